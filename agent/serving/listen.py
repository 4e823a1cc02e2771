"""The gRPC server: TCP on loopback and a Unix socket, Predict, ModelInfer, health, reflection, and an ordered stop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from agent.config import ServingConfig
from agent.errors import SlotdError, Unavailable
from agent.health.issues import Issues
from agent.serving import endpoint, health, keys, kserve, reflection, tfserving
from agent.serving.dataplane import Dataplane
from agent.serving.exchange import Exchange
from agent.serving.follow import follow
from agent.serving.h2.connection import Connection, Shared
from agent.serving.h2.messages import Room
from agent.serving.parse import Parser

if TYPE_CHECKING:
    from agent.serving.http.server import HttpServer
    from agent.serving.tls import Tls

log = structlog.get_logger(__name__)

MAX_CONNECTIONS = 256
"""On each address; more are closed as they come."""
HELD_MESSAGES = 16
"""How many requests of the largest size may be in hand at one time."""
LARGER_QUEUE = 1024
"""As many requests may wait after a reload: the bound of calls is set once."""
BACKLOG = 128
CLOSING = 2.0
"""Seconds for the last answers to be read, after the last call has ended."""


class GrpcServer:
    """`start`, then at the end `lame_duck` and `stop`; each once, in this order."""

    def __init__(self, config: ServingConfig, run_dir: Path, dataplane: Dataplane, issues: Issues) -> None:
        self._config = config
        self._keys = keys.Keys(config.keys, issues) if config.keys is not None else None
        self._socket_path = config.grpc.socket or run_dir / "grpc.sock"
        self._dataplane = dataplane
        self._parser = Parser(config.grpc.max_message)
        self._shared: Shared | None = None
        self._servers: list[asyncio.Server] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._health: health.Health | None = None
        self._http: HttpServer | None = None
        self._tls: Tls | None = None
        self._issues = issues
        self.statuses: Mapping[int, int] = {}
        """HTTP's answers by their status."""
        self._socket: endpoint.UnixSocket | None = None
        self._mark: tuple[int, int] | None = None

    def reconfigure(self, config: ServingConfig) -> None:
        """Another configuration is in force; its addresses and bounds of messages and streams are as at the start."""
        self._config = config

    async def start(self) -> list[str]:
        """Listen; returns the addresses as gRPC clients write them.

        Raises InvalidConfig, Conflict (naming who has the address), StorageError; nothing is left behind then.
        """
        try:
            return await self._start()
        except BaseException:
            await self.stop(0)
            raise

    async def lame_duck(self) -> None:
        """Health says NOT_SERVING for `serving.lame_duck` seconds, while requests are still answered."""
        if self._health is not None:
            self._health.lame_duck()
            await asyncio.sleep(self._config.lame_duck)

    async def stop(self, grace: float | None = None) -> None:
        """Clients are sent elsewhere; calls in flight get `grace` seconds (None: `serving.grace`), then they end with
        UNAVAILABLE."""
        if self._health is not None:
            self._health.close()
        for server in self._servers:
            server.close()
        grace = self._config.grace if grace is None else grace
        closing = []
        if self._shared is not None:
            shared = self._shared
            closing.append(close_all(shared.connections, lambda: not shared.connections, grace))
        if self._http is not None:
            closing.append(self._http.close(grace))
        await asyncio.gather(*closing)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._socket is not None:
            await asyncio.to_thread(self._socket.withdraw, self._mark)
        await self._parser.close()

    async def open_http(self, metrics: Callable[[], str], opened: Callable[[str], None]) -> None:
        """After `start`: HTTP too. `metrics` gives the text of /metrics; `opened` is told the address, once it listens.

        Raises nothing: what is wrong with its address is an issue.
        """
        config, shared = self._config, self._shared
        if config.http.listen is None or shared is None or self._health is None:
            return
        from agent.serving.http.connection import Shared as HttpShared
        from agent.serving.http.exchange import Exchange as HttpExchange
        from agent.serving.http.routes import OPEN, Routes, check_host
        from agent.serving.http.server import Counted, HttpServer

        most = config.grpc.max_message
        exchange = HttpExchange(self._dataplane, self._parser, most=most, room=shared.room)
        answer = Counted(Routes(exchange, self._health.good, metrics).answer)
        self.statuses = answer.statuses

        def guard(path: str, headers: Mapping[str, str]) -> None:
            if not self._anywhere():
                check_host(headers.get("host"))
            if self._keys is not None and path not in OPEN:
                self._keys.check(path, headers.items())

        handed = HttpShared(answer, shared.room, most, guard, answer.count)
        self._http = HttpServer(
            config.http.listen, handed, self._issues, opened, tls=self._tls, anywhere=self._anywhere()
        )
        await self._http.open()
        self._spawn(self._http.run(), "http-connections")

    async def _start(self) -> list[str]:
        config = self._config.grpc
        if self._config.tls.certificate is not None:
            from agent.serving import tls

            self._tls = tls.Tls(self._config.tls, self._issues)
            await self._tls.load()
            self._spawn(follow(self._tls.refresh, tls.EVERY, "serving-tls", self._issues), "certificate")
        tcp = None
        if config.listen:
            tcp = await asyncio.to_thread(
                endpoint.address, config.listen, "serving.grpc.listen", anywhere=self._anywhere()
            )
        room = Room(HELD_MESSAGES * config.max_message)
        exchange = Exchange(self._dataplane, self._parser, max_message=config.max_message, room=room)
        services = (tfserving.SERVICE, tfserving.MODEL_SERVICE, kserve.SERVICE)
        self._health = health.Health(self._dataplane, services)
        predictions = tfserving.PredictionService(exchange, self._dataplane)
        inferences = kserve.InferenceService(
            exchange, self._dataplane, self._health.good, max_message=config.max_message
        )
        described = reflection.Reflection((*services, health.SERVICE))
        if self._keys is not None:
            await self._keys.load()
        self._shared = Shared(
            {**predictions.routes, **inferences.routes, **self._health.routes, **described.routes},
            room,
            max_message=config.max_message,
            max_streams=config.max_streams,
            max_calls=max(self._config.max_queue, LARGER_QUEUE) + 2 * config.max_streams,
            guard=self._keys.check if self._keys is not None else None,
        )
        self._spawn(self._tick(self._shared), "connections")
        if self._keys is not None:
            self._spawn(follow(self._keys.refresh, keys.EVERY, "serving-keys", self._issues), "keys")
        addresses = []
        if tcp is not None:
            addresses.append(await self._bind_tcp(*tcp))
        self._socket = await asyncio.to_thread(endpoint.UnixSocket.prepare, self._socket_path)
        await self._serve(await asyncio.to_thread(bound, socket.AF_UNIX, str(self._socket.draft)))
        self._mark = await asyncio.to_thread(self._socket.publish)
        addresses.append(f"unix:{self._socket_path}")
        log.info("listening", addresses=addresses)
        return addresses

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))

    def _anywhere(self) -> bool:
        """Whether other hosts may reach the ports: what they send is sealed, and they say who they are."""
        config = self._config
        return self._tls is not None and (config.keys is not None or config.tls.client_ca is not None)

    async def _tick(self, shared: Shared) -> None:
        await asyncio.sleep(1.0)
        try:
            await self._parser.start()  # not before: the first requests have the CPU to themselves
        except (OSError, SlotdError) as error:  # the message that needs it will try again, and tell
            log.warning("parse_child_not_started", error=str(error))
        while True:
            shared.tick()
            await asyncio.sleep(1.0)

    async def _bind_tcp(self, host: str, port: int) -> str:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        literal = f"[{host}]" if ":" in host else host
        try:
            listener = bound(family, (host, port))
        except OSError:
            raise await asyncio.to_thread(endpoint.taken, literal, port) from None
        await self._serve(listener)
        return f"{literal}:{listener.getsockname()[1]}"

    async def _serve(self, listener: socket.socket) -> None:
        shared, places = self._shared, Places()
        assert shared is not None
        loop = asyncio.get_running_loop()
        make = loop.create_unix_server if listener.family == socket.AF_UNIX else loop.create_server
        sealed = sealing(self._tls, "h2") if listener.family != socket.AF_UNIX else {}
        made = partial(Connection, shared, places.take, places.give)
        server = await make(made, sock=listener, backlog=BACKLOG, **sealed)
        self._servers.append(server)


