"""tensorflow.TensorProto and PredictRequest, read into what slotd knows: named tensors, checked before they are made.

The generated protobuf class does the parsing; nothing here reads wire bytes. Used by the agent for small messages and
by `parse_child` for the rest, so it imports neither gRPC nor the dataplane.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.errors import InvalidInput
from agent.model.signature import DType, Strings, Tensor
from agent.serving.protos import DataType, PredictRequest, parse

MAX_TENSORS = 32
MAX_OUTPUTS = 256
MAX_RANK = 32
MAX_NAME = 1024
MAX_ELEMENTS = 1 << 40
"""Of a shape, zeros taken for ones: numpy knows no larger ones, whatever they hold."""
MAX_STRINGS = 16_384
"""Elements of all string tensors of one request."""

# The dtypes that slotd carries: number on the wire, dtype, and the field that holds its values one by one.
FIELDS: tuple[tuple[int, DType, str], ...] = (
    (1, DType.FLOAT32, "float_val"),
    (2, DType.FLOAT64, "double_val"),
    (3, DType.INT32, "int_val"),
    (4, DType.UINT8, "int_val"),
    (5, DType.INT16, "int_val"),
    (6, DType.INT8, "int_val"),
    (7, DType.STRING, "string_val"),
    (9, DType.INT64, "int64_val"),
    (10, DType.BOOL, "bool_val"),
    (17, DType.UINT16, "int_val"),
    (19, DType.FLOAT16, "half_val"),
    (22, DType.UINT32, "uint32_val"),
    (23, DType.UINT64, "uint64_val"),
)
_BY_NUMBER = {number: (dtype, field) for number, dtype, field in FIELDS}


class TooLarge(InvalidInput):
    """A tensor that would be larger than the caller allows."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """One request. `version` and `label` are None where the client sent none."""

    inputs: dict[str, Tensor]
    model: str = ""
    version: int | None = None
    label: str | None = None
    signature: str = ""
    outputs: tuple[str, ...] = ()
    id: str = ""
    """What the client calls the request; its answer has it too."""
    rows: bool = False
    """It came row by row, and its answer goes so."""
    binary: Mapping[str, bool] = field(default_factory=dict)
    """Which outputs go out as bytes behind a JSON document; "" stands for those that are not named."""


def read_request(data: bytes | memoryview, *, most: int) -> Parsed:
    """A PredictRequest from wire bytes; its tensors may take `most` bytes together.

    Raises InvalidInput naming the tensor, TooLarge if only `most` stands against it, Overloaded if memory does.
    """
    request = parse(PredictRequest, data)
    if len(request.inputs) > MAX_TENSORS:
        raise InvalidInput(f"has {len(request.inputs)} tensors; at most {MAX_TENSORS} are taken", field="inputs")
    if len(request.output_filter) > MAX_OUTPUTS:
        raise InvalidInput(
            f"has {len(request.output_filter)} names; at most {MAX_OUTPUTS} are taken", field="output_filter"
        )
    spec = request.model_spec
    choice = spec.WhichOneof("version_choice")
    names = (*request.inputs, *request.output_filter, spec.name, spec.version_label, spec.signature_name)
    for name in names:
        if len(name) > MAX_NAME:
            raise InvalidInput(f"a name of {len(name)} characters; at most {MAX_NAME} are taken", field=short(name))
    inputs: dict[str, Tensor] = {}
    strings = 0
    for name, proto in request.inputs.items():
        tensor = read_tensor(name, proto, most=most, strings=MAX_STRINGS - strings)
        most -= tensor.nbytes
        strings += len(tensor.items) if isinstance(tensor, Strings) else 0
        inputs[name] = tensor
    return Parsed(
        inputs,
        model=spec.name,
        version=spec.version.value if choice == "version" else None,
        label=spec.version_label if choice == "version_label" else None,
        signature=spec.signature_name,
        outputs=tuple(request.output_filter),
    )


def read_tensor(name: str, proto: Any, *, most: int, strings: int = MAX_STRINGS) -> Tensor:
    """A TensorProto as a tensor of at most `most` bytes, or of `strings` elements. Raises InvalidInput, TooLarge."""
    where = short(name)
    known = _BY_NUMBER.get(proto.dtype)
    if known is None:
        raise InvalidInput(f"has dtype {_dtype_name(proto.dtype)}, which slotd does not carry", field=where)
    dtype, field = known
    shape = _shape(proto.tensor_shape, where)
    values = getattr(proto, field)
    if dtype is DType.STRING:
        return _strings(shape, proto, values, most=most, strings=strings, where=where)
    count = math.prod(shape)
    size = math.prod(max(1, length) for length in shape) * dtype.numpy.itemsize
    if size > most:
        raise TooLarge(f"{dtype.value} {list(shape)} is larger than {most} bytes", field=where)
    content = proto.tensor_content
    if content:
        if len(values):
            raise InvalidInput(f"has both tensor_content and {field}", field=where)
        if len(content) != size or not count:
            raise InvalidInput(
                f"has {len(content)} bytes of tensor_content; {dtype.value} {list(shape)} has {size if count else 0}",
                field=where,
            )
        return checked(np.frombuffer(content, stored(dtype)), dtype, where).reshape(shape)
    if len(values) not in (count, 1):
        raise InvalidInput(_miscount(proto, field, len(values), dtype, shape, count), field=where)
    array = checked(np.array(values), dtype, where)
    return np.full(shape, array[0]) if len(values) != count else array.reshape(shape)


def short(name: str) -> str:
    """A name as a message shows it."""
    if len(name) > 100:
        return name[:100] + "…"
    return name or "(empty name)"


def _shape(proto: Any, where: str) -> tuple[int, ...]:
    if proto.unknown_rank:
        raise InvalidInput("has a shape of unknown rank", field=where, hint="a request states every size")
    if len(proto.dim) > MAX_RANK:
        raise InvalidInput(f"has {len(proto.dim)} dimensions; at most {MAX_RANK} are taken", field=where)
    shape = tuple(dim.size for dim in proto.dim)
    if any(size < 0 for size in shape):
        raise InvalidInput(f"has shape {list(shape)}", field=where, hint="a request states every size")
    return shape


def _strings(shape: tuple[int, ...], proto: Any, values: Any, *, most: int, strings: int, where: str) -> Strings:
    if proto.tensor_content:
        raise InvalidInput("has tensor_content; strings come in string_val", field=where)
    count = math.prod(shape)
    if max(count, len(values)) > strings:
        raise InvalidInput(
            f"has {max(count, len(values))} elements; a request may have {MAX_STRINGS} strings", field=where
        )
    if math.prod(max(1, size) for size in shape) >= MAX_ELEMENTS:
        raise InvalidInput(f"has shape {list(shape)}, more elements than there can be", field=where)
    if len(values) not in (count, 1):
        raise InvalidInput(_miscount(proto, "string_val", len(values), DType.STRING, shape, count), field=where)
    if len(values) == count:
        tensor = Strings(shape, list(values))
        if tensor.nbytes <= most:
            return tensor
    elif (4 + len(values[0])) * count <= most:
        return Strings(shape, [values[0]] * count)
    raise TooLarge(f"string {list(shape)} is larger than {most} bytes", field=where)


def stored(dtype: DType) -> npt.DTypeLike:
    """What tensor_content and the value lists hold."""
    return np.uint8 if dtype is DType.BOOL else dtype.numpy


def checked(values: npt.NDArray[Any], dtype: DType, where: str) -> npt.NDArray[Any]:
    """Values as they were stored, as the dtype they stand for; values that it does not have are refused."""
    if values.dtype == dtype.numpy or not values.size:
        return values.astype(dtype.numpy, copy=False)
    if dtype is DType.BOOL:
        if values.max() > 1:
            raise InvalidInput("has a bool that is neither 0 nor 1", field=where)
        return values.view(np.bool_)
    stored: np.dtype[Any] = np.dtype(np.uint16) if dtype is DType.FLOAT16 else dtype.numpy
    limits = np.iinfo(stored)
    if values.min() < limits.min or values.max() > limits.max:
        raise InvalidInput(f"has a value that {dtype.value} does not have", field=where)
    return values.astype(stored).view(dtype.numpy)


def _miscount(proto: Any, field: str, found: int, dtype: DType, shape: tuple[int, ...], count: int) -> str:
    text = f"has {found} values in {field}; {dtype.value} {list(shape)} has {count}"
    others = [entry.name for entry, _ in proto.ListFields() if entry.name.endswith("_val") and entry.name != field]
    return f"{text} (it has {', '.join(others)})" if others else text


def _dtype_name(number: int) -> str:
    known = DataType.values_by_number.get(number)
    return known.name if known else str(number)
