"""Which deployment or request a log line belongs to. Standard library only.

asyncio hands a task's context on to all that it starts, also to what outlives it, as an executor outlives the
deployment that started it. So a scope ends for everybody when its block ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class _Scope:
    __slots__ = ("ids", "open", "outer")

    def __init__(self, ids: dict[str, str], outer: _Scope | None) -> None:
        self.ids, self.outer, self.open = ids, outer, True


_current: ContextVar[_Scope | None] = ContextVar("scope", default=None)


@contextmanager
def scope(**ids: str) -> Iterator[None]:
    """Lines that are logged in the block, and in tasks that it starts as long as it lasts, carry these ids."""
    mine = _Scope(ids, _current.get())
    before = _current.set(mine)
    try:
        yield
    finally:
        mine.open = False
        _current.reset(before)


def ids() -> dict[str, str]:
    """Those in force here; the innermost wins."""
    found: dict[str, str] = {}
    at = _current.get()
    while at is not None:
        if at.open:
            found = {**at.ids, **found}
        at = at.outer
    return found
