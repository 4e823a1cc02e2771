"""inference.GRPCInferenceService, the KServe v2 protocol, as Triton's clients expect it.

Source: KServe's Open Inference Protocol; Triton's for what it leaves open: answers are raw, a stream goes on after an
error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from agent import __version__
from agent.errors import NotFound, SlotdError, Unavailable
from agent.executor.seat import Seat
from agent.model.signature import Strings, Tensor, TensorSpec
from agent.serving.binding import ModelFields
from agent.serving.dataplane import Answer, Dataplane
from agent.serving.encode import Parts, put_together, varint
from agent.serving.exchange import Exchange, Wire, served
from agent.serving.forms import INFER
from agent.serving.h2.call import QUESTION, Call, Method, Reply
from agent.serving.infer import DATATYPES, encode_infer, version_of
from agent.serving.parse import LARGE
from agent.serving.protos import message, parse
from agent.serving.tensorproto import Parsed

SERVICE = "inference.GRPCInferenceService"
PLATFORM = "slotd"


class InferenceService:
    """Its calls. `ready` says whether health tells that requests are answered."""

    def __init__(
        self, exchange: Exchange, dataplane: Dataplane, ready: Callable[[], bool], *, max_message: int
    ) -> None:
        self._exchange = exchange
        self._dataplane = dataplane
        self._ready = ready
        self._max_message = max_message
        self.routes = {
            f"/{SERVICE}/{name}": Method(unary=_unary(name, handler), most=QUESTION)
            for name, handler in (
                ("ServerLive", self._server_live),
                ("ServerReady", self._server_ready),
                ("ServerMetadata", self._server_metadata),
                ("ModelReady", self._model_ready),
                ("ModelMetadata", self._model_metadata),
            )
        }
        self.routes[f"/{SERVICE}/ModelInfer"] = Method(unary=self._infer)
        self.routes[f"/{SERVICE}/ModelStreamInfer"] = Method(streaming=self._stream)

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _infer(self, data: bytes | memoryview, call: Call) -> Reply:
        return await self._exchange.answer(data, call, WIRE)

    async def _stream(self, call: Call) -> None:
        """One request after the other, each answered in turn; one that is refused does not end the stream."""
        while (received := await call.receive()) is not None:
            await asyncio.sleep(0)  # all that is said in between may be there already: others have their turn
            data = received.data
            try:
                if received.compressed:
                    data = await call.unpacked(received)
                reply = await self._exchange.answer(data, call, WIRE)
            except SlotdError as error:
                if (left := call.time_remaining()) is not None and left <= 0:
                    raise  # the stream's time is over
                await call.send(_StreamResponse(error_message=f"[{error.grpc}] {error}").SerializeToString())
            else:
                parts: Parts = [b"\x12" + varint(len(reply)), reply]
                if len(reply) <= LARGE:
                    await call.send(put_together(parts, 2 * self._max_message))
                else:
                    await call.send(await asyncio.to_thread(put_together, parts, 2 * self._max_message))

    # --- questions ----------------------------------------------------------------------------------------------------

    def _server_live(self, _: Any) -> dict[str, object]:
        return {"live": True}

    def _server_ready(self, _: Any) -> dict[str, object]:
        return {"ready": self._ready()}

    def _server_metadata(self, _: Any) -> dict[str, object]:
        return {"name": "slotd", "version": __version__, "extensions": []}

    def _model_ready(self, asked: Any) -> dict[str, object]:
        try:
            self._model(asked.name, asked.version)
        except (NotFound, Unavailable):
            return {"ready": False}
        return {"ready": self._ready()}

    def _model_metadata(self, asked: Any) -> dict[str, object]:
        seat = self._model(asked.name, asked.version)
        return {
            "name": seat.model.name,
            "versions": [str(seat.model.version)],
            "platform": PLATFORM,
            "inputs": list(map(_described, seat.signature.inputs.values())),
            "outputs": list(map(_described, seat.signature.outputs.values())),
        }

    def _model(self, name: str, version: str) -> Seat:
        number = version_of(version)
        return served(self._dataplane, name, number, ModelFields("name", "version"))


_StreamResponse = message("inference.ModelStreamInferResponse")


def _unary(name: str, handler: Callable[[Any], dict[str, object]]) -> Callable[[bytes | memoryview, Call], Any]:
    asked, answered = message(f"inference.{name}Request"), message(f"inference.{name}Response")

    async def answer(data: bytes | memoryview, _: Call) -> Reply:
        written: bytes = answered(**handler(parse(asked, data))).SerializeToString()
        return written

    return answer


def _described(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": spec.shape}


def _encode(answer: Answer, parsed: Parsed, most: int) -> Reply:
    return encode_infer(answer.outputs, name=answer.name, version=answer.version, id=parsed.id, most=most)


def _one_by_one(tensor: Tensor) -> bool:
    return isinstance(tensor, Strings)


WIRE = Wire(INFER, lambda _: None, _encode, _one_by_one, ModelFields("model_name", "model_version"))
