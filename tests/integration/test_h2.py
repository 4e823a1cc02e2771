"""HTTP/2 frame by frame: what a client may do, and what nobody may do to us. Numbers in names: sections of RFC 9113."""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import struct
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import hpack
import pytest

from agent.errors import NotFound, Unauthenticated, Unavailable
from agent.serving.h2 import connection as module
from agent.serving.h2 import frames
from agent.serving.h2.call import Call, Method, Reply
from agent.serving.h2.connection import Connection, Shared
from agent.serving.h2.messages import Room
from support.h2_peer import Peer, data, messages
from support.stall import stall_probe

MOST = 1 << 20


class Server:
    """An echo, and methods that are slow, wrong or streaming."""

    def __init__(self, **bounds: int) -> None:
        self.gate = asyncio.Event()
        self.begun = 0
        self.cancelled = 0
        self.most = 1000
        self.count = 0
        routes = {
            "/test/Echo": Method(unary=self.echo),
            "/test/Slow": Method(unary=self.slow),
            "/test/Wrong": Method(unary=self.wrong),
            "/test/Broken": Method(unary=self.broken),
            "/test/Chat": Method(streaming=self.chat),
            "/test/Large": Method(unary=self.large),
        }
        limits = {"max_message": MOST, "max_streams": 10, "max_calls": 20, **bounds}
        self.shared = Shared(routes, Room(limits.pop("room", 8 * MOST)), **limits)
        self.port = 0

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(
            lambda: Connection(self.shared, self.admitted, self.gone), "127.0.0.1", 0
        )
        self.port = self.server.sockets[0].getsockname()[1]

    def admitted(self) -> bool:
        if self.count >= self.most:
            return False
        self.count += 1
        return True

    def gone(self) -> None:
        self.count -= 1

    async def echo(self, message: bytes | memoryview, call: Call) -> Reply:
        call.trailing = (("size", str(len(message))), ("timed", str(call.time_remaining() is not None)))
        return message

    async def slow(self, message: bytes | memoryview, _: Call) -> Reply:
        self.begun += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return message

    async def wrong(self, message: bytes | memoryview, _: Call) -> Reply:
        raise NotFound("there is no 100 % é\n", field="ü", hint="look\nelsewhere")

    async def broken(self, message: bytes | memoryview, _: Call) -> Reply:
        raise RuntimeError("secret")

    async def large(self, message: bytes | memoryview, _: Call) -> Reply:
        return bytes(int(bytes(message)))

    async def chat(self, call: Call) -> None:
        while (message := await call.receive()) is not None:
            await call.send(bytes(message.data).upper())

    def at_rest(self) -> bool:
        return not self.shared.calls and self.shared.room.free == 8 * MOST


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.start()
    yield server
    server.server.close()
    for one in tuple(server.shared.connections):
        one.abort()


@pytest.fixture
async def peer(server: Server) -> AsyncIterator[Peer]:
    async with await Peer.connect(server.port) as peer:
        yield peer


