"""`run_host.py` on a kernel that lacks a piece of the sandbox, as LACKS says: `landlock`, `seccomp` or both.

A filter of system calls stands in for that kernel: it answers as one would that has no such call.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import struct
from pathlib import Path

_LANDLOCK = (444, 445, 446)
_ENOSYS, _EINVAL = 38, 22
_PRCTL = {"x86_64": 157, "aarch64": 167}[os.uname().machine]
_SET_SECCOMP, _NO_NEW_PRIVS = 22, 38


def lack(*pieces: str) -> None:
    """From now on, for this process and its children."""
    load, equal, give = 0x20, 0x15, 0x06
    steps = [(load, 0, 0, 0)]
    if "landlock" in pieces:
        for number in _LANDLOCK:
            steps += [(equal, 0, 1, number), (give, 0, 0, 0x50000 | _ENOSYS)]
    if "seccomp" in pieces:
        steps += [(equal, 0, 3, _PRCTL), (load, 0, 0, 16), (equal, 0, 1, _SET_SECCOMP), (give, 0, 0, 0x50000 | _EINVAL)]
    steps.append((give, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    filters = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _SET_SECCOMP, ctypes.c_ulong(2), ctypes.c_ulong(ctypes.addressof(filters)), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the stand-in for an older kernel")


if __name__ == "__main__":
    lack(*os.environ["LACKS"].split(","))
    runpy.run_path(str(Path(__file__).with_name("run_host.py")), run_name="__main__")
