"""Golden cases: inputs with the outputs that they must give, shipped in the image.

A case is a JSON file; the paths in it start at the folder that it is in:

    {"inputs":  {"Placeholder:0": {"files": ["snowleopard.jpg"]}},      # a string tensor [n], the files' raw bytes
     "outputs": {"probabilities": {"npy": "snowleopard.npy"}, "label": {"values": [287]}},
     "tolerance": {"cpu": 1e-4, "slot": 0.02}}                          # largest absolute errors
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent.errors import InvalidModel
from agent.model.signature import DType, Signature, Strings, Tensor, TensorSpec, dtype_of
from agent.model.spec import MAX_RANK, Model, ModelFile, TensorName, explain

MAX_JSON = 64 << 10
"""Bytes of a case; it is parsed in the agent. Large tensors lie in .npy files beside it."""
MAX_BYTES = 256 << 20
"""All tensors of a model's golden cases together."""
MAX_FILES = 64
HINT = "make the case again with `slotd pack`"
Tolerance = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True)
class GoldenCase:
    """Inputs and what must come out of them; `outputs` may leave out some. Tolerances are largest absolute errors."""

    name: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    tolerance_cpu: float
    tolerance_slot: float


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Source(_Part):
    npy: ModelFile | None = None
    files: Annotated[tuple[ModelFile, ...], Field(min_length=1, max_length=MAX_FILES)] | None = None
    values: Any = None

    @model_validator(mode="after")
    def _one(self) -> _Source:
        if sum(value is not None for value in (self.npy, self.files, self.values)) != 1:
            raise ValueError("give exactly one of npy, files and values")
        return self


class _Tolerance(_Part):
    cpu: Tolerance = 1e-4
    slot: Tolerance = 0.02


class _File(_Part):
    inputs: Annotated[dict[TensorName, _Source], Field(min_length=1)]
    outputs: Annotated[dict[TensorName, _Source], Field(min_length=1)]
    tolerance: _Tolerance = _Tolerance()


def read_golden(model: Model, signature: Signature, *, max_tolerance: float = 0.05) -> list[GoldenCase]:
    """The golden cases that model.yaml names, checked against the signature. Reads files: call it in a thread.

    Raises InvalidModel naming the file and the field, also for a tolerance above `max_tolerance`.
    """
    left = MAX_BYTES
    cases = []
    for path in model.spec.golden:
        reader = _Reader(model.folder, path, left)
        cases.append(reader.case(signature, max_tolerance))
        left = reader.left
    return cases


def write_golden(
    folder: Path,
    name: str,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    tolerance: Mapping[str, float],
) -> Path:
    """Write a case as `<name>.json` and the files beside it; the path of the JSON. Strings become files [n]."""
    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"inputs": {}, "outputs": {}, "tolerance": dict(tolerance)}
    for side, tensors in (("inputs", inputs), ("outputs", outputs)):
        for index, (key, tensor) in enumerate(tensors.items()):
            stem = f"{name}.{side[:-1]}{index}"
            if isinstance(tensor, Strings):
                if len(tensor.shape) != 1:
                    raise ValueError(f"{key!r}: a string tensor of a golden case must have shape [n]")
                files = [f"{stem}.{number}" for number in range(len(tensor.items))]
                for file, item in zip(files, tensor.items, strict=True):
                    (folder / file).write_bytes(item)
                document[side][key] = {"files": files}
            else:
                with (folder / f"{stem}.npy").open("wb") as out:
                    np.save(out, tensor, allow_pickle=False)
                document[side][key] = {"npy": f"{stem}.npy"}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


