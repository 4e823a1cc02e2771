"""One client over HTTP/1.1: requests one after the other, each within its bounds of size and time.

httptools (llhttp, Node's parser) reads the requests. Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import unquote

import httptools
import numpy as np
import structlog

from agent.errors import DeadlineExceeded, InvalidInput, Overloaded, Oversize, SlotdError
from agent.serving.h2.messages import Room
from agent.serving.http.messages import Answer, Body, Request, Response, error_response

log = structlog.get_logger(__name__)

MAX_HEAD = 32 << 10
"""Bytes of a request line and its headers."""
MAX_FIELDS = 100
CHUNKED = 4 << 20
"""Bytes of a body whose length is not told before: it is put together at the end."""
PIPELINED = 16
"""Requests that may come before the one before them is answered."""
IDLE = 75.0
"""Seconds that a connection may do nothing."""
HEAD_TIME = 10.0
"""Seconds for a request's head, once it has begun."""
BODY_TIME = 20.0
BODY_RATE = 64 << 10
"""Bytes each second that a body must have, beyond BODY_TIME."""
READ_TIME = 30.0
"""Seconds in which a client must take something of its answer."""
LINGER = 2.0
"""Seconds for a client to read why the rest of its request is not wanted."""
_SMALL = 64 << 10
"""Bytes of a body that is read to its end though the request is refused."""
_PAGE = 2 << 20
_HIGH = 1 << 20


@dataclass
class Shared:
    """What all connections have in common. `room`: bytes that all requests in hand may take."""

    answer: Answer
    room: Room
    most: int
    """Bytes of a body."""
    guard: Callable[[str, Iterable[tuple[str, str]]], None]
    """Given a path and the headers; raises Unauthenticated."""
    connections: set[Connection] = field(default_factory=set)
    draining: bool = False

    def tick(self) -> None:
        """Once a second."""
        now = time.monotonic()
        for connection in tuple(self.connections):
            connection.tick(now)


class _Incoming:
    """A request that is being received. `held`: bytes of the room that its body has taken."""

    __slots__ = (
        "begun",
        "body",
        "chunks",
        "fields",
        "filled",
        "headers",
        "held",
        "keep",
        "length",
        "method",
        "refused",
        "url",
    )

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.method = ""
        self.url = b""
        self.headers: dict[str, str] = {}
        self.fields = 0
        self.length: int | None = None
        self.body: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self.chunks: list[bytes] = []
        self.filled = 0
        self.held = 0
        self.keep = False
        self.refused: SlotdError | None = None
        """Why it is not answered; its body is read and thrown away."""

    def whole(self) -> Body:
        """The body."""
        if self.body is not None:
            return self.body.data
        return self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)


