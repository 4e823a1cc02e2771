"""State dicts in PyTorch's legacy file format, read without PyTorch and without running what a pickle asks for.

The file is five pickles in a row (magic number, protocol, system, the state dict with persistent ids for storages, the
list of storage keys), then for each key an int64 count and the raw little-endian values.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt

from agent.errors import InvalidModel

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_VALUES = 1 << 30


@dataclass
class _Storage:
    dtype: np.dtype[Any]
    size: int
    values: npt.NDArray[Any] | None = None


@dataclass(frozen=True)
class _View:
    """A tensor: a window with strides (in elements) on a storage that is read later."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> npt.NDArray[Any]:
        values = self.storage.values
        if values is None:
            raise ValueError("a tensor's values are missing")
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("a tensor has an impossible shape")
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        size = math.prod(map(int, self.shape))
        if size > values.size or (size and last >= values.size):
            raise ValueError("a tensor is larger than its values")
        steps = tuple(step * values.itemsize for step in self.strides)
        return np.array(np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, steps), order="C")


def _rebuild(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    return _View(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    """Knows six names and makes nothing else."""

    known: ClassVar[dict[tuple[str, str], Callable[..., Any] | np.dtype[Any]]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        ("torch", "FloatStorage"): np.dtype("<f4"),
        ("torch", "DoubleStorage"): np.dtype("<f8"),
        ("torch", "HalfStorage"): np.dtype("<f2"),
        ("torch", "LongStorage"): np.dtype("<i8"),
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def persistent_load(self, key: Any) -> _Storage:
        kind, dtype, name, _, size, window = key
        if kind != "storage" or not isinstance(dtype, np.dtype) or window is not None:
            raise pickle.UnpicklingError("it has a storage of an unknown kind")
        if not isinstance(size, int) or not 0 <= size <= _MAX_VALUES:
            raise pickle.UnpicklingError("it has a storage of an impossible size")
        return self.storages.setdefault(str(name), _Storage(dtype, size))


def read_state_dict(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors by name, contiguous whatever their strides in the file. Raises InvalidModel."""
    try:
        with path.open("rb") as file:
            return _read(file)
    except OSError as error:
        raise InvalidModel(f"cannot be read: {error.strerror}", field=str(path)) from None
    except (pickle.UnpicklingError, ValueError, TypeError, EOFError, AttributeError, IndexError, KeyError) as error:
        raise InvalidModel(
            f"is not a state dict in PyTorch's legacy format: {error}",
            field=str(path),
            hint="save it with torch.save(…, _use_new_zipfile_serialization=False)",
        ) from None


def _read(file: BinaryIO) -> dict[str, npt.NDArray[Any]]:
    head = [_Unpickler(file).load() for _ in range(3)]
    if head[0] != _MAGIC or head[1] != _PROTOCOL or head[2].get("little_endian") is not True:
        raise ValueError("its head is not one")
    unpickler = _Unpickler(file)
    state = unpickler.load()
    for key in _Unpickler(file).load():
        storage = unpickler.storages[str(key)]
        if int.from_bytes(file.read(8), "little") != storage.size:
            raise ValueError("the size of a storage is wrong")
        data = file.read(storage.size * storage.dtype.itemsize)
        storage.values = np.frombuffer(data, storage.dtype)
        if storage.values.size != storage.size:
            raise ValueError("it is cut short")
    if not isinstance(state, dict) or not all(isinstance(value, _View) for value in state.values()):
        raise ValueError("it holds other things than tensors")
    return {str(name): view.array() for name, view in state.items()}
