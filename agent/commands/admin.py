"""The admin socket: the table of commands for whoever may open it on this host.

JSON lines both ways. `{"id", "command", "arguments"}` is answered by `{"id", "ok": true, "result"}` or
`{"id", "ok": false, "error": {"code", "message", "hint", "field"}}`, in order. The command `watch` (`task` optional)
answers with one line for each change of a deployment, all with `"more": true`, and a last one with `"more": false`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.commands.client import AdminClient
from agent.commands.host import Host
from agent.commands.table import Actor, Arguments, Table, check
from agent.commands.unix import listen, peer_of
from agent.errors import InvalidInput, Overloaded, SlotdError, Unavailable
from agent.groups import ADMIN

__all__ = ["AdminClient", "AdminServer"]

log = structlog.get_logger(__name__)

MAX_LINE = 1 << 20
_SHAPE = 'send {"id": 1, "command": "status", "arguments": {}} on one line'
CONNECTIONS = 32
IDLE = 60.0
"""Seconds without a request after which a connection gives its place to a new one, if all are taken."""
SLOW = 10.0
"""Seconds that a client may leave an answer unread."""
LOOKUP = 2.0
"""Seconds that the name of a user may take to be found."""


class Request(BaseModel):
    """One line."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Field(max_length=128)] | Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    command: str
    arguments: dict[str, Any] = {}


class Watch(Arguments):
    """What `watch` takes."""

    task: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class _Gone(Exception):
    """The client closed, or does not read."""


class AdminServer:
    """Serves the table at `path`. `start`, then `close`."""

    def __init__(
        self, path: Path, table: Table, host: Host, *, connections: int = CONNECTIONS, group: str | None = ADMIN
    ) -> None:
        """At most `connections` at a time; the socket is given to `group` if there is one of that name."""
        self.path = path
        self._table = table
        self._host = host
        self._most = connections
        self._group = group
        self._server: asyncio.Server | None = None
        self._inode: tuple[int, int] | None = None
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._names: dict[int, str] = {}

    async def start(self) -> None:
        """Listens. Raises Conflict if another slotd does, InvalidConfig if the path is too long, StorageError."""
        listener = await asyncio.to_thread(listen, self.path, group=self._group)
        try:
            status = os.stat(self.path)
            self._inode = (status.st_dev, status.st_ino)
            self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=MAX_LINE)
        except BaseException:
            listener.close()
            raise

    async def close(self, grace: float = 2.0) -> None:
        """Takes no more; commands that run get `grace` seconds, idle clients none. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        self._remove()
        for task, connection in list(self._connections.items()):
            if connection.idle_since is not None or connection.watching:
                task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=grace)
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=grace)

    def _remove(self) -> None:
        """Our socket, but not one that another slotd has put there since."""
        try:
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) == self._inode:
                self.path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("the admin socket could not be removed", path=str(self.path), error=str(error))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or (len(self._connections) >= self._most and not self._make_room()):
            error: SlotdError = Overloaded(
                f"all {self._most} connections are in use", hint="close one, or try again in a minute", retry_after=IDLE
            )
            if self._server is None:
                error = Unavailable("slotd is stopping")
            writer.write(_encode({"id": None, "ok": False, "error": error.as_dict()}))
            writer.close()
            return
        connection = _Connection(self, reader, writer)
        task = asyncio.create_task(connection.serve(), name="admin-connection")
        self._connections[task] = connection
        task.add_done_callback(self._ended)

    def _make_room(self) -> bool:
        """Ends the connection that has been idle the longest, if that is long enough."""
        idle = [(since, task) for task, c in self._connections.items() if (since := c.idle_since) is not None]
        if not idle:
            return False
        since, task = min(idle, key=lambda pair: pair[0])
        if time.monotonic() - since < IDLE:
            return False
        task.cancel()
        return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._connections[task]
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("an admin connection failed in an unforeseen way", exc_info=fault)

    async def actor(self, writer: asyncio.StreamWriter) -> Actor:
        """Who is at the other end: "uid 1000 (name)". Raises OSError."""
        uid = peer_of(writer.get_extra_info("socket").fileno()).uid
        if uid not in self._names:
            try:
                # Users may live in a directory service, which may be away.
                name = (await asyncio.wait_for(asyncio.to_thread(pwd.getpwuid, uid), LOOKUP)).pw_name
            except (KeyError, TimeoutError):
                return Actor("local", f"uid {uid}")
            if len(self._names) >= 1000:
                self._names.clear()
            self._names[uid] = name
        return Actor("local", f"uid {uid} ({self._names[uid]})")

    async def run(self, request: Request, actor: Actor) -> dict[str, Any]:
        """The result of a command. Raises SlotdError."""
        return await self._table.run(request.command, request.arguments, actor)

    def watch(self, arguments: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Raises InvalidInput."""
        return self._host.watch(check("watch", Watch, arguments).task)


