"""Settings of a process that moves large messages and must not stand still; made before anything large is imported."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

# malloc.h of glibc: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX
_SETTINGS = ((-8, 1), (-3, 64 << 20), (-1, 512 << 20), (-2, 16 << 20))

_MLOCK_ONFAULT = 1  # mman.h
_MAPPED_CODE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-.p \S+ \S+ [1-9]\d* +/")

_TURN = 0.0005
"""Seconds. With Python's own 5 ms the loop would wait longer than an answer takes."""


def take_turns() -> None:
    """A thread that runs Python keeps the others waiting for half a millisecond at most."""
    sys.setswitchinterval(_TURN)


def tune_malloc() -> bool:
    """Keep freed memory for the next message instead of giving each one back to the kernel page by page.

    With glibc's defaults every message over 128 KiB is mapped and unmapped: more than half a million page faults for a
    thousand requests of 600 KB, and a third of the throughput. One arena, because the loop is one thread.
    Returns whether all of it took; False where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    taken = [mallopt(name, value) for name, value in _SETTINGS]
    return all(taken)


def keep_code() -> int:
    """What this process runs stays in memory once it was used, though a memory limit lets the kernel drop it.

    Else the loop waits for the disk in the middle of an answer, as soon as a model takes what is left. Returns the
    bytes of files that may stay; 0 where RLIMIT_MEMLOCK or the C library does not allow it. Source: mlock2(2).
    """
    try:
        mlock2 = ctypes.CDLL(None).mlock2
    except AttributeError:
        return 0
    mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
    kept = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if found := _MAPPED_CODE.match(line):
            start, end = (int(part, 16) for part in found.groups())
            kept += (end - start) * (mlock2(start, end - start, _MLOCK_ONFAULT) == 0)
    return kept
