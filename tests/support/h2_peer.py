"""A peer that speaks HTTP/2 frame by frame, rightly or wrongly, over a real socket."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass, field

import hpack

from agent.serving.h2 import frames


@dataclass
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes


@dataclass
class Outcome:
    """What came back on one stream."""

    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    reset: int | None = None

    def __getitem__(self, name: str) -> str:
        return dict(self.headers)[name]


class Peer:
    """`reader` and `writer` are of a connection to the server; nothing is sent unasked."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.decoder = hpack.Decoder(max_header_list_size=1 << 20)
        self.encoder = hpack.Encoder()
        self.seen: list[Frame] = []

    @classmethod
    async def connect(cls, port: int, *, greet: bool = True, settings: dict[int, int] | None = None) -> Peer:
        peer = cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 24))
        if greet:
            peer.send(frames.PREFACE, frames.settings(settings or {}))
        return peer

    async def __aenter__(self) -> Peer:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    def headers(
        self, stream: int, path: str = "/test/Echo", *more: tuple[str, str], end: bool = False, **instead: str
    ) -> bytes:
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "test",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        fields.update({name.replace("_", "-").replace("--", ":"): value for name, value in instead.items()})
        block = self.encoder.encode([*fields.items(), *more])
        flags = frames.END_HEADERS | (frames.END_STREAM if end else 0)
        return frames.frame(frames.HEADERS, flags, stream, block)

    async def frame(self, timeout: float = 5) -> Frame:
        """The next frame. Raises EOFError when the server has closed."""
        try:
            async with asyncio.timeout(timeout):
                high, low, kind, flags, stream = frames.HEAD.unpack(await self.reader.readexactly(9))
                payload = await self.reader.readexactly(high << 8 | low)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EOFError from error
        found = Frame(kind, flags, stream, payload)
        self.seen.append(found)
        return found

    async def outcome(self, stream: int, timeout: float = 5, *, windows: bool = True) -> Outcome:
        """All that comes on a stream until its end; settings and pings are answered meanwhile."""
        outcome = Outcome()
        async with asyncio.timeout(timeout):
            while True:
                frame = await self.frame(timeout)
                if frame.kind == frames.SETTINGS and not frame.flags & frames.ACK:
                    self.send(frames.frame(frames.SETTINGS, frames.ACK, 0))
                elif frame.kind == frames.PING and not frame.flags & frames.ACK:
                    self.send(frames.ping(frame.payload, ack=True))
                elif frame.kind == frames.HEADERS:
                    decoded = [(str(k), str(v)) for k, v in self.decoder.decode(frame.payload)]
                    if frame.stream == stream:
                        outcome.headers += decoded
                elif frame.kind == frames.DATA and windows and frame.payload:
                    size = len(frame.payload)
                    self.send(frames.window_update(0, size), frames.window_update(frame.stream, size))
                if frame.stream == stream:
                    if frame.kind == frames.DATA:
                        outcome.body += frame.payload
                    if frame.kind == frames.RST_STREAM:
                        outcome.reset = int.from_bytes(frame.payload, "big")
                        return outcome
                    if frame.flags & frames.END_STREAM and frame.kind in (frames.DATA, frames.HEADERS):
                        return outcome

    async def ended(self, timeout: float = 5) -> int | None:
        """The code of the GOAWAY with which the server closes the connection, None without one."""
        code = None
        try:
            while True:
                frame = await self.frame(timeout)
                if frame.kind == frames.GOAWAY:
                    code = struct.unpack(">LL", frame.payload[:8])[1]
        except EOFError:
            return code


def data(stream: int, message: bytes, *, end: bool = True, flag: int = 0) -> bytes:
    """A message in one DATA frame."""
    payload = bytes((flag,)) + len(message).to_bytes(4, "big") + message
    return frames.frame(frames.DATA, frames.END_STREAM if end else 0, stream, payload)


def messages(body: bytes) -> list[bytes]:
    """What is in the DATA of an answer."""
    found = []
    while body:
        size = int.from_bytes(body[1:5], "big")
        found.append(body[5 : 5 + size])
        body = body[5 + size :]
    return found