class _Connection:
    """One client."""

    def __init__(self, server: AdminServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self.idle_since: float | None = time.monotonic()
        self.watching = False

    async def serve(self) -> None:
        """Until the client closes, does not read, or sends what is no line."""
        try:
            actor = await self._server.actor(self._writer)
            more = True
            while more:
                self.idle_since = time.monotonic()
                try:
                    line = await self._reader.readuntil(b"\n")
                except asyncio.IncompleteReadError as end:
                    line, more = end.partial, False
                except asyncio.LimitOverrunError:
                    error = InvalidInput(f"a line may have {MAX_LINE} bytes", hint="commands are short")
                    await self._fail(None, error)
                    await self._discard()
                    return
                self.idle_since = None
                if line.strip():
                    await self._answer(line, actor)
        except (_Gone, OSError):
            pass  # nobody is left to be told
        finally:
            await self._hang_up()

    async def _answer(self, line: bytes, actor: Actor) -> None:
        key: str | int | None = None
        try:
            document = _decode(line)
            key = _key(document)
            request = _request(document)
            if request.command == "watch":
                await self._watch(key, request.arguments)
                return
            result = await self._server.run(request, actor)
            await self._send({"id": key, "ok": True, "result": result})
        except SlotdError as error:
            await self._fail(key, error)
        except (_Gone, OSError):
            raise
        except Exception as fault:
            log.exception("an admin request failed in an unforeseen way", actor=str(actor))
            why = f"the request failed in an unforeseen way ({type(fault).__name__})"
            await self._fail(key, SlotdError(why, hint="the log of slotd has the details"))

    async def _watch(self, key: str | int | None, arguments: dict[str, Any]) -> None:
        documents = self._server.watch(arguments)
        self.watching = True
        closed = asyncio.create_task(self._reader.read(1), name="admin-watch-client")
        try:
            while True:
                coming = asyncio.create_task(_next(documents), name="admin-watch")
                try:
                    await asyncio.wait((coming, closed), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not coming.done():
                        coming.cancel()
                        await asyncio.gather(coming, return_exceptions=True)
                if closed.done():
                    raise _Gone
                document = coming.result()
                if document is None:
                    break
                await self._send({"id": key, "ok": True, "result": document, "more": True})
        finally:
            self.watching = False
            closed.cancel()
            await asyncio.gather(closed, return_exceptions=True)
            if isinstance(documents, AsyncGenerator):
                await documents.aclose()
        await self._send({"id": key, "ok": True, "result": None, "more": False})

    async def _send(self, document: dict[str, Any]) -> None:
        """Raises _Gone if the client leaves too much unread, SlotdError if the document is no JSON."""
        self._writer.write(_encode(document))
        try:
            async with asyncio.timeout(SLOW):
                await self._writer.drain()
        except TimeoutError:
            log.warning("an admin client does not read: dropped")
            self._writer.transport.abort()
            raise _Gone from None

    async def _fail(self, key: str | int | None, error: SlotdError) -> None:
        await self._send({"id": key, "ok": False, "error": error.as_dict()})

    async def _discard(self) -> None:
        """Reads what is still being sent for a moment, so that the client gets to read our answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while await self._reader.read(1 << 16):
                    pass

    async def _hang_up(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()
        except (TimeoutError, OSError):
            self._writer.transport.abort()


async def _next(documents: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(documents, None)


def _encode(document: dict[str, Any]) -> bytes:
    try:
        return json.dumps(document, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        log.exception("an answer is no JSON")
        raise SlotdError("the answer cannot be put into JSON", hint="the log of slotd has the details") from error


def _decode(line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise InvalidInput(f"is not JSON: {why}", field="line", hint=_SHAPE) from None
    if not isinstance(document, dict):
        raise InvalidInput("is not an object", field="line", hint=_SHAPE)
    return document


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _key(document: dict[str, Any]) -> str | int | None:
    """The id, if it is one: errors carry it as well."""
    key = document.get("id")
    if isinstance(key, str) and len(key) <= 128:
        return key
    return key if isinstance(key, int) and not isinstance(key, bool) and -(2**63) <= key < 2**63 else None


def _request(document: dict[str, Any]) -> Request:
    try:
        return Request.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0])[:128] if first["loc"] else "line"
        raise InvalidInput(first["msg"], field=field, hint=_SHAPE) from None
