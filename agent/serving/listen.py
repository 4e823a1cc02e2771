"""The gRPC server: TCP on loopback and a Unix socket, Predict, health, reflection, and an ordered stop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from agent.config import ServingConfig
from agent.serving import endpoint, health, tfserving
from agent.serving.dataplane import Dataplane
from agent.serving.parse import Parser
from agent.serving.protos import POOL

log = structlog.get_logger(__name__)

MAX_CONNECTIONS = 256
"""On each address; more are closed as they come."""
HELD_MESSAGES = 16
"""How many requests of the largest size may be in hand at one time."""
MAX_METADATA = 16 << 10
LARGER_QUEUE = 1024
"""As many requests may wait after a reload: gRPC's own bound is set once."""


class GrpcServer:
    """`start`, then at the end `lame_duck` and `stop`; each once, in this order."""

    def __init__(self, config: ServingConfig, run_dir: Path, dataplane: Dataplane) -> None:
        self._config = config
        self._socket_path = config.grpc.socket or run_dir / "grpc.sock"
        self._dataplane = dataplane
        self._parser = Parser(config.grpc.max_message)
        self._server: grpc.aio.Server | None = None
        self._health: health.Health | None = None
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
        """New requests are refused at once; those in flight get `grace` seconds (None: `serving.grace`), then they are
        cancelled."""
        if self._health is not None:
            self._health.close()
        if self._server is not None:
            await self._server.stop(self._config.grace if grace is None else grace)
        if self._socket is not None:
            await asyncio.to_thread(self._socket.withdraw, self._mark)
        await self._parser.close()

    async def _start(self) -> list[str]:
        config = self._config.grpc
        tcp = await asyncio.to_thread(endpoint.loopback, config.listen) if config.listen else None
        await self._parser.start()
        # Made here because it belongs to the running loop.
        self._server = server = grpc.aio.server(options=self._options(), maximum_concurrent_rpcs=self._most_calls())
        services = (tfserving.SERVICE,)
        self._health = health.Health(self._dataplane, services)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        _add_reflection(server, services)
        held = HELD_MESSAGES * config.max_message
        server.add_generic_rpc_handlers(
            (tfserving.PredictionService(self._dataplane, self._parser, max_message=config.max_message, held=held),)
        )
        addresses = []
        if tcp is not None:
            addresses.append(await self._bind_tcp(server, *tcp))
        self._socket = await asyncio.to_thread(endpoint.UnixSocket.prepare, self._socket_path)
        server.add_insecure_port(f"unix:{self._socket.draft}")
        self._mark = await asyncio.to_thread(self._socket.publish)
        addresses.append(f"unix:{self._socket_path}")
        await server.start()
        log.info("listening", addresses=addresses)
        return addresses

    async def _bind_tcp(self, server: grpc.aio.Server, host: str, port: int) -> str:
        literal = f"[{host}]" if ":" in host else host
        try:
            bound = server.add_insecure_port(f"{literal}:{port}")
        except RuntimeError:  # gRPC logs why
            raise await asyncio.to_thread(endpoint.taken, literal, port) from None
        return f"{literal}:{bound}"

    def _most_calls(self) -> int:
        """Calls at one time over all connections, health watches included; gRPC refuses more before it reads them."""
        return max(self._config.max_queue, LARGER_QUEUE) + 2 * self._config.grpc.max_streams

    def _options(self) -> list[tuple[str, int]]:
        config = self._config.grpc
        return [
            ("grpc.so_reuseport", 0),  # else a second server binds the same port, silently
            ("grpc.max_receive_message_length", config.max_message),
            ("grpc.max_send_message_length", config.max_message),
            ("grpc.max_metadata_size", MAX_METADATA),
            ("grpc.max_concurrent_streams", config.max_streams),
            ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 1_800_000),
            # A client that went away without a word is noticed; one that asks every ten seconds is welcome.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ]


def _add_reflection(server: grpc.aio.Server, services: tuple[str, ...]) -> None:
    """For our services, whose messages are in our own pool, and for gRPC's, which are added to it by their files."""
    for module in (health_pb2, reflection_pb2):
        POOL.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    names = (*services, health.SERVICE, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool=POOL)
