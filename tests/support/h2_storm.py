"""Conversations with the HTTP/2 side that are good at first and then changed at random, without sockets.

Whatever a peer sends, in whatever pieces, however slowly it reads and whenever it goes: nothing of ours fails, what
goes out is well-formed, and when the connection is over nothing of it is left.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import hpack
from structlog.testing import capture_logs

from agent.errors import NotFound
from agent.serving.h2 import frames
from agent.serving.h2.call import Call, Method, Reply
from agent.serving.h2.connection import Connection, Shared
from agent.serving.h2.messages import Room

MOST = 100_000
ROOM = 1 << 30
"""Bytes, more than any conversation takes: refusals for want of it have a test of their own."""
PATHS = ("/test/Echo", "/test/Slow", "/test/Wrong", "/test/Chat", "/test/Large", "/test/Nothing")


@dataclass
class Report:
    runs: int = 0
    answered: int = 0
    closed: Counter[int] = field(default_factory=Counter)
    """GOAWAYs by their code."""
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        closed = {frames_name(code): count for code, count in sorted(self.closed.items())}
        return (
            f"{self.runs} conversations, {self.answered} calls answered, ended by {closed}; faults: {self.faults[:5]}"
        )


def frames_name(code: int) -> str:
    names = ("NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED")
    more = ("FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM")
    return (names + more)[code] if code < 12 else str(code)


class Transport:
    """The socket's side: keeps what was written, and reads slowly if told so."""

    def __init__(self) -> None:
        self.protocol: Connection | None = None
        self.written = bytearray()
        self.reading, self.closed, self.lost, self.ended = True, False, False, False

    def write(self, data: bytes | memoryview) -> None:
        assert not self.ended, "written after its own end"
        self.written += data

    def writelines(self, parts: list[bytes | memoryview]) -> None:
        for part in parts:
            self.write(part)

    def set_write_buffer_limits(self, high: int) -> None:
        assert high > 0

    def get_extra_info(self, name: str, default: object = None) -> object:
        return SimpleNamespace(family=socket.AF_INET) if name == "socket" else default

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def lose(self) -> None:
        if not self.lost and self.protocol is not None:
            self.lost = self.closed = True
            self.protocol.connection_lost(None)