async def until(condition: Any, seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def still_good(server: Server, peer: Peer | None = None, stream: int = 99) -> None:
    """It answers, and holds nothing of what was before."""
    async with await Peer.connect(server.port) as fresh:
        for one, number in ((fresh, 1), *(((peer, stream),) if peer else ())):
            one.send(one.headers(number), data(number, b"good"))
            outcome = await one.outcome(number)
            assert messages(outcome.body) == [b"good"] and outcome["grpc-status"] == "0"
    await until(server.at_rest)


# --- calls ------------------------------------------------------------------------------------------------------------


async def test_echo(server: Server, peer: Peer) -> None:
    for number, text in ((1, b""), (3, b"a"), (5, os.urandom(10_000)), (7, os.urandom(MOST))):
        peer.send(peer.headers(number), data(number, text) if len(text) < 1 << 16 else b"")
        if len(text) >= 1 << 16:
            whole = b"\0" + len(text).to_bytes(4, "big") + text
            for at in range(0, len(whole), 100_000):
                piece = whole[at : at + 100_000]
                peer.send(frames.frame(frames.DATA, int(at + 100_000 >= len(whole)), number, piece))
        outcome = await peer.outcome(number)
        assert messages(outcome.body) == [text]
        assert outcome[":status"] == "200" and outcome["content-type"] == "application/grpc"
        assert (outcome["grpc-status"], outcome["size"]) == ("0", str(len(text)))
    await still_good(server, peer)


@pytest.mark.parametrize("step", [1, 2, 7, 4096])
async def test_bytes_may_come_one_by_one(server: Server, peer: Peer, step: int) -> None:
    text = os.urandom(300 if step < 10 else 200_000)
    peer.send(b"")
    whole = peer.headers(1) + data(1, text)[:0]
    message = b"\0" + len(text).to_bytes(4, "big") + text
    for at in range(0, len(message), 1000):  # frames that do not heed the messages' borders
        whole += frames.frame(frames.DATA, int(at + 1000 >= len(message)), 1, message[at : at + 1000])
    for at in range(0, len(whole), step):
        peer.send(whole[at : at + step])
        if at % (step * 50) == 0:
            await peer.writer.drain()
            await asyncio.sleep(0)
    assert messages((await peer.outcome(1, 20)).body) == [text]
    await still_good(server)


async def test_many_at_once_on_one_connection(server: Server, peer: Peer) -> None:
    texts = {number: os.urandom(20_000) for number in range(1, 19, 2)}
    for number in texts:
        peer.send(peer.headers(number))
    pieces = {number: b"\0" + len(text).to_bytes(4, "big") + text for number, text in texts.items()}
    for at in range(0, 20_005, 5000):
        for number, piece in pieces.items():
            peer.send(frames.frame(frames.DATA, int(at + 5000 > 20_004), number, piece[at : at + 5000]))
    seen: dict[int, bytes] = dict.fromkeys(texts, b"")
    ended: set[int] = set()
    while len(ended) < len(texts):
        frame = await peer.frame()
        if frame.kind == frames.DATA:
            seen[frame.stream] += frame.payload
            size = len(frame.payload)
            peer.send(frames.window_update(0, size), frames.window_update(frame.stream, size))
        elif frame.kind == frames.HEADERS and frame.flags & frames.END_STREAM:
            ended.add(frame.stream)
    assert {number: messages(body) for number, body in seen.items()} == {k: [v] for k, v in texts.items()}


async def test_padding_and_priority_are_taken(server: Server, peer: Peer) -> None:
    block = peer.headers(1)[9:]
    head = frames.frame(
        frames.HEADERS,
        frames.END_HEADERS | frames.PADDED | frames.PRIORITIZED,
        1,
        b"\x04" + bytes(5) + block + bytes(4),
    )
    body = b"\x03" + b"\0\0\0\0\x02hi" + bytes(3)
    peer.send(head, frames.frame(frames.PRIORITY, 0, 1, bytes(5)))
    peer.send(frames.frame(frames.DATA, frames.END_STREAM | frames.PADDED, 1, body))
    assert messages((await peer.outcome(1)).body) == [b"hi"]


async def test_a_header_block_in_pieces(server: Server, peer: Peer) -> None:
    block = peer.headers(1)[9:]
    peer.send(frames.frame(frames.HEADERS, 0, 1, block[:5]), frames.frame(frames.CONTINUATION, 0, 1, block[5:9]))
    peer.send(frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[9:]), data(1, b"x"))
    assert messages((await peer.outcome(1)).body) == [b"x"]


async def test_header_blocks_are_kept_only_while_the_table_stands(server: Server, peer: Peer) -> None:
    """The same bytes mean something else after another entry came: a cache that misses this answers the wrong call."""
    encoder = hpack.Encoder()
    fields = {":method": "POST", ":scheme": "http", ":authority": "t", "content-type": "application/grpc"}
    number = 1
    for turn in range(60):
        path = ("/test/Echo", "/test/Wrong", f"/test/None{turn % 7}")[turn % 3]
        block = encoder.encode([*fields.items(), (":path", path)][::-1][:1] + list(fields.items()))
        for _ in range(2):
            peer.send(frames.frame(frames.HEADERS, frames.END_HEADERS, number, block), data(number, b"x"))
            outcome = await peer.outcome(number)
            expected = {"/test/Echo": "0", "/test/Wrong": "5"}.get(path, "12")
            assert outcome["grpc-status"] == expected, (turn, path, outcome)
            number += 2
            block = encoder.encode([(":path", path), *fields.items()])


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_packed_messages(server: Server, peer: Peer, encoding: str, pack: Any) -> None:
    text = os.urandom(1000) * 10
    peer.send(peer.headers(1, "/test/Echo", ("grpc-encoding", encoding)), data(1, pack(text), flag=1))
    assert messages((await peer.outcome(1)).body) == [text]
    for number, packed in ((3, pack(text)[:-5]), (5, b"garbage" * 10)):
        peer.send(peer.headers(number, "/test/Echo", ("grpc-encoding", encoding)), data(number, packed, flag=1))
        assert (await peer.outcome(number))["grpc-status"] == "3"
    peer.send(peer.headers(7, "/test/Echo", ("grpc-encoding", encoding)), data(7, pack(bytes(MOST + 1)), flag=1))
    assert (await peer.outcome(7))["grpc-status"] == "8"
    peer.send(peer.headers(9, "/test/Echo", ("grpc-encoding", "br")), data(9, b"x", flag=1))
    assert (await peer.outcome(9))["grpc-status"] == "12"
    await still_good(server, peer)


