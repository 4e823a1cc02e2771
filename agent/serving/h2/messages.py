"""gRPC's messages out of the bytes of DATA frames. Source: "gRPC over HTTP2", Length-Prefixed-Message."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from agent.errors import InvalidInput, Overloaded, Oversize, Unimplemented

T = TypeVar("T")

PREFIX = 5
WAITING = 1000
"""Messages of one stream that may wait for its handler."""
_COPIED = 64 << 10
"""A message of up to so many bytes is copied once; a larger one is received where it stays."""
_PAGE = 2 << 20
"""The kernel may give a large message its memory in pages of this size: they are paid for before they are touched."""


class Room:
    """Bytes that all requests in hand may take together."""

    def __init__(self, size: int) -> None:
        self.free = size

    def take(self, size: int) -> None:
        """Raises Overloaded."""
        if size > self.free:
            raise Overloaded("too many bytes of requests are in hand", retry_after=0.1)
        self.free -= size

    def give(self, size: int) -> None:
        self.free += size


@dataclass(slots=True)
class Message:
    data: bytes | memoryview
    compressed: bool = False


class Assembler:
    """The messages of one stream. `held`: the bytes of `room` that they have taken so far."""

    __slots__ = ("_compressed", "_filled", "_large", "_most", "_paid", "_prefix", "_room", "_size", "held", "ready")

    def __init__(self, most: int, room: Room) -> None:
        self._most = most
        self._room = room
        self._prefix = b""
        self._size = -1
        self._compressed = False
        self._large: memoryview | None = None
        self._filled = self._paid = 0
        self.held = 0
        self.ready: list[Message] = []

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._prefix) or self._size >= 0

    def feed(self, view: memoryview) -> None:
        """The next bytes. Raises Overloaded, InvalidInput: the stream is of no use then."""
        at, end = 0, len(view)
        while at < end:
            if self._size < 0:
                missing = PREFIX - len(self._prefix)
                self._prefix += bytes(view[at : at + missing])
                at += missing
                if len(self._prefix) < PREFIX:
                    return
                self._begin()
                if self._size < 0:  # an empty one, which is whole already
                    continue
            take = min(self._size - self._filled, end - at)
            if self._large is None and take == self._size:
                self._pay(take)
                self._finish(bytes(view[at : at + take]))
            else:
                if self._large is None:
                    # Not zeroed: bytes that are not received are never looked at.
                    self._large = np.empty(self._size, np.uint8).data
                self._pay(self._filled + take)
                self._large[self._filled : self._filled + take] = view[at : at + take]
                self.landed(take)
            at += take

    def target(self) -> memoryview | None:
        """Where the next bytes belong, if that is one place for many of them; tell `landed` how many came."""
        if self._large is None or self._paid - self._filled < _COPIED:
            return None
        return self._large[self._filled : self._paid]

    def landed(self, count: int) -> None:
        """So many bytes were put into the target, or behind what was there."""
        self._filled += count
        if self._filled == self._size and self._large is not None:
            self._finish(self._large if self._size > _COPIED else bytes(self._large))

    def _begin(self) -> None:
        flag, self._size = self._prefix[0], int.from_bytes(self._prefix[1:], "big")
        self._prefix = b""
        if flag > 1:
            raise InvalidInput("the message's first byte is neither 0 nor 1", field="request")
        if self._size > self._most:
            raise Overloaded(
                f"a message of {self._size} bytes; at most {self._most} are taken",
                field="request",
                hint="send a smaller batch, or have serving.grpc.max_message raised",
            )
        if len(self.ready) >= WAITING:
            raise Overloaded(f"{WAITING} messages of this call are waiting already", retry_after=0.1)
        self._compressed = flag == 1
        self._filled = self._paid = 0
        if self._size == 0:
            self._finish(b"")

    def _finish(self, data: bytes | memoryview) -> None:
        self.ready.append(Message(data, self._compressed))
        self._size, self._large = -1, None

    def _pay(self, filled: int) -> None:
        """For so many bytes of this message, and for those that come with them in a page."""
        if filled > self._paid:
            paid = min(self._size, -(-filled // _PAGE) * _PAGE)
            self._room.take(paid - self._paid)
            self.held += paid - self._paid
            self._paid = paid


async def in_turn(lock: asyncio.Lock, executor: Executor | None, work: Callable[..., T], *arguments: Any) -> T:
    """`work` in a thread, one at a time.

    Who waits and is cancelled leaves nothing in the executor's queue; what runs keeps its turn until it has ended.
    """
    await lock.acquire()
    try:
        job = asyncio.get_running_loop().run_in_executor(executor, work, *arguments)
    except BaseException:
        lock.release()
        raise

    def ended(job: asyncio.Future[T]) -> None:
        lock.release()
        if not job.cancelled():
            job.exception()  # told to who waits; nobody may

    job.add_done_callback(ended)
    return await asyncio.shield(job)


def unpack(data: bytes | memoryview, encoding: str, most: int) -> bytes:
    """A compressed message; blocking. `encoding`: gzip or deflate. Raises InvalidInput, Overloaded, Unimplemented."""
    if encoding not in ("gzip", "deflate"):
        raise Unimplemented(
            f"messages packed with {encoding[:50]!r} are not taken", hint="use gzip, deflate or identity"
        )
    machine = zlib.decompressobj(zlib.MAX_WBITS | 16 if encoding == "gzip" else zlib.MAX_WBITS)
    try:
        unpacked = machine.decompress(data, most + 1)
    except zlib.error as error:
        raise InvalidInput(f"the message cannot be unpacked: {error}", field="request") from None
    if len(unpacked) > most:
        raise Oversize(f"a message of more than {most} bytes when unpacked", field="request")
    if not machine.eof or machine.unused_data:
        raise InvalidInput("the packed message is cut short, or has more behind its end", field="request")
    return unpacked