class Places:
    """As many connections as one address has."""

    def __init__(self) -> None:
        self._free = MAX_CONNECTIONS

    def take(self) -> bool:
        """Whether there was one left."""
        if not self._free:
            return False
        self._free -= 1
        return True

    def give(self) -> None:
        self._free += 1


class _Closable(Protocol):
    def drain(self) -> None: ...
    def cut_short(self, error: SlotdError) -> None: ...
    def abort(self) -> None: ...


async def close_all(connections: Collection[_Closable], ended: Callable[[], bool], grace: float) -> None:
    """Nothing new is taken; what is in hand has `grace` seconds until it has `ended`, then it ends with UNAVAILABLE."""
    for connection in tuple(connections):
        connection.drain()
    await until(ended, grace)
    for connection in tuple(connections):
        connection.cut_short(Unavailable("slotd is stopping", hint="try again in a moment"))
    await until(lambda: not connections, CLOSING)
    for connection in tuple(connections):
        connection.abort()
    await until(lambda: not connections, CLOSING)


def sealing(tls: Tls | None, protocol: str) -> dict[str, Any]:
    """What `create_server` takes for TLS."""
    if tls is None:
        return {}
    from agent.serving.tls import HANDSHAKE

    return {"ssl": tls.context(protocol), "ssl_handshake_timeout": HANDSHAKE, "ssl_shutdown_timeout": HANDSHAKE}


def bound(family: socket.AddressFamily, address: str | tuple[str, int]) -> socket.socket:
    """A socket that listens. Without SO_REUSEPORT, with which a second server would bind the same port, silently.

    Raises OSError.
    """
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            # Connections of the last run that are not quite over do not count.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


async def until(condition: Callable[[], bool], seconds: float) -> None:
    """Waits for something that is short in coming; no longer than that."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110  # it takes a round trip or so
                await asyncio.sleep(0.005)
