"""How fast an executor is: a few runs when it is loaded, which also warm it up."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from agent.errors import DeadlineExceeded, ExecutorError, InvalidInput
from agent.executor.seat import Seat
from agent.slot.samples import seeded_inputs

RUNS = 4
LONG_ENOUGH = 0.25
"""Seconds of measuring after which no further run is made."""
UNKNOWN = 0.05
"""Seconds for one request of a model that takes none of the made-up inputs."""


async def measure(seat: Seat, *, timeout: float, runs: int = RUNS) -> float:
    """Seconds that one request takes on this executor; CPU time where other work was in the way.

    One run is enough for an executor that somebody waits for: it says a little too much, and requests put it right.

    Raises ExecutorError if a run fails or takes longer than `timeout` seconds: such a model cannot serve.
    """
    samples = await asyncio.to_thread(seeded_inputs, seat.signature, seat.model.spec.image, (), seed=0, count=runs)
    deadline_ns = int((time.monotonic() + timeout) * 1e9)
    walls: list[float] = []
    used = await asyncio.to_thread(_cpu_seconds, seat.worker.pid)
    for inputs in samples:
        start = time.monotonic()
        try:
            await seat.run(inputs, deadline_ns)
        except DeadlineExceeded:
            raise ExecutorError(
                f"one run of the model takes more than {timeout:g} s",
                code="CALL_TIMEOUT",
                hint="is there a loop in it?",
            ) from None
        except InvalidInput:
            continue
        except ExecutorError as error:
            if error.code == ExecutorError.code:
                continue  # it does not take these inputs; its golden cases will tell whether it takes others
            raise
        walls.append(time.monotonic() - start)
        if sum(walls) > LONG_ENOUGH:
            break
    if not walls:
        return UNKNOWN
    spent = (await asyncio.to_thread(_cpu_seconds, seat.worker.pid) - used) / len(walls)
    best = min(walls)
    return max(1e-5, min(best, spent) if spent > 0.5 * best else best)


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
