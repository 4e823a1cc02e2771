"""Measures how long the event loop is kept from running anything else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class Stall:
    longest: float = 0.0
    """Seconds; whole when the context manager has ended."""


@asynccontextmanager
async def stall_probe(limit: float | None = 0.03, label: str = "") -> AsyncIterator[Stall]:
    """Runs beside the body; fails if the loop stood still for more than `limit` seconds, and prints the figure."""
    stall = Stall()
    stop = asyncio.Event()

    async def probe() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            await asyncio.sleep(0)
            now = time.perf_counter()
            stall.longest = max(stall.longest, now - last)
            last = now
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            stall.longest = max(stall.longest, now - last - 0.001)
            last = now

    task = asyncio.create_task(probe(), name="stall-probe")
    await asyncio.sleep(0.002)
    try:
        yield stall
    finally:
        await asyncio.sleep(0.002)
        stop.set()
        await task
        print(f"longest stall {label}: {stall.longest * 1e3:.1f} ms")
    if limit is not None:
        assert stall.longest <= limit, f"the loop stood still for {stall.longest * 1e3:.1f} ms"
