"""When to try again, and when somebody else seems to use our name. Knows no clock but what it is told."""

from __future__ import annotations

import random
from collections import deque

WINDOW = 600.0
"""Seconds in which takeovers are counted."""
LIMIT = 3
STEADY = 30.0
"""A connection that lasted this long (seconds) counts as good; what ends sooner goes on with the back-off."""


class Backoff:
    """Doubles from `first` to `longest` (seconds), with jitter of a half, so that a fleet doesn't come back at once."""

    def __init__(self, first: float, longest: float) -> None:
        self._first = first
        self._longest = max(first, longest)
        self._failures = 0

    def next(self) -> float:
        """How long to wait before the next attempt."""
        base = min(self._first * 2.0 ** min(self._failures, 60), self._longest)
        self._failures += 1
        return base * random.uniform(0.5, 1.0)  # noqa: S311 - spreads attempts, hides nothing

    def longest(self) -> float:
        """For what will not be over soon."""
        return self._longest * random.uniform(0.8, 1.0)  # noqa: S311

    def lasted(self, seconds: float) -> None:
        """A connection was up for so long."""
        if seconds >= min(STEADY, self._longest):
            self._failures = 0


class Takeovers:
    """Counts how often a connection of ours ended because another client came with the same name."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=LIMIT)

    def count(self, now: float) -> bool:
        """One more at `now` (monotonic seconds); True if that makes three in ten minutes."""
        self._seen.append(now)
        return len(self._seen) == LIMIT and now - self._seen[0] <= WINDOW
