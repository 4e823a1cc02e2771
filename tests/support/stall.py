"""Measures how long the event loop is kept from running anything else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Stall:
    longest: float = 0.0
    """Seconds; whole when the context manager has ended."""


class Stopwatch:
    """Time of this thread less the time for which it was ready to run and the machine ran others."""

    def __init__(self) -> None:
        self._queue = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, self._now()
        return self._last - before

    def _now(self) -> float:
        waited = int(self._queue.read_text().split()[1]) if self._queue.exists() else 0
        return time.perf_counter() - waited / 1e9


@asynccontextmanager
async def stall_probe(limit: float | None = 0.03, label: str = "") -> AsyncIterator[Stall]:
    """Runs beside the body; fails if the loop stood still for more than `limit` seconds, and prints the figure."""
    stall = Stall()
    stop = asyncio.Event()

    async def probe() -> None:
        watch = Stopwatch()
        while not stop.is_set():
            await asyncio.sleep(0)
            stall.longest = max(stall.longest, watch.lap())
            await asyncio.sleep(0.001)
            stall.longest = max(stall.longest, watch.lap() - 0.001)

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


async def record_stalls(path: Path, *, over: float = 0.003) -> None:
    """Until cancelled: appends `monotonic seconds` for each time that the loop stood still for more than `over`.

    Time for which this thread was ready to run and the machine ran others does not count.
    """
    with path.open("a", buffering=1) as file:
        watch = Stopwatch()
        while True:
            for seconds in (0.0, 0.001):
                await asyncio.sleep(seconds)
                lap = watch.lap() - seconds
                if lap > over:
                    file.write(f"{time.monotonic():.3f} {lap:.4f}\n")
                    watch.lap()
