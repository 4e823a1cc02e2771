"""PredictRequests as protobuf's own writers lay them out, read in place: large tensors are views, nothing is copied.

The generated class copies a tensor twice, which for a picture takes as long as all the rest of a request. This reader
takes only the plain shape: known fields in ascending order, each singular one once, packed values whose size is that of
the tensor, names in UTF-8 and unlike each other. It never judges: for anything else it says nothing, and the generated
class reads the message and tells what is wrong with it. Bounded, whatever the message holds.

Source: protobuf.dev, "Encoding"; tensorflow.proto.
"""

from __future__ import annotations

import math

import numpy as np

from agent.model.protowire import read_varint
from agent.model.signature import DType, Strings, Tensor
from agent.serving.tensorproto import FIELDS, MAX_NAME, MAX_RANK, MAX_TENSORS, Parsed

MAX_ITEMS = 64
"""Strings of one tensor."""
MAX_COPIED = 1 << 20
"""Bytes of strings, which are copied."""
MAX_FILTER = 32
_LENGTH_BYTES = 5

_DTYPES = {number: dtype for number, dtype, _ in FIELDS if dtype is not DType.BOOL}  # a bool's bytes must be looked at
_PACKED = {DType.FLOAT32: 0x2A, DType.FLOAT64: 0x32}
"""The tags of value lists that lie as an array does."""
_CONTENT, _STRING = 0x22, 0x42


def read_canonical(data: bytes | memoryview, *, most: int) -> Parsed | None:
    """The request, if it is of the plain shape and its tensors take at most `most` bytes; else None.

    Its numeric tensors are read-only views of `data`.
    """
    try:
        return _request(data, most)
    except (IndexError, ValueError):  # cut short, not UTF-8, not plain
        return None


def _request(data: bytes | memoryview, most: int) -> Parsed:
    model, version, signature = "", None, ""
    inputs: dict[str, Tensor] = {}
    outputs: list[str] = []
    at, end, before = 0, len(data), 0
    while at < end:
        tag = data[at]
        start, stop = span(data, at + 1, end)
        if tag == 0x0A and not before:
            model, version, signature = _model_spec(data, start, stop)
        elif tag == 0x12 and before <= tag and len(inputs) < MAX_TENSORS:
            name, tensor = _input(data, start, stop, most)
            if name in inputs:
                raise ValueError("the last one counts")
            most -= tensor.nbytes
            inputs[name] = tensor
        elif tag == 0x1A and len(outputs) < MAX_FILTER:
            outputs.append(name_at(data, start, stop))
        else:
            raise ValueError("another field")
        at, before = stop, tag
    return Parsed(inputs, model=model, version=version, signature=signature, outputs=tuple(outputs))


def _model_spec(data: bytes | memoryview, at: int, end: int) -> tuple[str, int | None, str]:
    name, version, signature = "", None, ""
    before = 0
    while at < end:
        tag = data[at]
        start, stop = span(data, at + 1, end)
        if tag <= before:
            raise ValueError("twice, or out of order")
        if tag == 0x0A:
            name = name_at(data, start, stop)
        elif tag == 0x12:
            version = _only_number(data, start, stop)
        elif tag == 0x1A:
            signature = name_at(data, start, stop)
        else:
            raise ValueError("another field")
        at, before = stop, tag
    return name, version, signature


def _input(data: bytes | memoryview, at: int, end: int, most: int) -> tuple[str, Tensor]:
    if data[at] != 0x0A:
        raise ValueError("no name")
    start, stop = span(data, at + 1, end)
    name = name_at(data, start, stop)
    if stop >= end or data[stop] != 0x12:
        raise ValueError("no tensor")
    start, stop = span(data, stop + 1, end)
    if stop != end:
        raise ValueError("something behind it")
    return name, _tensor(data, start, end, most)


def _tensor(data: bytes | memoryview, at: int, end: int, most: int) -> Tensor:
    if data[at] != 0x08:
        raise ValueError("no dtype")
    dtype = _DTYPES.get(data[at + 1])
    at += 2
    shape: tuple[int, ...] = ()
    if data[at] == 0x12:
        start, at = span(data, at + 1, end)
        shape = _shape(data, start, at)
    if dtype is None:
        raise ValueError("another dtype")
    if dtype is DType.STRING:
        return _strings(data, at, end, shape, most)
    if data[at] not in (_CONTENT, _PACKED.get(dtype)):
        raise ValueError("values of another kind")
    start, stop = span(data, at + 1, end)
    count = math.prod(shape)
    size = count * dtype.numpy.itemsize
    if stop != end or stop - start != size or not 0 < size <= most:
        raise ValueError("another size")
    return np.frombuffer(data, dtype.numpy, count, start).reshape(shape)


def _strings(data: bytes | memoryview, at: int, end: int, shape: tuple[int, ...], most: int) -> Strings:
    items: list[bytes] = []
    copied = 0
    while at < end:
        if data[at] != _STRING or len(items) == MAX_ITEMS:
            raise ValueError("another field, or too many")
        start, at = span(data, at + 1, end)
        copied += at - start
        if copied > MAX_COPIED:
            raise ValueError("too large to be copied here")
        items.append(bytes(data[start:at]))
    tensor = Strings(shape, items)
    if not items or len(items) != math.prod(shape) or tensor.nbytes > most:
        raise ValueError("another count")
    return tensor


def _shape(data: bytes | memoryview, at: int, end: int) -> tuple[int, ...]:
    sizes: list[int] = []
    while at < end:
        if data[at] != 0x12 or len(sizes) == MAX_RANK:
            raise ValueError("another field, or too many")
        start, at = span(data, at + 1, end)
        sizes.append(_only_number(data, start, at))
    return tuple(sizes)


def _only_number(data: bytes | memoryview, at: int, end: int) -> int:
    """A message with one number in its field 1, which is left out where it is 0. Negative ones are not for here."""
    if at == end:
        return 0
    if data[at] != 0x08:
        raise ValueError("another field")
    value, at = read_varint(data, at + 1)
    if at != end or value >= 1 << 63:
        raise ValueError("something behind it, or negative")
    return value


def name_at(data: bytes | memoryview, at: int, end: int) -> str:
    if end - at > MAX_NAME:
        raise ValueError("too long")
    return str(data[at:end], "utf-8")


def span(data: bytes | memoryview, at: int, end: int) -> tuple[int, int]:
    """Where the content begins whose length stands at `at`, and where it ends: inside its parent."""
    start = at
    size, at = read_varint(data, at)
    if size > end - at or at - start > _LENGTH_BYTES:
        raise ValueError("a length beyond its parent, or longer than protobuf takes")
    return at, at + size
