"""HTTP/1.1 byte by byte: what a client may do, and what nobody may do to us."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from agent.errors import InvalidInput, NotFound, SlotdError, Unauthenticated, Unavailable
from agent.serving.h2.messages import Room
from agent.serving.http import connection as module
from agent.serving.http.connection import Connection, Shared
from agent.serving.http.messages import BINARY, Request, Response

MOST = 1 << 20
ROOM = 3 * MOST
LARGE = 24 << 20
"""Bytes of an answer that no socket's buffers take."""


class Server:
    """An echo, and answers that are slow, wrong or large."""

    def __init__(self) -> None:
        self.shared = Shared(self.answer, Room(ROOM), MOST, self.guard)
        self.gate = asyncio.Event()
        self.seen: list[Request] = []
        self.begun = self.cancelled = self.count = 0
        self.most = 100
        self.raised: Exception = NotFound("no")
        self.faults: list[dict[str, Any]] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, fault: self.faults.append(fault))
        made = lambda: Connection(self.shared, self.admitted, self.gone)  # noqa: E731
        self.server = await loop.create_server(made, "127.0.0.1", 0)

    def admitted(self) -> bool:
        room = self.count < self.most
        self.count += room
        return room

    def gone(self) -> None:
        self.count -= 1

    def guard(self, path: str, headers: Iterable[tuple[str, str]]) -> None:
        if path.startswith("/secret") and dict(headers).get("authorization") != "Bearer key":
            raise Unauthenticated("no key")

    async def answer(self, request: Request) -> Response:
        self.seen.append(request)
        self.begun += 1
        if request.path == "/slow":
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        elif request.path == "/wrong":
            raise self.raised
        elif request.path == "/large":
            return Response(200, (bytes(LARGE),), BINARY)
        return Response(200, (request.method.encode(), b" ", bytes(request.body)), BINARY)

    @property
    def connection(self) -> Connection:
        (one,) = self.shared.connections
        return one


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, server: Server) -> Client:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, server.server.sockets[0].getsockname())
        return cls(*await asyncio.open_connection(sock=sock))

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def answer(self, head: bool = False) -> SimpleNamespace:
        async with asyncio.timeout(3):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
            headers = {name.lower(): text for name, text in (line.split(": ", 1) for line in lines)}
            body = b"" if head else await self.reader.readexactly(int(headers.get("content-length", 0)))
        return SimpleNamespace(status=int(first.split()[1]), headers=headers, body=body)

    async def refused(self, status: int, *, closed: bool = True) -> Any:
        """The error's document."""
        answer = await self.answer()
        assert (answer.status, "connection" in answer.headers) == (status, closed), answer
        if closed:
            assert await self.rest() == b""
        return json.loads(answer.body)

    async def rest(self) -> bytes:
        """All until the server's end."""
        async with asyncio.timeout(3):
            return await self.reader.read()

    async def echoes(self, text: bytes = b"again") -> None:
        self.send(post(text))
        assert (await self.answer()).body == b"POST " + text


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.start()
    yield server
    server.server.close()
    for one in tuple(server.shared.connections):
        one.abort()
    await until(lambda: not server.shared.connections)
    await asyncio.sleep(0)
    assert server.shared.room.free == ROOM, "nothing is held for who has gone"
    assert server.count == 0
    assert not server.faults


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    client = await Client.connect(server)
    yield client
    client.writer.close()


async def until(condition: Any, seconds: float = 3) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def head(*fields: str, method: str = "GET", path: str = "/echo", version: str = "1.1", host: bool = True) -> bytes:
    lines = (f"{method} {path} HTTP/{version}", *(["Host: t"] if host else []), *fields)
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n"


def post(body: bytes, *fields: str, path: str = "/echo") -> bytes:
    return head(f"Content-Length: {len(body)}", *fields, method="POST", path=path) + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    lines = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head("Transfer-Encoding: chunked", method="POST") + lines + end


def later(seconds: float) -> float:
    return time.monotonic() + seconds


# --- requests ---------------------------------------------------------------------------------------------------------


