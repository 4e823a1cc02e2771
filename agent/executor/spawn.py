"""Starts child processes; one of them before anybody knows what for.

That one imports what executors import while the agent imports its own, so that the committed model is loaded that much
earlier after a start. Standard library only, for that is the point.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple

from agent.spawning import Child, spawn, start

WORKER = (sys.executable, "-I", "-m", "agent.executor.worker")
EAGER = "eager"
"""The argument by which a worker does its imports before it is told what it is."""
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
# numpy would start threads as it is imported, and those would stay outside of the sandbox.
_OWN = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Spawned(NamedTuple):
    """A child that runs, our end of its channel, and a descriptor from which to read what it says; neither blocks."""

    child: Child
    channel: socket.socket
    words: int


_early: Spawned | None = None


def environment() -> dict[str, str]:
    """What a child knows of ours."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | _OWN


def pair() -> tuple[socket.socket, socket.socket]:
    """A channel: (the parent's end, which never blocks; the child's end)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def step_back(child: int) -> None:
    """A child is at nice 0 though the agent may be below: what computes for long goes behind what hands out answers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has just ended; it has another user by now
        if os.getpriority(os.PRIO_PROCESS, child) < 0:
            os.setpriority(os.PRIO_PROCESS, child, 0)


async def start_worker(argv: Sequence[str]) -> Spawned:
    """A child whose standard input is a channel: the one that was started ahead, if `argv` is what it runs, or a new
    one. Raises OSError."""
    return take_early(argv) or await start_new(argv)


async def start_new(argv: Sequence[str]) -> Spawned:
    """A new one. Raises OSError."""
    with _Ends() as ends:
        child = await start(argv, env=environment(), **ends.childs)
        return ends.keep(child)


def start_early() -> None:
    """Start one executor ahead of its task. If that fails, the one that is started later will say why."""
    global _early
    with contextlib.suppress(OSError), _Ends() as ends:
        _early = ends.keep(spawn((*WORKER, EAGER), env=environment(), **ends.childs))


class _Ends:
    """Both ends of a channel and of a pipe; the child's are closed at the end of `with`, ours unless they are kept."""

    def __init__(self) -> None:
        self._ours, self._theirs = pair()
        self._words, self._said = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._words, False)
        self._kept = False

    @property
    def childs(self) -> dict[str, int]:
        """What `spawn` takes."""
        return {"stdin": self._theirs.fileno(), "stdout": self._said, "stderr": self._said}

    def keep(self, child: Child) -> Spawned:
        step_back(child.pid)
        self._kept = True
        return Spawned(child, self._ours, self._words)

    def __enter__(self) -> _Ends:
        return self

    def __exit__(self, *_: object) -> None:
        self._theirs.close()
        os.close(self._said)
        if not self._kept:
            self._ours.close()
            os.close(self._words)


def take_early(argv: Sequence[str]) -> Spawned | None:
    """The one that was started ahead, if `argv` is what it runs and it is still there; it is the caller's then."""
    global _early
    if _early is None or tuple(argv) != WORKER:
        return None
    early, _early = _early, None
    if early.child.poll() is None:
        return early
    discard(early)
    return None


def drop_early() -> None:
    """Nobody needs it: it ends. Blocks for a moment."""
    global _early
    early, _early = _early, None
    if early is not None:
        discard(early)


def discard(spawned: Spawned) -> None:
    """It ends, and is forgotten. Blocks for a moment."""
    spawned.channel.close()
    os.close(spawned.words)
    spawned.child.kill()
    spawned.child.wait()
