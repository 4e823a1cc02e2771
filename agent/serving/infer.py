"""inference.ModelInferRequest, read into what slotd knows, and the reply's bytes.

The generated protobuf class does the parsing; what clients really send is read in place by `read_plain_infer`. Tensors
come raw, or one by one in the field of their datatype; they always go out raw, as Triton's do.

Source: KServe's Open Inference Protocol, "gRPC" and "Tensor Data"; grpc_predict_v2.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from agent.errors import InvalidInput, NotFound, Unimplemented
from agent.model.protowire import read_varint
from agent.model.signature import DType, Strings, Tensor, dtype_of
from agent.serving.canonical import MAX_COPIED, MAX_FILTER, MAX_ITEMS, name_at, span
from agent.serving.encode import Parts, delimited, put_together, varint
from agent.serving.protos import ModelInferRequest, parse
from agent.serving.tensorproto import (
    MAX_ELEMENTS,
    MAX_NAME,
    MAX_OUTPUTS,
    MAX_RANK,
    MAX_STRINGS,
    MAX_TENSORS,
    Parsed,
    TooLarge,
    checked,
    short,
    stored,
)

# Each dtype's name here, and the field that holds its values one by one; FP16 has none.
_DATATYPES: tuple[tuple[DType, str, str], ...] = (
    (DType.BOOL, "BOOL", "bool_contents"),
    (DType.INT8, "INT8", "int_contents"),
    (DType.INT16, "INT16", "int_contents"),
    (DType.INT32, "INT32", "int_contents"),
    (DType.INT64, "INT64", "int64_contents"),
    (DType.UINT8, "UINT8", "uint_contents"),
    (DType.UINT16, "UINT16", "uint_contents"),
    (DType.UINT32, "UINT32", "uint_contents"),
    (DType.UINT64, "UINT64", "uint64_contents"),
    (DType.FLOAT16, "FP16", ""),
    (DType.FLOAT32, "FP32", "fp32_contents"),
    (DType.FLOAT64, "FP64", "fp64_contents"),
    (DType.STRING, "BYTES", "bytes_contents"),
)
DATATYPES = {dtype: name for dtype, name, _ in _DATATYPES}
BY_NAME = {name: (dtype, field) for dtype, name, field in _DATATYPES}
_SHARED = "shared_memory_region"
_LENGTH = struct.Struct("<I")
_VERSION_DIGITS = 18


def read_infer(data: bytes | memoryview, *, most: int) -> Parsed:
    """A ModelInferRequest from wire bytes; its tensors may take `most` bytes together.

    Raises InvalidInput naming the tensor, TooLarge if only `most` stands against it, Overloaded if memory does,
    NotFound for a version that is no number, Unimplemented for what is not served.
    """
    request = parse(ModelInferRequest, data)
    _bounded(request)
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(
            f"has {len(raw)} entries for {len(request.inputs)} inputs",
            field="raw_input_contents",
            hint="send all inputs raw, or none",
        )
    inputs: dict[str, Tensor] = {}
    strings = 0
    for index, proto in enumerate(request.inputs):
        if proto.name in inputs:
            raise InvalidInput("is given twice", field=short(proto.name))
        tensor = _tensor(proto, raw[index] if raw else None, most=most, strings=MAX_STRINGS - strings)
        most -= tensor.nbytes
        strings += len(tensor.items) if isinstance(tensor, Strings) else 0
        inputs[proto.name] = tensor
    outputs = tuple(_wanted(proto) for proto in request.outputs)
    if len(set(outputs)) != len(outputs):
        raise InvalidInput("an output is asked for twice", field="outputs")
    return Parsed(
        inputs, model=request.model_name, version=version_of(request.model_version), outputs=outputs, id=request.id
    )


def version_of(text: str) -> int | None:
    """A version as KServe writes it; empty is any. Raises NotFound for one that is no number."""
    if not text:
        return None
    if len(text) > _VERSION_DIGITS or not (text.isascii() and text.isdigit()):
        raise NotFound(
            f"no version {short(text)!r} is served", field="model_version", hint="versions are numbers, such as 1"
        )
    return int(text)


def read_plain_infer(data: bytes | memoryview, *, most: int) -> Parsed | None:
    """The request, if all its tensors are raw, it is laid out as protobuf's own writers do it, without parameters, and
    takes at most `most` bytes; else None.

    Its numeric tensors are read-only views of `data`. Bounded, whatever the message holds; it never judges.
    """
    try:
        return _plain(data, most)
    except (IndexError, ValueError, NotFound):
        return None


def encode_infer(outputs: Mapping[str, Tensor], *, name: str, version: int, id: str, most: int) -> bytes | memoryview:
    """A ModelInferResponse of at most `most` bytes. Raises Overloaded if it would be larger.

    A large one is put together without Python's lock.
    """
    head = delimited(b"\x0a", name.encode()) + delimited(b"\x12", str(version).encode())
    parts: Parts = [head + delimited(b"\x1a", id.encode()) if id else head]
    raw: Parts = []
    for output, tensor in outputs.items():
        parts.append(_output_head(output, dtype_of(tensor), tuple(tensor.shape)))
        if isinstance(tensor, Strings):
            body: Parts = [piece for item in tensor.items for piece in (_LENGTH.pack(len(item)), item)]
        else:
            body = [np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data] if tensor.size else []
        raw += (b"\x32" + varint(sum(map(len, body))), *body)
    return put_together([*parts, *raw], most)


# --- by the generated class -------------------------------------------------------------------------------------------


def _bounded(request: Any) -> None:
    for field, most in (("inputs", MAX_TENSORS), ("outputs", MAX_OUTPUTS)):
        if (found := len(getattr(request, field))) > most:
            raise InvalidInput(f"has {found} tensors; at most {most} are taken", field=field)
    names: Iterable[str] = (
        *(proto.name for proto in (*request.inputs, *request.outputs)),
        request.model_name,
        request.model_version,
        request.id,
    )
    for name in names:
        if len(name) > MAX_NAME:
            raise InvalidInput(f"a name of {len(name)} characters; at most {MAX_NAME} are taken", field=short(name))


def _wanted(proto: Any) -> str:
    _no_shared_memory(proto)
    if "classification" in proto.parameters:
        raise Unimplemented("classification of outputs is not offered", field=short(proto.name))
    return str(proto.name)


def _no_shared_memory(proto: Any) -> None:
    if _SHARED in proto.parameters:
        raise Unimplemented("shared memory is not offered", field=short(proto.name), hint="send the tensor inline")


def _tensor(proto: Any, raw: bytes | None, *, most: int, strings: int) -> Tensor:
    where = short(proto.name)
    _no_shared_memory(proto)
    known = BY_NAME.get(proto.datatype)
    if known is None:
        raise InvalidInput(
            f"has datatype {short(proto.datatype)!r}, which slotd does not carry",
            field=where,
            hint=f"one of {', '.join(BY_NAME)}",
        )
    dtype, field = known
    shape, count = tuple(proto.shape), math.prod(proto.shape)
    filled = [entry.name for entry, _ in proto.contents.ListFields()]
    if raw is not None and filled:
        raise InvalidInput(f"comes raw and in {filled[0]}", field=where, hint="send it once")
    if raw is not None:
        return raw_tensor(raw, dtype, shape, where, most=most, strings=strings)
    check_size(dtype, shape, where, most=most, strings=strings)
    if dtype is DType.STRING:
        items = list(proto.contents.bytes_contents)
        _counted(proto, filled, field, len(items), count)
        return _bounded_strings(Strings(shape, items), where, most)
    if not field:
        raise InvalidInput(f"{proto.datatype} comes in raw_input_contents only", field=where)
    values = getattr(proto.contents, field)
    _counted(proto, filled, field, len(values), count)
    return checked(np.array(values), dtype, where).reshape(shape)


def raw_tensor(
    raw: bytes | memoryview, dtype: DType, shape: tuple[int, ...], where: str, *, most: int, strings: int
) -> Tensor:
    """A tensor of at most `most` bytes, or `strings` elements, from its bytes as they lie in memory; BYTES as a length
    before each. Raises InvalidInput, TooLarge."""
    size = check_size(dtype, shape, where, most=most, strings=strings)
    if dtype is DType.STRING:
        return _bounded_strings(Strings(shape, raw_strings(raw, math.prod(shape), where)), where, most)
    if len(raw) != size:
        raise InvalidInput(f"has {len(raw)} raw bytes; {DATATYPES[dtype]} {list(shape)} has {size}", field=where)
    return checked(np.frombuffer(raw, stored(dtype)), dtype, where).reshape(shape)


def check_size(dtype: DType, shape: tuple[int, ...], where: str, *, most: int, strings: int) -> int:
    """The bytes of such a tensor, if its elements have a size. Raises InvalidInput, TooLarge."""
    if len(shape) > MAX_RANK:
        raise InvalidInput(f"has {len(shape)} dimensions; at most {MAX_RANK} are taken", field=where)
    if any(size < 0 for size in shape):
        raise InvalidInput(f"has shape {list(shape)}", field=where, hint="a request states every size")
    if any(size >= MAX_ELEMENTS for size in shape):
        raise InvalidInput("has a shape of more elements than there can be", field=where)
    count, most_elements = math.prod(shape), math.prod(max(1, size) for size in shape)
    if dtype is DType.STRING:
        if most_elements >= MAX_ELEMENTS:
            raise InvalidInput(f"has shape {list(shape)}, more elements than there can be", field=where)
        if count > strings:
            raise InvalidInput(f"has {count} elements; a request may have {MAX_STRINGS} strings", field=where)
        return 0
    if most_elements * dtype.numpy.itemsize > most:
        raise TooLarge(f"{DATATYPES[dtype]} {list(shape)} is larger than {most} bytes", field=where)
    return count * dtype.numpy.itemsize


def _bounded_strings(tensor: Strings, where: str, most: int) -> Strings:
    if tensor.nbytes > most:
        raise TooLarge(f"BYTES {list(tensor.shape)} is larger than {most} bytes", field=where)
    return tensor


def _counted(proto: Any, filled: list[str], field: str, found: int, count: int) -> None:
    if found != count or any(name != field for name in filled):
        others = [name for name in filled if name != field]
        text = f"has {found} values in {field}; {proto.datatype} {list(proto.shape)} has {count}"
        raise InvalidInput(f"{text} (it has {', '.join(others)})" if others else text, field=short(proto.name))


def raw_strings(raw: bytes | memoryview, count: int, where: str) -> list[bytes]:
    items: list[bytes] = []
    at, end = 0, len(raw)
    while at < end and len(items) < count:
        if end - at < _LENGTH.size:
            break
        (size,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if size > end - at:
            at = end + 1
            break
        items.append(bytes(raw[at : at + size]))
        at += size
    if at != end or len(items) != count:
        raise InvalidInput(
            f"its raw bytes are not {count} strings",
            field=where,
            hint="each is its length as four bytes, the lowest first, and its bytes",
        )
    return items


# --- in place ---------------------------------------------------------------------------------------------------------


def _plain(data: bytes | memoryview, most: int) -> Parsed:
    model = version = id = ""
    heads: list[tuple[str, DType, tuple[int, ...]]] = []
    outputs: list[str] = []
    inputs: dict[str, Tensor] = {}
    at, end, before = 0, len(data), 0
    while at < end:
        tag = data[at]
        start, stop = span(data, at + 1, end)
        if tag < before or (tag == before and tag < 0x2A):
            raise ValueError("out of order, or twice")
        if tag == 0x0A:
            model = name_at(data, start, stop)
        elif tag == 0x12:
            version = name_at(data, start, stop)
        elif tag == 0x1A:
            id = name_at(data, start, stop)
        elif tag == 0x2A and len(heads) < MAX_TENSORS:
            heads.append(_head(data, start, stop))
        elif tag == 0x32 and len(outputs) < MAX_FILTER:
            outputs.append(_only_name(data, start, stop))
        elif tag == 0x3A and len(inputs) < len(heads):
            name, dtype, shape = heads[len(inputs)]
            tensor = _raw(data, start, stop, dtype, shape)
            most -= tensor.nbytes
            if name in inputs or most < 0:
                raise ValueError("twice, or too large")
            inputs[name] = tensor
        else:
            raise ValueError("another field")
        at, before = stop, tag
    if len(inputs) != len(heads) or len(set(outputs)) != len(outputs):
        raise ValueError("not all are raw, or an output is asked for twice")
    return Parsed(inputs, model=model, version=version_of(version), outputs=tuple(outputs), id=id)


def _head(data: bytes | memoryview, at: int, end: int) -> tuple[str, DType, tuple[int, ...]]:
    """Of an input: its name, its datatype and its shape."""
    name = datatype = ""
    shape: list[int] = []
    before = 0
    while at < end:
        tag = data[at]
        start, at = span(data, at + 1, end)
        if tag <= before:
            raise ValueError("out of order, or twice")
        if tag == 0x0A:
            name = name_at(data, start, at)
        elif tag == 0x12:
            datatype = name_at(data, start, at)
        elif tag == 0x1A:
            while start < at:
                size, start = read_varint(data, start)
                if size >= 1 << 63 or len(shape) == MAX_RANK:
                    raise ValueError("negative, or too many")
                shape.append(size)
            if start != at:
                raise ValueError("a number beyond its list")
        else:
            raise ValueError("another field")
        before = tag
    dtype = BY_NAME[datatype][0] if datatype in BY_NAME else None
    if dtype is None or dtype is DType.BOOL:  # a bool's bytes must be looked at
        raise ValueError("another datatype")
    return name, dtype, tuple(shape)


def _only_name(data: bytes | memoryview, at: int, end: int) -> str:
    if at == end:
        return ""
    start, stop = span(data, at + 1, end)
    if data[at] != 0x0A or stop != end:
        raise ValueError("parameters")
    return name_at(data, start, stop)


def _raw(data: bytes | memoryview, start: int, stop: int, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if dtype is DType.STRING:
        if math.prod(max(1, size) for size in shape) >= MAX_ELEMENTS:
            raise ValueError("a shape that none can have")
        if count > MAX_ITEMS or stop - start > MAX_COPIED:
            raise ValueError("too many to be copied here")
        try:
            return Strings(shape, raw_strings(data[start:stop], count, ""))
        except InvalidInput:
            raise ValueError("no strings") from None
    if stop - start != count * dtype.numpy.itemsize or not count:
        raise ValueError("another size")
    return np.frombuffer(data, dtype.numpy, count, start).reshape(shape)


@lru_cache(maxsize=256)
def _output_head(name: str, dtype: DType, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(map(varint, shape))
    head = delimited(b"\x0a", name.encode()) + delimited(b"\x12", DATATYPES[dtype].encode())
    return delimited(b"\x2a", head + delimited(b"\x1a", dims) if dims else head)
