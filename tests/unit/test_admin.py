"""The admin socket, over real sockets: who asks, what is answered, and what a bad client cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.commands import admin
from agent.commands.admin import MAX_LINE, AdminClient, AdminServer
from agent.commands.builtin import build_table
from agent.commands.path import MAX_PATH
from agent.commands.table import Actor, Arguments, Command
from agent.commands.unix import listen, peer_of
from agent.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InvalidConfig,
    InvalidInput,
    NotFound,
    Overloaded,
    SlotdError,
    StorageError,
    Unavailable,
)
from support.fake_host import FakeHost, deployment_document

ME = f"local: uid {os.getuid()} ({pwd.getpwuid(os.getuid()).pw_name})"


class Text(Arguments):
    """What echo takes."""

    text: str = ""


class Served:
    """A server, its host, and two more commands: `echo` says who asked, `slow` waits for `gate`."""

    def __init__(self, path: Path, **more: Any) -> None:
        self.path = path
        self.host = FakeHost()
        self.gate = asyncio.Event()
        self.ran: list[str] = []
        table = build_table(self.host)

        async def echo(arguments: Text, actor: Actor) -> dict[str, Any]:
            self.ran.append(arguments.text)
            return {"text": arguments.text, "actor": str(actor)}

        async def slow(arguments: Text, actor: Actor) -> dict[str, Any]:
            await self.gate.wait()
            self.ran.append("slow")
            return {}

        async def bad(arguments: Text, actor: Actor) -> dict[str, Any]:
            return {"set": {1, 2}} if arguments.text == "set" else {"nan": float("nan")}

        for name, run in (("echo", echo), ("slow", slow), ("bad", bad)):
            table.add(Command(name, name, Text, False, run))
        self.server = AdminServer(path, table, self.host, **more)

    async def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        return await asyncio.to_thread(AdminClient(self.path, timeout=10).call, name, arguments)

    async def raw(self, data: bytes) -> list[dict[str, Any]]:
        """What a client gets that sends this and then closes its side."""
        reader, writer = await asyncio.open_unix_connection(self.path, limit=1 << 24)
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            writer.write_eof()
        try:
            async with asyncio.timeout(20):
                return [json.loads(line) for line in (await reader.read()).splitlines()]
        finally:
            writer.close()


@asynccontextmanager
async def serving(folder: Path, **more: Any) -> AsyncIterator[Served]:
    served = Served(folder / "admin.sock", **more)
    await served.server.start()
    try:
        yield served
    finally:
        await served.server.close(grace=0.2)
        assert not served.server._connections


# --- asking ----------------------------------------------------------------------------------------------------------


async def test_commands_and_who_asked(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        assert (await served.call("ping"))["pong"] is True
        assert await served.call("echo", text="größe\u2028\n") == {"text": "größe\u2028\n", "actor": ME}
        assert (await served.call("deploy", image="a/b:1"))["task"] == "d-1"
        assert served.host.asked[-1][0] == "deploy"


def test_the_same_under_uvloop(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as served:
            assert (await served.call("echo", text="x"))["actor"] == ME
            assert [answer["ok"] for answer in await served.raw(b"x\n" * 3)] == [False] * 3
            served.host.hold = True
            documents = AdminClient(served.path).watch("d-1")
            assert (await asyncio.to_thread(next, documents))["id"] == "d-1"
            await served.server.close(grace=0.2)
        assert not served.path.exists()

    uvloop.run(main())


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
async def test_somebody_else_is_known_by_uid() -> None:
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "s.sendall(sys.stdin.buffer.read()); print(s.makefile().readline())"
    )
    # Not tmp_path: nobody else may look into its parents.
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        async with serving(Path(name)) as served:

            async def ask(uid: int) -> subprocess.CompletedProcess[str]:
                return await asyncio.to_thread(
                    subprocess.run,
                    ["/usr/bin/python3", "-c", program, str(served.path)],
                    input='{"command": "echo"}\n',
                    text=True,
                    capture_output=True,
                    user=uid,
                    extra_groups=[],
                    group=uid,
                )

            refused = await ask(4321)
            assert "PermissionError" in refused.stderr
            served.path.chmod(0o666)
            answered = await ask(4321)
            assert json.loads(answered.stdout)["result"]["actor"] == "local: uid 4321", answered.stderr


async def test_errors_come_back_as_they_were(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        with pytest.raises(NotFound) as missing:
            await served.call("pong")
        assert missing.value.hint == "did you mean ping?"
        with pytest.raises(InvalidInput) as wrong:
            await served.call("deploy", imag="x")
        assert wrong.value.field == "image"
        served.host.fault = Overloaded("busy", hint="wait", retry_after=3.0)
        with pytest.raises(Overloaded) as busy:
            await served.call("deploy", image="x")
        assert (busy.value.retry_after, busy.value.exit) == (3.0, 75)
        for text in ("set", "nan"):
            with pytest.raises(SlotdError, match="JSON"):
                await served.call("bad", text=text)


async def test_several_on_one_connection(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        lines = [
            b'{"id": "a", "command": "echo", "arguments": {"text": "1"}}\n',
            b"\n",
            b'{"id": 2, "command": "nothing"}\r\n',
            b'{"command": "echo", "arguments": {"text": "3"}}',  # the last line needs no end
        ]
        answers = await served.raw(b"".join(lines))
        assert [(answer["id"], answer["ok"]) for answer in answers] == [("a", True), (2, False), (None, True)]
        assert served.ran == ["1", "3"]


# --- what is no request ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b"hello", "line"),
        (b"\xff\xfe\x00", "line"),
        (b"[]", "line"),
        (b"null", "line"),
        (b"{}", "command"),
        (b'{"command": 3}', "command"),
        (b'{"command": "ping", "arguments": []}', "arguments"),
        (b'{"command": "ping", "arguments": {"x": NaN}}', "line"),
        (b'{"command": "ping", "extra": 1}', "extra"),
        (b'{"command": "ping", "id": 1.5}', "id"),
        (b'{"command": "ping", "id": true}', "id"),
        (b'{"command": "ping", "id": [1]}', "id"),
        (b'{"command": "ping", "id": 99999999999999999999}', "id"),
        (b'{"command": "ping", "id": "' + b"x" * 200 + b'"}', "id"),
        (b'{"command": "ping"} {"command": "ping"}', "line"),
        (b"[" * 100_000, "line"),
        (b'{"a":' * 50_000, "line"),
        (b"1" * 100_000, "line"),
        (b'{"command": "echo", "arguments": {"text": 1}}', "text"),
        (b'{"command": "watch", "arguments": {"taks": "x"}}', "taks"),
        (b'{"command": "\\ud800"}', "command"),
    ],
)
async def test_a_malformed_line_is_answered_and_the_connection_goes_on(tmp_path: Path, line: bytes, field: str) -> None:
    async with serving(tmp_path) as served:
        bad, good = await served.raw(line + b'\n{"id": 7, "command": "echo"}\n')
        assert bad["ok"] is False
        assert bad["error"]["code"] in ("INVALID_ARGUMENT", "NOT_FOUND")
        assert bad["error"]["field"] == field
        assert bad["error"]["hint"]
        assert len(json.dumps(bad)) < 1000
        assert (good["id"], good["ok"]) == (7, True)


async def test_the_id_comes_back_with_an_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        (answer,) = await served.raw(b'{"id": "mine", "command": "ping", "more": 1}\n')
        assert (answer["id"], answer["error"]["field"]) == ("mine", "more")


async def test_a_line_that_is_too_long(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        fitting = b'{"command": "echo", "arguments": {"text": "' + b"x" * (MAX_LINE - 100) + b'"}}\n'
        (answer,) = await served.raw(fitting)
        assert answer["ok"] is True
        for length in (MAX_LINE + 1, 5 * MAX_LINE):
            (answer,) = await served.raw(b"x" * length + b'\n{"command": "echo"}\n')  # an error, then it is closed
            assert answer["error"]["code"] == "INVALID_ARGUMENT"
            assert str(MAX_LINE) in answer["error"]["message"]
        with pytest.raises(InvalidInput, match="line"):
            await served.call("echo", text="x" * 3 * MAX_LINE)
        assert (await served.call("ping"))["pong"]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_requests = st.fixed_dictionaries(
    {}, optional={"id": _json, "command": _json | st.sampled_from(["ping", "echo", "watch"]), "arguments": _json}
)
_lines = (
    st.binary(max_size=60)
    | _json.map(lambda v: json.dumps(v).encode())
    | _requests.map(lambda v: json.dumps(v).encode())
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=st.lists(_lines, min_size=1, max_size=6))
async def test_whatever_lines_come(tmp_path: Path, lines: list[bytes]) -> None:
    """Each line that is not blank has an answer, in order; afterwards the server is well."""
    data = b"\n".join(lines)
    watches = any(b'"watch"' in line for line in lines)
    async with serving(tmp_path) as served:
        answers = await served.raw(data)
        if not watches:
            assert len(answers) == sum(1 for line in data.split(b"\n") if line.strip())
        for answer in answers:
            assert set(answer) <= {"id", "ok", "result", "error", "more"}
            assert answer["ok"] or answer["error"]["code"]
        (good,) = await served.raw(b'{"id": 1, "command": "echo"}\n')
        assert good["ok"] is True


# --- watching --------------------------------------------------------------------------------------------------------


async def test_watching_until_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        documents = await asyncio.to_thread(lambda: list(AdminClient(served.path).watch("d-1")))
        assert documents == [deployment_document(None), deployment_document("committed")]
        with pytest.raises(NotFound):
            await asyncio.to_thread(lambda: list(AdminClient(served.path).watch("d-9")))
        answers = await served.raw(b'{"id": 5, "command": "watch"}\n')
        assert {answer["id"] for answer in answers} <= {5}


async def test_a_watch_ends_when_the_client_closes(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.host.hold = True
        ended = asyncio.Event()
        original = served.host.watch

        async def watch(task: str | None = None) -> AsyncIterator[dict[str, Any]]:
            try:
                async for document in original(task):
                    yield document
            finally:
                ended.set()

        served.host.watch = watch  # type: ignore[method-assign]
        client = AdminClient(served.path)
        documents = client.watch()
        for _ in range(2):
            await asyncio.to_thread(next, documents)
        assert not ended.is_set()
        documents.close()  # type: ignore[attr-defined]
        await asyncio.wait_for(ended.wait(), 5)
        assert not client._open


async def test_a_host_that_fails_in_a_watch(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:

        async def watch(task: str | None = None) -> AsyncIterator[dict[str, Any]]:
            yield {"id": "d-1"}
            raise RuntimeError("a secret")

        served.host.watch = watch  # type: ignore[method-assign]
        documents = AdminClient(served.path).watch()
        assert await asyncio.to_thread(next, documents) == {"id": "d-1"}
        with pytest.raises(SlotdError) as caught:
            await asyncio.to_thread(next, documents)
        assert "secret" not in str(caught.value.as_dict())


async def test_the_daemon_stops_under_a_watch(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.host.hold = True
        documents = AdminClient(served.path).watch("d-1")
        await asyncio.to_thread(next, documents)
        await served.server.close()
        with pytest.raises(Unavailable):
            await asyncio.to_thread(lambda: list(documents))


# --- many and slow clients -------------------------------------------------------------------------------------------


async def test_connections_are_bounded_and_idle_ones_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, connections=3) as served:
        idle = [await asyncio.open_unix_connection(served.path) for _ in range(3)]
        while len(served.server._connections) < 3:
            await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="all 3 connections"):
            await served.call("ping")
        idle[1][1].write(b'{"command": "echo"}\n')
        assert json.loads(await idle[1][0].readline())["ok"]  # an idle connection goes on working
        monkeypatch.setattr(admin, "IDLE", 0.0)
        await served.call("ping")
        assert await idle[0][0].read() == b""  # the one that was idle the longest
        idle[2][1].write(b'{"command": "echo"}\n')
        assert json.loads(await idle[2][0].readline())["ok"]
        for _, writer in idle:
            writer.close()


async def test_a_client_that_does_not_read_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "SLOW", 0.2)
    async with serving(tmp_path) as served:
        served.host.document = {"large": "x" * 1_000_000}
        _, writer = await asyncio.open_unix_connection(served.path)
        writer.write(b'{"command": "status"}\n' * 20)
        while not served.server._connections:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            while served.server._connections:
                await asyncio.sleep(0.01)
        writer.close()
        served.host.document = {}
        assert await served.call("status") == {}


async def test_a_command_outlives_its_client(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        _, writer = await asyncio.open_unix_connection(served.path)
        writer.write(b'{"command": "slow"}\n')
        while not served.server._connections:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        served.gate.set()
        async with asyncio.timeout(5):
            while served.ran != ["slow"]:
                await asyncio.sleep(0.01)


async def test_closing_is_bounded(tmp_path: Path) -> None:
    """Idle clients are let go at once, a command gets its grace, and then it is over."""
    async with serving(tmp_path) as served:
        _, idle = await asyncio.open_unix_connection(served.path)
        pending = asyncio.create_task(served.call("slow"))
        while len(served.server._connections) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            await served.server.close(grace=0.3)
        with pytest.raises(Unavailable):
            await pending
        assert served.ran == []
        assert not served.path.exists()
        await served.server.close()
        idle.close()


async def test_a_command_that_ends_in_its_grace_is_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        pending = asyncio.create_task(served.call("slow"))
        while not served.server._connections:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(served.server.close(grace=5))
        await asyncio.sleep(0.05)
        served.gate.set()
        assert await pending == {}
        await closing


# --- the socket ------------------------------------------------------------------------------------------------------


async def test_the_file(tmp_path: Path) -> None:
    async with serving(tmp_path / "new" / "run") as served:
        mode = served.path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o660
        assert [path.name for path in served.path.parent.iterdir()] == ["admin.sock"]
    assert not served.path.exists()


async def test_a_stale_socket_is_replaced_a_live_one_never(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(tmp_path) as served:
        second = Served(path)
        with pytest.raises(Conflict, match=f"pid {os.getpid()}") as caught:
            await second.server.start()
        assert caught.value.hint
        assert (await served.call("ping"))["pong"]
        assert [entry.name for entry in tmp_path.iterdir()] == ["admin.sock"]


async def test_a_socket_that_is_not_ours_any_more_is_left(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.path.unlink()
        async with serving(tmp_path) as second:
            await served.server.close()
            assert (await second.call("ping"))["pong"]


def test_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    path.write_text("precious")
    with pytest.raises(Conflict, match="no socket"):
        listen(path)
    assert path.read_text() == "precious"
    with pytest.raises(StorageError) as caught:
        listen(path / "below")
    assert caught.value.hint


def test_the_length_of_the_path(tmp_path: Path) -> None:
    fits = tmp_path / ("x" * (MAX_PATH - len(os.fsencode(tmp_path)) - 1))
    assert len(os.fsencode(fits)) == 107
    with listen(fits), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(fits))
        assert peer_of(client.fileno()).pid == os.getpid()
    too_long = fits.with_name(fits.name + "x")
    with pytest.raises(InvalidConfig, match="107 bytes, this has 108"):
        listen(too_long)
    with pytest.raises(InvalidConfig):
        AdminClient(too_long).call("ping")


def test_the_group(tmp_path: Path) -> None:
    with listen(tmp_path / "a", group="no-such-group-here"):
        pass
    if os.getuid() == 0:
        with listen(tmp_path / "b", group="daemon"):
            assert (tmp_path / "b").stat().st_gid != 0


# --- the client against what is no slotd -----------------------------------------------------------------------------


def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    for prepare in (lambda: None, lambda: socket.socket(socket.AF_UNIX).bind(str(path))):
        prepare()
        with pytest.raises(Unavailable) as caught:
            AdminClient(path).call("status")
        assert caught.value.exit == 69
        assert caught.value.message == f"no slotd listens on {path}"
        assert "slotd run" in str(caught.value.hint)
        with pytest.raises(Unavailable):
            next(AdminClient(path).watch())


@contextlib.contextmanager
def answering(path: Path, *answers: bytes | None) -> Iterator[None]:
    """One connection after the other is sent this and closed; None: nothing, for a while."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(8)

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                if answer is None:
                    time.sleep(0.5)
                else:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join(10)
        listener.close()


