"""Tensors as every room of slotd knows them: dtype, shape and data, without any wire format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


class DType(Enum):
    """Element types, named as ONNX and model.yaml name them. `STRING` elements are bytes of any length."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    FLOAT16 = "float16"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    UINT8 = "uint8"
    UINT16 = "uint16"
    UINT32 = "uint32"
    UINT64 = "uint64"
    BOOL = "bool"
    STRING = "string"

    __hash__ = object.__hash__  # enum's own is written in Python, and every tensor is looked up by it

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The numpy dtype; STRING has none (ValueError)."""
        dtype = _NUMPY.get(self)
        if dtype is None:
            raise ValueError("string tensors have no fixed-size numpy dtype")
        return dtype

    @classmethod
    def of(cls, dtype: np.dtype[np.generic]) -> DType:
        """The DType of a numpy dtype; ValueError for one that slotd does not carry."""
        found = _OF.get(dtype)
        return cls(dtype.name) if found is None else found


# Looked up for every tensor of every request, where numpy's own names take ten times as long.
_NUMPY: dict[DType, np.dtype[np.generic]] = {
    dtype: np.dtype(dtype.value) for dtype in DType if dtype is not DType.STRING
}
_OF: dict[np.dtype[np.generic], DType] = {numpy: dtype for dtype, numpy in _NUMPY.items()}


@dataclass(frozen=True, slots=True)
class Strings:
    """A tensor of byte strings: `items` in row-major order, `len(items)` is the product of `shape`."""

    shape: tuple[int, ...]
    items: tuple[bytes, ...] | list[bytes]

    @property
    def nbytes(self) -> int:
        """Size in an arena: a u32 length for each element, then the bytes."""
        return 4 * len(self.items) + sum(map(len, self.items))


Tensor: TypeAlias = npt.NDArray[np.generic] | Strings


def dtype_of(tensor: Tensor) -> DType:
    """The element type of a tensor."""
    return DType.STRING if isinstance(tensor, Strings) else DType.of(tensor.dtype)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model says of one input or output; -1 is any size."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a concrete shape fits."""
        return len(shape) == len(self.shape) and all(
            want in (-1, have) for want, have in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype.value} {list(self.shape)}"


@dataclass(frozen=True)
class Signature:
    """A model's inputs and outputs, in the model's own order, by the names that clients use."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def differences(self, other: Signature) -> list[str]:
        """What a client of `self` would notice if `other` answered instead; empty if nothing."""
        found: list[str] = []
        for side, mine, theirs in (("input", self.inputs, other.inputs), ("output", self.outputs, other.outputs)):
            for name, spec in mine.items():
                there = theirs.get(name)
                if there is None:
                    found.append(f"{side} {name!r} is gone")
                elif (there.dtype, there.shape) != (spec.dtype, spec.shape):
                    found.append(f"{side} {spec} becomes {there.dtype.value} {list(there.shape)}")
            if side == "input":
                found += [f"input {name!r} is new" for name in theirs if name not in mine]
        return found

    def as_dict(self) -> dict[str, dict[str, dict[str, object]]]:
        """As model.yaml writes it."""
        return {
            side: {spec.name: {"dtype": spec.dtype.value, "shape": list(spec.shape)} for spec in specs.values()}
            for side, specs in (("inputs", self.inputs), ("outputs", self.outputs))
        }


def signature_from(document: Mapping[str, Mapping[str, Mapping[str, object]]]) -> Signature:
    """The reverse of `Signature.as_dict`."""

    def side(specs: Mapping[str, Mapping[str, object]]) -> dict[str, TensorSpec]:
        found = {}
        for name, spec in specs.items():
            shape = spec["shape"]
            assert isinstance(shape, list | tuple)
            found[name] = TensorSpec(name, DType(spec["dtype"]), tuple(int(size) for size in shape))
        return found

    return Signature(side(document["inputs"]), side(document["outputs"]))
