"""Where a request is parsed: here if that takes well under a millisecond or two, else in a child process.

What clients really send is read in place (`canonical`), whatever its size; the rest by the generated class.

protobuf holds Python's lock while it parses, so a thread would not keep the loop free: 4 MB of empty strings stop it
for 60 ms, 32 MiB of them for half a second.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import structlog

from agent.errors import Oversize, Unavailable
from agent.executor.spawn import step_back
from agent.model.protowire import read_varint
from agent.serving import handover
from agent.serving.forms import Form, Part
from agent.serving.h2.messages import in_turn
from agent.serving.tensorproto import Parsed, TooLarge
from agent.spawning import PASSED, Child, spawn

log = structlog.get_logger(__name__)

LARGE = 4 << 20
"""Bytes from which on a message, or the tensors it stands for, are made in the child."""
TIMEOUT = 10.0
"""Seconds that the child may take for one message."""


_RECORD_COST = 512
_BUDGET = 128 << 10


class Parser:
    """Parses requests without stopping the loop. `most`: bytes that the tensors of one request may take."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._child = _Child(most)
        self._closed = False
        # One thread: it owns the child, and messages take turns in it.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parse")
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Start the child, so that the first large message need not wait for it."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._child.start)

    async def parse(self, data: bytes | memoryview, form: Form, context: bytes = b"") -> Parsed:
        """The request in `data`; `context` is what its form needs to know besides.

        Raises InvalidInput, Overloaded, Unavailable, and what else its form refuses.
        """
        plain = form.plain(data, most=self._most, context=context)
        if plain is not None:
            return plain
        if len(data) <= LARGE and (len(data) <= form.small or is_light(data, form)):
            try:
                return form.read(data, most=min(self._most, LARGE), context=context)
            except TooLarge:
                if self._most <= LARGE:
                    raise
        if self._closed:
            raise Unavailable("slotd is stopping")
        return await in_turn(self._turn, self._thread, self._child.parse, data, form.number, context)

    async def close(self) -> None:
        """End the child; a message in it is given up."""
        self._closed = True
        self._child.stop()
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        await asyncio.to_thread(self._child.reap)


def is_light(data: bytes | memoryview, form: Form) -> bool:
    """Whether a request has few enough parts to be parsed at once.

    Only counts: nothing is taken from what it walks over, so that a message it reads otherwise than protobuf does is
    at worst parsed in the wrong place. Bounded itself: 256 records, ten bytes for a varint.
    """
    if form.parts is None:
        return False
    try:
        return _cost(data, 0, len(data), form.parts, 0) <= _BUDGET
    except (IndexError, ValueError):
        return False  # malformed, or groups: the child says what is wrong


def _cost(data: bytes | memoryview, at: int, end: int, part: Part, cost: int) -> int:
    while at < end and cost <= _BUDGET:
        cost += _RECORD_COST
        tag, at = read_varint(data, at)
        wire = tag & 7
        if wire == 2:
            size, at = read_varint(data, at)
            if size > end - at:
                raise ValueError("a length beyond its parent")
            inner = part.nested.get(tag >> 3)
            if inner is not None:
                cost = _cost(data, at, at + size, inner, cost)
            cost += size * part.costly.get(tag >> 3, 0)
            at += size
        elif wire == 0:
            at = read_varint(data, at)[1]
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError("a group")
    return cost


# --- the child -------------------------------------------------------------------------------------------------------


class _Child:
    """The process that parses, as its thread sees it; every method but `stop` blocks."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._process: Child | None = None
        self._socket: socket.socket | None = None
        self._stopped = False

    def start(self) -> socket.socket:
        """The socket to a running child. Raises Unavailable if there is to be none any more."""
        if self._socket is not None and self._process is not None and self._process.poll() is None:
            return self._socket
        if (exit_status := self._give_up()) is not None:
            log.warning("parse_child_died", exit=exit_status, idle=True)
        if self._stopped:
            raise Unavailable("slotd is stopping")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(TIMEOUT)
        argv = (sys.executable, "-I", "-m", "agent.serving.parse_child", str(PASSED), str(self._most))
        environment = {"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1", "LANG": "C.UTF-8"}
        try:
            with theirs:  # not under the lock, which the loop takes to stop it
                process = spawn(argv, env=environment, stdout=2, passed=theirs.fileno())
        except OSError:
            ours.close()
            raise
        step_back(process.pid)
        with self._lock:
            self._process, self._socket = process, ours
            stopped = self._stopped
        if stopped:
            self._give_up()
            raise Unavailable("slotd is stopping")
        return ours

    def parse(self, data: bytes | memoryview, form: int, context: bytes) -> Parsed:
        """The request in `data`, whose form has that number, from the child."""
        try:
            channel = self.start()
            with _Descriptor(os.memfd_create("request", os.MFD_CLOEXEC)) as request:
                handover.write_all(request, context, handover.write_all(request, data, 0))
                socket.send_fds(channel, [handover.TASK.pack(form, len(data), len(context))], [request])
            answer, descriptors, _, _ = socket.recv_fds(channel, handover.RECORD.size, 1)
        except OSError as error:  # includes the time-out
            log.warning("parse_child_lost", error=str(error), bytes=len(data))
            self._give_up()
            raise _lost() from error
        if len(descriptors) != 1:
            log.warning("parse_child_died", bytes=len(data), exit=self._give_up())
            raise _lost()
        with _Descriptor(descriptors[0]) as reply:
            return handover.read(reply, answer)

    def stop(self) -> None:
        """No more children; the thread that waits for one wakes up."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def reap(self) -> None:
        """After `stop` and the thread's end."""
        self._give_up()

    def _give_up(self) -> int | None:
        """End this child; the next message gets another one. Its exit status."""
        with self._lock:
            process, channel, self._process, self._socket = self._process, self._socket, None, None
        if channel is not None:
            channel.close()
        if process is None:
            return None
        process.kill()
        return process.wait()


class _Descriptor:
    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> int:
        return self._number

    def __exit__(self, *_: object) -> None:
        os.close(self._number)


def _lost() -> Oversize:
    return Oversize(
        "the request could not be parsed within the memory and the time that it may take",
        field="request",
        hint="send fewer or larger tensors; over HTTP, as bytes behind the JSON document",
    )