class _Reader:
    """One golden case file; `left` is how many bytes of tensors may still be read."""

    def __init__(self, root: Path, name: str, left: int) -> None:
        self._root, self._name, self.left = root.resolve(), name, left
        self._folder = (self._root / name).parent

    def case(self, signature: Signature, max_tolerance: float) -> GoldenCase:
        document = self._parse()
        for target, value in (("cpu", document.tolerance.cpu), ("slot", document.tolerance.slot)):
            if value > max_tolerance:
                raise self._bad(
                    f"tolerance.{target}",
                    f"{value:g} is more than this host allows, {max_tolerance:g}",
                    hint="swap.max_tolerance in the host's configuration caps it",
                )
        if missing := [name for name in signature.inputs if name not in document.inputs]:
            raise self._bad("inputs", f"{missing[0]!r} is missing")
        return GoldenCase(
            name=self._name,
            inputs=self._side("inputs", document.inputs, signature.inputs),
            outputs=self._side("outputs", document.outputs, signature.outputs),
            tolerance_cpu=document.tolerance.cpu,
            tolerance_slot=document.tolerance.slot,
        )

    def _parse(self) -> _File:
        try:
            return _File.model_validate(json.loads(self._bytes(self._root / self._name, "", MAX_JSON)))
        except ValidationError as error:
            raise self._bad(*explain(error)) from None
        except (ValueError, RecursionError) as error:
            raise self._bad("", f"is not JSON: {error}") from None

    def _side(self, side: str, sources: Mapping[str, _Source], specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, source in sources.items():
            field = f"{side}.{name}"
            spec = specs.get(name)
            if spec is None:
                raise self._bad(field, f"the model has no such {side[:-1]}; it has {', '.join(map(repr, specs))}")
            tensor = self._tensor(field, source, spec)
            if dtype_of(tensor) is not spec.dtype or not spec.accepts(tensor.shape):
                raise self._bad(
                    field,
                    f"is {dtype_of(tensor).value} {list(tensor.shape)}, the model has {spec.dtype.value} "
                    f"{list(spec.shape)}",
                )
            if math.prod(tensor.shape) == 0:
                raise self._bad(field, "has no elements")
            if side == "outputs" and not isinstance(tensor, Strings) and not _finite(tensor):
                raise self._bad(field, "holds NaN or infinity, which no slot can be compared with")
            tensors[name] = tensor
        return tensors

    def _tensor(self, field: str, source: _Source, spec: TensorSpec) -> Tensor:
        if source.files is not None:
            if spec.dtype is not DType.STRING:
                raise self._bad(field, f"files give a string tensor, the model has {spec.dtype.value}")
            items = [self._bytes(self._folder / file, field, self.left) for file in source.files]
            return Strings((len(items),), items)
        if spec.dtype is DType.STRING:
            if source.npy is not None:
                raise self._bad(field, "a string tensor is given by files or values, not npy")
            return self._texts(field, source.values)
        if source.npy is not None:
            return self._npy(field, source.npy)
        return self._values(field, source.values, spec.dtype)

    def _npy(self, field: str, name: str) -> npt.NDArray[np.generic]:
        """An array whose header is believed only if the file is just as long as it says."""
        with self._open(self._folder / name, field) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                version = np.lib.format.read_magic(file)
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = read[version](file)
                known = DType.of(dtype)
            except Exception:  # numpy's header parser lets a handful of kinds through, tokenize.TokenError among them
                raise self._bad(field, f"{name} is not a .npy file of plain numbers") from None
            count = math.prod(shape) * dtype.itemsize
            if any(length < 0 for length in shape) or size - file.tell() != count:
                raise self._bad(field, f"{name} is cut off, or longer than its header says")
            self._spend(field, count)
            data = file.read(count)
        if len(data) != count:
            raise self._bad(field, f"{name} is cut off")
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        return np.ascontiguousarray(array, known.numpy).reshape(shape)

    def _values(self, field: str, values: Any, dtype: DType) -> npt.NDArray[np.generic]:
        try:
            raw = np.array(values)
        except (ValueError, OverflowError):
            raise self._bad(field, "values is not a regular nested list of numbers") from None
        kind = dtype.numpy.kind
        if raw.dtype.kind not in {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}[kind]:
            raise self._bad(field, f"values does not hold numbers that {dtype.value} can have")
        if kind in "iu":
            limits = np.iinfo(dtype.value)
            if raw.size and (int(raw.min()) < limits.min or int(raw.max()) > limits.max):
                raise self._bad(field, f"values holds a number outside {dtype.value}")
        self._spend(field, raw.nbytes)
        with np.errstate(over="ignore"):
            array = raw.astype(dtype.numpy)
        if kind == "f" and not np.all(np.isfinite(array)):
            raise self._bad(field, f"values holds a number outside {dtype.value}")
        return array

    def _texts(self, field: str, values: Any) -> Strings:
        flat: list[bytes] = []
        shape = _shape(values)
        if len(shape) > MAX_RANK:
            raise self._bad(field, f"values is nested more than {MAX_RANK} deep")

        def walk(part: Any, rest: tuple[int, ...]) -> None:
            if not rest and isinstance(part, str):
                flat.append(part.encode())
            elif rest and isinstance(part, list) and len(part) == rest[0]:
                for item in part:
                    walk(item, rest[1:])
            else:
                raise self._bad(field, "values is not a regular nested list of strings")

        walk(values, shape)
        self._spend(field, sum(map(len, flat)))
        return Strings(shape, flat)

    def _bytes(self, path: Path, field: str, limit: int) -> bytes:
        with self._open(path, field) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise self._bad(field, f"{path.name} is larger than {limit} bytes")
        if field:
            self._spend(field, len(data))
        return data

    def _open(self, path: Path, field: str) -> BinaryIO:
        try:
            if not path.parent.resolve(strict=True).is_relative_to(self._root):
                raise self._bad(field, f"{path.name} is outside the model's folder")
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise self._bad(field, f"{path.name} cannot be opened: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._bad(field, f"{path.name} is not a plain file")
        return open(fd, "rb")

    def _spend(self, field: str, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise self._bad(field, f"the golden cases have more than {MAX_BYTES >> 20} MiB together")

    def _bad(self, field: str, message: str, *, hint: str = HINT) -> InvalidModel:
        return InvalidModel(message, field=f"{self._name}: {field}" if field else self._name, hint=hint)


def _shape(values: Any) -> tuple[int, ...]:
    shape = []
    while isinstance(values, list):
        shape.append(len(values))
        values = values[0] if values else None
    return tuple(shape)


def _finite(array: npt.NDArray[np.generic]) -> bool:
    return array.dtype.kind != "f" or bool(np.all(np.isfinite(array.astype(np.float64))))