async def test_requests_one_after_the_other(server: Server, client: Client) -> None:
    client.send(b"\r\n", head("X-A: 1", "x-a:  2 ", "X-B: \xe9", path="/a%20%C3%A9?q=1"))
    answer = await client.answer()
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"GET ", BINARY)
    request = server.seen[0]
    assert (request.method, request.path) == ("GET", "/a é")
    assert request.headers == {"host": "t", "x-a": "1, 2", "x-b": "é"}
    for body in (b"", b"a", os.urandom(100_000), os.urandom(MOST)):
        await client.echoes(body)
    assert server.shared.room.free == ROOM


async def test_pipelined_requests_are_answered_in_order(server: Server, client: Client) -> None:
    client.send(post(b"0", path="/slow"), *(post(b"%d" % number) for number in range(1, 10)), chunked(b"1", b"0"))
    await until(lambda: server.begun)
    server.gate.set()
    assert [(await client.answer()).body for _ in range(11)] == [b"POST %d" % number for number in range(11)]


@pytest.mark.parametrize("last", [head("Connection: close"), head(version="1.0", host=False)])
async def test_the_connection_ends_where_one_of_them_says_so(client: Client, last: bytes) -> None:
    client.send(last)
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"], await client.rest()) == (200, "close", b"")


async def test_head_has_no_body(client: Client) -> None:
    client.send(head(method="HEAD"))
    assert (await client.answer(head=True)).headers["content-length"] == "5"
    await client.echoes()


async def test_chunked_bodies(client: Client) -> None:
    for chunks in ([], [b"a"], [b"a" * 1000, b"b" * 70_000, b"c"], [bytes(MOST)]):
        client.send(chunked(*chunks))
        assert (await client.answer()).body == b"POST " + b"".join(chunks)
    client.send(chunked(end=b"1;a=b\r\nx\r\n0\r\nX-T: 1\r\n\r\n"))
    assert (await client.answer()).body == b"POST x"


async def test_trailers_are_not_taken_for_headers(server: Server, client: Client) -> None:
    """RFC 9110, 6.5.1: what was decided by the headers must not be changed behind the body."""
    client.send(chunked(b"x", end=b"0\r\nContent-Type: text/evil\r\nX-T: 1\r\n\r\n"))
    assert (await client.answer()).status == 200
    assert set(server.seen[0].headers) == {"host", "transfer-encoding"}


@pytest.mark.parametrize("step", [1, 7, 1000])
async def test_bytes_may_come_one_by_one(client: Client, step: int) -> None:
    text = os.urandom(step * 50)
    whole = post(text) + chunked(text[:20], text[20:])
    for at in range(0, len(whole), step):
        client.send(whole[at : at + step])
        await asyncio.sleep(0)
    assert [(await client.answer()).body for _ in range(2)] == [b"POST " + text] * 2


async def test_the_beginning_of_a_head_behind_a_large_body(client: Client) -> None:
    """All in one piece: the body's bytes are not the next head's."""
    following = post(b"next")
    client.send(post(bytes(100_000)), following[:20])
    assert len((await client.answer()).body) == 100_005
    client.send(following[20:])
    assert (await client.answer()).body == b"POST next"


async def test_expect(server: Server, client: Client) -> None:
    client.send(post(b"", "Expect: 100-Continue").replace(b"Length: 0", b"Length: 2"))
    assert (await client.answer()).status == 100 and not server.begun
    client.send(b"hi")
    assert (await client.answer()).body == b"POST hi"
    client.send(head(f"Content-Length: {MOST + 1}", "Expect: 100-continue", method="POST"))
    await client.refused(413)


async def test_expect_and_a_refusal_that_needs_no_body(client: Client) -> None:
    """RFC 9110, 10.1.1: a final status at once; the client waits for it with its body."""
    client.send(head("Content-Length: 2", "Expect: 100-continue", method="POST", path="/secret"))
    assert (await client.answer()).status == 401


async def test_expect_is_nothing_in_http_1_0(client: Client) -> None:
    client.send(head("Content-Length: 2", "Expect: 100-continue", method="POST", version="1.0"))
    await asyncio.sleep(0.05)
    client.send(b"hi")
    assert (await client.answer()).status == 200


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_a_body_that_is_too_large_is_not_read(server: Server, client: Client) -> None:
    client.send(head(f"Content-Length: {MOST + 1}", method="POST"))
    error = await client.refused(413)
    assert (error["code"], error["field"]) == ("TOO_LARGE", "content-length") and not server.begun


