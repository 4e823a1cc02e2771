"""`run_host.py` with a probe beside it: each time the event loop stood still, as a line in the file PROBED.

A line is three numbers: when (monotonic clock), for how many seconds, and how much of that the loop's own thread
computed. On a machine with other work the second is large without anybody being at fault; the third is not.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import time
from pathlib import Path

from agent.memory import tune_malloc

tune_malloc()

from agent.daemon import Daemon  # noqa: E402

WORTH_A_LINE = 0.005
run = Daemon.run


async def probe(file: Path) -> None:
    with file.open("a", buffering=1) as lines:
        wall, own = time.monotonic(), time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now, used = time.monotonic(), time.thread_time()
            if now - wall - 0.001 > WORTH_A_LINE:
                lines.write(f"{now} {now - wall - 0.001} {used - own}\n")
            wall, own = now, used


async def probed(self: Daemon) -> int:
    task = asyncio.create_task(probe(Path(os.environ["PROBED"])), name="stall-probe")
    try:
        return await run(self)
    finally:
        task.cancel()


Daemon.run = probed  # type: ignore[method-assign]
runpy.run_path(str(Path(__file__).with_name("run_host.py")), run_name="__main__")