def test_answers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with answering(
        path, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"[1]\n", b'{"ok": true}\n', b'{"ok": false}\n', None
    ):
        client = AdminClient(path, timeout=5)
        with pytest.raises(Unavailable, match="went away"):
            client.call("x")
        for _ in range(2):
            with pytest.raises(SlotdError, match="does not answer as slotd does"):
                client.call("x")
        assert client.call("x") == {}
        with pytest.raises(SlotdError, match="no message"):
            client.call("x")
        with pytest.raises(DeadlineExceeded):
            AdminClient(path, timeout=0.1).call("x")
        assert not client._open


def test_an_answer_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.commands.client.MAX_ANSWER", 100_000)
    with answering(tmp_path / "s", b"x" * 10_000_000), pytest.raises(SlotdError, match="more than 100000 bytes"):
        AdminClient(tmp_path / "s").call("x")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_somebody_who_may_not(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from agent.commands.client import AdminClient\n"
        "from agent.errors import Forbidden\n"
        "path = Path(sys.argv[1])\n"
        "os.setgroups([]); os.setgid(4321); os.setuid(4321)\n"
        "try: AdminClient(path).call('ping')\n"
        "except Forbidden as error: print(error.exit, error.hint)\n"
    )
    with listen(tmp_path / "s"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "s")], capture_output=True, text=True, check=True
        )
    assert done.stdout.startswith(f"{Forbidden.exit} ")
    assert "slotd-admin" in done.stdout


def test_a_queue_that_is_full_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listen(path, backlog=0):
        clients = []
        for _ in range(3):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(str(path))
            clients.append(client)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            AdminClient(path, timeout=0.3).call("ping")
        assert time.monotonic() - began >= 0.3
        for client in clients:
            client.close()


def test_the_client_needs_no_event_loop() -> None:
    program = "import sys, agent.commands.client; print('asyncio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