async def test_a_chunked_body_that_is_too_large(server: Server, client: Client) -> None:
    client.send(chunked(bytes(MOST), b"x"))
    assert (await client.refused(413))["field"] == "transfer-encoding"
    assert not server.begun


LONG = "a" * module.MAX_HEAD


@pytest.mark.parametrize(
    "data",
    [
        head(f"X: {LONG}"),
        head(*(f"X{number}: {LONG[:1000]}" for number in range(40))),
        head(*(f"X{number}: 1" for number in range(module.MAX_FIELDS))),
        head(path=f"/{LONG}"),
        head(path=f"/{LONG * 3}")[:-20],
        head(f"X: {LONG * 3}")[:-4],
        head(LONG * 3)[:-4],
        chunked(b"x", end=b"0\r\nX: " + b"a" * (8 * module.MAX_HEAD)),
    ],
    ids=["header", "headers", "number", "path", "endless path", "endless value", "endless name", "endless trailer"],
)
async def test_heads_that_are_too_large(server: Server, client: Client, data: bytes) -> None:
    client.send(data)
    await client.refused(400)
    assert not server.begun


async def test_all_bodies_together_are_bounded(server: Server, client: Client) -> None:
    others = [await Client.connect(server) for _ in range(3)]
    for one in others:
        one.send(post(bytes(MOST), path="/slow"))
    await until(lambda: server.begun == 3)
    assert server.shared.room.free == 0
    client.send(post(b"x"))
    answer = await client.answer()
    assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    server.gate.set()
    for one in others:
        assert (await one.answer()).status == 200
        one.writer.close()


async def test_no_more_connections_than_are_admitted(server: Server, client: Client) -> None:
    await client.echoes()
    server.most = server.count
    assert await (await Client.connect(server)).rest() == b""


# --- what is no HTTP --------------------------------------------------------------------------------------------------

HIDDEN = head(path="/hidden")


@pytest.mark.parametrize(
    "data",
    [
        *(head(*fields, method="POST") + b"0\r\n\r\n" + HIDDEN for fields in (
            ("Content-Length: 5", "Content-Length: 50"), ("Content-Length: 5, 6",), ("Content-Length: 5, 5",),
            ("Content-Length: 5", "Content-Length: 5"), ("X: 1\r\n Transfer-Encoding: chunked",), ("X : 1",),
            ("Content-Length: +5",),
            ("Content-Length: -1",), ("Content-Length:",),
            ("Content-Length: 5", "Transfer-Encoding: chunked"), ("Transfer-Encoding: chunked", "Content-Length: 5"),
            ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), ("Transfer-Encoding: gzip",),
            ("Transfer-Encoding: chunked, identity",), ("Transfer-Encoding: xchunked",),
            ("Transfer-Encoding : chunked",), ("X: \0",),
            ("Content-Length: 99999999999999999999",),
        )),
        head("Host: u") + HIDDEN,
        head().replace(b"\r\n", b"\n") + b"\r\n\r\n" + HIDDEN,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        head(method="get"), head(method="FETCH"), head(version="9.9"),
        chunked(end=b"zz\r\n"), chunked(end=b"1\r\nxx\r\n"),
    ],
)  # fmt: skip
async def test_what_may_be_read_in_two_ways_or_in_none(server: Server, client: Client, data: bytes) -> None:
    client.send(data)
    answer = await client.answer()
    assert answer.status in (400, 413, 501), answer
    assert await client.rest() == b""
    assert not server.begun


