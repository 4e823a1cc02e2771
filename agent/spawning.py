"""Starts processes so that nobody waits for it: not the loop, and not Python's lock.

`subprocess` holds that lock until the child has begun its program, which is read from the disk; while memory is short
that takes as long as a hundred answers. posix_spawn(3), called through ctypes, does not.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from threading import Lock
from typing import TYPE_CHECKING, ParamSpec

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

P = ParamSpec("P")

PASSED = 3
"""The number that a passed descriptor has in the child."""
_NULL = os.fsencode(os.devnull)
# spawn.h, glibc 2.26 and later. The structures have 336 and 80 bytes there.
_SETSIGDEF, _SETSIGMASK, _SETSID = 0x04, 0x08, 0x80
_STRUCT = 1024
_SIGSET = 128
_UNKNOWN = 255
_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)
"""What Python ignores, and a program expects to have its effect."""
_libc = ctypes.CDLL(None)


class Child:
    """A process that was started here, until it is reaped here."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """As subprocess has it: the exit status, or minus the signal; None until it was reaped."""
        self._reaping = Lock()

    def poll(self) -> int | None:
        """Reaps it if it has ended, unless another thread waits for that; the return code."""
        if self._reaping.acquire(blocking=False):
            try:
                self._reap(os.WNOHANG)
            finally:
                self._reaping.release()
        return self.returncode

    def wait(self) -> int:
        """Blocks until it has ended; the return code."""
        with self._reaping:
            self._reap(0)
        assert self.returncode is not None
        return self.returncode

    def _reap(self, options: int) -> None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # somebody else has reaped it, and knows how it ended
                self.returncode = _UNKNOWN
                return
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # another thread has just reaped it
                os.kill(self.pid, signal.SIGKILL)


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int = 2,
    passed: int | None = None,
) -> Child:
    """A process in a session of its own, in /, with these descriptors and no others; None is /dev/null.

    `argv[0]` is an absolute path. `passed` is number PASSED in the child. Blocks without Python's lock until the child
    runs its program. Raises OSError.
    """
    actions, attributes = ctypes.create_string_buffer(_STRUCT), ctypes.create_string_buffer(_STRUCT)
    pid = ctypes.c_int()
    _checked(_libc.posix_spawn_file_actions_init(actions))
    try:
        for number, source, mode in ((0, stdin, os.O_RDONLY), (1, stdout, os.O_WRONLY), (2, stderr, 0)):
            if source is None:
                _checked(_libc.posix_spawn_file_actions_addopen(actions, number, _NULL, mode, 0))
            else:
                _checked(_libc.posix_spawn_file_actions_adddup2(actions, source, number))
        if passed is not None:
            _checked(_libc.posix_spawn_file_actions_adddup2(actions, passed, PASSED))
        # Python's own descriptors are closed by exec; this is for those of libraries. glibc 2.34 and later.
        if (close_from := getattr(_libc, "posix_spawn_file_actions_addclosefrom_np", None)) is not None:
            _checked(close_from(actions, PASSED + (passed is not None)))
        _checked(_libc.posix_spawn_file_actions_addchdir_np(actions, b"/"))
        _checked(_libc.posix_spawnattr_init(attributes))
        try:
            ignored, none = ctypes.create_string_buffer(_SIGSET), ctypes.create_string_buffer(_SIGSET)
            for number in _IGNORED:
                _libc.sigaddset(ignored, int(number))
            _checked(_libc.posix_spawnattr_setsigdefault(attributes, ignored))
            _checked(_libc.posix_spawnattr_setsigmask(attributes, none))
            flags = ctypes.c_short(_SETSIGDEF | _SETSIGMASK | _SETSID)
            _checked(_libc.posix_spawnattr_setflags(attributes, flags))
            _checked(
                _libc.posix_spawn(
                    ctypes.byref(pid),
                    os.fsencode(argv[0]),
                    actions,
                    attributes,
                    _strings(argv),
                    _strings([f"{name}={value}" for name, value in env.items()]),
                ),
                argv[0],
            )
        finally:
            _libc.posix_spawnattr_destroy(attributes)
    finally:
        _libc.posix_spawn_file_actions_destroy(actions)
    return Child(pid.value)


def _in_a_thread(work: Callable[P, Child]) -> Callable[P, Coroutine[None, None, Child]]:
    async def start(*arguments: P.args, **named: P.kwargs) -> Child:
        import asyncio  # the first child of all is started before there is time for it

        making = asyncio.get_running_loop().run_in_executor(_starter(), partial(work, *arguments, **named))
        cancelled = False
        while not making.done():
            try:
                await asyncio.wait([making])
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            if making.exception() is None:
                making.result().kill()
                _starter().submit(making.result().wait)
            raise asyncio.CancelledError
        return making.result()

    return start


start = _in_a_thread(spawn)
"""`spawn` in a thread. The descriptors stay the caller's, who may close them when this has ended, however it ends.

One that is cancelled leaves no process behind.
"""


@cache
def _starter() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1, thread_name_prefix="starts-children")


def _strings(values: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [os.fsencode(value) for value in values]
    if any(b"\0" in value for value in encoded):
        raise ValueError("a NUL in what a process is started with")
    return (ctypes.c_char_p * (len(encoded) + 1))(*encoded, None)


def _checked(error: int, name: str | None = None) -> None:
    if error:
        raise OSError(error, os.strerror(error), name)
