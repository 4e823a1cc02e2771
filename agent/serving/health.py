"""grpc.health.v1: whether requests are answered, and whether the slot answers them."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2

from agent.errors import InvalidInput, NotFound
from agent.serving.dataplane import Dataplane
from agent.serving.h2.call import QUESTION, Call, Method, Reply
from agent.serving.protos import parse
from agent.serving.tensorproto import short

SERVICE = "grpc.health.v1.Health"
SLOT = "slotd.slot"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
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
        self.routes = {
            f"/{SERVICE}/Check": Method(unary=self._check, most=QUESTION),
            f"/{SERVICE}/List": Method(unary=self._list, most=QUESTION),
            f"/{SERVICE}/Watch": Method(streaming=self._watch, most=QUESTION),
        }
        dataplane.on_change(self._tell)

    def lame_duck(self) -> None:
        """From now on NOT_SERVING."""
        self._lame = True
        self._tell()

    def close(self) -> None:
        """Ends all watches, which would hold up the server's stop."""
        self._closed = True
        self._tell()

    def good(self) -> bool:
        """Whether "" is SERVING."""
        return bool(self.status("") == SERVING)

    def status(self, service: str) -> int | None:
        """The status of a service, None if there is no such service."""
        if service == SLOT:
            good = self._dataplane.slot_answers()
        elif service in ("", *self._services, *self._model_names()):
            good = self._dataplane.can_answer()
        else:
            return None
        return int(SERVING if good and not self._lame else NOT_SERVING)

    async def _check(self, data: bytes | memoryview, _: Call) -> Reply:
        service = _asked(data)
        status = self.status(service)
        if status is None:
            raise NotFound(f"there is no service {short(service)!r}", field="service")
        return _answer(status)

    async def _list(self, _: bytes | memoryview, __: Call) -> Reply:
        names = ("", SLOT, *self._services, *self._model_names())
        listed: bytes = health_pb2.HealthListResponse(
            statuses={name: health_pb2.HealthCheckResponse(status=self.status(name)) for name in names}
        ).SerializeToString()
        return listed

    async def _watch(self, call: Call) -> None:
        asked = await call.receive()
        if asked is None:
            raise InvalidInput("the message is missing", field="request")
        service = _asked(asked.data)
        told: int | None = None
        while not self._closed:
            changed = self._changed
            status = self.status(service)
            status = SERVICE_UNKNOWN if status is None else status
            if status != told:
                told = status
                await call.send(_answer(status))
            if not self._closed:
                await changed.wait()

    def _model_names(self) -> list[str]:
        served = self._dataplane.served()
        return [served.model.name] if served is not None else []

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _asked(data: bytes | memoryview) -> str:
    service: str = parse(health_pb2.HealthCheckRequest, data).service
    return service


def _answer(status: int) -> bytes:
    answer: bytes = health_pb2.HealthCheckResponse(status=status).SerializeToString()
    return answer
