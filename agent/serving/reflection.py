"""gRPC reflection, v1 and v1alpha: what grpcurl, k6 and the like need to call us without our .proto files.

The answers are gRPC's own package's. It brings grpcio, which nothing else on the serving side needs, so it is imported
when somebody asks.
"""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from agent.errors import Unimplemented
from agent.serving.h2.call import QUESTION, Call, Method
from agent.serving.protos import POOL, parse

SERVICE = "grpc.reflection.v1alpha.ServerReflection"
_LATER = "grpc.reflection.v1.ServerReflection"
"""The same messages under another name."""


class Reflection:
    """For our services, whose messages are in our own pool, and for gRPC's, which are added to it by their files."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = (*services, SERVICE)
        self._servicer: Any = None
        self.routes = {
            f"/{name}/ServerReflectionInfo": Method(streaming=self._info, most=QUESTION) for name in (SERVICE, _LATER)
        }

    async def _info(self, call: Call) -> None:
        if self._servicer is None:
            self._servicer = await asyncio.to_thread(_servicer, self._services)
        while (message := await call.receive()) is not None:
            await asyncio.sleep(0)  # all questions may be there already: others have their turn
            if message.compressed:
                raise Unimplemented("packed messages are not taken here")
            request = parse(reflection_pb2.ServerReflectionRequest, message.data)
            for answer in self._servicer.ServerReflectionInfo(iter((request,)), None):
                await call.send(answer.SerializeToString())


def _servicer(services: tuple[str, ...]) -> Any:
    from grpc_reflection.v1alpha.reflection import ReflectionServicer

    for module in (health_pb2, reflection_pb2):
        POOL.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    return ReflectionServicer(service_names=services, pool=POOL)