@pytest.mark.parametrize(
    "data",
    [head("Connection: Upgrade", "Upgrade: h2c"), head("Connection: Upgrade", "Upgrade: websocket"),
     post(b"GET ", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")],
    ids=["h2c", "websocket", "h2c with a body"],
)  # fmt: skip
async def test_an_upgrade_that_is_offered_is_not_taken(client: Client, data: bytes) -> None:
    """RFC 9110, 7.8: as if it were not there."""
    client.send(data)
    answer = await client.answer()
    assert (answer.status, answer.body.removeprefix(b"POST ")) == (200, b"GET ")
    await client.echoes()


async def test_there_is_no_proxy(client: Client) -> None:
    client.send(head(method="CONNECT", path="t:1"))
    await client.refused(501)


async def test_a_request_without_a_host(client: Client) -> None:
    client.send(head(host=False))
    assert (await client.refused(400))["field"] == "host"


@pytest.mark.parametrize(("data", "field"), [(head(path="no"), "request"), (head(path="/%ff"), "request")])
async def test_paths_that_are_none(client: Client, data: bytes, field: str) -> None:
    client.send(data)
    assert (await client.refused(400))["field"] == field


@pytest.mark.parametrize(
    ("first", "behind"),
    [((), b"\x16garbage"), ((), head(f"X: {LONG}")), ((), head() * 20), (("Connection: close",), head())],
    ids=["garbage", "too large", "too many", "behind the last one"],
)
async def test_what_comes_behind_a_request_does_not_undo_it(
    server: Server, client: Client, first: tuple[str, ...], behind: bytes
) -> None:
    client.send(post(b"first", *first, path="/slow"), behind)
    await until(lambda: server.begun)
    server.gate.set()
    assert (await client.answer()).body == b"POST first"


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "status", "document", "more"),
    [
        (NotFound("no é", field="x", hint="look"), 404,
         {"error": "x: no é", "code": "NOT_FOUND", "field": "x", "hint": "look"}, {}),
        (Unavailable("busy", retry_after=1.2), 503, {"error": "busy", "code": "UNAVAILABLE"}, {"retry-after": "2"}),
        (InvalidInput("no", code="NARROW", retry_after=1), 400, {"error": "no", "code": "NARROW"}, {}),
        (ValueError("secret"), 500, {"error": str(SlotdError("an unforeseen fault; the log has the details")),
                                     "code": "INTERNAL"}, {}),
    ],
)  # fmt: skip
async def test_errors(
    server: Server, client: Client, raised: Exception, status: int, document: Any, more: dict[str, str]
) -> None:
    server.raised = raised
    client.send(post(b"x", path="/wrong"))
    answer = await client.answer()
    assert (answer.status, json.loads(answer.body)) == (status, document)
    assert {name: answer.headers[name] for name in answer.headers if name == "retry-after"} == more
    await client.echoes()


async def test_an_error_that_cannot_be_written_is_told_all_the_same(server: Server, client: Client) -> None:
    """JSON's "\\ud800" is a text that has no bytes, and may be in what an error cites."""
    server.raised = InvalidInput("is unknown", field="\ud800")
    client.send(head(path="/wrong"))
    assert (await client.answer()).status in (400, 500)


async def test_the_guard(server: Server, client: Client) -> None:
    for body in (b"", b"x" * 1000):
        client.send(post(body, path="/secret"))
        assert (await client.refused(401, closed=False))["code"] == "UNAUTHENTICATED"
    client.send(post(b"x", "Authorization: Bearer key", path="/secret"))
    assert (await client.answer()).status == 200 and server.begun == 1
    client.send(head("Content-Length: 1000000", method="POST", path="/secret"))
    await client.refused(401)
    other = await Client.connect(server)
    other.send(chunked().replace(b"/echo", b"/secret"))
    await other.refused(401)
    assert server.begun == 1
    other.writer.close()


# --- ends -------------------------------------------------------------------------------------------------------------


async def test_a_client_that_goes_away(server: Server, client: Client) -> None:
    client.send(post(bytes(1000), path="/slow"))
    await until(lambda: server.begun)
    client.writer.transport.abort()
    await until(lambda: server.cancelled and not server.shared.connections)


async def test_a_client_that_goes_away_within_a_body(server: Server, client: Client) -> None:
    client.send(post(bytes(MOST))[:-1])
    await until(lambda: server.shared.room.free < ROOM)
    client.writer.close()
    await until(lambda: server.shared.room.free == ROOM)


