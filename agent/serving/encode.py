"""A PredictResponse as wire bytes, written around the outputs' memory with one copy.

TensorFlow Serving answers in the typed fields and many clients read nothing else, so we do too. Numbers of fixed width
and booleans go out as they lie in memory; the rest is written as varints.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.errors import Overloaded
from agent.model.signature import DType, Strings, Tensor, dtype_of

SIGNATURE_NAME = "serving_default"

Parts = list[bytes | memoryview]
_JOINED = 1 << 20
"""Bytes of a reply up to which joining it keeps Python's lock for well under a millisecond."""

# dtype: number on the wire, tag of its packed list
_PACKED = {
    DType.FLOAT32: (1, b"\x2a"),
    DType.FLOAT64: (2, b"\x32"),
    DType.INT32: (3, b"\x3a"),
    DType.UINT8: (4, b"\x3a"),
    DType.INT16: (5, b"\x3a"),
    DType.INT8: (6, b"\x3a"),
    DType.STRING: (7, b"\x42"),
    DType.INT64: (9, b"\x52"),
    DType.BOOL: (10, b"\x5a"),
    DType.UINT16: (17, b"\x3a"),
    DType.FLOAT16: (19, b"\x6a"),
    DType.UINT32: (22, b"\x82\x01"),
    DType.UINT64: (23, b"\x8a\x01"),
}
_AS_IT_LIES = (DType.FLOAT32, DType.FLOAT64, DType.BOOL)


def encode_response(outputs: Mapping[str, Tensor], *, name: str, version: int, most: int) -> bytes | memoryview:
    """A PredictResponse of at most `most` bytes. Raises Overloaded if it would be larger."""
    parts: Parts = []
    for output, tensor in outputs.items():
        body, size = encode_tensor(tensor)
        key = delimited(b"\x0a", output.encode())
        head = key + b"\x12" + varint(size)
        parts += (b"\x0a" + varint(len(head) + size) + head, *body)
    spec = delimited(b"\x0a", name.encode()) + delimited(b"\x12", b"\x08" + varint(version) if version else b"")
    parts.append(delimited(b"\x12", spec + delimited(b"\x1a", SIGNATURE_NAME.encode())))
    return put_together(parts, most)


def put_together(parts: Parts, most: int) -> bytes | memoryview:
    """A reply of at most `most` bytes. Raises Overloaded if it would be larger.

    A large one is copied without Python's lock.
    """
    total = sum(map(len, parts))
    if total > most:
        raise Overloaded(
            f"the reply has {total} bytes; at most {most} are sent",
            hint="name the outputs that you need, or send a smaller batch",
        )
    if total <= _JOINED:
        return b"".join(parts)
    whole = np.empty(total, np.uint8)
    at = 0
    for part in parts:
        np.copyto(whole[at : at + len(part)], np.frombuffer(part, np.uint8))
        at += len(part)
    return whole.data


def encode_tensor(tensor: Tensor) -> tuple[Parts, int]:
    """A TensorProto in parts, and its length. The parts are views of the tensor's memory where that is possible."""
    dtype = dtype_of(tensor)
    number, tag = _PACKED[dtype]
    head = _head(number, tuple(tensor.shape))
    if isinstance(tensor, Strings):
        parts: Parts = [head]
        for item in tensor.items:
            parts += (tag + varint(len(item)), item)
        return parts, sum(map(len, parts))
    if not tensor.size:
        return [head], len(head)
    flat = np.ascontiguousarray(tensor).reshape(-1)
    body = flat.view(np.uint8).data if dtype in _AS_IT_LIES else packed_varints(flat)
    head += tag + varint(len(body))
    return [head, body], len(head) + len(body)


def varint(value: int) -> bytes:
    """One number as protobuf writes it; negative ones in 64-bit two's complement."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    if value < 0x80:
        return value.to_bytes()
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def packed_varints(values: npt.NDArray[Any]) -> bytes:
    """Numbers one after the other as varints; float16 as the bits it is made of."""
    if values.dtype == np.float16:
        values = values.view(np.uint16)
    rest = values.astype(np.int64).view(np.uint64) if values.dtype.kind == "i" else values.astype(np.uint64)
    lengths = np.ones(len(rest), np.int64)
    for bits in range(7, 64, 7):
        longer = rest >= np.uint64(1 << bits)
        if not longer.any():
            break
        lengths += longer
    ends = np.cumsum(lengths)
    written = np.empty(int(ends[-1]), np.uint8)
    for index in range(int(lengths.max())):
        here = lengths > index
        more = (lengths[here] > index + 1).astype(np.uint8) << 7
        written[(ends - lengths)[here] + index] = ((rest[here] >> np.uint64(7 * index)) & np.uint64(0x7F)) | more
    return written.tobytes()


@lru_cache(maxsize=256)
def _head(number: int, shape: tuple[int, ...]) -> bytes:
    """dtype and tensor_shape."""
    dims = b"".join(delimited(b"\x12", b"\x08" + varint(size) if size else b"") for size in shape)
    return b"\x08" + varint(number) + delimited(b"\x12", dims)


def delimited(tag: bytes, content: bytes) -> bytes:
    """A field of bytes, as protobuf writes it."""
    return tag + varint(len(content)) + content
