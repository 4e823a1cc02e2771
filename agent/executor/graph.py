"""What an ONNX file says of its inputs and outputs, without loading it: a slot's graph need not run on the CPU.

Reads the protocol buffer's own encoding, for that is all that is needed of it: ModelProto.graph (7); GraphProto
initializer (5), input (11), output (12); ValueInfoProto name (1), type (2), with the numbers of onnx.proto3. Weights
are skipped, not read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from agent.errors import InvalidModel
from agent.model.protowire import read_varint
from agent.model.signature import DType, TensorSpec

_Bytes: TypeAlias = memoryview
_ELEMENTS = {
    1: DType.FLOAT32,
    2: DType.UINT8,
    3: DType.INT8,
    4: DType.UINT16,
    5: DType.INT16,
    6: DType.INT32,
    7: DType.INT64,
    8: DType.STRING,
    9: DType.BOOL,
    10: DType.FLOAT16,
    11: DType.FLOAT64,
    12: DType.UINT32,
    13: DType.UINT64,
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_graph(path: Path) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """(inputs, outputs) of the graph in a file; dynamic sizes are -1. Raises InvalidModel naming the file."""
    try:
        with path.open("rb") as file:
            return _graph(memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)))
    except (OSError, ValueError, IndexError) as error:
        raise InvalidModel(f"is not an ONNX graph: {error}", field=path.name) from None


def has_external_weights(path: Path) -> bool:
    """Whether a graph's weights lie in files beside it (TensorProto.data_location, 14). Raises InvalidModel."""
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        graph = _message(data, 7)
        return any(
            field == 14 and where == 1
            for number, tensor in _fields(graph)
            if number == 5 and isinstance(tensor, memoryview)
            for field, where in _fields(tensor)
        )
    except (OSError, ValueError, IndexError) as error:
        raise InvalidModel(f"is not an ONNX graph: {error}", field=path.name) from None


def _graph(data: _Bytes) -> tuple[list[TensorSpec], list[TensorSpec]]:
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    constants: set[str] = set()
    found = False
    for number, graph in _fields(data):
        if number != 7 or not isinstance(graph, memoryview):
            continue
        found = True
        for inner, value in _fields(graph):
            if not isinstance(value, memoryview):
                continue
            if inner == 5:
                constants.add(_text(value, 8))
            elif inner == 11:
                inputs.append(_value_info(value))
            elif inner == 12:
                outputs.append(_value_info(value))
    if not found:
        raise ValueError("it has no graph")
    return [spec for spec in inputs if spec.name not in constants], outputs


def _value_info(data: _Bytes) -> TensorSpec:
    name = _text(data, 1)
    tensor = _message(_message(data, 2), 1)
    element = next((value for number, value in _fields(tensor) if number == 1), 0)
    dtype = _ELEMENTS.get(element) if isinstance(element, int) else None
    if dtype is None:
        raise ValueError(f"{name!r} has an element type that slotd does not carry")
    shape: list[int] = []
    for number, value in _fields(_message(tensor, 2)):
        if number == 1 and isinstance(value, memoryview):
            size = next((size for place, size in _fields(value) if place == 1), -1)
            shape.append(size if isinstance(size, int) and 0 <= size < 1 << 63 else -1)
    return TensorSpec(name, dtype, tuple(shape))


def _message(data: _Bytes, wanted: int) -> _Bytes:
    for number, value in _fields(data):
        if number == wanted and isinstance(value, memoryview):
            return value
    return data[:0]


def _text(data: _Bytes, wanted: int) -> str:
    return bytes(_message(data, wanted)).decode()


def _fields(data: _Bytes) -> Iterator[tuple[int, int | _Bytes]]:
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        kind = tag & 7
        value: int | _Bytes
        if kind == _VARINT:
            value, at = read_varint(data, at)
        else:
            if kind == _BYTES:
                size, at = read_varint(data, at)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"wire type {kind}")
            if size > len(data) - at:
                raise ValueError("it is cut short")
            value = data[at : at + size]
            at += size
        yield tag >> 3, value
