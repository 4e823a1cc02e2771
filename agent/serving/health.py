"""grpc.health.v1: whether requests are answered, and whether the slot answers them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agent.serving.dataplane import Dataplane
from agent.serving.tensorproto import short

SERVICE = "grpc.health.v1.Health"
SLOT = "slotd.slot"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpcio has no types
    """The truth at the moment of the question; watchers are told when it changes.

    "", the model's name and the names in `services` are SERVING while anything can answer, `slotd.slot` while the slot
    does. Nothing is after `lame_duck`.
    """

    def __init__(self, dataplane: Dataplane, services: tuple[str, ...]) -> None:
        self._dataplane = dataplane
        self._services = services
        self._lame = False
        self._closed = False
        self._changed = asyncio.Event()
        dataplane.on_change(self._tell)

    def lame_duck(self) -> None:
        """From now on NOT_SERVING."""
        self._lame = True
        self._tell()

    def close(self) -> None:
        """Ends all watches, which would hold up the server's stop."""
        self._closed = True
        self._tell()

    def status(self, service: str) -> int | None:
        """The status of a service, None if there is no such service."""
        if service == SLOT:
            good = self._dataplane.slot_answers()
        elif service in ("", *self._services, *self._dataplane.model_names()):
            good = self._dataplane.can_answer()
        else:
            return None
        return int(SERVING if good and not self._lame else NOT_SERVING)

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802  # gRPC's name
        status = self.status(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {short(request.service)!r}")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        names = ("", SLOT, *self._services, *self._dataplane.model_names())
        return health_pb2.HealthListResponse(
            statuses={name: health_pb2.HealthCheckResponse(status=self.status(name)) for name in names}
        )

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:  # noqa: N802
        told: int | None = None
        while not self._closed:
            changed = self._changed
            status = self.status(request.service)
            status = SERVICE_UNKNOWN if status is None else status
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
