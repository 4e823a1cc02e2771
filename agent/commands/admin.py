"""The admin socket: the command table for local users, as JSON lines; and the client that the CLI uses.

A request is `{"id", "command", "arguments"}`, its answer `{"id", "ok", "result" | "error"}`. `watch` answers with a
line for each change of a deployment. Who asks is what the kernel says of the peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import pwd
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from agent.commands.host import Host
from agent.commands.table import Actor, Table
from agent.errors import (
    Conflict,
    InvalidConfig,
    InvalidInput,
    Overloaded,
    SlotdError,
    StorageError,
    Unavailable,
    revive,
)

log = structlog.get_logger(__name__)

MAX_LINE = 1 << 20
MAX_CONNECTIONS = 32
MAX_PATH = 107
"""What fits into sockaddr_un."""
SEND_TIMEOUT = 10.0
"""Seconds that a reader may be slow."""
WATCH = "watch"


class AdminServer:
    """Listens on a Unix socket of mode 0660."""

    def __init__(self, path: Path, table: Table, host: Host) -> None:
        self.path = path
        self._table = table
        self._host = host
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._inode: int | None = None

    async def start(self) -> None:
        """Raises Conflict if a live slotd has the socket, InvalidConfig for a path that is too long, StorageError."""
        if len(os.fsencode(self.path)) > MAX_PATH:
            raise InvalidConfig(
                f"the socket's path is longer than {MAX_PATH} bytes: {self.path}",
                field="run_dir",
                hint="choose a shorter one",
            )
        if await asyncio.to_thread(_is_live, self.path):
            raise Conflict(
                f"another slotd listens on {self.path}", field="run_dir", hint="give this one its own run_dir"
            )
        try:
            listener = await asyncio.to_thread(_bind, self.path)
        except OSError as error:
            raise StorageError(
                f"cannot be bound: {error.strerror}", field=str(self.path), hint="check run_dir"
            ) from error
        self._inode = self.path.stat().st_ino
        self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=MAX_LINE)

    async def close(self) -> None:
        """Ends all connections, and removes the socket if it is still ours."""
        if self._server is not None:
            self._server.close()
        for client in tuple(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            if self._inode is not None and self.path.stat().st_ino == self._inode:
                self.path.unlink()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if len(self._clients) > MAX_CONNECTIONS:
                await _send(
                    writer, _failed(None, Overloaded(f"more than {MAX_CONNECTIONS} connections", retry_after=1.0))
                )
                return
            await self._serve(reader, writer, _peer(writer))
        except (ConnectionError, TimeoutError):
            pass  # the client went away or does not read; nobody is left to tell
        finally:
            self._clients.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, actor: Actor) -> None:
        while True:
            try:
                line = await reader.readline()
            except ValueError:
                await _send(writer, _failed(None, InvalidInput(f"a line is longer than {MAX_LINE} bytes")))
                return
            if not line:
                return
            if not line.strip():
                continue
            number: object = None
            try:
                request = _parse(line)
                number = request.get("id")
                arguments = request.get("arguments", {})
                if not isinstance(arguments, dict):
                    raise InvalidInput("must be an object", field="arguments")
                if request["command"] == WATCH:
                    await self._watch(writer, number, arguments)
                    continue
                result = await self._table.run(request["command"], arguments, actor)
                await _send(writer, {"id": number, "ok": True, "result": result})
            except SlotdError as error:
                await _send(writer, _failed(number, error))
            except (ConnectionError, TimeoutError):
                raise
            except Exception:
                log.exception("admin_command_failed", actor=str(actor))
                await _send(writer, _failed(number, SlotdError("an unforeseen fault", hint="see the log of slotd")))

    async def _watch(self, writer: asyncio.StreamWriter, number: object, arguments: Mapping[str, Any]) -> None:
        task = arguments.get("task")
        if task is not None and not isinstance(task, str):
            raise InvalidInput("must be a task id", field="task")
        stream = self._host.watch(task)
        async with contextlib.aclosing(stream) as documents:  # type: ignore[type-var]
            async for document in documents:
                await _send(writer, {"id": number, "ok": True, "result": document})
        await _send(writer, {"id": number, "ok": True, "end": True})


def _parse(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidInput("the line is not JSON", hint='send {"id": 1, "command": "ping"}') from None
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        raise InvalidInput("a request is an object with a command", field="command")
    return request


def _failed(number: object, error: SlotdError) -> dict[str, Any]:
    return {"id": number, "ok": False, "error": error.as_dict()}


async def _send(writer: asyncio.StreamWriter, document: Mapping[str, Any]) -> None:
    writer.write(json.dumps(document, separators=(",", ":"), default=str).encode() + b"\n")
    async with asyncio.timeout(SEND_TIMEOUT):
        await writer.drain()


def _peer(writer: asyncio.StreamWriter) -> Actor:
    """SO_PEERCRED of the connection."""
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as peer:
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", raw)
    try:
        return Actor("local", f"uid {uid} ({pwd.getpwuid(uid).pw_name})")
    except KeyError:
        return Actor("local", f"uid {uid}")


def _is_live(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _bind(path: Path) -> socket.socket:
    """A listening socket that was never open to others: made in a 0700 folder, then renamed into place."""
    private = path.parent / f".admin-{os.getpid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    hidden = private / "s"
    hidden.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(hidden))
        hidden.chmod(0o660)
        listener.listen(MAX_CONNECTIONS)
        hidden.rename(path)
    except BaseException:
        listener.close()
        raise
    finally:
        hidden.unlink(missing_ok=True)
        private.rmdir()
    return listener


class AdminClient:
    """Asks a daemon; synchronous."""

    def __init__(self, path: Path, *, timeout: float = 30.0) -> None:
        self.path = path
        self._timeout = timeout
        self._numbers = itertools.count(1)
        self._socket: socket.socket | None = None
        self._buffer = b""

    def call(self, name: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The result of a command. Raises what the daemon said, or Unavailable if none listens."""
        result: dict[str, Any] = self._ask(name, arguments or {})["result"]
        return result

    def watch(self, task: str | None = None) -> Iterator[dict[str, Any]]:
        """A deployment's documents, as they change, until it has ended."""
        answer = self._ask(WATCH, {"task": task} if task else {})
        assert self._socket is not None
        self._socket.settimeout(None)
        try:
            while not answer.get("end"):
                yield answer["result"]
                answer = self._read()
        finally:
            self.close()

    def close(self) -> None:
        """Hangs up."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._buffer = None, b""

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        request = {"id": next(self._numbers), "command": name, "arguments": dict(arguments)}
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.settimeout(self._timeout)
                self._socket.connect(str(self.path))
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            self.close()
            if isinstance(error, PermissionError):
                raise Unavailable(
                    f"{self.path} may not be opened", hint="become a member of the group slotd-admin, or use sudo"
                ) from None
            raise Unavailable(f"no slotd listens on {self.path}", hint="start it with `slotd run`") from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._socket is not None
        try:
            while b"\n" not in self._buffer:
                data = self._socket.recv(65536)
                if not data:
                    raise ConnectionResetError
                self._buffer += data
        except OSError as error:
            self.close()
            why = "did not answer in time" if isinstance(error, TimeoutError) else "ended before it answered"
            raise Unavailable(f"slotd {why}", hint="look at its log") from None
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if not answer.get("ok"):
            raise revive(answer.get("error") or {})
        return answer