async def test_errors_as_grpc_tells_them(server: Server, peer: Peer) -> None:
    peer.send(peer.headers(1, "/test/Wrong"), data(1, b""))
    outcome = await peer.outcome(1)
    assert outcome["grpc-status"] == "5"
    assert outcome["grpc-message"] == "%C3%BC: there is no 100 %25 %C3%A9%0A"
    assert (outcome["slotd-error-field"], outcome["slotd-error-hint"]) == ("?", "look?elsewhere")
    peer.send(peer.headers(3, "/test/Broken"), data(3, b""))
    outcome = await peer.outcome(3)
    assert outcome["grpc-status"] == "13" and "secret" not in str(outcome.headers)
    assert outcome["slotd-request-id"] in outcome["grpc-message"]
    await still_good(server, peer)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", "3"),  # no message
        (b"\0\0\0", "3"),  # cut short
        (b"\0\0\0\0\x05abc", "3"),
        (b"\0\0\0\0\x01a\0\0\0\0\x01b", "3"),  # two
        (b"\0\0\0\0\x01a\0", "3"),
        (b"\x02\0\0\0\x01a", "3"),  # a flag that is none
        (b"\0" + (MOST + 1).to_bytes(4, "big") + b"a", "8"),
        (b"\0\xff\xff\xff\xff", "8"),
        (b"\x01\0\0\0\x01a", "12"),  # packed, with nothing said about how
    ],
)
async def test_messages_that_are_none(server: Server, peer: Peer, sent: bytes, status: str) -> None:
    peer.send(peer.headers(1), frames.frame(frames.DATA, frames.END_STREAM, 1, sent))
    assert (await peer.outcome(1))["grpc-status"] == status
    await still_good(server, peer)


async def test_no_method_no_grpc_no_post(server: Server, peer: Peer) -> None:
    peer.send(peer.headers(1, "/test/Nothing"), data(1, b""))
    outcome = await peer.outcome(1)
    assert outcome["grpc-status"] == "12" and "/test/Nothing" in outcome["grpc-message"]
    peer.send(peer.headers(3, __method="GET", end=True))
    assert (await peer.outcome(3))[":status"] == "405"
    peer.send(peer.headers(5, content_type="application/json"), data(5, b"{}"))
    assert (await peer.outcome(5))[":status"] == "415"
    peer.send(peer.headers(7, content_type="application/grpc+proto"), data(7, b"p"))
    assert messages((await peer.outcome(7)).body) == [b"p"]
    for number, timeout in ((9, "abc"), (11, "123456789S"), (13, "5"), (15, "-1S")):
        peer.send(peer.headers(number, "/test/Echo", ("grpc-timeout", timeout)), data(number, b""))
        assert (await peer.outcome(number))["grpc-status"] == "3"
    peer.send(peer.headers(17, "/test/Echo", ("grpc-timeout", "5S")), data(17, b""))
    assert (await peer.outcome(17))["timed"] == "True"
    await still_good(server, peer)


async def test_http_1_is_told_what_this_is(server: Server) -> None:
    async with await Peer.connect(server.port, greet=False) as peer:
        peer.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await asyncio.wait_for(peer.reader.read(), 5)
        assert b"400 Bad Request" in answer and b"gRPC" in answer
    await still_good(server)


async def test_streaming_both_ways(server: Server, peer: Peer) -> None:
    peer.send(peer.headers(1, "/test/Chat"))
    body = b""
    for text in (b"one", b"two", b""):
        peer.send(data(1, text, end=False))
        while len(messages(body)) < 1 or messages(body)[-1] != text.upper():
            frame = await peer.frame()
            body += frame.payload if frame.kind == frames.DATA else b""
    peer.send(frames.frame(frames.DATA, frames.END_STREAM, 1))
    outcome = await peer.outcome(1)
    assert outcome["grpc-status"] == "0"
    assert messages(body) == [b"ONE", b"TWO", b""]
    await still_good(server, peer)


async def test_a_stream_that_floods_its_handler(server: Server, peer: Peer) -> None:
    peer.send(peer.headers(1, "/test/Chat"))
    for _ in range(50):
        peer.send(frames.frame(frames.DATA, 0, 1, b"\0\0\0\0\x01a" * 2000))
    outcome = await peer.outcome(1, windows=False)
    assert outcome["grpc-status"] == "8"
    await still_good(server)


# --- flow control -----------------------------------------------------------------------------------------------------


async def test_answers_keep_to_the_windows(server: Server) -> None:
    async with await Peer.connect(server.port, settings={frames.INITIAL_WINDOW_SIZE: 10}) as peer:
        peer.send(peer.headers(1, "/test/Large"), data(1, b"100000"))
        got = 0
        while got < 10:
            frame = await peer.frame()
            got += len(frame.payload) if frame.kind == frames.DATA else 0
        assert got == 10
        with pytest.raises(TimeoutError):
            await peer.frame(0.1)
        peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 1000}))
        while got < 1000:
            frame = await peer.frame()
            got += len(frame.payload) if frame.kind == frames.DATA else 0
        assert got == 1000
        peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 5}))  # the window is negative now
        peer.send(frames.window_update(1, 900))
        await peer.frame()
        with pytest.raises(TimeoutError):
            await peer.frame(0.1)
        peer.send(frames.window_update(1, 1 << 20))
        while got < 65_535:  # the connection's
            frame = await peer.frame()
            got += len(frame.payload) if frame.kind == frames.DATA else 0
        assert got == 65_535
        peer.send(peer.headers(3), data(3, b"waits, too"))
        await peer.frame()  # its headers, which no window holds up
        with pytest.raises(TimeoutError):
            await peer.frame(0.1)
        peer.send(frames.window_update(0, 1 << 20))
        outcome = await peer.outcome(1)
        assert got + len(outcome.body) == 100_005 and outcome["grpc-status"] == "0"
    await still_good(server)


