"""One client over HTTP/1.1: requests one after the other, each within its bounds of size and time.

What a client sends is seen to a little at a time, for all connections together, so that no way to send it holds up the
loop; answers go out in pieces for the same reason (TLS encrypts on the loop).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import structlog

from agent.errors import InvalidInput, Oversize, RequestTimeout, SlotdError
from agent.serving.h2.messages import Room
from agent.serving.http.messages import Answer, Body, Request, Response, error_response
from agent.serving.http.reader import MAX_FIELDS, MAX_HEAD, MAX_LINE, TOKEN, Head, read_chunk, read_head

__all__ = ["MAX_FIELDS", "MAX_HEAD", "Connection", "Shared"]

log = structlog.get_logger(__name__)

CHUNKED = 4 << 20
"""Bytes of a body whose length is not told before."""
IDLE = 75.0
"""Seconds that a connection may do nothing."""
HEAD_TIME = 10.0
"""Seconds for a request's head, once it has begun."""
BODY_TIME = 20.0
RATE = 64 << 10
"""Bytes of a body for each of which there is another second."""
READ_TIME = 30.0
"""Seconds in which a client must take something of its answer; all of it, with one more for each MiB."""
LINGER = 2.0
"""Seconds for a client to read why the rest of its request is not wanted."""
_TURN = 0.001
"""Seconds of a turn of the loop for what all clients have sent."""
_SMALL = 64 << 10
"""Bytes of a body that is read to its end though the request is refused; bytes behind a request that may wait."""
_PIECE = 128 << 10
_PAGE = 2 << 20


@dataclass
class Shared:
    """What all connections have in common. `room`: bytes that all requests in hand may take."""

    answer: Answer
    room: Room
    most: int
    """Bytes of a body."""
    guard: Callable[[str, Mapping[str, str]], None]
    """Given a path and the headers; raises SlotdError."""
    refused: Callable[[int], None] = lambda _: None
    """Told the status of what `answer` was not asked for."""
    connections: set[Connection] = field(default_factory=set)
    draining: bool = False
    _queue: deque[Connection] = field(default_factory=deque)
    _scheduled: bool = False

    def tick(self) -> None:
        """Once a second."""
        now = time.monotonic()
        for connection in tuple(self.connections):
            connection.tick(now)

    def enqueue(self, connection: Connection) -> None:
        """It has something to read: in its turn."""
        self._queue.append(connection)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        until = time.perf_counter() + _TURN
        for _ in range(len(self._queue)):
            self._queue.popleft().proceed(until)
            if time.perf_counter() >= until:
                break
        if self._queue and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._run)


