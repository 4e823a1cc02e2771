"""Runs the programmer: a short-lived child that programs, checks or resets the slot, and nothing else (parent side).

The child gets one verified, read-only descriptor of the bitstream and opens no graph. It is reaped by its pidfd, so
no child watcher or SIGCHLD handler of the event loop has to know about it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from agent.errors import SlotdError, SlotError
from agent.executor.spawn import environment
from agent.spawning import PASSED, Child, start
from drivers.base import SlotState, Wanted

VERBS = ("program", "check", "reset-port", "reset-function")
MAX_MESSAGE = 64 * 1024
GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL."""
KILL_WAIT = 12.0
"""Seconds that a killed child may take: a programming ioctl can sit unkillable for the kernel's own 8 s."""
ARGV = (sys.executable, "-I", "-m", "agent.executor.programmer_child")

log = structlog.get_logger(__name__)
_stuck: set[_Child] = set()


async def run_programmer(
    driver: str,
    options: Mapping[str, Any],
    verb: str,
    *,
    bitstream: Path | None,
    wanted: Wanted,
    timeout: float,
    argv: Sequence[str] = ARGV,
) -> SlotState:
    """Do `verb` in a child of its own; what the slot says of itself afterwards.

    Raises SlotError: what the driver reported, PROGRAM_TIMEOUT after `timeout` seconds (the child is killed and reaped
    then, as it is on cancellation), DEVICE_STUCK if the child will not die, INCOMPATIBLE_BITSTREAM if the file is not
    the one whose sha256 is wanted, PROGRAM_FAILED if the child ends without a word.
    """
    if verb not in VERBS or (bitstream is None) == (verb in ("program", "check")):
        raise ValueError(f"verb {verb!r} with{'out' if bitstream is None else ''} a bitstream")
    request = {"driver": driver, "options": dict(options), "verb": verb, "wanted": asdict(wanted)}
    fd = None if bitstream is None else await _opened(bitstream, wanted.bitstream_sha256)
    try:
        child = await _Child.start(argv, {**request, "bitstream": None if fd is None else PASSED}, fd)
    finally:
        if fd is not None:
            os.close(fd)
    try:
        await asyncio.wait_for(asyncio.shield(child.ended), timeout)
        return child.answer(verb)
    except TimeoutError:
        await _to_the_end(child.kill())
        child.require_ended()
        raise SlotError(
            f"{verb} took longer than {timeout:g} s and was ended",
            code="PROGRAM_TIMEOUT",
            hint="if this slot needs longer, raise slot.program_timeout",
        ) from None
    except asyncio.CancelledError:
        await _to_the_end(child.kill())
        raise
    finally:
        child.let_go()


class _Child:
    """One programmer process, from its start until it is reaped."""

    def __init__(self, process: Child, channel: socket.socket) -> None:
        self._process, self._channel = process, channel
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(process.pid)
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)

    @classmethod
    async def start(cls, argv: Sequence[str], request: Mapping[str, Any], fd: int | None) -> _Child:
        """Raises SlotError if no process can be made."""
        message = json.dumps(request, default=str).encode()
        if len(message) > MAX_MESSAGE:
            raise SlotError(f"slot.options are larger than {MAX_MESSAGE} bytes", code="PROGRAM_FAILED")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process: Child | None = None
        try:
            with theirs:
                ours.setblocking(False)
                ours.send(message)
                # In a session of its own: a Ctrl-C meant for slotd must not cut a programming off.
                process = await start(argv, env=environment(), stdin=theirs.fileno(), passed=fd)
            return cls(process, ours)
        except BaseException as error:
            ours.close()
            if process is not None:
                process.kill()
                process.wait()
            if not isinstance(error, OSError):
                raise
            raise SlotError(f"the programmer cannot be started: {error}", code="PROGRAM_FAILED") from None

    def answer(self, verb: str) -> SlotState:
        """What the child said. Raises SlotError."""
        try:
            data = self._channel.recv(MAX_MESSAGE)
        except OSError:
            data = b""
        if not data:
            code = self._process.returncode or 0
            end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise SlotError(f"the programmer {end} during {verb} without saying why", code="PROGRAM_FAILED")
        document = json.loads(data)
        if "error" in document:
            error = document["error"]
            raise SlotError(error["message"], code=error["code"], hint=error["hint"])
        return SlotState(**document["state"])

    async def kill(self) -> None:
        """SIGTERM, SIGKILL, and a bounded wait for the end."""
        for number, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, KILL_WAIT)):
            if self.ended.done():
                return
            signal.pidfd_send_signal(self._pidfd, number)
            await asyncio.wait([self.ended], timeout=wait)

    def require_ended(self) -> None:
        """Raises SlotError DEVICE_STUCK."""
        if not self.ended.done():
            raise SlotError(
                f"the programmer (pid {self._process.pid}) sits in the kernel and cannot be killed",
                code="DEVICE_STUCK",
                hint="the device or its kernel driver hangs; this host needs a power cycle",
            )

    def let_go(self) -> None:
        """Nobody waits any more; a child that could not be killed is reaped whenever it ends."""
        self._channel.close()
        if not self.ended.done():
            log.error("programmer_stuck", pid=self._process.pid)
            _stuck.add(self)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        _stuck.discard(self)
        if not self.ended.done():
            self.ended.set_result(None)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await something short and bounded that must not be left half-done, whatever is cancelled meanwhile."""
    task = asyncio.create_task(work, name="programmer-kill")
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


async def _opened(path: Path, sha256: str | None) -> int:
    opening = asyncio.create_task(asyncio.to_thread(_open_verified, path, sha256), name="bitstream-hash")
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_result)  # the thread cannot be stopped; its descriptor must not be lost
        raise


def _close_result(opening: asyncio.Task[int]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())


def _open_verified(path: Path, sha256: str | None) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _unfit(path, f"cannot be opened: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _unfit(path, "is not a plain file")
        with open(fd, "rb", closefd=False) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 is not None and found != sha256:
            raise _unfit(path, f"has sha256 {found}, not {sha256}")
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise _unfit(path, f"cannot be read: {error.strerror}") from None
        raise
    return fd


def _unfit(path: Path, why: str) -> SlotdError:
    return SlotError(
        f"the bitstream {path.name} {why}",
        code="INCOMPATIBLE_BITSTREAM",
        hint="the unpacked model changed on disk; deploy it again",
    )