async def test_frames_are_no_larger_than_the_peer_takes(server: Server) -> None:
    async with await Peer.connect(server.port, settings={frames.INITIAL_WINDOW_SIZE: 1 << 20}) as peer:
        peer.send(frames.window_update(0, 1 << 20))
        peer.send(peer.headers(1, "/test/Large"), data(1, b"500000"))
        await peer.outcome(1)
        assert max(len(frame.payload) for frame in peer.seen) == 16_384
        peer.send(frames.settings({frames.MAX_FRAME_SIZE: 100_000}))
        peer.send(peer.headers(3, "/test/Large"), data(3, b"500000"))
        assert len((await peer.outcome(3)).body) == 500_005
        assert max(len(frame.payload) for frame in peer.seen) == 100_000


async def test_more_than_the_window_of_a_stream_ends_it(server: Server, peer: Peer) -> None:
    peer.send(peer.headers(1, "/test/Slow"), data(1, bytes(1000), end=False))
    for _ in range(20):
        peer.send(frames.frame(frames.DATA, 0, 1, bytes(100_000)))
    outcome = await peer.outcome(1, windows=False)
    assert outcome.reset == frames.FLOW_CONTROL_ERROR or outcome["grpc-status"] == "8"
    await still_good(server, peer)


async def test_all_requests_together_are_bounded(server: Server) -> None:
    server.shared.room.free = 100_000
    async with await Peer.connect(server.port) as one, await Peer.connect(server.port) as other:
        one.send(one.headers(1, "/test/Slow"), data(1, bytes(80_000)))
        await until(lambda: server.begun)
        other.send(other.headers(1), data(1, bytes(50_000)))
        outcome = await other.outcome(1)
        assert outcome["grpc-status"] == "8" and int(outcome["grpc-retry-pushback-ms"]) > 0
        server.gate.set()
        assert (await one.outcome(1))["grpc-status"] == "0"
        other.send(other.headers(3), data(3, bytes(50_000)))
        assert (await other.outcome(3))["grpc-status"] == "0"
    await until(lambda: server.shared.room.free == 100_000)


async def test_beginnings_of_large_messages_are_paid_for_by_the_page(server: Server) -> None:
    """One byte of a message may cost two megabytes: many such must not take more than the room there is."""
    server.shared.max_message = 32 * MOST
    server.shared.max_streams = server.shared.max_calls = 100
    async with await Peer.connect(server.port) as peer:
        for number in range(1, 21, 2):
            head = b"\0" + (32 * MOST).to_bytes(4, "big")
            peer.send(peer.headers(number), frames.frame(frames.DATA, 0, number, head + b"a"))
        assert (await peer.outcome(9))["grpc-status"] == "8"  # 8 MiB of room are four pages
        assert server.shared.room.free == 0
    await still_good(server)


async def test_whatever_comes_after_the_end_is_not_looked_at(server: Server, peer: Peer) -> None:
    await peer.frame()
    peer.send(frames.frame(frames.PUSH_PROMISE, 0, 1), bytes(63 << 10))
    await peer.writer.drain()
    for _ in range(20):
        peer.send(bytes(100_000))
        await asyncio.sleep(0.001)
    assert await peer.ended() == frames.PROTOCOL_ERROR
    await still_good(server)


# --- cancellation and the end -----------------------------------------------------------------------------------------


async def test_a_reset_cancels_the_handler(server: Server, peer: Peer) -> None:
    peer.send(peer.headers(1, "/test/Slow"), data(1, b"x"))
    await until(lambda: server.begun)
    peer.send(frames.reset(1, frames.CANCEL))
    await until(lambda: server.cancelled == 1)
    await still_good(server, peer)


async def test_a_lost_connection_cancels_its_calls(server: Server) -> None:
    peer = await Peer.connect(server.port)
    peer.send(peer.headers(1, "/test/Slow"), data(1, b"x"), peer.headers(3, "/test/Chat"), peer.headers(5))
    peer.send(frames.frame(frames.DATA, 0, 5, b"\0\0\x0f\0\0" + bytes(900_000)))
    await until(lambda: server.begun and server.shared.calls == 3)
    peer.writer.transport.abort()
    await until(lambda: server.cancelled == 1)
    await still_good(server)
    assert server.count == 0 or await _gone(server)


async def _gone(server: Server) -> bool:
    await until(lambda: server.count == 0)
    return True


