"""Starting a process as an ordinary user, from a test that runs as root."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

UID = 4322
_KEEP_CAPS, _AMBIENT, _RAISE = 8, 47, 2
_READ_SEARCH = 2


def become(uid: int) -> Callable[[], None]:
    """For `preexec_fn`. Nothing of root is left but the right to read and search folders: Python itself may lie where
    others may not look (/root). It opens no memory, sends no signal, connects to no socket."""
    libc = ctypes.CDLL(None, use_errno=True)

    def change() -> None:
        libc.prctl(_KEEP_CAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        header, bit = (ctypes.c_uint32 * 2)(0x20080522, 0), 1 << _READ_SEARCH
        if libc.capset(header, (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)) != 0:
            os._exit(111)
        if libc.prctl(_AMBIENT, _RAISE, _READ_SEARCH, 0, 0) != 0:
            os._exit(112)

    return change
