"""slotd, but SIGUSR1 makes its event loop stand still, and a file /run/slotd/slow-start makes its start take 10 s."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from agent import cli, daemon

run, load = daemon.Daemon.run, daemon.load_committed


async def blockable(self: daemon.Daemon) -> int:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, stand_still)
    return await run(self)


def stand_still() -> None:
    while True:
        time.sleep(1)


async def slow(*args: Any, **more: Any) -> None:
    if os.path.exists("/run/slotd/slow-start"):
        await asyncio.sleep(10)
    await load(*args, **more)


daemon.Daemon.run = blockable  # type: ignore[method-assign]
daemon.load_committed = slow
sys.argv[0] = str(Path(sys.argv[0]).with_name("slotd"))
cli.main()
