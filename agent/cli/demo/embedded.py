"""The demo's slotd: a child process with everything embedded, and where it can be reached."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agent.cli.demo.build import LAYOUT
from agent.cli.demo.child import tail
from agent.errors import SlotdError, Unavailable

DEVICE = "demo"
PROGRAM_TIME = 1.5
LATENCY = 0.004
PROBATION = 2.0
_READY = 60.0
_STOP = 20.0
_KILL = 5.0
_LOOK = 0.05


@dataclass(frozen=True)
class Ends:
    """Where it listens."""

    address: str
    broker: str
    """host:port"""
    pid: int

    @property
    def ports(self) -> str:
        """In a few words."""
        return " · ".join(
            f"{name} port {end.rpartition(':')[2]}" for name, end in (("gRPC", self.address), ("MQTT", self.broker))
        )


class Embedded:
    """`slotd run` as a service manager would start it."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "config.yaml"
        self.log = folder / "slotd.log"
        self._folder = folder
        self._run_dir = folder / "run"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> Ends:
        """Until READY and until its broker listens. Raises Unavailable, or what `ended` raises."""
        await asyncio.to_thread(self._write_config)
        notify = self._folder / "notify.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listener:
            try:
                listener.bind(str(notify))
            except OSError as error:
                raise SlotdError(
                    f"no socket can be made: {error}", field=str(notify), hint="choose a --folder with a shorter path"
                ) from None
            with self.log.open("wb") as log:
                # Not asyncio's: a process of asyncio is killed when the loop ends, and --keep must leave this one.
                self._process = subprocess.Popen(  # noqa: ASYNC220
                    [sys.executable, "-m", "agent", "run", "--config", str(self.config)],
                    env={**os.environ, "NOTIFY_SOCKET": str(notify)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            try:
                async with asyncio.timeout(_READY):
                    await self._ready(listener)
                    return await self._ends()
            except TimeoutError:
                raise Unavailable(f"slotd was not ready within {_READY:.0f} s", hint="its log says why") from None

    async def ended(self) -> None:
        """Raises Unavailable when it ends by itself; returns never."""
        while True:
            self._require()
            await asyncio.sleep(_LOOK)

    @property
    def started(self) -> bool:
        """Whether there is something to stop."""
        return self._process is not None

    async def stop(self) -> int | None:
        """SIGTERM, and SIGKILL if that does not help; the exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        for number, seconds in ((signal.SIGTERM, _STOP), (signal.SIGKILL, _KILL)):
            if process.poll() is None:
                process.send_signal(number)
            until = asyncio.get_running_loop().time() + seconds
            while process.poll() is None and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK)
        return process.returncode

    def _require(self) -> None:
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            raise Unavailable(f"slotd ended with {code}", hint="its log says why")

    async def _ready(self, listener: socket.socket) -> None:
        while True:
            self._require()
            try:
                if b"READY=1" in listener.recv(4096):
                    return
            except BlockingIOError:
                await asyncio.sleep(_LOOK)

    async def _ends(self) -> Ends:
        """The ports that it took, as its status says."""
        while True:
            self._require()
            status = await asyncio.to_thread(self._status)
            if status["link"]["connected"]:
                listen = [one for one in status["serving"]["listen"] if not one.startswith("unix:")]
                return Ends(listen[0], str(status["link"]["broker"]), int(status["pid"]))
            await asyncio.sleep(_LOOK)

    def _status(self) -> dict[str, Any]:
        from agent.cli.connect import ask

        return ask(self._run_dir / "admin.sock", None, "status")

    def _write_config(self) -> None:
        self.config.write_text(yaml.safe_dump(settings(self._folder), sort_keys=False))

    def tail(self) -> str:
        """The last words of its log."""
        return tail(self.log, 20)


def settings(folder: Path) -> dict[str, Any]:
    """Its configuration: everything embedded, all of it in `folder`, and a short probation."""
    return {
        "device": DEVICE,
        "state_dir": str(folder / "state"),
        "run_dir": str(folder / "run"),
        "embedded": True,
        "slot": {"driver": "simulated", "options": {"program_time": PROGRAM_TIME, "latency": LATENCY}},
        "swap": {"probation": {"duration": PROBATION}},
        "serving": {"grpc": {"listen": "127.0.0.1:0"}, "http": {"listen": None}, "lame_duck": 0.2},
        "images": {"layouts": [str(folder / LAYOUT)], "keep_free": "64MiB"},
        "link": {"host": "", "port": 0},
        "log": {"format": "console"},
    }