@pytest.mark.parametrize(
    ("data", "seconds"),
    [
        (head()[:-1], module.HEAD_TIME),
        (post(b"ab")[:-1], module.BODY_TIME),
        (chunked(b"a", end=b""), module.BODY_TIME),
        (post(bytes(MOST))[:-1], module.BODY_TIME + (MOST - 1) / module.RATE),
    ],
    ids=["head", "body", "chunks", "large body"],
)
async def test_requests_that_do_not_come_in_time(server: Server, client: Client, data: bytes, seconds: float) -> None:
    client.send(data)
    await until(lambda: server.shared.connections)
    await asyncio.sleep(0.05)
    server.connection.tick(later(seconds - 1))
    assert not server.connection._closing_at
    server.connection.tick(later(seconds + 1))
    assert (await client.refused(408))["code"] == "REQUEST_TIMEOUT"
    client.send(b"it goes on")
    await asyncio.sleep(0.02)
    server.connection.tick(later(module.LINGER + 1))
    await until(lambda: not server.shared.connections)


async def test_idle_connections(server: Server, client: Client) -> None:
    await client.echoes()
    server.connection.tick(later(module.IDLE - 1))
    await client.echoes()
    server.connection.tick(later(module.IDLE + 1))
    assert await client.rest() == b""
    other = await Client.connect(server)
    other.send(head(path="/slow"))
    await until(lambda: server.begun == 3)
    server.connection.tick(later(10 * module.IDLE))
    server.gate.set()
    assert (await other.answer()).status == 200, "it was not idle"
    other.writer.close()


async def unread(server: Server, client: Client) -> Connection:
    """A connection whose answer is stuck."""
    client.send(head(path="/large"))
    await until(lambda: server.begun)
    await asyncio.sleep(0.1)
    server.connection.tick(later(0))
    server.connection.tick(later(module.READ_TIME - 1))
    assert server.connection._sending is not None
    return server.connection


async def test_clients_that_do_not_read(server: Server, client: Client) -> None:
    (await unread(server, client)).tick(later(module.READ_TIME + 1))
    await until(lambda: not server.shared.connections)


async def test_clients_that_send_instead_of_reading(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READ_TIME is for taking something of the answer; bytes of a next request are not that."""
    connection = await unread(server, client)
    for turn in range(1, 5):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda turn=turn: later(turn * 20)))
        connection.data_received(b"GET "[turn - 1 : turn])
        connection.tick(later(turn * 20 + 1))
    await until(lambda: not server.shared.connections, 1)


async def test_clients_that_read_slowly_get_all(server: Server, client: Client) -> None:
    connection = await unread(server, client)
    for turn in range(1, 5):
        await client.reader.readexactly(1 << 20)
        await asyncio.sleep(0.02)
        connection.tick(later(turn * 10))
    assert len(await client.reader.readexactly(LARGE - (5 << 20))) and server.shared.connections


async def test_drain(server: Server, client: Client) -> None:
    await client.echoes()
    busy = await Client.connect(server)
    busy.send(head(path="/slow"))
    await until(lambda: server.begun == 2)
    server.shared.draining = True
    for one in tuple(server.shared.connections):
        one.drain()
    assert await client.rest() == b""
    assert await (await Client.connect(server)).rest() == b""
    assert sorted(one.answered for one in server.shared.connections) in ([False], [False, True])
    server.gate.set()
    assert (await busy.answer()).headers["connection"] == "close" and await busy.rest() == b""
    busy.writer.close()


@pytest.mark.parametrize("data", [head(path="/slow"), post(b"ab")[:-1], head()[:-1], b""])
async def test_cut_short(server: Server, client: Client, data: bytes) -> None:
    client.send(data)
    await until(lambda: server.shared.connections)
    await asyncio.sleep(0.02)
    connection = server.connection
    connection.cut_short(Unavailable("stopping", hint="again"))
    assert await client.refused(503) == {"error": "stopping", "code": "UNAVAILABLE", "hint": "again"}
    connection.cut_short(Unavailable("not twice"))
    assert connection.answered and server.cancelled == server.begun


async def test_an_answer_on_its_way_gets_no_second_one(server: Server, client: Client) -> None:
    (await unread(server, client)).cut_short(Unavailable("stopping"))
    assert len((await client.answer()).body) == LARGE
    assert await client.rest() == b""