class Storm:
    """`run` so many conversations; the same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.count = 0
        self.report = Report()
        routes = {
            "/test/Echo": Method(unary=self._echo),
            "/test/Slow": Method(unary=self._slow),
            "/test/Wrong": Method(unary=self._wrong),
            "/test/Chat": Method(streaming=self._chat),
            "/test/Large": Method(unary=self._large),
        }
        self.shared = Shared(routes, Room(ROOM), max_message=MOST, max_streams=10, max_calls=20)

    async def run(self, runs: int) -> Report:
        for number in range(runs):
            with capture_logs() as logs:
                try:
                    await self._one()
                except Exception as error:
                    self.report.faults.append(f"{number}: {type(error).__name__}: {error}")
            self.report.faults += [f"{number}: {one}" for one in logs if one["event"].endswith("_failed")]
            self.report.runs += 1
            if len(self.report.faults) > 20:
                break
        return self.report

    async def _one(self) -> None:
        transport = Transport()
        connection = Connection(self.shared, self._admitted, self._gone)
        transport.protocol = connection
        connection.connection_made(transport)  # type: ignore[arg-type]
        try:
            await self._feed(connection, transport, self._conversation())
        finally:
            transport.lose()
        async with asyncio.timeout(5):
            while self.shared.calls or self.shared.room.free != ROOM:
                await asyncio.sleep(0)
        assert not self.shared.connections and not self.count, "a connection is left"
        self._look_at(bytes(transport.written))

    async def _feed(self, connection: Connection, transport: Transport, stream: bytes) -> None:
        chance = self.chance
        paused = False
        at = 0
        typical = chance.choice((1, 5, 30, 500, 70_000) if len(stream) < 5000 else (500, 5000, 70_000))
        drained, ticked = (chance.randrange(len(stream) * 10 or 1) for _ in range(2))
        while at < len(stream) and not transport.closed:
            if not transport.reading:
                await asyncio.sleep(0)
                continue
            buffer = connection.get_buffer(-1)
            assert len(buffer) > 0, "no room to receive into"
            size = min(len(buffer), len(stream) - at, chance.randint(1, typical))
            buffer[:size] = stream[at : at + size]
            connection.buffer_updated(size)
            at += size
            dice = chance.random()
            if dice < 0.2:
                await asyncio.sleep(0)
            elif dice < 0.22 and not paused:
                connection.pause_writing()
                paused = True
            elif dice < 0.3 and paused:
                connection.resume_writing()
                paused = False
            if at - size <= drained < at:
                connection.drain()
            if at - size <= ticked < at:
                connection.tick(time.monotonic() + chance.choice((0.0, 15.0, 40.0, 1e5)))
        if paused and chance.random() < 0.8:
            connection.resume_writing()
        if chance.random() < 0.9:
            for _ in range(20):
                await asyncio.sleep(0)

    # --- what the peer says -------------------------------------------------------------------------------------------

    def _conversation(self) -> bytes:
        chance, encoder = self.chance, hpack.Encoder()
        said = [frames.PREFACE, frames.settings(self._settings())]
        stream = -1
        for _ in range(chance.randint(1, 12)):
            kind = chance.random()
            if kind < 0.6:
                stream += 2
                said += self._call(encoder, stream)
            elif kind < 0.7:
                said.append(frames.frame(frames.PING, chance.choice((0, frames.ACK)), 0, chance.randbytes(8)))
            elif kind < 0.8:
                number = chance.choice((0, max(1, stream)))
                said.append(frames.window_update(number, chance.choice((1, 1000, 65_535, 1 << 30))))
            elif kind < 0.9:
                if stream > 0:
                    said.append(frames.reset(max(1, chance.choice((stream, stream - 2))), 8))
            elif kind < 0.97:
                said.append(frames.settings(self._settings()))
            else:
                payload = chance.randbytes(chance.choice((0, 1, 3, 4, 5, 6, 8, 9, 200)))
                number = chance.choice((0, max(1, stream), stream + 2, (1 << 31) - 1))
                said.append(frames.frame(chance.randrange(12), chance.randrange(256), number, payload))
        if chance.random() < 0.2:
            self._shuffle(said)
        whole = bytearray(b"".join(said))
        if chance.random() < 0.5:
            for _ in range(chance.randint(1, 4)):
                self._change(whole)
        return bytes(whole)

    def _settings(self) -> dict[int, int]:
        chance = self.chance
        known = (
            frames.INITIAL_WINDOW_SIZE,
            frames.MAX_FRAME_SIZE,
            frames.MAX_CONCURRENT_STREAMS,
            frames.MAX_HEADER_LIST_SIZE,
            1,  # HEADER_TABLE_SIZE
            99,
        )
        values = (16_384, 65_535, 1 << 20) if chance.random() < 0.9 else (0, 1, 100, (1 << 31) - 1)
        return {chance.choice(known): chance.choice(values) for _ in range(chance.randint(0, 3))}

    def _call(self, encoder: hpack.Encoder, stream: int) -> list[bytes]:
        chance = self.chance
        path = chance.choice(PATHS)
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), ("content-type", "application/grpc")]
        if chance.random() < 0.3:
            fields.append(("grpc-timeout", chance.choice(("1S", "0n", "99999999H", "1x", "10m"))))
        if chance.random() < 0.3:
            fields.append((f"x-{chance.randrange(5)}", "v" * chance.choice((0, 10, 2000))))
        block = encoder.encode(fields)
        empty = chance.random() < 0.05
        flags = frames.END_STREAM if empty else 0
        said = []
        if chance.random() < 0.2 and len(block) > 2:
            cut = chance.randint(1, len(block) - 1)
            said = [
                frames.frame(frames.HEADERS, flags, stream, block[:cut]),
                frames.frame(frames.CONTINUATION, frames.END_HEADERS, stream, block[cut:]),
            ]
        else:
            said = [frames.frame(frames.HEADERS, flags | frames.END_HEADERS, stream, block)]
        if empty:
            return said
        size = chance.choice((0, 1, 100, 20_000, MOST, MOST + 1))
        text = b"%d" % chance.choice((0, 10, 70_000)) if path == "/test/Large" else bytes(size)
        body = b"\0" + len(text).to_bytes(4, "big") + text
        if path == "/test/Chat":
            body *= chance.randint(1, 4)
        at = 0
        while True:
            step = chance.choice((len(body), 1000, 16_384))
            piece, at = body[at : at + step], at + step
            last = frames.END_STREAM if at >= len(body) else 0
            if chance.random() < 0.1:
                padding = chance.randrange(20)
                piece = bytes((padding,)) + piece + bytes(padding)
                said.append(frames.frame(frames.DATA, last | frames.PADDED, stream, piece))
            else:
                said.append(frames.frame(frames.DATA, last, stream, piece))
            if last:
                return said

    def _shuffle(self, said: list[bytes]) -> None:
        chance = self.chance
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(2, len(said)) if len(said) > 2 else 1
            match chance.randrange(3):
                case 0:
                    said.insert(at, said[at])
                case 1:
                    del said[at]
                case 2:
                    other = chance.randrange(len(said))
                    said[at], said[other] = said[other], said[at]
            if len(said) < 3:
                return

    def _change(self, data: bytearray) -> None:
        chance = self.chance
        if not data:
            return
        # Heads of frames are few among the bytes of messages: the beginning is changed more often.
        first = len(frames.PREFACE) if len(data) > len(frames.PREFACE) and chance.random() < 0.95 else 0
        at = chance.randrange(first, max(first + 1, min(len(data), chance.choice((100, 1000, len(data))))))
        match chance.randrange(5):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.choice((0, 1, 5, 0x7F, 0x80, 0xFF))
            case 2:
                data[at:at] = chance.randbytes(chance.randint(1, 12))
            case 3:
                del data[at : at + chance.randint(1, 12)]
            case 4:
                del data[at:]

    # --- what came back -----------------------------------------------------------------------------------------------

    def _look_at(self, written: bytes) -> None:
        """Whole frames of a known kind, none of a stream that we have ended."""
        if written.startswith(b"HTTP/1.1 400"):
            return
        decoder = hpack.Decoder()
        at, over = 0, set()
        while at < len(written):
            high, low, kind, flags, stream = frames.HEAD.unpack_from(written, at)
            length = high << 8 | low
            payload = written[at + frames.HEAD.size : at + frames.HEAD.size + length]
            assert len(payload) == length, "a frame that is cut short"
            at += frames.HEAD.size + length
            if kind in (frames.HEADERS, frames.DATA):
                assert stream and stream not in over, f"a frame of stream {stream}, which is over"
                if kind == frames.HEADERS:
                    fields = dict(decoder.decode(payload))
                    self.report.answered += fields.get("grpc-status") == "0"
                if flags & frames.END_STREAM:
                    over.add(stream)
            elif kind == frames.RST_STREAM:
                over.add(stream)
            elif kind == frames.GOAWAY:
                code = int.from_bytes(payload[4:8], "big")
                assert code != frames.INTERNAL_ERROR, payload[8:]
                self.report.closed[code] += 1
            else:
                assert kind in (frames.SETTINGS, frames.PING, frames.WINDOW_UPDATE), kind

    # --- what is asked for --------------------------------------------------------------------------------------------

    def _admitted(self) -> bool:
        self.count += 1
        return True

    def _gone(self) -> None:
        self.count -= 1

    async def _echo(self, message: bytes | memoryview, _: Call) -> Reply:
        return message

    async def _slow(self, message: bytes | memoryview, _: Call) -> Reply:
        for _turn in range(self.chance.randint(1, 10)):
            await asyncio.sleep(0)
        return message

    async def _wrong(self, _: bytes | memoryview, __: Call) -> Reply:
        raise NotFound("it is not there", field="x", hint="look elsewhere")

    async def _large(self, message: bytes | memoryview, _: Call) -> Reply:
        text = bytes(message)
        return bytes(int(text)) if text.isdigit() and len(text) < 6 else b"?"

    async def _chat(self, call: Call) -> None:
        while (message := await call.receive()) is not None:
            await call.send(bytes(message.data))


async def storm(runs: int, seed: int) -> Any:
    """A report of one storm."""
    return await Storm(seed).run(runs)
