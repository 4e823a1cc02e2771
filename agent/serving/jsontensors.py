"""Tensors as JSON has them, and back: nested lists, numbers of whatever kind, bytes as text or as {"b64": ...}.

Used by the agent for small documents and by `parse_child` for the rest. Floats are written so that who reads them gets
the same bits.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from agent.errors import InvalidInput
from agent.model.signature import DType, Strings, Tensor
from agent.serving.infer import check_size
from agent.serving.tensorproto import MAX_RANK, MAX_STRINGS, TooLarge

B64 = "b64"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SLOW_PIECE = 512
_PIECE = 16_384
"""Elements that are written at once: orjson keeps Python's lock for half a millisecond."""
_KINDS: dict[str, tuple[type, ...]] = {"f": (int, float), "i": (int,), "u": (int,), "b": (bool,)}
_NOT_FINITE = (b"NaN", b"Infinity")


def read_json(data: bytes | memoryview) -> Any:
    """A document; NaN and Infinity are taken as TensorFlow Serving takes them. Raises InvalidInput."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        text = bytes(data)
        if any(word in text for word in _NOT_FINITE) and not _SURROGATE.search(text):
            try:
                return json.loads(text.decode())
            except (ValueError, RecursionError):
                pass
        raise InvalidInput(f"is no JSON: {error}"[:200], field="request") from None


def read_tensor(
    value: Any, dtype: DType, where: str, *, most: int, strings: int, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Nested lists as a tensor of at most `most` bytes, or `strings` elements.

    `shape`: what it is to have; the values are nested so, or come in one list. Raises InvalidInput, TooLarge.
    """
    found, leaves = _flattened(value, where, most)
    if shape is None:
        shape = found
    elif shape != found and len(found) != 1 and leaves:
        raise InvalidInput(f"its lists have the shape {list(found)}, not {list(shape)}", field=where)
    check_size(dtype, shape, where, most=most, strings=min(strings, MAX_STRINGS))
    if math.prod(shape) != len(leaves):
        raise InvalidInput(f"has {len(leaves)} values; {dtype.value} {list(shape)} has {math.prod(shape)}", field=where)
    if dtype is not DType.STRING:
        return _numbers(leaves, dtype, where).reshape(shape)
    tensor = Strings(shape, [_bytes(one, where) for one in leaves])
    if tensor.nbytes > most:
        raise TooLarge(f"string {list(shape)} is larger than {most} bytes", field=where)
    return tensor


def _flattened(value: Any, where: str, most: int) -> tuple[tuple[int, ...], list[Any]]:
    """The shape of nested lists, and what they hold in one; a level at a time, without a step for each element."""
    shape: list[int] = []
    level = [value]
    while level and isinstance(level[0], list):
        if set(map(type, level)) != {list} or len(lengths := set(map(len, level))) != 1:
            raise InvalidInput("is no tensor: lists of different lengths", field=where)
        shape.append(lengths.pop())
        if len(shape) > MAX_RANK:
            raise InvalidInput(f"has more than {MAX_RANK} dimensions", field=where)
        if len(level) * shape[-1] > most:
            raise TooLarge(f"{shape} is larger than {most} bytes", field=where)
        level = list(chain.from_iterable(level))
    return tuple(shape), level


def _numbers(leaves: list[Any], dtype: DType, where: str) -> npt.NDArray[Any]:
    """Of just the kinds that it may hold: numpy would make something of texts, of None and of true, too."""
    kinds = set(map(type, leaves))
    kind = dtype.numpy.kind
    if not kinds <= set(_KINDS[kind]):
        if kinds <= {int, float}:
            raise InvalidInput(f"has numbers that no {dtype.value} has", field=where)
        raise InvalidInput(f"has values that are not {dtype.value}", field=where)
    wide: npt.DTypeLike = {"f": np.float64, "i": np.int64, "u": np.uint64, "b": np.bool_}[kind]
    try:
        found = np.array(leaves, wide)
    except OverflowError:
        raise _unfit(dtype, where) from None
    if kind in "iu" and found.size:
        limits = np.iinfo(dtype.value)
        if int(found.min()) < limits.min or int(found.max()) > limits.max:
            raise _unfit(dtype, where)
    with np.errstate(over="ignore"):
        made = found.astype(dtype.numpy, copy=False)
    if kind == "f" and bool((np.isinf(made) & ~np.isinf(found)).any()):
        raise _unfit(dtype, where)
    return made


def _unfit(dtype: DType, where: str) -> InvalidInput:
    return InvalidInput(f"has a value that {dtype.value} does not have", field=where)


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
    if _elements(array.shape) <= _PIECE or array.ndim == 0:
        pieces.append(_dumped(array))
        return
    pieces.append(b"[")
    if array.ndim == 1:
        starts = range(0, array.size, _PIECE)
        pieces += [(b"," if at else b"") + _dumped(array[at : at + _PIECE])[1:-1] for at in starts]
    else:
        rows = max(1, _PIECE // _elements(array.shape[1:]))
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
    if array.dtype.kind == "f":
        # With the digits of a float64: read as one, as everybody does, and then narrowed, it is the same again.
        array = array.astype(np.float64)
        if not np.isfinite(array).all():
            return _by_name(array)
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)


def _by_name(array: npt.NDArray[Any]) -> bytes:
    """With NaN and Infinity, which orjson does not write; a few at a time, for json keeps Python's lock as well."""
    if array.ndim > 1:
        if array.size <= _SLOW_PIECE:
            return json.dumps(array.tolist(), separators=(",", ":")).encode()
        rows = max(1, _SLOW_PIECE // _elements(array.shape[1:]))
        if rows == 1:
            return b"[" + b",".join(map(_by_name, array)) + b"]"
        return b"[" + b",".join(_by_name(array[at : at + rows])[1:-1] for at in range(0, len(array), rows)) + b"]"
    starts = range(0, array.size, _SLOW_PIECE)
    parts = [json.dumps(array[at : at + _SLOW_PIECE].tolist(), separators=(",", ":"))[1:-1] for at in starts]
    return f"[{','.join(parts)}]".encode()


def _elements(shape: tuple[int, ...]) -> int:
    """How long it takes to write: a list of nothing is something."""
    return math.prod(max(1, size) for size in shape)


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
