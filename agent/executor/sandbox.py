"""What a child gives up before it reads a byte of an image."""

from __future__ import annotations

import ctypes
import os
import resource

MAX_FILES = 256
_PR_SET_NO_NEW_PRIVS = 38


def isolate_descriptors(channel: int) -> None:
    """Move the channel, which came as standard input, to its place, and close everything else but output."""
    os.dup2(0, channel, inheritable=False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.closerange(channel + 1, 1 << 20)  # close_range(2); `null` too, unless it has the channel's number


def enter(memory: int) -> None:
    """No new privileges, no core, few files, private files, at most `memory` bytes of private memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
    os.umask(0o077)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, MAX_FILES)
    _limit(resource.RLIMIT_DATA, memory)


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))
