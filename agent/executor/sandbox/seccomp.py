"""A filter of system calls, written by hand for the kernel's classic BPF (seccomp(2), mode 2).

What is refused fails with EPERM, as for a process without the right to it: libraries have an answer to that, and what
they say of it is in the log. Only code for another machine (a 32-bit call) kills the child. New calls that slotd does
not know are ENOSYS, and so is clone3, whose flags a filter cannot read: the C library then uses clone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from agent.executor.sandbox import calls, kernel
from agent.executor.sandbox.grants import Grants

ALLOW, KILL = 0x7FFF0000, 0x80000000
_ERRNO = 0x00050000
_X32 = 0x40000000
_THREAD = 0x00010000
_NAMESPACES = 0x7E020080
_TYPE = 0xF
_UNIX, _INET, _INET6 = 1, 2, 10
_STREAM, _DGRAM = 1, 2
_OWNERS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals by way of a descriptor
_IOCTLS = (0x5412, 0x541C, 0x8901, 0x8902)  # TIOCSTI, TIOCLINUX; FIOSETOWN, SIOCSPGRP as above

_NR, _ARCH, _ARGS = 0, 4, 16
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06


@dataclass(frozen=True)
class Machine:
    """One architecture: its audit number, and which column of the table of calls it has."""

    audit: int
    column: int
    x32: bool = False


MACHINES = {"x86_64": Machine(0xC000003E, 0, x32=True), "aarch64": Machine(0xC00000B7, 1)}


def machine() -> Machine | None:
    """This one; None if its calls are not known."""
    return MACHINES.get(os.uname().machine)


def install(grants: Grants, *, signals: bool) -> bool:
    """Enter, for the calling thread and those that it starts; False where there are no filters. Raises OSError.

    `signals`: Landlock keeps signals in the sandbox, so that programs which were granted may be ended.
    """
    here = machine()
    if here is None or not kernel.has_seccomp():
        return False
    code = program(here, grants, os.getpid(), signals=signals)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    filters = ctypes.create_string_buffer(head, len(head))
    kernel.prctl(kernel.PR_SET_SECCOMP, 2, ctypes.addressof(filters))
    return True


def program(here: Machine, grants: Grants, pid: int, *, signals: bool) -> bytes:
    """The filter of one child as the kernel takes it: 8 bytes for each instruction."""
    rules: list[list[_Step]] = []

    def each(table: Mapping[str, tuple[int | None, int | None]], *body: _Step) -> None:
        for numbers in table.values():
            number = numbers[here.column]
            if number is not None:
                rules.append([_when(number, len(body)), *body])

    each(calls.DENIED, _refuse(errno.EPERM))
    each(calls.SOCKETS, _refuse(errno.EPERM))
    if not (grants.network or grants.unix):
        each({**calls.CONNECT, **calls.SOCKET}, _refuse(errno.EPERM))
    else:
        each(calls.SOCKET, *_sockets(grants))
    each(calls.CLONE3, _refuse(errno.ENOSYS))
    if grants.execute:
        each(calls.CLONE, *_unless_any(0, _NAMESPACES))
    else:
        each(calls.PROGRAMS, _refuse(errno.EPERM))
        each(calls.CLONE, *_threads())
    if not (grants.execute and signals):
        each(calls.SIGNALS, *_only(0, pid))
    each(calls.ITSELF, *_only(0, 0, pid))
    for (_, numbers), kind in zip(calls.ITSELF_BY_KIND.items(), (0, 1), strict=True):
        each({"": numbers}, _load(0), (_EQUAL, 1, 0, kind), _refuse(errno.EPERM), *_only(1, 0, pid))
    each(calls.FCNTL, *_none_of(1, *_OWNERS))
    each(calls.IOCTL, *_none_of(1, *_IOCTLS))

    steps = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, here.audit), (_RETURN, 0, 0, KILL), (_LOAD, 0, 0, _NR)]
    if here.x32:
        steps += [(_AT_LEAST, 0, 1, _X32), _refuse(errno.EPERM)]
    steps += [(_AT_LEAST, 0, 1, calls.LAST + 1), _refuse(errno.ENOSYS)]
    steps += [step for rule in rules for step in rule]
    steps.append(_ALLOWED)
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


# --- instructions: (code, jump if true, jump if false, value) --------------------------------------------------------
# Every body ends with a return, so that what follows can count on the call's number being loaded.

_Step = tuple[int, int, int, int]
_ALLOWED: _Step = (_RETURN, 0, 0, ALLOW)


def _refuse(code: int) -> _Step:
    return (_RETURN, 0, 0, _ERRNO | code)


def _load(argument: int) -> _Step:
    """The lower half, which is all that the kernel reads of an int; both machines are little-endian."""
    return (_LOAD, 0, 0, _ARGS + 8 * argument)


def _when(number: int, length: int) -> _Step:
    return (_EQUAL, 0, length, number)


def _only(argument: int, *values: int) -> Iterator[_Step]:
    yield _load(argument)
    for place, value in enumerate(values):
        yield (_EQUAL, len(values) - place, 0, value)
    yield _refuse(errno.EPERM)
    yield _ALLOWED


def _none_of(argument: int, *values: int) -> Iterator[_Step]:
    yield _load(argument)
    for place, value in enumerate(values):
        yield (_EQUAL, len(values) - place, 0, value)
    yield _ALLOWED
    yield _refuse(errno.EPERM)


def _unless_any(argument: int, bits: int) -> Iterator[_Step]:
    yield _load(argument)
    yield (_ANY_BIT, 0, 1, bits)
    yield _refuse(errno.EPERM)
    yield _ALLOWED


def _threads() -> Iterator[_Step]:
    """A thread of its own, never a process."""
    yield _load(0)
    yield (_ANY_BIT, 1, 0, _THREAD)
    yield _refuse(errno.EPERM)
    yield from _unless_any(0, _NAMESPACES)


def _sockets(grants: Grants) -> Iterator[_Step]:
    """Streams and datagrams of the families that were granted; no raw ones."""
    families = ([_INET, _INET6] if grants.network else []) + ([_UNIX] if grants.unix else [])
    yield _load(0)
    for place, family in enumerate(families):
        yield (_EQUAL, len(families) - place, 0, family)
    yield _refuse(errno.EPERM)
    yield _load(1)
    yield (_AND, 0, 0, _TYPE)
    yield (_EQUAL, 2, 0, _STREAM)
    yield (_EQUAL, 1, 0, _DGRAM)
    yield _refuse(errno.EPERM)
    yield _ALLOWED
