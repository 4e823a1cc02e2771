"""The kernel's doors: prctl(2), capset(2), syscall(2) through ctypes, and what of the sandbox this kernel has."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_GET_SECCOMP, PR_SET_SECCOMP = 3, 4, 21, 22
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 24, 38, 47
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every machine

_VERSION_FLAG = 1
_FILTER = 2
_AMBIENT_CLEAR_ALL = 4
_CAPABILITIES_3 = 0x20080522
_ABSENT = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def prctl(option: int, *values: int) -> int:
    """prctl(2). Raises OSError."""
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    result: int = _libc.prctl(ctypes.c_int(option), *padded)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")
    return result


def syscall(number: int, *values: Any) -> int:
    """syscall(2); whole numbers go as long, anything else as ctypes has it. Raises OSError."""
    result: int = _libc.syscall(
        ctypes.c_long(number), *(ctypes.c_long(value) if isinstance(value, int) else value for value in values)
    )
    if result < 0:
        raise OSError(ctypes.get_errno(), f"syscall {number}: {os.strerror(ctypes.get_errno())}")
    return result


def drop_capabilities(keep: tuple[int, ...]) -> None:
    """Give up all capabilities but these, for ever. Changes nothing for a process that has none."""
    try:
        prctl(PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL)
        for number in range(64):
            if number not in keep:
                prctl(PR_CAPBSET_DROP, number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM):  # beyond the kernel's last; not ours to drop
            raise
    held = _effective()
    bits = sum(1 << number for number in keep) & held
    words = (ctypes.c_uint32 * 6)(bits & 0xFFFFFFFF, bits & 0xFFFFFFFF, 0, bits >> 32, bits >> 32, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
    if _libc.capset(header, words) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _effective() -> int:
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
    words = (ctypes.c_uint32 * 6)()
    if _libc.capget(header, words) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    return int(words[1]) & int(words[0]) | (int(words[4]) & int(words[3])) << 32


def withhold_memory() -> None:
    """Not dumpable: no process of the same user may read or trace this one, and it leaves no core."""
    prctl(PR_SET_DUMPABLE, 0)


def is_withheld() -> bool:
    """Whether `withhold_memory` is in force."""
    return prctl(PR_GET_DUMPABLE) != 1


def landlock_abi() -> int:
    """The version of Landlock; 0 where there is none, or where a container withholds it."""
    try:
        return syscall(LANDLOCK_CREATE_RULESET, None, 0, _VERSION_FLAG)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        return 0


def has_seccomp() -> bool:
    """Whether filters of system calls can be set, and we know this machine's calls."""
    from agent.executor.sandbox.seccomp import machine

    if machine() is None:
        return False
    try:
        prctl(PR_GET_SECCOMP)
        prctl(PR_SET_SECCOMP, _FILTER, 0)  # no filter at all: EFAULT where filters are known
    except OSError as error:
        return error.errno == errno.EFAULT
    return False


def probe() -> dict[str, Any]:
    """What this kernel gives the sandbox, without entering it; `lacks` names the pieces that are not there."""
    abi, filters = landlock_abi(), has_seccomp()
    return report(abi, filters)


def report(abi: int, filters: bool, *, files: bool = True) -> dict[str, Any]:
    """What is in force; `files`: whether Landlock's rules for files are (they are not for writers before ABI 2)."""
    lacks = [name for name, there in (("landlock", abi > 0 and files), ("seccomp", filters)) if not there]
    return {"landlock": abi if files else 0, "seccomp": filters, "lacks": lacks}
