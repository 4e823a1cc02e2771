"""How far one set of outputs is from another, in the tolerances that are allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from agent.model.signature import Strings, Tensor, dtype_of

FAR = 1e6
"""As many tolerances as matter; keeps ratios finite."""
_RELATIVE, _ABSOLUTE = 1e-3, 1e-5


@dataclass(frozen=True)
class Expected:
    """What must come out, and how exactly: a largest absolute error, or (None) float32's, from the outputs' size."""

    outputs: Mapping[str, Tensor]
    tolerance: float | None
    source: str

    def allowed(self, name: str) -> float:
        """The largest absolute error of one output; 0 for integers and strings."""
        tensor = self.outputs[name]
        if isinstance(tensor, Strings) or tensor.dtype.kind != "f":
            return 0.0
        if self.tolerance is not None:
            return self.tolerance
        return _RELATIVE * float(np.max(np.abs(_wide(tensor)), initial=0.0)) + _ABSOLUTE


@dataclass(frozen=True)
class Difference:
    """The worst of one comparison: `error` is absolute, `ratio` in tolerances (above 1 is wrong), `why` for people."""

    output: str
    error: float
    allowed: float
    ratio: float
    why: str = ""


def difference(expected: Expected, got: Mapping[str, Tensor]) -> Difference:
    """The output that is furthest from what is expected."""
    worst = Difference("", 0.0, 0.0, 0.0)
    for name in expected.outputs:
        found = _one(expected, name, got.get(name))
        if not worst.output or found.ratio > worst.ratio:
            worst = found
    return worst


def distance(one: Expected, other: Expected) -> float:
    """How many tolerances lie between two expectations, in the output that tells them apart best."""
    found = 0.0
    for name in one.outputs.keys() & other.outputs.keys():
        allowed = max(one.allowed(name), other.allowed(name))
        found = max(found, _ratio(_apart(one.outputs[name], other.outputs[name])[0], allowed))
    return found


def _one(expected: Expected, name: str, got: Tensor | None) -> Difference:
    want, allowed = expected.outputs[name], expected.allowed(name)
    if got is None:
        return Difference(name, math.inf, allowed, FAR, "is missing")
    if not isinstance(got, Strings) and got.dtype.kind == "f" and not np.all(np.isfinite(got)):
        return Difference(name, math.inf, allowed, FAR, "holds NaN or infinity")
    error, why = _apart(want, got)
    return Difference(name, error, allowed, _ratio(error, allowed), why)


def _apart(want: Tensor, got: Tensor) -> tuple[float, str]:
    if (kinds := (dtype_of(want).value, dtype_of(got).value))[0] != kinds[1]:
        return math.inf, f"is {kinds[1]}, not {kinds[0]}"
    if tuple(want.shape) != tuple(got.shape):
        return math.inf, f"has shape {list(got.shape)}, not {list(want.shape)}"
    if isinstance(want, Strings) or isinstance(got, Strings):
        assert isinstance(want, Strings) and isinstance(got, Strings)
        wrong, total = sum(map(bytes.__ne__, want.items, got.items)), len(want.items)
    elif want.dtype.kind == "f":
        error = float(np.max(np.abs(_wide(want) - _wide(got)), initial=0.0))
        return error, f"is off by {error:.3g}"
    else:
        wrong, total = int(np.count_nonzero(want != got)), want.size
    return (1.0 if wrong else 0.0), f"differs in {wrong} of {total} elements"


def _ratio(error: float, allowed: float) -> float:
    if error == 0.0:
        return 0.0
    return min(FAR, error / allowed) if allowed > 0.0 and not math.isnan(error) else FAR


def _wide(array: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    return array.astype(np.float64)
