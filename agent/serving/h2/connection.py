"""One peer's connection: frames in, calls out, flow control both ways, and nothing that a peer can make grow.

Nothing here waits; the work of a call is a task of its own. A large message is received into the place where it stays.
Source: RFC 9113.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import structlog

from agent.errors import DeadlineExceeded, InvalidInput, Overloaded, SlotdError, Unavailable, Unimplemented
from agent.scope import scope
from agent.serving.h2 import frames
from agent.serving.h2.call import (
    RESPONSE,
    Call,
    Metadata,
    Reply,
    Routes,
    error_trailers,
    good_trailers,
    late,
    timeout_of,
)
from agent.serving.h2.frames import ConnectionFault
from agent.serving.h2.headers import MAX_BLOCK, HeaderReader, Headers, write
from agent.serving.h2.messages import PREFIX, Assembler, Message, Room, in_turn, unpack

log = structlog.get_logger(__name__)

MAX_METADATA = 16 << 10
"""Bytes of the headers of one call, as HTTP/2 counts them."""
BUFFER = 64 << 10
"""Bytes that are received before they are looked at."""
MAX_FRAME = 4 << 20
"""Bytes of a DATA frame; all others are small."""
_STEP = 128 << 10
"""Bytes that are received at once."""
_TURN = 1 << 20
"""Bytes after which everybody else has a turn. libuv alone would read 32 times, and where memory is short each page has
to be found first."""
_BLOCKS = 50
"""Header blocks after which they have one, too: a call that is refused takes 40 microseconds."""
CONNECTION_WINDOW = 1 << 30
"""Bytes that a peer may send before we say that it may send more: what bounds a request is its own stream's window."""
_REFILL = 1 << 28
"""Bytes after which we do."""
_UNSENT = 256 << 10
"""Bytes that may wait for the peer to read them before calls hold their answers back."""
_MOST_UNSENT = 4 << 20
"""Bytes of refusals and acknowledgements that may wait besides."""
CONTROL_FRAMES = 3000
"""For each second, over what comes with calls: a peer that sends more wants to keep us busy."""
SETTLE = 10.0
"""Seconds for a peer to say hello."""
STALLED = 30.0
"""Seconds in which nothing more of a message came."""
UNREAD = 60.0
"""Seconds in which nothing of what was sent was read."""
QUIET = 60.0
"""Seconds of silence after which a peer is asked whether it is there."""
PING_ANSWER = 20.0
"""Seconds for the answer to that."""
IDLE = 1800.0
"""Seconds without a call after which a connection is closed."""
LINGER = 5.0
"""Seconds for the last word to be read."""

_ALIVE, _DRAIN = b"slotd-up", b"slotdend"
_RUN = os.urandom(3).hex()
_numbers = itertools.count(1)


@dataclass
class Shared:
    """What all connections of a server have in common."""

    routes: Routes
    room: Room
    max_message: int
    max_streams: int
    max_calls: int
    guard: Callable[[str, Metadata], None] | None = None
    """Asked about each call over TCP, by its path and metadata, before its message is received. Raises SlotdError."""
    connections: set[Connection] = field(default_factory=set)
    calls: int = 0
    _unpacking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def unpacked(self, call: Call, message: Message) -> bytes:
        """A packed message. What it may become counts among the bytes in hand meanwhile, and what it has become, if it
        is the only one of its call, until that ends. Raises SlotdError."""
        most = min(self.max_message, call.method.most)
        self.room.take(most)
        kept = 0
        try:
            data = await in_turn(self._unpacking, None, unpack, message.data, call.encoding, most)
            if call.method.streaming is None and call.open:
                kept = len(data)
        finally:
            self.room.give(most - kept)
            call.assembler.held += kept
        return data

    def tick(self) -> None:
        """Once a second."""
        now = time.monotonic()
        for connection in tuple(self.connections):
            try:
                connection.tick(now)
            except Exception:  # our own mistake costs this peer its connection, nobody else
                log.exception("connection_failed", peer=connection.peer)
                connection.abort()


