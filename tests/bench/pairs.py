"""Two things measured turn by turn in one run, and how much the machine itself wavers meanwhile.

Absolute times say little: the machine is another one tomorrow. What is compared is measured in pairs, one right after
the other, and what is judged is the median of the pairs' ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Spread:
    """Some figures of one kind."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({min(self.values):.3f} to {max(self.values):.3f}, {len(self.values)} times)"


@dataclass
class Result:
    """One line of the bench. `limit` with `at_least` says when it is met; without a limit it is only shown."""

    name: str
    ratio: Spread
    limit: float | None = None
    at_least: bool = False
    details: dict[str, str] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        if self.limit is None:
            return True
        return self.ratio.median >= self.limit if self.at_least else self.ratio.median <= self.limit

    def __str__(self) -> str:
        target = ""
        if self.limit is not None:
            target = f"   target {'>=' if self.at_least else '<='} {self.limit:g}: {'met' if self.met else 'MISSED'}"
        lines = [f"{self.name}: {self.ratio}{target}"]
        return "\n".join([*lines, *(f"    {key}: {value}" for key, value in self.details.items())])

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "median": self.ratio.median,
            "values": list(self.ratio.values),
            "limit": self.limit,
            "met": self.met,
            "details": self.details,
        }


def alternate(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int, noise: Noise
) -> tuple[Spread, Spread, Spread]:
    """(ratios, ours, theirs). Who goes first changes from pair to pair."""
    found: list[tuple[float, float]] = []
    for pair in range(pairs):
        noise.tick()
        if pair % 2:
            other = theirs()
            own = ours()
        else:
            own = ours()
            other = theirs()
        found.append((own, other))
    noise.tick()
    return (
        Spread(tuple(own / other for own, other in found)),
        Spread(tuple(own for own, _ in found)),
        Spread(tuple(other for _, other in found)),
    )


def quantile(times: Sequence[float], share: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Noise:
    """How steady the machine was: the same small work again and again, and the CPU time that went to nobody of ours."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._began = _cpu()

    def tick(self) -> None:
        """Measure once; takes some 10 ms."""
        best = 1e9
        for _ in range(3):
            start = time.perf_counter()
            total = 0
            for number in range(60_000):
                total += number * number
            best = min(best, time.perf_counter() - start)
        self._times.append(best)

    def __str__(self) -> str:
        work = Spread(tuple(time / min(self._times) for time in self._times)) if self._times else None
        busy, stolen, total = (now - then for now, then in zip(_cpu(), self._began, strict=True))
        share = f"CPUs {busy / max(1, total):.0%} busy, {stolen / max(1, total):.1%} stolen"
        load = Path("/proc/loadavg").read_text().split()[0]
        return f"the same work took {work} times its shortest; {share}; load {load}"


def _cpu() -> tuple[int, int, int]:
    """(busy, stolen, all) ticks of all CPUs."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], fields[7], sum(fields)
