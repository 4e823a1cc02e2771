"""One call: what its handler sees of it, how it ends, and what that is on the wire."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from agent.errors import DeadlineExceeded, InvalidInput, Overloaded, SlotdError, Unavailable
from agent.serving.h2.headers import Headers, write
from agent.serving.h2.messages import Assembler, Message

MAX_TEXT = 1000
"""Bytes of each text of an error: clients take 8 KiB of headers, and a byte beyond ASCII becomes three."""
STATUS = {
    "OK": 0,
    "CANCELLED": 1,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "UNAUTHENTICATED": 16,
}
"""Source: statuscodes.md of the gRPC project."""

_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_HTTP_OK = b"\x88"  # the indexed field `:status: 200`
RESPONSE = _HTTP_OK + write([("content-type", b"application/grpc"), ("grpc-accept-encoding", b"identity,deflate,gzip")])

Metadata = tuple[tuple[str, str], ...]
Reply = bytes | memoryview
Unary = Callable[["bytes | memoryview", "Call"], Awaitable[Reply]]
Streaming = Callable[["Call"], Awaitable[None]]


@dataclass(frozen=True)
class Method:
    """What answers a path: one message for one message, or whatever the handler receives and sends."""

    unary: Unary | None = None
    streaming: Streaming | None = None
    most: int = 1 << 32
    """Bytes of a message, if that is less than what the server takes."""


QUESTION = 16 << 10
"""Bytes of a message that carries no tensors: the generated classes read as much in well under a millisecond."""

Routes = Mapping[str, Method]


class Call:
    """One call. Handlers use `metadata`, `time_remaining`, `trailing`, and streaming ones `receive` and `send`; the
    rest belongs to the connection."""

    __slots__ = (
        "assembler",
        "deadline",
        "encoding",
        "half_closed",
        "headers_sent",
        "metadata",
        "method",
        "moved",
        "number",
        "open",
        "out",
        "path",
        "peer",
        "reason",
        "receivable",
        "send",
        "taken",
        "task",
        "trailers",
        "trailing",
        "unpacked",
        "waiter",
        "window",
    )

    def __init__(self, number: int, headers: Headers, peer: str, window: int, assembler: Assembler) -> None:
        self.number = number
        self.metadata: Metadata = headers.metadata
        self.encoding = headers.encoding
        self.peer = peer
        self.path = headers.path
        self.deadline: float | None = None
        """Of the monotonic clock."""
        self.trailing: Metadata = ()
        """Metadata that goes out behind a good answer."""
        self.method = Method()
        self.assembler = assembler
        self.half_closed = False
        """The client has sent all that it will."""
        self.open = True
        self.headers_sent = False
        self.window = window
        self.receivable = 0
        """Bytes that the client may still send on this stream."""
        self.out: deque[bytes | memoryview] = deque()
        self.trailers: bytes | None = None
        self.task: asyncio.Task[None] | None = None
        self.reason: SlotdError | None = None
        """Why the task is cancelled, if not because the client has gone."""
        self.waiter: asyncio.Future[None] | None = None
        self.moved = time.monotonic()
        """When something of it was last received or sent."""
        self.send: Callable[[Reply], Awaitable[None]] = _not_streaming
        self.unpacked: Callable[[Message], Awaitable[bytes]] = _not_packed
        """For a streaming handler: the bytes of a packed message."""
        self.taken: Callable[[int], None] = _nothing
        """Told of each message that the handler takes, and its size: the client may send as much again."""

    def time_remaining(self) -> float | None:
        """Seconds, None if the client set no deadline."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    async def receive(self) -> Message | None:
        """The next message, None when the client has sent its last. Raises InvalidInput."""
        while not self.assembler.ready:
            if self.half_closed:
                if self.assembler.partial:
                    raise InvalidInput("the last message is cut short", field="request")
                return None
            await self.wait()
        message = self.assembler.ready.pop(0)
        self.taken(len(message.data))
        return message

    async def wait(self) -> None:
        """Until something has come or gone."""
        self.waiter = asyncio.get_running_loop().create_future()
        await self.waiter

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


async def _not_streaming(_: Reply) -> None:
    raise AssertionError("a unary handler returns its answer")


async def _not_packed(_: Message) -> bytes:
    raise AssertionError("only streams unpack for themselves")


def _nothing(_: int) -> None:
    pass


def timeout_of(text: str) -> float:
    """Seconds of a `grpc-timeout`. Raises InvalidInput."""
    found = re.fullmatch(r"([0-9]{1,8})([HMSmun])", text)
    if not found:
        raise InvalidInput("must be up to eight digits and one of H, M, S, m, u and n", field="grpc-timeout")
    return int(found[1]) * _UNITS[found[2]]


def late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before there was an answer")


@lru_cache(maxsize=256)
def good_trailers(metadata: Metadata) -> bytes:
    """The header block behind a good answer; a model's are the same for each."""
    return write([("grpc-status", b"0"), *((name, value.encode("ascii")) for name, value in metadata)])


def error_trailers(error: SlotdError, more: Metadata = ()) -> bytes:
    """The header block that tells of an error, without the response's own."""
    fields = [
        ("grpc-status", str(STATUS[error.grpc]).encode()),
        ("grpc-message", _percent(_cut(str(error)))),
        ("slotd-error-code", error.code.encode("ascii")),
    ]
    if error.field:
        fields.append(("slotd-error-field", _plain(error.field)))
    if error.hint:
        fields.append(("slotd-error-hint", _plain(error.hint)))
    if error.retry_after is not None and isinstance(error, Overloaded | Unavailable):
        wait = str(max(1, round(error.retry_after * 1000))).encode()
        # The first is for people and scripts, the second is what gRPC's own retries obey.
        fields += [("retry-pushback-ms", wait), ("grpc-retry-pushback-ms", wait)]
    return write([*fields, *((name, _plain(value)) for name, value in more)])


def _cut(text: str) -> str:
    """At most MAX_TEXT bytes of it."""
    return text.encode()[:MAX_TEXT].decode(errors="ignore")


def _percent(text: str) -> bytes:
    """As `grpc-message` goes over the wire: what is not printable ASCII, and %, as %XX."""
    return b"".join(
        bytes((byte,)) if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte
        for byte in text.encode(errors="replace")
    )


def _plain(text: str) -> bytes:
    """As a metadata value may be: printable ASCII."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:MAX_TEXT]).strip().encode()