class Connection(asyncio.BufferedProtocol):
    """`admitted`: whether there is a place for one more; `gone` is called at its end if there was."""

    def __init__(self, shared: Shared, admitted: Callable[[], bool], gone: Callable[[], None]) -> None:
        self._shared = shared
        self._admitted = admitted
        self._gone = gone
        self._in = False
        self._transport: asyncio.Transport | None = None
        self.peer = "?"
        self._local = False
        """Over a Unix socket, whose permissions say who may."""
        # What was received and not yet looked at: _memory[_at:_end].
        self._memory = bytearray(BUFFER)
        self._view = memoryview(self._memory)
        self._at = self._end = 0
        self._greeted = self._settled = False
        # The DATA frame that is being read: bytes of it that are left, padding behind them, whose it is.
        self._left = self._padding = 0
        self._reading: Call | None = None
        self._ends = False
        self._direct: Call | None = None
        self._turn = self._blocks = 0
        self._consumed = 0
        self._headers_in = HeaderReader()
        self._block: tuple[int, int, bytearray] | None = None
        """A header block that is not whole: stream, flags, bytes."""
        self._calls: dict[int, Call] = {}
        self._ending = 0
        """Tasks of calls that are over for the client."""
        self._held_back: dict[int, Call] = {}
        self._last = 0
        self._window = frames.DEFAULT_WINDOW
        self._initial = frames.DEFAULT_WINDOW
        self._peer_frame = frames.SMALLEST_MAX_FRAME
        self._paused = self._flushing = False
        self._paused_at = 0.0
        self._draining: int | None = None
        """After a GOAWAY: the last stream that is answered."""
        self._over = False
        self._over_at: float | None = None
        self._control = 0
        self._acks = 0
        self._heard = True
        self._heard_at = self._used_at = self._since = time.monotonic()
        self._asked_at: float | None = None

    # --- asyncio's side -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's class
        self._in = self._admitted()
        if not self._in:
            self._over = True
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=_UNSENT)
        self.peer = _peer(self._transport)
        self._local = transport.get_extra_info("socket").family == socket.AF_UNIX
        self._shared.connections.add(self)
        window = min(frames.MAX_WINDOW, self._shared.max_message + BUFFER)
        hello = frames.settings(
            {
                frames.MAX_CONCURRENT_STREAMS: self._shared.max_streams,
                frames.INITIAL_WINDOW_SIZE: window,
                frames.MAX_FRAME_SIZE: MAX_FRAME,
                frames.MAX_HEADER_LIST_SIZE: MAX_METADATA,
            }
        )
        self._transport.write(hello + frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW))

    def connection_lost(self, error: Exception | None) -> None:
        self._over = True
        self._shared.connections.discard(self)
        for call in tuple(self._calls.values()):
            self._close(call)
        if self._in:
            self._in = False
            self._gone()

    def pause_writing(self) -> None:
        self._paused = True
        self._paused_at = time.monotonic()

    def resume_writing(self) -> None:
        self._paused = False
        self._acks = 0
        self._flush_all()

    def get_buffer(self, _: int) -> memoryview:
        if self._left and self._at == self._end:
            call = self._reading
            if call is not None and call.open and (target := call.assembler.target()) is not None:
                self._direct = call
                return target[: min(self._left, _STEP)]
        self._direct = None
        if self._at == self._end or self._over:  # what comes after the end is not looked at
            self._at = self._end = 0
        elif BUFFER - self._end < MAX_BLOCK:
            rest = self._end - self._at
            self._memory[:rest] = self._memory[self._at : self._end]
            self._at, self._end = 0, rest
        return self._view[self._end :]

    def buffer_updated(self, count: int) -> None:
        self._heard = True
        if self._over:
            return
        try:
            if self._direct is not None:
                call, self._direct = self._direct, None
                self._left -= count
                call.assembler.landed(count)
                if not self._left:
                    self._data_ended()
                self._turn += count
                if self._turn >= _TURN:
                    self._rest()
            else:
                self._end += count
                self._read()
            if self._consumed >= _REFILL:
                self._write(frames.window_update(0, self._consumed))
                self._consumed = 0
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault))
        except Exception:  # our own mistake costs this peer its connection, nobody else
            log.exception("connection_failed", peer=self.peer)
            self._fail(frames.INTERNAL_ERROR, "an error inside slotd")

    def _rest(self) -> None:
        """Until the loop comes round again."""
        self._turn = 0
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
            if self._at < self._end:  # what had come before
                self.buffer_updated(0)

    # --- frames -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        blocks = self._blocks
        while not self._over:
            if self._blocks - blocks >= _BLOCKS:
                self._rest()
                return
            have = self._end - self._at
            if self._left:
                if not have:
                    return
                take = min(have, self._left)
                self._left -= take
                call = self._reading
                if call is not None and call.open:
                    try:
                        call.assembler.feed(self._view[self._at : self._at + take])
                    except SlotdError as error:
                        self._refuse(call, error)
                self._at += take
                if not self._left:
                    self._data_ended()
                continue
            if self._padding:
                if not have:
                    return
                take = min(have, self._padding)
                self._padding -= take
                self._at += take
                continue
            if not self._greeted:
                if not self._greet(have):
                    return
                continue
            if have < frames.HEAD.size:
                return
            high, low, kind, flags, stream = frames.HEAD.unpack_from(self._memory, self._at)
            length = high << 8 | low
            stream &= frames.MAX_WINDOW
            if not self._settled and (kind != frames.SETTINGS or flags & frames.ACK):
                raise ConnectionFault(frames.PROTOCOL_ERROR, "the first frame must be SETTINGS")
            if self._block is not None and (kind != frames.CONTINUATION or stream != self._block[0]):
                raise ConnectionFault(frames.PROTOCOL_ERROR, "a header block was broken off")
            if kind == frames.DATA:
                if not self._begin_data(flags, stream, length, have):
                    return
                continue
            if length > MAX_BLOCK:
                raise ConnectionFault(frames.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            if have < frames.HEAD.size + length:
                return
            start = self._at + frames.HEAD.size
            self._at = start + length
            self._frame(kind, flags, stream, bytes(self._view[start : self._at]))

    def _greet(self, have: int) -> bool:
        size = min(have, len(frames.PREFACE))
        start = bytes(self._view[self._at : self._at + size])
        if not frames.PREFACE.startswith(start):
            if start[:4] in (b"GET ", b"POST", b"HEAD", b"PUT "):
                text = "this port speaks gRPC, which is HTTP/2\n"
                self._write(
                    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n"
                    + f"Content-Length: {len(text)}\r\n\r\n{text}".encode()
                )
                self._end_transport()
                return False
            raise ConnectionFault(frames.PROTOCOL_ERROR, "not HTTP/2")
        if size < len(frames.PREFACE):
            return False
        self._greeted = True
        self._at += size
        return True

    def _begin_data(self, flags: int, stream: int, length: int, have: int) -> bool:
        """False if the frame's head is not whole yet."""
        padded = bool(flags & frames.PADDED)
        if length > MAX_FRAME:
            raise ConnectionFault(frames.FRAME_SIZE_ERROR, f"a frame of {length} bytes; at most {MAX_FRAME} are taken")
        if not stream or stream > self._last:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "data for a stream that was not opened")
        padding = 0
        if padded:
            if have < frames.HEAD.size + 1:
                return False
            padding = self._memory[self._at + frames.HEAD.size]
            if padding >= length:
                raise ConnectionFault(frames.PROTOCOL_ERROR, "more padding than frame")
            self._at += 1
        self._at += frames.HEAD.size
        self._consumed += length
        if not length or padding:
            self._count()
        call = self._calls.get(stream)
        if call is not None and call.half_closed:
            self._drop(call, frames.STREAM_CLOSED)
            call = None
        self._reading, self._ends = call, bool(flags & frames.END_STREAM)
        self._left, self._padding = length - padding - padded, padding
        if call is not None:
            call.receivable -= length
            if call.receivable < 0:
                self._drop(call, frames.FLOW_CONTROL_ERROR)
        if not self._left:
            self._data_ended()
        return True

    def _data_ended(self) -> None:
        call, self._reading = self._reading, None
        if call is None or not call.open:
            return
        call.moved = time.monotonic()
        call.half_closed = self._ends
        self._deliver(call)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.HEADERS:
            self._on_headers(flags, stream, payload)
        elif kind == frames.CONTINUATION:
            self._on_continuation(flags, payload)
        elif kind == frames.WINDOW_UPDATE:
            self._on_window_update(stream, payload)
        elif kind == frames.PING:
            self._on_ping(flags, stream, payload)
        elif kind == frames.SETTINGS:
            self._on_settings(flags, stream, payload)
        elif kind == frames.RST_STREAM:
            self._on_reset(stream, payload)
        elif kind == frames.GOAWAY:
            _expect(len(payload) >= 8 and not stream, "GOAWAY")
            self._count()
            self.drain()
        elif kind == frames.PUSH_PROMISE:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a client does not push")
        else:  # PRIORITY, and what a later version may bring
            self._count()
            if kind == frames.PRIORITY:
                _expect(len(payload) == 5, "PRIORITY", frames.FRAME_SIZE_ERROR)

    def _on_headers(self, flags: int, stream: int, payload: bytes) -> None:
        if not stream % 2:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "a client's streams are odd")
        padding = 0
        if flags & frames.PADDED:
            _expect(len(payload) >= 1, "HEADERS")
            padding, payload = payload[0], payload[1:]
        if flags & frames.PRIORITIZED:
            _expect(len(payload) >= 5, "HEADERS")
            payload = payload[5:]
        _expect(padding <= len(payload), "HEADERS")
        payload = payload[: len(payload) - padding]
        if flags & frames.END_HEADERS:
            self._on_block(stream, flags, payload)
        else:
            self._block = (stream, flags, bytearray(payload))

    def _on_continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise ConnectionFault(frames.PROTOCOL_ERROR, "nothing is to be continued")
        stream, first, block = self._block
        block += payload
        if len(block) > MAX_BLOCK or not payload:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, f"headers of more than {MAX_BLOCK} bytes")
        if flags & frames.END_HEADERS:
            self._block = None
            self._on_block(stream, first, bytes(block))

    def _on_block(self, stream: int, flags: int, block: bytes) -> None:
        self._blocks += 1
        headers = self._headers_in.read(block)
        if stream <= self._last:
            call = self._calls.get(stream)
            if call is None:
                raise ConnectionFault(frames.STREAM_CLOSED, "headers for a stream that is over")
            if call.half_closed or not flags & frames.END_STREAM:
                self._drop(call, frames.PROTOCOL_ERROR)
            else:  # trailers
                call.half_closed = True
                self._deliver(call)
            return
        self._last = stream
        if self._draining is not None and stream > self._draining:
            return  # the client sends it elsewhere
        if headers.fault is not None:
            self._count()
            self._write(frames.reset(stream, frames.PROTOCOL_ERROR))
        elif len(self._calls) + self._ending >= self._shared.max_streams:
            self._count()
            self._write(frames.reset(stream, frames.REFUSED_STREAM))
        elif headers.method != "POST" or not _is_grpc(headers.content_type):
            self._count()
            wrong = b"405" if headers.method != "POST" else b"415"
            answer = frames.frame(
                frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream, write([(":status", wrong)])
            )
            self._write(answer + (b"" if flags & frames.END_STREAM else frames.reset(stream, frames.NO_ERROR)))
        else:
            self._open(stream, headers, ended=bool(flags & frames.END_STREAM))

    def _on_window_update(self, stream: int, payload: bytes) -> None:
        self._count()
        _expect(len(payload) == 4, "WINDOW_UPDATE", frames.FRAME_SIZE_ERROR)
        size = int.from_bytes(payload, "big") & frames.MAX_WINDOW
        if not stream:
            _expect(size > 0, "WINDOW_UPDATE")
            self._window += size
            _expect(self._window <= frames.MAX_WINDOW, "WINDOW_UPDATE", frames.FLOW_CONTROL_ERROR)
            self._flush_all()
            return
        _expect(stream <= self._last, "WINDOW_UPDATE")
        call = self._calls.get(stream)
        if call is None:
            return
        call.window += size
        if not size or call.window > frames.MAX_WINDOW:
            self._drop(call, frames.FLOW_CONTROL_ERROR if size else frames.PROTOCOL_ERROR)
        elif call.out:
            self._flush(call)

    def _on_ping(self, flags: int, stream: int, payload: bytes) -> None:
        self._count()
        _expect(not stream, "PING")
        _expect(len(payload) == 8, "PING", frames.FRAME_SIZE_ERROR)
        if not flags & frames.ACK:
            self._acknowledge(frames.ping(payload, ack=True))
        elif payload == _ALIVE:
            self._asked_at = None
        elif payload == _DRAIN and self._draining == frames.MAX_WINDOW:
            # Whatever was under way to us when the first GOAWAY went out has come.
            self._draining = self._last
            self._write(frames.goaway(self._last, frames.NO_ERROR))
            self._end_if_drained()

    def _on_settings(self, flags: int, stream: int, payload: bytes) -> None:
        self._count()
        _expect(not stream, "SETTINGS")
        if flags & frames.ACK:
            _expect(not payload, "SETTINGS", frames.FRAME_SIZE_ERROR)
            return
        _expect(not len(payload) % 6, "SETTINGS", frames.FRAME_SIZE_ERROR)
        self._settled = True
        for key, value in struct.iter_unpack(">HL", payload):
            if key == frames.INITIAL_WINDOW_SIZE:
                _expect(value <= frames.MAX_WINDOW, "SETTINGS", frames.FLOW_CONTROL_ERROR)
                change, self._initial = value - self._initial, value
                for call in self._calls.values():
                    call.window += change
                    _expect(call.window <= frames.MAX_WINDOW, "SETTINGS", frames.FLOW_CONTROL_ERROR)
            elif key == frames.MAX_FRAME_SIZE:
                _expect(frames.SMALLEST_MAX_FRAME <= value <= frames.LARGEST_MAX_FRAME, "SETTINGS")
                self._peer_frame = value
            elif key == frames.ENABLE_PUSH:
                _expect(value <= 1, "SETTINGS")
        self._acknowledge(frames.frame(frames.SETTINGS, frames.ACK, 0))
        self._flush_all()

    def _on_reset(self, stream: int, payload: bytes) -> None:
        self._count()
        _expect(len(payload) == 4, "RST_STREAM", frames.FRAME_SIZE_ERROR)
        _expect(0 < stream <= self._last, "RST_STREAM")
        call = self._calls.get(stream)
        if call is not None:
            self._close(call)

    def _count(self) -> None:
        self._control += 1
        if self._control > CONTROL_FRAMES:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "too many frames that are no calls")

    def _acknowledge(self, answer: bytes) -> None:
        self._acks += self._paused
        if self._acks > 100:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "our answers are not read")
        self._write(answer)

    # --- calls --------------------------------------------------------------------------------------------------------

    def _open(self, stream: int, headers: Headers, *, ended: bool) -> None:
        shared = self._shared
        method = shared.routes.get(headers.path)
        most = min(shared.max_message, method.most) if method is not None else 0
        call = Call(stream, headers, self.peer, self._initial, Assembler(most, shared.room))
        call.receivable = shared.max_message + BUFFER
        call.half_closed = ended
        self._calls[stream] = call
        shared.calls += 1
        try:
            if headers.size > MAX_METADATA:
                raise Overloaded(f"metadata of {headers.size} bytes; at most {MAX_METADATA} are taken")
            self._admit(headers.path, headers.metadata)
            if method is None:
                raise Unimplemented(f"there is no method {headers.path[:200]!r}", hint="ask gRPC reflection")
            if shared.calls > shared.max_calls:
                raise Overloaded(f"{shared.max_calls} calls are in hand", retry_after=0.1)
            if headers.timeout is not None:
                call.deadline = time.monotonic() + timeout_of(headers.timeout)
        except SlotdError as error:
            self._refuse(call, error)
            self._count()
            return
        self._control -= 4
        call.method = method
        if method.streaming is not None:
            call.send = partial(self._send, call)
            call.taken = partial(self._taken, call)
            call.unpacked = partial(shared.unpacked, call)
            self._start(call)
        elif ended:
            self._deliver(call)

    def _admit(self, path: str, metadata: Metadata) -> None:
        if self._shared.guard is not None and not self._local:
            self._shared.guard(path, metadata)

    def _deliver(self, call: Call) -> None:
        """Something of a call has come."""
        if call.method.streaming is not None:
            try:  # once more: a stream may be older than its key
                self._admit(call.path, call.metadata)
            except SlotdError as error:
                self._refuse(call, error)
                return
            call.wake()
            return
        ready, partial_ = call.assembler.ready, call.assembler.partial
        if len(ready) > 1 or (ready and partial_):
            self._refuse(call, InvalidInput("more than one message in a call that takes one", field="request"))
        elif call.half_closed and call.task is None:
            if ready:
                self._start(call)
            else:
                what = "is cut short" if partial_ else "is missing"
                self._refuse(call, InvalidInput(f"the message {what}", field="request"))

    def _start(self, call: Call) -> None:
        call.task = asyncio.get_running_loop().create_task(self._serve(call), name="call")
        call.task.add_done_callback(partial(self._served, call))

    async def _serve(self, call: Call) -> None:
        number = f"{_RUN}-{next(_numbers)}"
        with scope(request=number):
            try:
                reply = await self._handled(call)
            except asyncio.CancelledError:
                self._refuse(call, call.reason or Unavailable("slotd is stopping"))
                raise
            except SlotdError as error:
                if error.grpc == "INTERNAL":
                    log.error("request_failed", code=error.code, error=str(error), peer=self.peer)
                self._refuse(call, error)
            except Exception:
                log.exception("request_failed", peer=self.peer)
                told = SlotdError(f"an error inside slotd; its log has request {number}")
                self._refuse(call, told, (("slotd-request-id", number),))
            else:
                self._answer(call, reply)

    def _served(self, call: Call, _: asyncio.Task[None]) -> None:
        """Not at the end of `_serve`: a task that is cancelled before it begins has none."""
        call.task = None
        self._ending -= not call.open
        self._forget(call)

    async def _handled(self, call: Call) -> Reply | None:
        if call.method.streaming is not None:
            await call.method.streaming(call)
            return None
        message = call.assembler.ready.pop()
        data = message.data
        if message.compressed:
            data = await self._shared.unpacked(call, message)
        assert call.method.unary is not None
        return await call.method.unary(data, call)

    def _answer(self, call: Call, reply: Reply | None) -> None:
        """The end of a call that went well."""
        if not call.open:
            return
        trailers = good_trailers(call.trailing)
        if reply is not None:
            size = len(reply) + PREFIX
            if (
                size <= min(self._peer_frame, self._window, call.window, _UNSENT)
                and not self._held_back
                and not self._paused
            ):
                self._window -= size
                number = call.number
                self._write(
                    b"".join(
                        (
                            frames.frame(frames.HEADERS, frames.END_HEADERS, number, RESPONSE),
                            frames.head(size, frames.DATA, 0, number),
                            b"\x00" + len(reply).to_bytes(4, "big"),
                            reply,
                            frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, number, trailers),
                        )
                    )
                )
                self._finish(call)
                return
            self._queue(call, reply)
        call.trailers = trailers
        self._flush(call)

    def _refuse(self, call: Call, error: SlotdError, more: Metadata = ()) -> None:
        """The end of a call that did not; nothing more of an answer goes out."""
        if not call.open:
            return
        trailers = error_trailers(error, more)
        call.out.clear()
        block = trailers if call.headers_sent else RESPONSE + trailers
        self._write(frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, call.number, block))
        self._finish(call)

    async def _send(self, call: Call, message: Reply) -> None:
        """A streaming handler's next message; waits until the client has room for it."""
        if not call.open:
            raise asyncio.CancelledError
        self._queue(call, message)
        self._flush(call)
        while call.out and call.open:
            await call.wait()

    def _queue(self, call: Call, message: Reply) -> None:
        call.out.append(b"\x00" + len(message).to_bytes(4, "big"))
        if message:
            call.out.append(memoryview(message))

    def _flush(self, call: Call) -> None:
        """Sends what the windows allow of a call's answer, and its end when nothing is left."""
        parts: list[bytes | memoryview] = []
        number, room = call.number, _UNSENT
        if not call.headers_sent:
            parts.append(frames.frame(frames.HEADERS, frames.END_HEADERS, number, RESPONSE))
            call.headers_sent = True
        while call.out and not self._paused and not self._flushing:
            size = min(sum(map(len, call.out)), self._peer_frame, self._window, call.window, _UNSENT)
            if size <= 0:
                break
            if room <= 0:  # the rest when this is on its way, and others had their turn
                self._flush_soon()
                break
            parts.append(frames.head(size, frames.DATA, 0, number))
            self._window -= size
            call.window -= size
            room -= size
            while size:
                first = call.out[0]
                if len(first) <= size:
                    parts.append(first)
                    size -= len(first)
                    call.out.popleft()
                else:
                    view = memoryview(first)
                    parts.append(view[:size])
                    call.out[0] = view[size:]
                    size = 0
        if parts:
            call.moved = time.monotonic()
        if call.out:
            self._held_back[number] = call
            self._write_all(parts)
            return
        self._held_back.pop(number, None)
        if call.trailers is not None:
            end = frames.END_HEADERS | frames.END_STREAM
            parts.append(frames.frame(frames.HEADERS, end, number, call.trailers))
            self._write_all(parts)
            self._finish(call)
        else:
            self._write_all(parts)
            call.wake()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flushing = False
        if not self._paused:
            self._flush_all()

    def _flush_all(self) -> None:
        for call in tuple(self._held_back.values()):
            if self._paused or self._flushing or self._window <= 0:
                return
            if call.open:
                self._flush(call)

    def _taken(self, call: Call, size: int) -> None:
        """A streaming handler has taken a message of so many bytes."""
        call.assembler.held -= size
        self._shared.room.give(size)
        call.receivable += PREFIX + size
        if call.open and not call.half_closed:
            self._write(frames.window_update(call.number, PREFIX + size))

    def _finish(self, call: Call) -> None:
        """Its end is written."""
        if not call.half_closed:
            self._write(frames.reset(call.number, frames.NO_ERROR))  # the rest of the request is of no use
        self._used_at = time.monotonic()
        self._close(call)

    def _drop(self, call: Call, code: int) -> None:
        """The peer broke the protocol on this stream."""
        self._write(frames.reset(call.number, code))
        self._close(call)

    def _close(self, call: Call) -> None:
        """It is over for the client, whatever its task still does."""
        if not call.open:
            return
        call.open = False
        del self._calls[call.number]
        self._held_back.pop(call.number, None)
        self._shared.calls -= 1
        call.out.clear()
        call.wake()
        if call.task is None:
            self._forget(call)
        else:
            self._ending += 1
            if call.task is not asyncio.current_task():
                call.task.cancel()
        self._end_if_drained()

    def _forget(self, call: Call) -> None:
        self._shared.room.give(call.assembler.held)
        call.assembler.held = 0

    # --- the end ------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """No new calls; it closes when those in hand are answered."""
        if self._draining is None and not self._over:
            self._draining = frames.MAX_WINDOW
            self._write(frames.goaway(frames.MAX_WINDOW, frames.NO_ERROR) + frames.ping(_DRAIN))

    def cut_short(self, reason: SlotdError) -> None:
        """Whatever is in hand ends now, with this error; then it closes."""
        for call in tuple(self._calls.values()):
            call.reason = reason
            if call.task is not None:
                call.task.cancel()
            self._refuse(call, reason)
        self._draining = self._last
        self._end_transport()

    def _end_if_drained(self) -> None:
        if self._draining is not None and self._draining < frames.MAX_WINDOW and not self._calls:
            self._end_transport()

    def _fail(self, code: int, why: str) -> None:
        log.debug("connection_refused", peer=self.peer, why=why)
        self._write(frames.goaway(self._last, code, why))
        self._over = True
        if self._transport is not None and not self._transport.is_closing():
            # Closed with bytes unread, TCP would throw away what we have just said: `tick` closes it.
            if self._transport.can_write_eof():
                self._transport.write_eof()
                self._over_at = time.monotonic()
            else:
                self._transport.close()
        for call in tuple(self._calls.values()):
            self._close(call)

    def _end_transport(self) -> None:
        self._over = True
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """At once, whatever is unsent."""
        self._over = True
        if self._transport is not None:
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._writable():
            self._transport.write(data)  # type: ignore[union-attr]

    def _write_all(self, parts: list[bytes | memoryview]) -> None:
        if parts and self._writable():
            self._transport.writelines(parts)  # type: ignore[union-attr]

    def _writable(self) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        if self._paused and transport.get_write_buffer_size() > _MOST_UNSENT:
            self.abort()  # it asks and asks, and reads nothing
            return False
        return True

    # --- once a second ------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Whether the peer is still there, and its calls get on."""
        self._control = 0
        if self._heard:
            self._heard, self._heard_at = False, now
        if self._over:
            self._over_at = self._over_at or now
            if now - self._over_at > LINGER:  # it does not read what is still to be said
                self.abort()
            return
        silent = self._asked_at is not None and now - self._asked_at > PING_ANSWER
        unread = self._paused and now - self._paused_at > UNREAD
        if silent or unread or (not self._settled and now - self._since > SETTLE):
            self.abort()
        elif self._asked_at is None and now - self._heard_at > QUIET:
            self._asked_at = now
            self._write(frames.ping(_ALIVE))
        if not self._calls and now - self._used_at > IDLE:
            self.drain()
        for call in tuple(self._calls.values()):
            self._look_at(call, now)

    def _look_at(self, call: Call, now: float) -> None:
        if call.deadline is not None and now > call.deadline + 1.0:
            self._refuse(call, late())
        elif call.out and now - call.moved > UNREAD:
            self._drop(call, frames.CANCEL)
        elif call.task is None and not call.half_closed and now - call.moved > STALLED:
            self._refuse(call, DeadlineExceeded(f"the message did not go on for {STALLED:g} s"))


def _expect(holds: bool, what: str, code: int = frames.PROTOCOL_ERROR) -> None:
    if not holds:
        raise ConnectionFault(code, f"a {what} frame that cannot be")


def _is_grpc(content_type: str) -> bool:
    return content_type == "application/grpc" or content_type.startswith(("application/grpc+", "application/grpc;"))


def _peer(transport: asyncio.Transport) -> str:
    name: Any = transport.get_extra_info("peername")
    if isinstance(name, tuple):
        return f"ipv6:[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"ipv4:{name[0]}:{name[1]}"
    with suppress(OSError, AttributeError):
        pid, uid, _ = struct.unpack("3i", transport.get_extra_info("socket").getsockopt(1, 17, 12))  # SO_PEERCRED
        return f"unix:pid {pid}, uid {uid}"
    return "unix:"