class _Incoming:
    """A request that is being received. `held`: bytes of the room that its body has taken."""

    __slots__ = ("begun", "body", "chunk", "filled", "head", "held", "refused", "trailers")

    def __init__(self, head: Head) -> None:
        self.begun = time.monotonic()
        self.head = head
        self.body: np.ndarray[Any, np.dtype[np.uint8]] | bytearray | bytes = b""
        self.filled = 0
        self.held = 0
        self.chunk = -1
        """Bytes that are missing of a chunk, with the two behind it; -1: the line before one comes next."""
        self.trailers = -1
        """Bytes of trailers so far; -1 before the last chunk."""
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
        self._transport: asyncio.Transport | None = None
        self._counted = False
        self._buffer = bytearray()
        self._at = 0
        self._sought = 0
        """Up to where the end of a head was sought in vain."""
        self._queued = False
        self._in: _Incoming | None = None
        self._task: asyncio.Task[Response] | None = None
        self._reason: SlotdError | None = None
        """Why the task is cancelled, if not because the client has gone."""
        self._since = time.monotonic()
        """When it fell idle."""
        self._head_since: float | None = None
        self._out: deque[memoryview] = deque()
        self._paused = False
        self._sending: float | None = None
        """When the answer must have been taken; None if nothing is left of it."""
        self._unsent = 0
        self._taken = 0.0
        """When something of it was last taken."""
        self._last = False
        """Nothing comes behind this answer."""
        self._closing_at: float | None = None

    # --- the transport's ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's class
        if self._shared.draining or not self._admitted():
            self._transport.abort()
            return
        self._counted = True
        self._transport.set_write_buffer_limits(1, 0)  # told when all that was written has gone out
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
        self._out.clear()
        self._buffer.clear()
        self._at = 0

    def data_received(self, data: bytes) -> None:
        if self._closing_at is not None or self._last:
            return  # nobody listens any more
        self._buffer += data
        if self._busy:
            # What comes behind a request waits; reading goes on for a while, to see a client that goes.
            if len(self._buffer) > _SMALL and self._transport is not None:
                self._transport.pause_reading()
        else:
            self._enqueue()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._feed()

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        return self._task is not None or self._sending is not None

    def _enqueue(self) -> None:
        if not self._queued:
            self._queued = True
            if self._transport is not None:
                self._transport.pause_reading()
            self._shared.enqueue(self)

    def proceed(self, until: float) -> None:
        """Sees to what has come, until nothing more can be said of it, a request is whole, or the time is up."""
        self._queued = False
        try:
            while self._transport is not None and not self._busy and self._closing_at is None:
                if not self._step():
                    self._compact()
                    self._transport.resume_reading()
                    return
                if time.perf_counter() >= until:
                    break
        except SlotdError as error:
            self._end(error)
            return
        self._compact()
        if self._transport is None or self._closing_at is not None:
            return
        if not self._busy:
            self._enqueue()
        elif len(self._buffer) <= _SMALL:
            self._transport.resume_reading()

    def _compact(self) -> None:
        if self._at:
            del self._buffer[: self._at]
            self._sought = max(0, self._sought - self._at)
            self._at = 0

    def _step(self) -> bool:
        """The next piece; False if it has not come yet. Raises SlotdError: the connection is of no further use."""
        incoming = self._in
        if incoming is None:
            return self._begin()
        if incoming.head.length is not None:
            missing = incoming.head.length - incoming.filled
            if missing:
                taken = self._take(min(missing, _PIECE))
                if not taken:
                    return False
                self._more(incoming, taken)
                missing -= len(taken)
            if not missing:
                self._whole(incoming)
            return True
        return self._chunks(incoming)

    def _take(self, most: int) -> bytes:
        data = bytes(memoryview(self._buffer)[self._at : self._at + most])
        self._at += len(data)
        return data

    def _line(self, most: int) -> bytes | None:
        """The next line, None if it has not come yet. Raises InvalidInput if it is longer."""
        end = self._buffer.find(b"\r\n", self._at, self._at + most + 2)
        if end < 0:
            if len(self._buffer) - self._at > most + 1:
                raise InvalidInput(f"has a line of more than {most} bytes", field="request")
            return None
        line = bytes(memoryview(self._buffer)[self._at : end])
        self._at = end + 2
        return line

    def _begin(self) -> bool:
        while self._buffer.startswith(b"\r\n", self._at):  # empty lines before a request are none of it
            self._at += 2
        left = len(self._buffer) - self._at
        if not left:
            self._head_since = None
            return False
        if self._head_since is None:
            self._head_since = time.monotonic()
        if self._buffer[self._at] not in TOKEN:  # perhaps it speaks TLS, and would wait for an answer
            raise InvalidInput("this is no HTTP/1.1", field="request")
        end = self._buffer.find(b"\r\n\r\n", max(self._at, self._sought - 3), self._at + MAX_HEAD + 4)
        if end < 0:
            if left > MAX_HEAD:
                raise InvalidInput(f"has more than {MAX_HEAD} bytes of headers", field="request", hint="send fewer")
            self._sought = len(self._buffer)
            return False
        head = read_head(bytes(memoryview(self._buffer)[self._at : end]))
        self._at, self._sought, self._head_since = end + 4, 0, None
        self._in = incoming = _Incoming(head)
        try:
            self._shared.guard(head.path, head.headers)
            if head.length is not None and head.length > self._shared.most:
                raise Oversize(
                    f"a body of {head.length} bytes; at most {self._shared.most} are taken",
                    field="content-length",
                    hint="send a smaller batch, or have serving.grpc.max_message raised",
                )
        except SlotdError as error:
            if head.waits or head.length is None or head.length > _SMALL:
                raise
            incoming.refused = error
        else:
            if head.waits and self._transport is not None:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _chunks(self, incoming: _Incoming) -> bool:
        if incoming.trailers >= 0:
            line = self._line(MAX_HEAD)
            if line is None:
                return False
            incoming.trailers += len(line) + 2
            if incoming.trailers > MAX_HEAD:
                raise InvalidInput(f"has more than {MAX_HEAD} bytes of trailers", field="request")
            if not line:
                self._whole(incoming)
            return True
        if incoming.chunk < 0:
            line = self._line(MAX_LINE)
            if line is None:
                return False
            size = read_chunk(line)
            if size:
                incoming.chunk = size + 2
            else:
                incoming.trailers = 0
            return True
        if incoming.chunk > 2:
            taken = self._take(min(incoming.chunk - 2, _PIECE))
            incoming.chunk -= len(taken)
            if taken:
                self._more(incoming, taken)
            return bool(taken)
        if len(self._buffer) - self._at < 2:
            return False
        if self._take(2) != b"\r\n":
            raise InvalidInput("has a chunk that is longer than it says", field="request")
        incoming.chunk = -1
        return True

    def _more(self, incoming: _Incoming, data: bytes) -> None:
        filled = incoming.filled + len(data)
        if incoming.refused is None and incoming.head.length is None:
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
        elif incoming.refused is None and incoming.head.length is not None:
            self._pay(incoming, min(incoming.head.length, -(-filled // _PAGE) * _PAGE))
            if not incoming.filled and filled == incoming.head.length:
                incoming.body = data
            else:
                if isinstance(incoming.body, bytes):
                    # Not zeroed: bytes that are not received are never looked at.
                    incoming.body = np.empty(incoming.head.length, np.uint8)
                cast("np.ndarray[Any, Any]", incoming.body)[incoming.filled : filled] = np.frombuffer(data, np.uint8)
        incoming.filled = filled

    def _whole(self, incoming: _Incoming) -> None:
        head = incoming.head
        if incoming.refused is not None:
            self._in = None
            self._give(incoming)
            self._refuse(incoming.refused, head)
            return
        request = Request(head.method, head.path, head.headers, incoming.whole(), time.monotonic())
        incoming.body = b""
        self._task = asyncio.create_task(cast(Any, self._shared.answer(request)), name="http")
        self._task.add_done_callback(self._answered)

    def _refuse(self, error: SlotdError, head: Head) -> None:
        self._shared.refused(error.http)
        self._respond(error_response(error), head)

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
            log.error("http_fault", path=incoming.head.path[:200], exc_info=error)
            response = error_response(SlotdError("an unforeseen fault; the log has the details"))
        if self._transport is None:
            return
        if response is None:
            self._transport.abort()
            return
        self._respond(response, incoming.head)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _respond(self, response: Response, head: Head) -> None:
        last = self._shared.draining or self._reason is not None or not head.keep
        body = response.bytes()
        self._send([response.head(body, last=last), *([] if head.method == "HEAD" else body)], last=last)

    def _send(self, parts: Sequence[Body], *, last: bool) -> None:
        self._last = last
        self._taken = time.monotonic()
        self._sending = self._taken + READ_TIME + sum(map(len, parts)) / (1 << 20)
        self._out.extend(memoryview(part) for part in parts if len(part))
        self._feed()

    def _feed(self) -> None:
        """As much of the answer as the client takes; a little for each turn of the loop."""
        transport = self._transport
        if transport is None or self._sending is None or self._paused:
            return
        batch: list[memoryview] = []
        size = 0
        while self._out and size < _PIECE:
            part = self._out[0]
            batch.append(part[: _PIECE - size])
            size += len(batch[-1])
            if len(batch[-1]) == len(part):
                self._out.popleft()
            else:
                self._out[0] = part[len(batch[-1]) :]
        if batch:
            transport.writelines(batch)
        if self._paused or self._transport is None:
            return
        if self._out:
            asyncio.get_running_loop().call_soon(self._feed)
            return
        self._sending = None
        if self._last:
            self._finish()
            return
        self._since = time.monotonic()
        if self._shared.draining:
            self._finish()
        elif len(self._buffer) > self._at:
            self._enqueue()
        else:
            transport.resume_reading()

    # --- ends ---------------------------------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        """Nothing is being received, answered or sent."""
        return not self._busy and self._in is None and self._head_since is None

    @property
    def answered(self) -> bool:
        """Nothing is being answered or sent."""
        return not self._busy

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
            self._last = True
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
            if (unsent := len(self._out) + transport.get_write_buffer_size()) != self._unsent:
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
        self._head_since = None
        self._buffer.clear()
        self._at = self._sought = 0
        self._shared.refused(error.http)
        response = error_response(error)
        body = response.bytes()
        self._send([response.head(body, last=True), *body], last=True)

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

    def _pay(self, incoming: _Incoming, total: int) -> None:
        if total > incoming.held:
            self._shared.room.take(total - incoming.held)
            incoming.held = total

    def _give(self, incoming: _Incoming) -> None:
        self._shared.room.give(incoming.held)
        incoming.held = 0
