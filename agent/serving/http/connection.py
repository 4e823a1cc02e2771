"""One client over HTTP/1.1: requests one after the other, each within its bounds of size and time.

h11 knows the protocol. It hands over one event at a time, so that however small the pieces are in which a client
sends, the loop sees to a few of them and then to others. Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import unquote

import h11
import numpy as np
import structlog

from agent.errors import InvalidInput, Oversize, RequestTimeout, SlotdError, Unimplemented
from agent.serving.h2.messages import Room
from agent.serving.http.messages import Answer, Body, Request, Response, error_response

log = structlog.get_logger(__name__)

MAX_HEAD = 32 << 10
"""Bytes of a request line and its headers, of a chunk's head, of trailers."""
MAX_FIELDS = 100
CHUNKED = 4 << 20
"""Bytes of a body whose length is not told before."""
IDLE = 75.0
"""Seconds that a connection may do nothing."""
HEAD_TIME = 10.0
"""Seconds for a request's head, once it has begun."""
BODY_TIME = 20.0
READ_TIME = 30.0
"""Seconds in which a client must have taken its answer."""
RATE = 64 << 10
"""Bytes for each of which more, in either direction, there is another second."""
LINGER = 2.0
"""Seconds for a client to read why the rest of its request is not wanted."""
_EVENTS = 32
"""Pieces of a request that are seen to in one turn of the loop."""
_SMALL = 64 << 10
"""Bytes of a body that is read to its end though the request is refused, and of an answer that counts for nothing."""
_PAGE = 2 << 20
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_SINGLE = ("authorization", "content-type", "content-encoding", "slotd-priority", "slotd-timeout-ms")


@dataclass
class Shared:
    """What all connections have in common. `room`: bytes that all requests in hand may take."""

    answer: Answer
    room: Room
    most: int
    """Bytes of a body."""
    guard: Callable[[str, Mapping[str, str]], None]
    """Given a path and the headers; raises SlotdError."""
    connections: set[Connection] = field(default_factory=set)
    draining: bool = False

    def tick(self) -> None:
        """Once a second."""
        now = time.monotonic()
        for connection in tuple(self.connections):
            connection.tick(now)


class _Incoming:
    """A request that is being received. `held`: bytes of the room that its body has taken."""

    __slots__ = ("begun", "body", "filled", "headers", "held", "length", "method", "path", "refused")

    def __init__(self, method: str) -> None:
        self.begun = time.monotonic()
        self.method = method
        self.path = ""
        self.headers: dict[str, str] = {}
        self.length: int | None = None
        """None: it comes in chunks."""
        self.body: np.ndarray[Any, np.dtype[np.uint8]] | bytearray | bytes = b""
        self.filled = 0
        self.held = 0
        self.refused: SlotdError | None = None
        """Why it is not answered; its body is read and thrown away."""

    def whole(self) -> Body:
        """The body."""
        return self.body if isinstance(self.body, bytes) else memoryview(self.body)  # type: ignore[arg-type]


