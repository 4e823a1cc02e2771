"""A clock that stands still until it is told."""

from __future__ import annotations

from agent.journal.sqlite import Clock


class Hands:
    """Time passes by `pass_`; `set` is somebody who sets the wall clock."""

    def __init__(self, wall: float = 1_800_000_000.0) -> None:
        self.wall = wall
        self.steady = 1000.0

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def set(self, wall: float) -> None:
        self.wall = wall

    def clock(self) -> Clock:
        return Clock(wall=lambda: self.wall, steady=lambda: self.steady)
