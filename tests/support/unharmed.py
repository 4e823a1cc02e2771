"""A host that is given bad things, and what must be the same afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from support import host as host_module
from support.host import Host

X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)
ROOM = 8 << 20
"""Bytes by which the agent's memory may grow under all of it; the first of everything has been done before."""
STALL = 0.25
"""Seconds of computing in one go on the event loop that no case may cause; gross, since CI machines differ."""


@dataclass(frozen=True)
class State:
    """What must not change. `workers`: the pids of executors and decoders."""

    pid: int
    host: str
    committed: Any
    previous: Any
    accelerator: str | None
    slot_pid: int | None
    workers: frozenset[int]
    boot: bytes


def state_of(host: Host) -> State:
    status = host.status()
    return State(
        pid=status["pid"],
        host=status["host"],
        committed=status["committed"],
        previous=status["previous"],
        accelerator=status["slot"]["accelerator"],
        slot_pid=(status["slot"]["executor"] or {}).get("pid"),
        workers=workers_of(host),
        boot=boot_of(host),
    )


def workers_of(host: Host) -> frozenset[int]:
    assert host.process is not None
    found = set()
    for child in psutil.Process(host.process.pid).children():
        try:
            if {"agent.executor.worker", "agent.executor.decoder"} & set(child.cmdline()):
                found.add(child.pid)
        except psutil.Error:
            continue  # it has ended meanwhile
    return frozenset(found)


def boot_of(host: Host) -> bytes:
    path = host.folder / "state" / "boot.json"
    return path.read_bytes() if path.exists() else b""


def rss_of(host: Host) -> int:
    assert host.process is not None
    return int(psutil.Process(host.process.pid).memory_info().rss)


class Watch:
    """The stalls that the host's probe has noted."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def since(self, when: float) -> tuple[float, float]:
        """The longest stall that ended after `when`, and the longest computing, in seconds."""
        lines = [tuple(map(float, line.split())) for line in self.file.read_text().splitlines()]
        late = [(wall, own) for at, wall, own in lines if at >= when]
        return max((wall for wall, _ in late), default=0.0), max((own for _, own in late), default=0.0)


@contextmanager
def probed_host(folder: Path, **settings: Any) -> Iterator[tuple[Host, Watch]]:
    """A running host with a stall probe in it."""
    folder.mkdir(parents=True, exist_ok=True)
    watch = Watch(folder / "stalls")
    watch.file.touch()
    host = Host(folder, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROBED", str(watch.file))
        patch.setattr(host_module, "RUNNER", Path(__file__).with_name("probed_host.py"))
        host.start()
    try:
        yield host, watch
    finally:
        host.kill()


@contextmanager
def all_unharmed(host: Host, watch: Watch, label: str) -> Iterator[None]:
    """Around all cases of a module: the agent has not grown, its loop never stood still for long."""
    before, start = rss_of(host), time.monotonic()
    yield
    grown = rss_of(host) - before
    wall, own = watch.since(start)
    print(f"{label}: agent grown by {grown / 2**20:+.1f} MiB to {rss_of(host) >> 20}; ", end="")
    print(f"longest stall {wall * 1e3:.0f} ms, {own * 1e3:.0f} ms of it computing")
    assert grown < ROOM, f"the agent has grown by {grown >> 20} MiB"
    assert own < STALL, f"the event loop computed for {own:.3f} s in one go"


@contextmanager
def unharmed(host: Host) -> Iterator[None]:
    """Around one case: the same processes, the same model from the slot, the same boot.json."""
    before = state_of(host)
    assert before.host == "slot"
    yield
    host.until(lambda: workers_of(host) == before.workers)  # those of a refused model take a moment to end
    assert state_of(host) == before
