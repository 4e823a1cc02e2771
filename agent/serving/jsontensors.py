"""Tensors as JSON has them, and back: nested lists, numbers of whatever kind, bytes as text or as {"b64": ...}.

Used by the agent for small documents and by `parse_child` for the rest. Floats are written with as few digits as tell
them from their neighbours, so that who reads them gets the same bits.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from agent.errors import InvalidInput
from agent.model.signature import DType, Strings, Tensor
from agent.serving.tensorproto import MAX_ELEMENTS, MAX_RANK, MAX_STRINGS, TooLarge

B64 = "b64"
_PIECE = 16_384
"""Elements that are written at once: orjson keeps Python's lock for half a millisecond."""
_NOT_FINITE = (b"NaN", b"Infinity")


def read_json(data: bytes | memoryview) -> Any:
    """A document; NaN and Infinity are taken as TensorFlow Serving takes them. Raises InvalidInput."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        text = bytes(data)
        if any(word in text for word in _NOT_FINITE):
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                pass
        raise InvalidInput(f"is no JSON: {error}"[:200], field="request") from None


def read_tensor(
    value: Any, dtype: DType, where: str, *, most: int, strings: int, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Nested lists as a tensor of at most `most` bytes, or `strings` elements.

    `shape`: what it is to have; the values may come in one list then. Raises InvalidInput, TooLarge.
    """
    if shape is not None and (len(shape) > MAX_RANK or any(size < 0 for size in shape)):
        raise InvalidInput(f"has shape {list(shape)[:40]}", field=where, hint="a request states every size")
    if shape is not None and math.prod(max(1, size) for size in shape) >= MAX_ELEMENTS:
        raise InvalidInput(f"has shape {list(shape)}, more elements than there can be", field=where)
    if dtype is DType.STRING:
        tensor: Tensor = _strings(value, where, strings)
    else:
        tensor = _numbers(value, dtype, where, most)
    if shape is not None and tuple(tensor.shape) != shape:
        count, found = math.prod(shape), math.prod(tensor.shape)
        if count != found:
            raise InvalidInput(f"has {found} values; {dtype.value} {list(shape)} has {count}", field=where)
        tensor = Strings(shape, tensor.items) if isinstance(tensor, Strings) else tensor.reshape(shape)
    if tensor.nbytes > most:
        raise TooLarge(f"{dtype.value} {list(tensor.shape)} is larger than {most} bytes", field=where)
    return tensor


def _numbers(value: Any, dtype: DType, where: str, most: int) -> npt.NDArray[Any]:
    try:
        found = np.array(value)
    except (ValueError, OverflowError):
        raise _ragged(where) from None
    if found.size == 0:
        return np.empty(found.shape, dtype.numpy)
    if found.size * dtype.numpy.itemsize > most:
        raise TooLarge(f"{dtype.value} {list(found.shape)} is larger than {most} bytes", field=where)
    kind = found.dtype.kind
    wanted = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}[dtype.numpy.kind]
    if kind not in wanted:
        if kind == "O" or (kind == "f" and wanted == "iu"):
            raise _ragged(where) if kind == "O" else InvalidInput(f"has numbers that no {dtype.value} has", field=where)
        raise InvalidInput(f"has values that are not {dtype.value}", field=where)
    if wanted == "iu":
        limits = np.iinfo(dtype.value)
        if int(found.min()) < limits.min or int(found.max()) > limits.max:
            raise InvalidInput(f"has a value that {dtype.value} does not have", field=where)
        return found.astype(dtype.numpy)
    with np.errstate(over="ignore"):
        made = found.astype(dtype.numpy)
    if dtype.numpy.kind == "f" and bool((np.isinf(made) & ~np.isinf(found.astype(np.float64))).any()):
        raise InvalidInput(f"has a value that {dtype.value} does not have", field=where)
    return made


def _ragged(where: str) -> InvalidInput:
    return InvalidInput("is no tensor: lists of different lengths, or something that is no number", field=where)


def _strings(value: Any, where: str, most: int) -> Strings:
    shape: list[int] = []
    level = [value]
    while isinstance(level[0] if level else None, list):
        lengths = {len(one) if isinstance(one, list) else -1 for one in level}
        if len(lengths) != 1 or len(shape) == MAX_RANK:
            raise InvalidInput("is no tensor: lists of different lengths", field=where)
        shape.append(lengths.pop())
        level = [inner for one in level for inner in one]
        if len(level) > min(most, MAX_STRINGS):
            raise InvalidInput(f"has more than {most} elements; a request may have {MAX_STRINGS} strings", field=where)
    return Strings(tuple(shape), [_bytes(one, where) for one in level])


def _bytes(value: Any, where: str) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise InvalidInput("has a text that is no Unicode", field=where) from None
    if is_b64(value):
        try:
            return base64.b64decode(value[B64], validate=True)
        except (binascii.Error, ValueError):
            raise InvalidInput("has something else than base64 in b64", field=where) from None
    raise InvalidInput('has values that are no strings; bytes are written {"b64": "..."}', field=where)


def is_b64(value: Any) -> bool:
    """Whether this is how JSON has bytes."""
    return isinstance(value, dict) and list(value) == [B64] and isinstance(value[B64], str)


def write_tensor(tensor: Tensor, *, flat: bool = False) -> list[bytes]:
    """A tensor as JSON, in pieces; nested as its shape says, or `flat`."""
    if isinstance(tensor, Strings):
        return [_texts(tensor.items) if flat else _nested(tensor.items, tensor.shape)]
    array = np.ascontiguousarray(tensor)
    pieces: list[bytes] = []
    _write(array.reshape(-1) if flat else array.reshape(tensor.shape), pieces)
    return pieces


def _write(array: npt.NDArray[Any], pieces: list[bytes]) -> None:
    if array.size <= _PIECE or array.ndim == 0:
        pieces.append(_dumped(array))
        return
    pieces.append(b"[")
    if array.ndim == 1:
        starts = range(0, array.size, _PIECE)
        pieces += [(b"," if at else b"") + _dumped(array[at : at + _PIECE])[1:-1] for at in starts]
    else:
        rows = max(1, _PIECE // max(1, array.size // len(array)))
        for at in range(0, len(array), rows):
            if at:
                pieces.append(b",")
            if rows > 1:
                pieces.append(_dumped(array[at : at + rows])[1:-1])
            else:
                _write(array[at], pieces)
    pieces.append(b"]")


def _dumped(array: npt.NDArray[Any]) -> bytes:
    if array.ndim == 0:
        array = array.reshape(1)
        return _dumped(array)[1:-1]
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return json.dumps(array.tolist(), separators=(",", ":")).encode()  # NaN and Infinity by name
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)


def _nested(items: Sequence[bytes], shape: tuple[int, ...]) -> bytes:
    if not shape:
        return _text(items[0])
    if len(shape) == 1:
        return _texts(items)
    step = math.prod(shape[1:])
    rows = [_nested(items[index * step : (index + 1) * step], shape[1:]) for index in range(shape[0])]
    return b"[" + b",".join(rows) + b"]"


def _texts(items: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(map(_text, items)) + b"]"


def _text(item: bytes) -> bytes:
    try:
        return orjson.dumps(item.decode())
    except UnicodeDecodeError:
        return orjson.dumps({B64: base64.b64encode(item).decode()})


def write_name(name: str) -> bytes:
    """A member's name and its colon."""
    return orjson.dumps(name) + b":"