async def test_a_deadline_ends_what_does_not_end_by_itself(server: Server, peer: Peer) -> None:
    peer.send(peer.headers(1, "/test/Slow", ("grpc-timeout", "1m")), data(1, b"x"))
    await until(lambda: server.begun)
    await asyncio.sleep(1.01)
    server.shared.tick()
    assert (await peer.outcome(1))["grpc-status"] == "4"
    await until(lambda: server.cancelled == 1)
    await still_good(server, peer)


async def test_a_message_that_does_not_go_on(server: Server, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALLED", 0.05)
    peer.send(peer.headers(1), frames.frame(frames.DATA, 0, 1, b"\0\0\0\0\x05a"), peer.headers(3))
    await until(lambda: server.shared.calls == 2)
    await asyncio.sleep(0.1)
    server.shared.tick()
    assert (await peer.outcome(3))["grpc-status"] == "4"
    await still_good(server, peer)


async def test_an_answer_that_is_not_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNREAD", 0.05)
    async with await Peer.connect(server.port, settings={frames.INITIAL_WINDOW_SIZE: 5}) as peer:
        peer.send(peer.headers(1, "/test/Large"), data(1, b"100000"))
        await until(lambda: server.shared.calls == 1)
        await asyncio.sleep(0.1)
        server.shared.tick()
        assert (await peer.outcome(1, windows=False)).reset == frames.CANCEL
    await still_good(server)


async def test_a_peer_that_asks_and_never_reads(server: Server) -> None:
    """Not one window is exceeded; what it gets are refusals and acknowledgements."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.transport.pause_reading()
    peer = Peer(reader, writer)
    peer.send(frames.PREFACE, frames.settings({}))
    number, ticked = 1, time.monotonic()
    async with asyncio.timeout(60):
        while server.count:
            if time.monotonic() >= ticked + 1:
                server.shared.tick()
                ticked = time.monotonic()
            block = b"".join(
                peer.headers(number + 2 * turn, f"/test/{'x' * 200}{number}", end=True) for turn in range(200)
            )
            number += 400
            writer.write(block)
            if writer.transport.get_write_buffer_size() > 1 << 20:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0)
            if writer.transport.is_closing():
                break
    await still_good(server)


async def test_many_calls_in_one_piece_are_all_answered(server: Server) -> None:
    """More header blocks than are read at once: the rest is read without another byte."""
    server.shared.max_streams = server.shared.max_calls = 1000
    async with await Peer.connect(server.port) as peer:
        numbers = range(1, 601, 2)
        peer.send(b"".join(peer.headers(number) + data(number, b"%d" % number) for number in numbers))
        answers: dict[int, bytes] = {}
        while len(answers) < len(numbers):
            frame = await peer.frame()
            if frame.kind == frames.DATA:
                answers[frame.stream] = messages(frame.payload)[0]
        assert answers == {number: b"%d" % number for number in numbers}


async def test_calls_that_are_refused_at_once_are_bounded(server: Server) -> None:
    """Each costs us more than its sender."""

    def nobody(path: str, metadata: Any) -> None:
        raise Unauthenticated("no key", field="authorization")

    server.shared.guard = nobody
    async with await Peer.connect(server.port) as peer:
        peer.send(b"".join(peer.headers(number, end=True) for number in range(1, 10_001, 2)))
        assert await peer.ended() == frames.ENHANCE_YOUR_CALM
    server.shared.guard = None
    await still_good(server)


async def test_a_method_may_take_less_than_the_server(server: Server, peer: Peer) -> None:
    server.shared.routes = {**server.shared.routes, "/test/Echo": Method(unary=server.echo, most=100)}
    peer.send(peer.headers(1), data(1, bytes(101)), peer.headers(3), data(3, bytes(100)))
    assert (await peer.outcome(1))["grpc-status"] == "8"
    assert (await peer.outcome(3))["grpc-status"] == "0"


async def test_what_is_packed_counts_as_what_it_becomes(server: Server) -> None:
    """While their handlers run, seven of them leave no room for an eighth, though their bytes are few."""
    async with await Peer.connect(server.port, settings={frames.INITIAL_WINDOW_SIZE: 2 * MOST}) as peer:
        peer.send(frames.window_update(0, 16 * MOST))
        packed = gzip.compress(bytes(MOST))
        for number in range(1, 17, 2):
            headers = peer.headers(number, "/test/Slow", ("grpc-encoding", "gzip"))
            peer.send(headers, data(number, packed, flag=1))
        assert (await peer.outcome(15))["grpc-status"] == "8"
        await until(lambda: server.begun == 7)
        assert server.shared.room.free < MOST
        server.gate.set()
        answered = 0
        while answered < 7 * MOST:
            frame = await peer.frame()
            if frame.kind == frames.DATA:
                answered += len(frame.payload)
    await still_good(server)


async def test_silence_is_asked_about(server: Server, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET", 0.05)
    monkeypatch.setattr(module, "PING_ANSWER", 0.05)
    peer.send(peer.headers(1), data(1, b"x"))
    await peer.outcome(1)
    await asyncio.sleep(0.05)
    server.shared.tick()
    await asyncio.sleep(0.1)
    server.shared.tick()
    while (frame := await peer.frame()).kind != frames.PING:
        pass
    peer.send(frames.ping(frame.payload, ack=True))
    await still_good(server, peer, 3)
    await asyncio.sleep(0.05)
    server.shared.tick()
    await asyncio.sleep(0.1)
    server.shared.tick()  # asks again; nobody answers
    await asyncio.sleep(0.1)
    server.shared.tick()
    await peer.ended()
    await still_good(server)


async def test_a_peer_that_says_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE", 0.05)
    async with await Peer.connect(server.port, greet=False) as peer:
        await until(lambda: server.count == 1)
        await asyncio.sleep(0.1)
        server.shared.tick()
        await peer.ended()
    await still_good(server)


async def test_drain_answers_what_is_under_way_and_closes(server: Server, peer: Peer) -> None:
    peer.send(peer.headers(1, "/test/Slow"), data(1, b"x"))
    await until(lambda: server.begun)
    (one,) = server.shared.connections
    one.drain()
    peer.send(peer.headers(3), data(3, b"was under way"))
    assert messages((await peer.outcome(3)).body) == [b"was under way"]
    lasts = [struct.unpack(">LL", frame.payload[:8])[0] for frame in peer.seen if frame.kind == frames.GOAWAY]
    assert lasts[0] == frames.MAX_WINDOW
    peer.send(frames.ping(b"12345678"))
    while (await peer.frame()).kind != frames.PING:
        pass
    server.gate.set()
    assert messages((await peer.outcome(1)).body) == [b"x"]
    assert await peer.ended() in (None, frames.NO_ERROR)
    lasts = [struct.unpack(">LL", frame.payload[:8])[0] for frame in peer.seen if frame.kind == frames.GOAWAY]
    assert lasts == [frames.MAX_WINDOW, 3]
    await still_good(server)


async def test_cut_short_tells_everybody_why(server: Server, peer: Peer) -> None:
    peer.send(peer.headers(1, "/test/Slow"), data(1, b"x"), peer.headers(3, "/test/Chat"), peer.headers(5))
    await until(lambda: server.begun and server.shared.calls == 3)
    (one,) = server.shared.connections
    one.cut_short(Unavailable("slotd is stopping"))
    for number in (1, 3):
        outcome = await peer.outcome(number)
        assert (outcome["grpc-status"], outcome["grpc-message"]) == ("14", "slotd is stopping")
    await peer.ended()
    await until(lambda: server.cancelled == 1)
    await still_good(server)


# --- too much ---------------------------------------------------------------------------------------------------------


async def test_calls_on_one_connection_are_bounded(server: Server, peer: Peer) -> None:
    for number in range(1, 21, 2):
        peer.send(peer.headers(number, "/test/Slow"), data(number, b"x"))
    await until(lambda: server.begun == 10)
    peer.send(peer.headers(21), data(21, b"x"))
    assert (await peer.outcome(21)).reset == frames.REFUSED_STREAM
    server.gate.set()
    assert (await peer.outcome(19))["grpc-status"] == "0"
    await still_good(server, peer)


async def test_calls_of_all_connections_are_bounded_and_told_so(server: Server) -> None:
    peers = [await Peer.connect(server.port) for _ in range(3)]
    for peer in peers[:2]:
        for number in range(1, 21, 2):
            peer.send(peer.headers(number, "/test/Slow"), data(number, b"x"))
    await until(lambda: server.begun == 20)
    peers[2].send(peers[2].headers(1), data(1, b"x"))
    outcome = await peers[2].outcome(1)
    assert outcome["grpc-status"] == "8" and "20 calls" in outcome["grpc-message"]
    server.gate.set()
    await until(lambda: not server.shared.calls)
    await still_good(server, peers[2])
    for peer in peers:
        peer.writer.close()


async def test_connections_are_bounded(server: Server) -> None:
    server.most = 2
    peers = [await Peer.connect(server.port) for _ in range(2)]
    await until(lambda: server.count == 2)
    third = await Peer.connect(server.port)
    await third.ended()
    for peer in peers:
        peer.writer.close()
    await until(lambda: server.count == 0)
    await still_good(server)


async def test_metadata_is_bounded(server: Server, peer: Peer) -> None:
    # Entries of the table count each time they are named, so that few bytes can stand for many.
    many = [("cookie", "x" * 1000)] * 30
    peer.send(peer.headers(1, "/test/Echo", *many), data(1, b"x"))
    outcome = await peer.outcome(1)
    assert outcome["grpc-status"] == "8" and "metadata" in outcome["grpc-message"]
    await still_good(server, peer, 3)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("bomb", frames.ENHANCE_YOUR_CALM),
        ("block", frames.ENHANCE_YOUR_CALM),
        ("empty continuations", frames.ENHANCE_YOUR_CALM),
        ("pings", frames.ENHANCE_YOUR_CALM),
        ("settings", frames.ENHANCE_YOUR_CALM),
        ("empty data", frames.ENHANCE_YOUR_CALM),
        ("window updates", frames.ENHANCE_YOUR_CALM),
        ("unknown frames", frames.ENHANCE_YOUR_CALM),
        ("garbage in headers", frames.COMPRESSION_ERROR),
    ],
)
async def test_floods(server: Server, peer: Peer, what: str, code: int) -> None:
    many = 5000
    if what == "bomb":
        sent = [peer.headers(1, "/test/Echo", *[("cookie", "x" * 3000)] * 100)]
    elif what == "block":
        piece = os.urandom(10_000)
        sent = [frames.frame(frames.HEADERS, 0, 1, b"")] + [frames.frame(frames.CONTINUATION, 0, 1, piece)] * 2
    elif what == "empty continuations":
        sent = [frames.frame(frames.HEADERS, 0, 1, b"\x82")] + [frames.frame(frames.CONTINUATION, 0, 1)] * many
    elif what == "garbage in headers":
        sent = [frames.frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff")]
    else:
        one = {
            "pings": frames.ping(b"12345678"),
            "settings": frames.settings({}),
            "empty data": frames.frame(frames.DATA, 0, 1),
            "window updates": frames.window_update(0, 1),
            "unknown frames": frames.frame(0x42, 0, 0, b"?"),
        }[what]
        sent = [peer.headers(1), *[one] * many]
    async with stall_probe(0.1, what):
        peer.send(*sent)
        assert await peer.ended() == code
    await still_good(server)


# --- what the protocol forbids ----------------------------------------------------------------------------------------

GOOD = b""


def _(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return frames.frame(kind, flags, stream, payload)


FORBIDDEN = {
    "3.4 no preface": (b"SSH-2.0-x\r\n" + bytes(20), frames.PROTOCOL_ERROR),
    "4.2 a frame that is too large": (frames.head(1 << 20, frames.HEADERS, 0, 1), frames.FRAME_SIZE_ERROR),
    "4.2 a DATA frame that is too large": (frames.head((1 << 24) - 1, frames.DATA, 0, 1), frames.FRAME_SIZE_ERROR),
    "5.1 data for an idle stream": (_(frames.DATA, 0, 5, b"x"), frames.PROTOCOL_ERROR),
    "5.1 a reset of an idle stream": (frames.reset(5, 0), frames.PROTOCOL_ERROR),
    "5.1 a window for an idle stream": (frames.window_update(5, 1), frames.PROTOCOL_ERROR),
    "5.1.1 an even stream": (_(frames.HEADERS, frames.END_HEADERS, 2, b"\x82"), frames.PROTOCOL_ERROR),
    "6.1 data for stream 0": (_(frames.DATA, 0, 0, b"x"), frames.PROTOCOL_ERROR),
    "6.2 headers for stream 0": (_(frames.HEADERS, frames.END_HEADERS, 0, b"\x82"), frames.PROTOCOL_ERROR),
    "6.2 padding without end": (_(frames.HEADERS, frames.END_HEADERS | 8, 1, b"\xff\x82"), frames.PROTOCOL_ERROR),
    "6.3 a priority of another size": (_(frames.PRIORITY, 0, 1, b"x"), frames.FRAME_SIZE_ERROR),
    "6.4 a reset of another size": (_(frames.RST_STREAM, 0, 1, b"xxx"), frames.FRAME_SIZE_ERROR),
    "6.5 settings with a stream": (_(frames.SETTINGS, 0, 1), frames.PROTOCOL_ERROR),
    "6.5 settings of another size": (_(frames.SETTINGS, 0, 0, bytes(5)), frames.FRAME_SIZE_ERROR),
    "6.5 an acknowledgement with content": (_(frames.SETTINGS, 1, 0, bytes(6)), frames.FRAME_SIZE_ERROR),
    "6.5.2 push 2": (frames.settings({frames.ENABLE_PUSH: 2}), frames.PROTOCOL_ERROR),
    "6.5.2 window": (frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 31}), frames.FLOW_CONTROL_ERROR),
    "6.5.2 frame size": (frames.settings({frames.MAX_FRAME_SIZE: 100}), frames.PROTOCOL_ERROR),
    "6.6 a push": (_(frames.PUSH_PROMISE, 4, 1, bytes(8)), frames.PROTOCOL_ERROR),
    "6.7 a ping with a stream": (_(frames.PING, 0, 1, bytes(8)), frames.PROTOCOL_ERROR),
    "6.7 a ping of another size": (_(frames.PING, 0, 0, bytes(7)), frames.FRAME_SIZE_ERROR),
    "6.8 a goaway of another size": (_(frames.GOAWAY, 0, 0, bytes(3)), frames.PROTOCOL_ERROR),
    "6.9 an empty window": (frames.window_update(0, 0), frames.PROTOCOL_ERROR),
    "6.9 a window of another size": (_(frames.WINDOW_UPDATE, 0, 0, bytes(3)), frames.FRAME_SIZE_ERROR),
    "6.9.1 more than a window": (frames.window_update(0, (1 << 31) - 1), frames.FLOW_CONTROL_ERROR),
    "6.10 nothing to continue": (_(frames.CONTINUATION, 4, 1, b"\x82"), frames.PROTOCOL_ERROR),
    "6.10 broken off": (_(frames.HEADERS, 0, 1, b"\x82") + frames.ping(bytes(8)), frames.PROTOCOL_ERROR),
    "6.10 of another stream": (
        _(frames.HEADERS, 0, 1, b"\x82") + _(frames.CONTINUATION, 4, 3, b"\x82"),
        frames.PROTOCOL_ERROR,
    ),
}


@pytest.mark.parametrize("name", FORBIDDEN)
async def test_forbidden(server: Server, name: str) -> None:
    sent, code = FORBIDDEN[name]
    async with await Peer.connect(server.port, greet="preface" not in name) as peer:
        peer.send(sent)
        assert await peer.ended() == code
    await still_good(server)


async def test_the_first_frame_must_be_settings(server: Server) -> None:
    async with await Peer.connect(server.port, greet=False) as peer:
        peer.send(frames.PREFACE, frames.ping(bytes(8)))
        assert await peer.ended() == frames.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "fields",
    [
        [(":method", "POST"), (":scheme", "http")],
        [(":method", "POST"), (":scheme", "http"), (":path", "")],
        [(":method", "POST"), (":method", "POST"), (":scheme", "http"), (":path", "/test/Echo")],
        [(":method", "POST"), (":scheme", "http"), ("te", "trailers"), (":path", "/test/Echo")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/test/Echo"), ("Upper", "x")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/test/Echo"), ("connection", "close")],
        [(":method", "POST"), (":scheme", "http"), (":path", "/test/Echo"), (":status", "200")],
    ],
)
async def test_malformed_requests_8_1(server: Server, peer: Peer, fields: list[tuple[str, str]]) -> None:
    block = peer.encoder.encode(fields)
    peer.send(frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1, block))
    assert (await peer.outcome(1)).reset == frames.PROTOCOL_ERROR
    await still_good(server, peer)


async def test_frames_of_a_stream_that_is_over_are_ignored(server: Server, peer: Peer) -> None:
    peer.send(peer.headers(1), data(1, b"x"))
    await peer.outcome(1)
    peer.send(frames.window_update(1, 10), frames.reset(1, 0), data(1, b"late"))
    await still_good(server, peer, 3)


@pytest.mark.parametrize("seed", range(4))
async def test_garbage_behind_a_good_beginning(server: Server, seed: int) -> None:
    """Whatever comes, the connection ends or goes on, and everybody else is served."""
    chance = random.Random(seed)
    for _round in range(60):
        async with await Peer.connect(server.port) as peer:
            good = [peer.headers(1), data(1, b"x" * chance.randrange(1000)), peer.headers(3, "/test/Chat")]
            for _piece in range(chance.randrange(1, 12)):
                kind = chance.choice([*range(10), chance.randrange(256)])
                payload = chance.randbytes(chance.choice([0, 1, 4, 5, 6, 8, 12, chance.randrange(500)]))
                good.append(frames.frame(kind, chance.randrange(256), chance.choice([0, 1, 3, 5, 2**31 - 1]), payload))
            if chance.random() < 0.3:
                good.append(chance.randbytes(50))
            peer.send(*good)
            await peer.writer.drain()
            await asyncio.sleep(0.002)
    await until(lambda: server.count == 0)
    await still_good(server)


async def test_grpcs_own_client(server: Server) -> None:
    """All kinds of calls with compression, a deadline, metadata and many streams on one channel."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        echo = channel.unary_unary("/test/Echo")
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate):
            text = b"z" * 100_000
            assert await echo(text, compression=compression, timeout=5) == text
        sizes = [random.Random(1).randrange(100_000) for _ in range(200)]
        replies = await asyncio.gather(*(echo(bytes(size)) for size in sizes))
        assert [len(reply) for reply in replies] == sizes
        chat = channel.stream_stream("/test/Chat")

        async def talk() -> AsyncIterator[bytes]:
            for turn in range(100):
                yield b"hello %d" % turn

        assert [reply async for reply in chat(talk())] == [b"HELLO %d" % turn for turn in range(100)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test/Slow")(b"x", timeout=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: server.cancelled == 1)
    await still_good(server)


async def test_large_answers_to_a_client_that_updates_its_windows_often(server: Server) -> None:
    """28 MB at a time, over gRPC's own client: in steps, and nobody is taken for one who never reads."""
    server.shared.max_message = 64 << 20
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
        call = channel.unary_unary("/test/Large")
        for _ in range(5):
            replies = await asyncio.gather(*(call(b"%d" % (28 << 20), timeout=30) for _ in range(2)))
            assert [len(reply) for reply in replies] == [28 << 20] * 2
    await still_good(server)
