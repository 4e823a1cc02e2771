"""Runs the daemon as `slotd run` does.

With a phase as second argument it kills itself when that phase is journaled; with HOLD_AT=phase in the environment it
stays in that phase (`asked`: in the one that the file names) while the file HOLD_WHILE is there; with FRAIL=1 its
executors end at an input of 13; with FAIL_WHEN a background task fails as soon as that file is there; STOP_BOUND sets
how many seconds a stop may take, LOOK_EVERY how many lie between two looks at the storage; STALLS is a file where it is
written when the loop stood still.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.memory import tune_malloc

tune_malloc()

from agent import daemon, storage  # noqa: E402
from agent.errors import SlotdError  # noqa: E402
from agent.executor.client import Launch, launch_model  # noqa: E402
from agent.journal.database import Journal  # noqa: E402
from agent.logs import configure  # noqa: E402
from agent.reload.source import load  # noqa: E402
from agent.slot import installer, residents  # noqa: E402
from agent.slot.arbiter import Phase  # noqa: E402
from agent.slot.attempt import Deployment  # noqa: E402
from agent.slot.deployment import Deployments  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.stall import record_stalls  # noqa: E402


def make_frail() -> None:
    """Executors run tests/support/frail_child.py."""
    child = str(Path(__file__).with_name("frail_child.py"))

    def launch(*args: Any, **more: Any) -> Launch:
        return replace(launch_model(*args, **more), argv=(sys.executable, child))

    installer.launch_model = residents.launch_model = launch


def hold(phase: str, file: Path) -> None:
    """Deployments stay where they are while the file is there."""
    enter = Deployments._enter

    async def and_wait(self: Deployments, deployment: Deployment, name: Phase) -> None:
        await enter(self, deployment, name)
        while name.value == (_content(file) if phase == "asked" else phase) and file.exists():
            await asyncio.sleep(0.01)

    Deployments._enter = and_wait  # type: ignore[method-assign]


def _content(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def fail_when(file: Path) -> None:
    """The task that reads the sensors meets a bug."""

    async def fail(*_: object) -> None:
        while not file.exists():
            await asyncio.sleep(0.02)
        raise RuntimeError("an injected bug")

    daemon.Daemon._sample = fail  # type: ignore[method-assign,assignment]


def watch_stalls(file: Path) -> None:
    """Each time that the loop stands still is written down."""
    sample = daemon.Daemon._sample

    async def watched(self: daemon.Daemon, *arguments: Any) -> None:
        recorder = asyncio.create_task(record_stalls(file), name="stalls")
        try:
            await sample(self, *arguments)
        finally:
            recorder.cancel()

    daemon.Daemon._sample = watched  # type: ignore[method-assign]


def main() -> int:
    if os.environ.get("FRAIL"):
        make_frail()
    if os.environ.get("HOLD_AT"):
        hold(os.environ["HOLD_AT"], Path(os.environ["HOLD_WHILE"]))
    if os.environ.get("FAIL_WHEN"):
        fail_when(Path(os.environ["FAIL_WHEN"]))
    if os.environ.get("STALLS"):
        watch_stalls(Path(os.environ["STALLS"]))
    if os.environ.get("STOP_BOUND"):
        daemon.STOP_BOUND = float(os.environ["STOP_BOUND"])
    if os.environ.get("LOOK_EVERY"):
        storage.EVERY = float(os.environ["LOOK_EVERY"])
    path, phase = Path(sys.argv[1]), sys.argv[2]
    if phase:
        journaled = Journal.phase

        async def and_die(self: Journal, deployment_id: str, name: str, **more: object) -> None:
            await journaled(self, deployment_id, name, **more)
            if name == phase:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.phase = and_die
    try:
        loaded = load(path, embedded=bool(os.environ.get("EMBEDDED")))
        configure(loaded.config.log)
        return daemon.run(loaded)
    except SlotdError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit


sys.exit(main())
