"""Into the sandbox, in an order in which no step takes away what the next one needs."""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import dataclass
from typing import Any

from agent.executor.sandbox import kernel, landlock, seccomp
from agent.executor.sandbox.grants import Grants

MAX_FILES = 256
OOM_SCORE = 500
"""When memory runs out, a child goes before the agent."""


@dataclass(frozen=True)
class Limits:
    """What a child may use up. Threads are bounded by memory, in which each needs its stack; processes there are none.

    Sizes in bytes. `file_size` bounds each file and memfd (default: `memory`).
    """

    memory: int
    files: int = MAX_FILES
    file_size: int | None = None


def isolate_descriptors(channel: int) -> None:
    """Move the channel, which came as standard input, to its place, and close everything else but output."""
    os.dup2(0, channel, inheritable=False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.closerange(channel + 1, 1 << 20)  # close_range(2); `null` too, unless it has the channel's number


def enter(limits: Limits, grants: Grants, *, umask: int = 0o077) -> dict[str, Any]:
    """For the rest of this process's life. What is in force: `landlock` (ABI, 0: none), `seccomp`, `lacks`.

    What a kernel does not have is left out and told. Raises OSError if a step fails otherwise, RuntimeError if there
    are threads already: they would stay outside.
    """
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{threads} threads were started before the sandbox was entered")
    os.umask(umask)
    _prefer_to_kill()
    for which, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, limits.files),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_FSIZE, limits.memory if limits.file_size is None else limits.file_size),
        (resource.RLIMIT_DATA, limits.memory),
    ):
        _limit(which, value)
    for folder in grants.write:
        # Whoever writes there will say what is wrong with it. Never its parents: a child whose agent was killed must
        # not bring back what has been removed since.
        with contextlib.suppress(OSError):
            os.mkdir(folder, mode=0o700)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if grants.capabilities is not None:
        kernel.drop_capabilities(grants.capabilities)
    abi, files = landlock.restrict(grants)
    filters = seccomp.install(grants, signals=files and abi >= 6)
    kernel.withhold_memory()
    return kernel.report(abi, filters, files=files)


def _prefer_to_kill() -> None:
    # Raising it needs no right. Where /proc is not writable, or the unit has set more, it stays as it is.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+") as file:
        if int(file.read()) < OOM_SCORE:
            file.seek(0)
            file.write(str(OOM_SCORE))


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))
