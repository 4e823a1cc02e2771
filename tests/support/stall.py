"""Measures how long the event loop is kept from running anything else."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
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
        try:
            self._queue: int | None = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        except FileNotFoundError:  # a kernel without it
            self._queue = None
        self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, self._now()
        return self._last - before

    def _now(self) -> float:
        waited = int(os.pread(self._queue, 100, 0).split()[1]) if self._queue is not None else 0
        return time.perf_counter() - waited / 1e9


@asynccontextmanager
async def stall_probe(limit: float | None = 0.03, label: str = "") -> AsyncIterator[Stall]:
    """Runs beside the body; fails if the loop stood still for more than `limit` seconds, and prints the figure.

    What there is stays out of Python's collections meanwhile, as in the agent from READY on: all that a run of tests
    has imported takes a tenth of a second to go through.
    """
    stall = Stall()
    gc.collect()
    gc.freeze()
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
        gc.unfreeze()
        print(f"longest stall {label}: {stall.longest * 1e3:.1f} ms")
    if limit is not None:
        assert stall.longest <= limit, f"the loop stood still for {stall.longest * 1e3:.1f} ms"


@dataclass(frozen=True)
class Pause:
    """One time that the loop came late: when it came (monotonic clock), by how much, and what was done meanwhile."""

    at: float
    late: float
    """Seconds, without those for which the loop's thread was ready to run and the machine ran others."""
    seconds: float
    """What of that is the program's doing: what the loop's thread computed and what the kernel did for it; if it waited
    for more than the time, what all threads did, for one of them may have had Python's lock; if a page had to come from
    the disk, all of it. The rest is that of the machine, which runs others or, itself a guest, is not run."""
    user: float
    system: float
    faults: int
    sleeps: int

    def __str__(self) -> str:
        figures = " ".join(f"{one * 1e3:.1f}" for one in (self.seconds, self.late, self.user, self.system))
        return f"{figures} {self.faults} {self.sleeps}"


async def record_stalls(path: Path, *, over: float = 0.003) -> None:
    """Until cancelled: appends a Pause as a line for each time that the loop was late by more than `over`."""
    with path.open("a", buffering=1) as file:
        watch, before = Stopwatch(), _used()
        while True:
            for seconds, sleeps in ((0.0, 0), (0.001, 1)):
                await asyncio.sleep(seconds)
                late, now = watch.lap() - seconds, _used()
                if late > over:
                    (loop, everyone), (loop_before, everyone_before) = now, before
                    user, system = loop.ru_utime - loop_before.ru_utime, loop.ru_stime - loop_before.ru_stime
                    waits = loop.ru_nvcsw - loop_before.ru_nvcsw
                    own = user + system
                    if waits > sleeps:
                        own = (
                            everyone.ru_utime + everyone.ru_stime - everyone_before.ru_utime - everyone_before.ru_stime
                        )
                    faults = everyone.ru_majflt - everyone_before.ru_majflt
                    own = late if faults else min(own, late)
                    numbers = " ".join(f"{one:.4f}" for one in (time.monotonic(), late, own, user, system))
                    file.write(f"{numbers} {faults} {waits}\n")
                    watch.lap()
                before = _used()


def _used() -> tuple[resource.struct_rusage, resource.struct_rusage]:
    return resource.getrusage(resource.RUSAGE_THREAD), resource.getrusage(resource.RUSAGE_SELF)


def _computed(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def recorded(path: Path) -> list[Pause]:
    """What `record_stalls` has written."""
    lines = (line.split() for line in path.read_text().splitlines())
    return [Pause(*map(float, line[:5]), *map(int, line[5:])) for line in lines]
