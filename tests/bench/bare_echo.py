"""A bare `grpc.aio` server: bytes in, bytes out, nothing between. Prints its port.

`bare_echo.py SIZE [tuned]`: answers SIZE bytes, 0: what came. `tuned`: with uvloop and the allocator as slotd has them.
"""

from __future__ import annotations

import asyncio
import sys

SIZE, TUNED = int(sys.argv[1]), sys.argv[2:] == ["tuned"]
if TUNED:
    from agent.memory import tune_malloc

    tune_malloc()

import grpc  # noqa: E402
import uvloop  # noqa: E402

REPLY = bytes(SIZE)


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._echo)

    async def _echo(self, data: bytes, _: grpc.aio.ServicerContext) -> bytes:
        return REPLY or data


async def main() -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if TUNED:
    uvloop.run(main())
else:
    asyncio.run(main())
