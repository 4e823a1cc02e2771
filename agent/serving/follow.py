"""Looks at files again and again, as long as clients are served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from agent.health.issues import Issues

log = structlog.get_logger(__name__)


async def follow(refresh: Callable[[], Awaitable[None]], every: float, name: str, issues: Issues) -> None:
    """Calls `refresh` every so many seconds, until it is cancelled. `name`: a word with dashes, for its faults."""
    while True:
        await asyncio.sleep(every)
        try:
            await refresh()
        except Exception as fault:  # our own mistake: what was read stays in force, and it is told
            log.exception("not_followed", what=name)
            issues.fault(name, fault)
