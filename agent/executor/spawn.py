"""Starts child processes; one of them before anybody knows what for.

That one imports what executors import while the agent imports its own, so that the committed model is loaded that much
earlier after a start. Standard library only, for that is the point.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

WORKER = (sys.executable, "-I", "-m", "agent.executor.worker")
EAGER = "eager"
"""The argument by which a worker does its imports before it is told what it is."""
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
# numpy would start threads as it is imported, and those would stay outside of the sandbox.
_OWN = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Spawned(NamedTuple):
    """A child that runs, and a descriptor from which to read what it says; reading never blocks."""

    popen: subprocess.Popen[bytes]
    words: int


class Early(NamedTuple):
    """A child without a task yet; `socket` is our end of its channel."""

    socket: socket.socket
    spawned: Spawned


_early: Early | None = None


def environment() -> dict[str, str]:
    """What a child knows of ours."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | _OWN


def pair() -> tuple[socket.socket, socket.socket]:
    """A channel: (the parent's end, which never blocks; the child's end)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def spawn(argv: Sequence[str], channel: socket.socket) -> Spawned:
    """A child whose standard input is `channel`. Raises OSError."""
    words, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.set_blocking(theirs, True)
        popen = subprocess.Popen(
            tuple(argv),
            stdin=channel.fileno(),
            stdout=theirs,
            stderr=theirs,
            close_fds=True,
            start_new_session=True,  # a Ctrl-C is for the agent, which ends its children in order
            cwd="/",
            env=environment(),
        )
    except BaseException:
        os.close(words)
        raise
    finally:
        os.close(theirs)
    step_back(popen.pid)
    return Spawned(popen, words)


def step_back(child: int) -> None:
    """A child is at nice 0 though the agent may be below: what computes for long goes behind what hands out answers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has just ended; it has another user by now
        if os.getpriority(os.PRIO_PROCESS, child) < 0:
            os.setpriority(os.PRIO_PROCESS, child, 0)


def start_early() -> None:
    """Start one executor ahead of its task. If that fails, the one that is started later will say why."""
    global _early
    ours, theirs = pair()
    try:
        _early = Early(ours, spawn((*WORKER, EAGER), theirs))
    except OSError:
        ours.close()
    finally:
        theirs.close()


def take_early(argv: Sequence[str]) -> Early | None:
    """The one that was started ahead, if `argv` is what it runs and it is still there; it is the caller's then."""
    global _early
    if _early is None or tuple(argv) != WORKER:
        return None
    early, _early = _early, None
    if early.spawned.popen.poll() is None:
        return early
    _end(early)
    return None


def drop_early() -> None:
    """Nobody needs it: it ends. Blocks for a moment."""
    global _early
    early, _early = _early, None
    if early is not None:
        _end(early)


def _end(early: Early) -> None:
    early.socket.close()
    os.close(early.spawned.words)
    early.spawned.popen.kill()
    early.spawned.popen.wait()
