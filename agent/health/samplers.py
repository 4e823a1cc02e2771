"""Reads the host's figures. Each sampler runs in its own thread and is given up after a while, never piled up."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

Sampler = Callable[[], Mapping[str, Any]]
_log = structlog.get_logger("health")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def process() -> dict[str, Any]:
    """The agent's own resident memory (bytes), open descriptors and threads."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    return {
        "rss_bytes": resident,
        "fds": len(os.listdir("/proc/self/fd")) - 1,  # one of them is the listing itself
        "threads": threading.active_count(),
    }


def load() -> dict[str, Any]:
    """The load averages and how many processors they are to be seen against."""
    one, five, fifteen = os.getloadavg()
    return {"1m": round(one, 2), "5m": round(five, 2), "15m": round(fifteen, 2), "cpus": os.cpu_count()}


def disk(folder: Path) -> Sampler:
    """Room (bytes) and inodes left for us where `folder` lies."""

    def read() -> dict[str, Any]:
        found = os.statvfs(folder)
        return {
            "free_bytes": found.f_bavail * found.f_frsize,
            "total_bytes": found.f_blocks * found.f_frsize,
            "free_inodes": found.f_favail,
        }

    return read


class Samplers:
    """Reads all samplers at once. One that hangs (a dead mount, a stuck device) keeps its thread, and only that one:
    it is not started again until it has come back, and is listed under `unreadable`."""

    def __init__(self, samplers: Mapping[str, Sampler], *, timeout: float = 5.0) -> None:
        self._samplers = dict(samplers)
        self._timeout = timeout
        self._running: dict[str, asyncio.Future[Mapping[str, Any]]] = {}

    @classmethod
    def usual(cls, state_dir: Path, slot: Sampler | None = None) -> Samplers:
        """Process, load and the state's disk; `slot` reads `temperature_c` and `power_w` if the driver can."""
        samplers: dict[str, Sampler] = {"process": process, "load": load, "disk": disk(state_dir)}
        if slot is not None:
            samplers["slot"] = slot
        return cls(samplers)

    async def read(self) -> dict[str, Any]:
        """The figures of each sampler under its name, and `unreadable`: {name: why} if any failed. Never raises."""
        for name, sampler in self._samplers.items():
            if name not in self._running:
                self._running[name] = _in_thread(name, sampler)
        if self._running:
            await asyncio.wait(self._running.values(), timeout=self._timeout)
        samples: dict[str, Any] = {}
        unreadable: dict[str, str] = {}
        for name, running in list(self._running.items()):
            if not running.done():
                unreadable[name] = f"has not answered within {self._timeout:g} s"
                continue
            del self._running[name]
            if fault := running.exception():
                unreadable[name] = f"{type(fault).__name__}: {fault}"
            else:
                samples[name] = dict(running.result())
        if unreadable:
            _log.warning("figures cannot be read", unreadable=unreadable)
            samples["unreadable"] = unreadable
        return samples


def _in_thread(name: str, sampler: Sampler) -> asyncio.Future[Mapping[str, Any]]:
    """Runs it in a daemon thread: one that never returns must not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Mapping[str, Any]] = loop.create_future()

    def settle(result: Mapping[str, Any] | None, fault: Exception | None) -> None:
        if future.done():
            return
        if fault is not None:
            future.set_exception(fault)
        else:
            future.set_result(result or {})

    def run() -> None:
        result: Mapping[str, Any] | None = None
        fault: Exception | None = None
        try:
            result = sampler()
        except Exception as error:
            fault = error
        if not loop.is_closed():
            try:
                loop.call_soon_threadsafe(settle, result, fault)
            except RuntimeError:  # closed between the question and the call: nobody waits any more
                pass

    threading.Thread(target=run, name=f"sampler-{name}", daemon=True).start()
    return future
