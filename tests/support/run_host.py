"""Runs the daemon as `slotd run` does; with a phase as second argument it kills itself when that phase is journaled."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from agent.memory import tune_malloc

tune_malloc()

from agent.journal.database import Journal  # noqa: E402

from agent import daemon  # noqa: E402
from agent.config import read_config  # noqa: E402
from agent.errors import SlotdError  # noqa: E402
from agent.logs import configure  # noqa: E402


def main() -> int:
    path, phase = Path(sys.argv[1]), sys.argv[2]
    if phase:
        journaled = Journal.phase

        async def and_die(self: Journal, deployment_id: str, name: str, **more: object) -> None:
            await journaled(self, deployment_id, name, **more)
            if name == phase:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.phase = and_die
    try:
        config = read_config(path)
        configure(config.log)
        return asyncio.run(daemon.run(config))
    except SlotdError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit


sys.exit(main())