class Connection(asyncio.Protocol):
    """`admitted` says whether there may be one more; `gone` is told at the end of one that was."""

    def __init__(self, shared: Shared, admitted: Callable[[], bool], gone: Callable[[], None]) -> None:
        self._shared = shared
        self._admitted, self._gone = admitted, gone
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._transport: asyncio.Transport | None = None
        self._counted = False
        self._in: _Incoming | None = None
        self._task: asyncio.Task[Response] | None = None
        self._reason: SlotdError | None = None
        """Why the task is cancelled, if not because the client has gone."""
        self._since = time.monotonic()
        """When it fell idle."""
        self._head_since: float | None = None
        self._pumping = False
        self._behind = 0
        """Bytes that came behind the request that is being answered."""
        self._sending: float | None = None
        """When the answer must have been taken; None if nothing is left of it."""
        self._unsent = 0
        self._taken = 0.0
        """When something of it was last taken."""
        self._answer_held = 0
        self._closing_at: float | None = None

    # --- the transport's ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's class
        if self._shared.draining or not self._admitted():
            self._transport.abort()
            return
        self._counted = True
        self._transport.set_write_buffer_limits(0)  # told when all of an answer has gone out
        self._shared.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._shared.connections.discard(self)
        if self._counted:
            self._gone()
        if self._task is not None:
            self._task.cancel()  # `_answered` gives back what it holds
        elif self._in is not None:
            self._give(self._in)
            self._in = None
        self._sent()

    def data_received(self, data: bytes) -> None:
        if self._closing_at is not None:
            return  # nobody listens any more
        if self._head_since is None and self._in is None:
            data = data.lstrip(b"\r\n")  # empty lines before a request are none of it
            if not data:
                return
            self._head_since = time.monotonic()
        self._h11.receive_data(data)
        if self._task is not None or self._sending is not None:
            # One request at a time. What comes behind it waits; reading goes on for a while, to see a client that goes.
            self._behind += len(data)
            if self._behind > _SMALL and self._transport is not None:
                self._transport.pause_reading()
        elif not self._pumping:
            self._pump()

    def pause_writing(self) -> None:
        """What it has written waits for the client."""

    def resume_writing(self) -> None:
        self._sent()
        if self._closing_at is not None:
            self._closing_at = time.monotonic() + LINGER
        else:
            self._go_on()

    # --- requests -----------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """The next few events."""
        self._pumping = False
        transport = self._transport
        if transport is None or self._closing_at is not None:
            return
        try:
            for _ in range(_EVENTS):
                event = self._h11.next_event()
                if event is h11.NEED_DATA:
                    transport.resume_reading()
                    return
                if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    transport.pause_reading()
                    return
                self._see_to(event)
                if self._task is not None or self._sending is not None:
                    transport.resume_reading()
                    return
                if self._closing_at is not None:
                    return
        except SlotdError as error:
            self._end(error)
        except h11.RemoteProtocolError as error:
            self._end(_protocol_error(error))
        else:
            self._pumping = True
            transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._pump)

    def _see_to(self, event: Any) -> None:
        """Raises SlotdError: the connection is of no further use."""
        if isinstance(event, h11.Request):
            self._head_since = None
            self._in = incoming = _Incoming(event.method.decode("ascii"))
            self._begun(incoming, event)
        elif isinstance(event, h11.Data):
            assert self._in is not None
            self._more(self._in, event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert self._in is not None
            self._whole(self._in)

    def _begun(self, incoming: _Incoming, event: h11.Request) -> None:
        chunked = False
        refused: SlotdError | None = None
        size = len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
        if len(event.headers) > MAX_FIELDS or size > MAX_HEAD:
            raise InvalidInput(f"has more than {MAX_FIELDS} headers, or than {MAX_HEAD} bytes of them", field="request")
        if incoming.method not in _METHODS:
            raise Unimplemented(f"there is no method {incoming.method[:20]!r}", field="request")
        for raw, value in event.headers:
            name, text = raw.decode("ascii"), value.decode("latin-1")
            if name in _SINGLE and name in incoming.headers:
                refused = refused or InvalidInput("is given twice", field=name)
            before = incoming.headers.get(name)
            incoming.headers[name] = text if before is None else f"{before}, {text}"
            if name == "transfer-encoding":
                chunked = True
            elif name == "content-length":
                incoming.length = int(text)
        if chunked and incoming.length is not None:
            raise InvalidInput("has both Content-Length and chunks", field="transfer-encoding")
        if not chunked and incoming.length is None:
            incoming.length = 0
        if event.http_version not in (b"1.0", b"1.1"):
            raise Unimplemented("only HTTP/1.0 and HTTP/1.1 are spoken here", field="request")
        if chunked and event.http_version == b"1.0":
            raise InvalidInput("HTTP/1.0 has no chunks", field="transfer-encoding")
        try:
            if refused is not None:
                raise refused
            incoming.path = _path(event.target)
            self._shared.guard(incoming.path, incoming.headers)
            if incoming.length is not None and incoming.length > self._shared.most:
                raise Oversize(
                    f"a body of {incoming.length} bytes; at most {self._shared.most} are taken",
                    field="content-length",
                    hint="send a smaller batch, or have serving.grpc.max_message raised",
                )
        except SlotdError as error:
            waits = self._h11.they_are_waiting_for_100_continue
            if waits or incoming.length is None or incoming.length > _SMALL:
                raise
            incoming.refused = error
        else:
            if self._h11.they_are_waiting_for_100_continue:
                self._write([self._h11.send(h11.InformationalResponse(status_code=100, headers=[])) or b""])

    def _more(self, incoming: _Incoming, data: Any) -> None:
        if incoming.refused is not None:
            return
        filled = incoming.filled + len(data)
        if incoming.length is None:
            if filled > min(CHUNKED, self._shared.most):
                raise Oversize(
                    f"a body of more than {CHUNKED} bytes whose length is not told",
                    field="transfer-encoding",
                    hint="send Content-Length",
                )
            self._pay(incoming, 2 * (-(-filled // _SMALL) * _SMALL))  # it doubles as it grows
            if isinstance(incoming.body, bytes):
                incoming.body = bytearray()
            cast(bytearray, incoming.body).extend(data)
        else:
            self._pay(incoming, min(incoming.length, -(-filled // _PAGE) * _PAGE))
            if not incoming.filled and filled == incoming.length:
                incoming.body = bytes(data)
            else:
                if isinstance(incoming.body, bytes):
                    # Not zeroed: bytes that are not received are never looked at.
                    incoming.body = np.empty(incoming.length, np.uint8)
                cast("np.ndarray[Any, Any]", incoming.body)[incoming.filled : filled] = np.frombuffer(data, np.uint8)
        incoming.filled = filled

    def _whole(self, incoming: _Incoming) -> None:
        if incoming.refused is not None:
            self._give(incoming)
            self._in = None
            self._respond(error_response(incoming.refused), head=incoming.method == "HEAD")
            return
        request = Request(incoming.method, incoming.path, incoming.headers, incoming.whole(), time.monotonic())
        incoming.body = b""
        self._task = asyncio.create_task(cast(Any, self._shared.answer(request)), name="http")
        self._task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[Response]) -> None:
        """However it ended: also before it began."""
        incoming, self._in, self._task = self._in, None, None
        assert incoming is not None
        self._give(incoming)
        if task.cancelled():
            response = error_response(self._reason) if self._reason is not None else None
        elif (error := task.exception()) is None:
            response = task.result()
        elif isinstance(error, SlotdError):
            response = error_response(error)
        else:
            log.error("http_fault", path=incoming.path[:200], exc_info=error)
            response = error_response(SlotdError("an unforeseen fault; the log has the details"))
        if self._transport is None:
            return
        if response is None:
            self._transport.abort()
            return
        self._respond(response, head=incoming.method == "HEAD")

    def _respond(self, response: Response, *, head: bool) -> None:
        body = response.bytes()
        size = sum(map(len, body))
        if size > _SMALL:
            self._shared.room.owe(size)
            self._answer_held = size
        last = self._shared.draining or self._reason is not None
        parts: list[Body] = []
        for event in (
            h11.Response(status_code=response.status, headers=response.fields(body, last=last)),
            *(h11.Data(data=cast(bytes, part)) for part in body if len(part) and not head),
            h11.EndOfMessage(),
        ):
            parts += self._h11.send_with_data_passthrough(event) or ()
        self._taken = time.monotonic()
        self._sending = self._taken + READ_TIME + size / RATE
        self._write(parts)
        if self._transport is not None and not self._transport.get_write_buffer_size():
            self._sent()
            self._go_on()

    def _go_on(self) -> None:
        """An answer has gone out whole: the next request, if there may be one."""
        if self._transport is None or self._closing_at is not None or self._sending is not None:
            return
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            self._since = time.monotonic()
            self._behind = 0
            if self._shared.draining:
                self._finish()
                return
            if self._h11.trailing_data[0]:
                self._head_since = self._since
            if not self._pumping:
                self._pumping = True
                asyncio.get_running_loop().call_soon(self._pump)
        elif self._h11.our_state in (h11.MUST_CLOSE, h11.CLOSED, h11.ERROR):
            self._finish()

    # --- ends ---------------------------------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        """Nothing is being received, answered or sent."""
        return self._task is None and self._in is None and self._sending is None and self._head_since is None

    @property
    def answered(self) -> bool:
        """Nothing is being answered or sent."""
        return self._task is None and self._sending is None

    def drain(self) -> None:
        """No further requests."""
        if self.quiet:
            self._finish()

    def cut_short(self, error: SlotdError) -> None:
        """What is being received or answered is given up, and the client is told why."""
        if self._closing_at is not None:
            return
        if self._task is not None:
            self._reason = error
            self._task.cancel()
        elif self._sending is not None:
            self._finish()
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
        if self._sending is not None:
            if (unsent := transport.get_write_buffer_size()) != self._unsent:
                self._unsent, self._taken = unsent, now
            if now > min(self._sending, self._taken + READ_TIME):
                transport.abort()
        elif self._closing_at is not None:
            if now >= self._closing_at:
                transport.abort()
        elif self._task is not None:
            return
        elif self._in is not None:
            if now - self._in.begun > BODY_TIME + self._in.filled / RATE:
                self._end(RequestTimeout("the request's body did not come in time", field="request"))
        elif self._head_since is not None:
            if now - self._head_since > HEAD_TIME:
                self._end(RequestTimeout("the request's head did not come in time", field="request"))
        elif now - self._since > IDLE:
            transport.close()

    def _end(self, error: SlotdError) -> None:
        """The last words; what the client still sends is thrown away."""
        if self._closing_at is not None or self._transport is None:
            return
        if self._in is not None:
            self._give(self._in)
            self._in = None
        response = error_response(error)
        body = response.bytes()
        self._taken = time.monotonic()
        self._sending = self._taken + READ_TIME
        self._write([response.head(body), *body])
        if self._transport is not None and not self._transport.get_write_buffer_size():
            self._sent()
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

    def _write(self, parts: Iterable[Body]) -> None:
        if self._transport is not None and self._closing_at is None:
            self._transport.writelines(list(parts))

    def _sent(self) -> None:
        """Nothing of an answer is left here."""
        self._sending = None
        self._shared.room.give(self._answer_held)
        self._answer_held = 0

    # --- bytes --------------------------------------------------------------------------------------------------------

    def _pay(self, incoming: _Incoming, total: int) -> None:
        if total > incoming.held:
            self._shared.room.take(total - incoming.held)
            incoming.held = total

    def _give(self, incoming: _Incoming) -> None:
        self._shared.room.give(incoming.held)
        incoming.held = 0


def _protocol_error(error: h11.RemoteProtocolError) -> SlotdError:
    text = f"this is no HTTP/1.1: {error}"[:300]
    if error.error_status_hint == 501:
        return Unimplemented(text, field="request", hint="send Content-Length, or chunks and nothing else")
    return InvalidInput(text, field="request")


def _path(target: bytes) -> str:
    """Decoded, without the query. Raises InvalidInput."""
    try:
        text = target.decode("ascii")
        if not text.startswith("/"):  # absolute-form
            _, found, text = text.partition("://")
            text = "/" + text.partition("/")[2] if found else ""
        if not text:
            raise ValueError
        return unquote(text.partition("?")[0].partition("#")[0], errors="strict")
    except ValueError:  # includes what is no text
        raise InvalidInput("is no path", field="request") from None