class Connection(asyncio.Protocol):
    """`admitted` says whether there may be one more; `gone` is told at the end of one that was."""

    def __init__(self, shared: Shared, admitted: Callable[[], bool], gone: Callable[[], None]) -> None:
        self._shared = shared
        self._admitted, self._gone = admitted, gone
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._counted = False
        self._in: _Incoming | None = None
        self._in_head = False
        self._head = 0
        self._waiting: deque[_Incoming] = deque()
        self._task: asyncio.Task[None] | None = None
        self._moved = time.monotonic()
        self._unsent = 0
        self._closing_at: float | None = None
        self._drained: asyncio.Future[None] | None = None
        self._reason: SlotdError | None = None
        """Why the task is cancelled, if not because the client has gone."""

    # --- the transport's ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's class
        self._transport = transport
        if self._shared.draining or not self._admitted():
            transport.abort()
            return
        self._counted = True
        transport.set_write_buffer_limits(_HIGH)
        self._shared.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._shared.connections.discard(self)
        if self._counted:
            self._gone()
        if self._in is not None:
            self._give(self._in)
        for incoming in self._waiting:
            self._give(incoming)
        self._in = None
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._closing_at is not None:
            return  # nobody listens any more
        self._moved = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._end(InvalidInput("connections are not upgraded", field="upgrade", hint="speak HTTP/1.1"))
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if isinstance(cause, SlotdError):
                self._end(cause)
            else:
                log.error("http_fault", exc_info=cause)
                self._end(SlotdError("an unforeseen fault; the log has the details"))
        except httptools.HttpParserError as error:
            self._end(InvalidInput(f"this is no HTTP/1.1: {error}", field="request"))
        else:
            if self._in is not None and self._in_head:
                self._head += len(data)
                if self._head > 2 * MAX_HEAD:
                    self._end(_head_too_large())

    def pause_writing(self) -> None:
        if self._drained is None:
            self._drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    # --- the parser's -------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._in = _Incoming()
        self._in_head = True
        self._head = 0

    def on_url(self, url: bytes) -> None:
        assert self._in is not None
        self._in.url += url
        self._bounded(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        incoming = self._in
        assert incoming is not None
        incoming.fields += 1
        self._bounded(len(name) + len(value))
        if incoming.fields > MAX_FIELDS:
            raise _head_too_large()
        key, text = name.decode("latin-1").lower(), value.decode("latin-1").strip()
        if key in incoming.headers and key in ("authorization", "content-length", "host", "transfer-encoding"):
            raise InvalidInput("is given twice", field=key)
        before = incoming.headers.get(key)
        incoming.headers[key] = text if before is None else f"{before}, {text}"

    def on_headers_complete(self) -> None:
        incoming = self._in
        assert incoming is not None
        self._in_head = False
        incoming.method = self._parser.get_method().decode("ascii")
        incoming.keep = bool(self._parser.should_keep_alive())
        length = incoming.headers.get("content-length")
        chunked = "transfer-encoding" in incoming.headers
        if length is not None:
            incoming.length = int(length)  # the parser has seen that it is a number
        try:
            self._wanted(incoming)
        except SlotdError as error:
            if chunked or (incoming.length or 0) > _SMALL:
                raise
            incoming.refused = error
        expects = incoming.headers.get("expect", "").lower() == "100-continue"
        if expects and incoming.refused is None and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        incoming = self._in
        assert incoming is not None
        if incoming.refused is not None:
            return
        filled = incoming.filled + len(data)
        if incoming.length is None:
            if filled > min(CHUNKED, self._shared.most):
                raise Overloaded(
                    f"a body of more than {CHUNKED} bytes whose length is not told",
                    field="transfer-encoding",
                    hint="send Content-Length",
                )
            self._pay(incoming, filled)
            incoming.chunks.append(data)
        else:
            self._pay(incoming, min(incoming.length, -(-filled // _PAGE) * _PAGE))
            if incoming.body is None and filled == incoming.length:
                incoming.chunks.append(data)  # all of it at once
            else:
                if incoming.body is None:
                    # Not zeroed: bytes that are not received are never looked at.
                    incoming.body = np.empty(incoming.length, np.uint8)
                incoming.body[incoming.filled : filled] = np.frombuffer(data, np.uint8)
        incoming.filled = filled

    def on_message_complete(self) -> None:
        incoming, self._in = self._in, None
        assert incoming is not None
        if self._task is not None:
            if len(self._waiting) >= PIPELINED:
                self._give(incoming)
                raise Overloaded(f"{PIPELINED} requests of this connection wait already")
            if self._transport is not None:
                self._transport.pause_reading()
        self._waiting.append(incoming)
        self._next()

    # --- requests -----------------------------------------------------------------------------------------------------

    def _wanted(self, incoming: _Incoming) -> None:
        """Raises SlotdError for a request whose body need not be read."""
        if "host" not in incoming.headers and self._parser.get_http_version() == "1.1":
            raise InvalidInput("is missing", field="host")
        self._shared.guard(_path(incoming.url), incoming.headers.items())
        if incoming.length is not None and incoming.length > self._shared.most:
            raise Oversize(
                f"a body of {incoming.length} bytes; at most {self._shared.most} are taken",
                field="content-length",
                hint="send a smaller batch, or have serving.grpc.max_message raised",
            )

    def _next(self) -> None:
        if self._task is None and self._waiting and self._transport is not None:
            incoming = self._waiting.popleft()
            if not self._waiting:
                self._transport.resume_reading()
            self._task = asyncio.create_task(self._serve(incoming), name="http")

    async def _serve(self, incoming: _Incoming) -> None:
        keep = incoming.keep and not self._shared.draining
        try:
            response = await self._answered(incoming)
            keep = keep and not self._shared.draining
            await self._send(response, keep=keep, head=incoming.method == "HEAD")
        except asyncio.CancelledError:
            keep = False
            if self._reason is None:  # the client has gone
                raise
            self._end(self._reason)
        finally:
            self._give(incoming)
            self._task = None
            self._moved = time.monotonic()
        if not keep:
            self._finish()
        else:
            self._next()

    async def _answered(self, incoming: _Incoming) -> Response:
        try:
            if incoming.refused is not None:
                raise incoming.refused
            path = _path(incoming.url)
            request = Request(incoming.method, path, incoming.headers, incoming.whole())
            incoming.chunks, incoming.body = [], None
            return await self._shared.answer(request)
        except SlotdError as error:
            return error_response(error)
        except Exception:
            log.exception("http_fault", path=_path(incoming.url)[:200])
            return error_response(SlotdError("an unforeseen fault; the log has the details"))

    async def _send(self, response: Response, *, keep: bool, head: bool) -> None:
        transport = self._transport
        if transport is None:
            return
        transport.writelines(response.parts(keep=keep, head=head))
        self._unsent = transport.get_write_buffer_size()
        while self._drained is not None:
            await asyncio.shield(self._drained)

    # --- ends ---------------------------------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        """Nothing is being received or answered."""
        return self._task is None and self._in is None and not self._waiting

    def drain(self) -> None:
        """No further requests."""
        if self.quiet:
            self._finish()

    @property
    def answered(self) -> bool:
        """It is on its way out, and has had its answer."""
        return self._closing_at is not None and self._task is None

    def cut_short(self, error: SlotdError) -> None:
        """What is being received or answered is given up, and the client is told why."""
        if self._closing_at is not None:
            return
        if self._task is not None:
            self._reason = error
            self._task.cancel()
        else:
            self._end(error)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def tick(self, now: float) -> None:
        """Ends what has taken too long."""
        transport = self._transport
        if transport is None:
            return
        unsent = transport.get_write_buffer_size()
        if unsent and unsent != self._unsent:
            self._moved = now
        self._unsent = unsent
        if unsent:
            if now - self._moved > READ_TIME:
                transport.abort()
            elif self._closing_at is not None:
                self._closing_at = now + LINGER
        elif self._closing_at is not None:
            if now >= self._closing_at:
                transport.abort()
        elif self._in is not None and self._task is None:
            took = now - self._in.begun
            if took > (HEAD_TIME if self._in_head else BODY_TIME + self._in.filled / BODY_RATE):
                self._end(DeadlineExceeded("the request did not come in time", code="REQUEST_TIMEOUT"))
        elif self.quiet and now - self._moved > IDLE:
            transport.close()

    def _end(self, error: SlotdError) -> None:
        """The last words: what the client still sends is thrown away."""
        if self._closing_at is not None or self._transport is None:
            return
        if self._in is not None:
            self._give(self._in)
            self._in = None
        if self._task is None or self._task is asyncio.current_task():
            self._transport.writelines(error_response(error).parts(keep=False, head=False))
        self._finish()

    def _finish(self) -> None:
        """Closes, once the client has had the time to read."""
        if self._transport is None or self._closing_at is not None:
            return
        self._closing_at = time.monotonic() + LINGER
        if self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()  # to see that the client closes, too
        else:
            self._transport.close()

    # --- bytes --------------------------------------------------------------------------------------------------------

    def _bounded(self, more: int) -> None:
        self._head += more
        if self._head > MAX_HEAD:
            raise _head_too_large()

    def _pay(self, incoming: _Incoming, total: int) -> None:
        if total > incoming.held:
            self._shared.room.take(total - incoming.held)
            incoming.held = total

    def _give(self, incoming: _Incoming) -> None:
        self._shared.room.give(incoming.held)
        incoming.held = 0


def _head_too_large() -> InvalidInput:
    return InvalidInput(
        f"has more than {MAX_HEAD} bytes or {MAX_FIELDS} headers", field="request", hint="send fewer headers"
    )


def _path(url: bytes) -> str:
    """Decoded, without the query. Raises InvalidInput."""
    try:
        path: bytes | None = httptools.parse_url(url).path
        return unquote((path or b"/").decode("ascii"), errors="strict")
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
        raise InvalidInput("is no URL", field="request") from None
