"""One child process of the agent: how it is watched, listened to and ended. No thread, no SIGCHLD handler."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from agent.executor.spawn import Spawned, discard

log = structlog.get_logger(__name__)

TAIL = 4096
"""Bytes of a child's last words that are kept for the error message."""
LINES_A_SECOND = 20.0
LINES_AT_ONCE = 100.0


@dataclass(frozen=True)
class Exit:
    """How a child ended: its exit code, or the signal that ended it; `stderr` is the end of what it wrote."""

    code: int | None
    signal: int | None
    stderr: str = ""

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit code {self.code}"
        try:
            return signal.Signals(self.signal).name
        except ValueError:
            return f"signal {self.signal}"


class Process:
    """A running child whose output goes to the log."""

    def __init__(self, spawned: Spawned, *, role: str, idle: bool, on_exit: Callable[[], None]) -> None:
        """`on_exit` is called once, when the child was reaped and `exit` is set. Raises OSError, and discards it."""
        self.role = role
        self.exit: Exit | None = None
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self._tail = b""
        self._line = b""
        self._allowance = LINES_AT_ONCE
        self._counted = self._loop.time()
        self._dropped = 0
        self._child, self._words = spawned.child, spawned.words
        self.pid = self._child.pid
        try:
            self._pidfd = os.pidfd_open(self.pid)  # our own unreaped child: the pid cannot be another's
        except OSError:
            discard(spawned)
            raise
        self._loop.add_reader(self._pidfd, self._ended)
        self._loop.add_reader(self._words, self._speaks)
        if idle:
            self.schedule(os.SCHED_IDLE)

    def schedule(self, policy: int) -> None:
        """Puts all of the child's threads under a scheduling policy; threads made later inherit it."""
        if self.exit is not None:
            return
        try:
            threads = os.listdir(f"/proc/{self.pid}/task")
        except FileNotFoundError:
            return  # it has just ended
        for thread in threads:
            try:
                os.sched_setscheduler(int(thread), policy, os.sched_param(0))
            except ProcessLookupError:
                continue  # this thread has
            except PermissionError:
                hint = "give the service LimitNICE=+0 or CAP_SYS_NICE"
                log.warning("priority_unchanged", role=self.role, pid=self.pid, hint=hint)
                return

    def signal(self, number: int) -> None:
        """Sends a signal, never to another process."""
        if self.exit is None:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass  # it has ended and is about to be reaped

    def _ended(self) -> None:
        info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        if info is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        for _ in range(64):  # what it said last; bounded, for a grandchild may hold the pipe and go on
            if not self._speaks():
                break
        self._hush()
        ended = info.si_code == os.CLD_EXITED
        self._child.returncode = info.si_status if ended else -info.si_status
        self.exit = Exit(
            info.si_status if ended else None, None if ended else info.si_status, self._tail.decode("utf-8", "replace")
        )
        self._on_exit()

    # --- what the child says ----------------------------------------------------------------------------------------

    def _speaks(self) -> bool:
        if self._words < 0:
            return False
        try:
            said = os.read(self._words, 65536)
        except BlockingIOError:
            return False
        if not said:
            self._hush()
            return False
        self._tail = (self._tail + said)[-TAIL:]
        *lines, self._line = (self._line + said).split(b"\n")
        self._line = self._line[-TAIL:]
        for line in lines:
            self._tell(line)
        return True

    def _tell(self, line: bytes) -> None:
        now = self._loop.time()
        self._allowance = min(LINES_AT_ONCE, self._allowance + (now - self._counted) * LINES_A_SECOND)
        self._counted = now
        if self._allowance < 1:
            self._dropped += 1
            return
        self._allowance -= 1
        if self._dropped:
            log.warning("child_lines_dropped", role=self.role, pid=self.pid, lines=self._dropped)
            self._dropped = 0
        text = line[:TAIL].decode("utf-8", "replace").rstrip()
        if text:
            log.info("child_says", role=self.role, pid=self.pid, line=text)

    def _hush(self) -> None:
        if self._words >= 0:
            self._loop.remove_reader(self._words)
            os.close(self._words)
            self._words = -1
            if self._line:
                self._tell(self._line)
                self._line = b""
