"""How long answers took since the start, counted in buckets; those of several hosts can be added."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds in seconds, each within its bucket; beyond the last there is one more."""


class Histogram:
    """Counts of BOUNDS, and the sum in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """(upper bound, how many took no longer); the last bound is infinite."""
        total = 0
        for bound, count in zip((*BOUNDS, float("inf")), self._counts, strict=True):
            total += count
            yield bound, total
