"""tensorflow.serving.PredictionService: errors as its clients expect them."""

from __future__ import annotations

from agent.errors import InvalidInput, NotFound
from agent.model.signature import DType, Tensor, dtype_of
from agent.serving.dataplane import Answer
from agent.serving.encode import SIGNATURE_NAME, encode_response
from agent.serving.exchange import Exchange, Wire
from agent.serving.forms import PREDICT
from agent.serving.h2.call import Call, Method, Reply
from agent.serving.tensorproto import Parsed, short

SERVICE = "tensorflow.serving.PredictionService"


class PredictionService:
    """Its calls."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.routes = {f"/{SERVICE}/Predict": Method(unary=self._predict)}

    async def _predict(self, data: bytes | memoryview, call: Call) -> Reply:
        return await self._exchange.answer(data, call, WIRE)


def _check(parsed: Parsed) -> None:
    if parsed.label is not None:
        raise NotFound(
            f"no version is labelled {short(parsed.label)!r}; labels are not supported",
            field="model_spec.version_label",
            hint="leave version_label out, or set version",
        )
    if parsed.signature not in ("", SIGNATURE_NAME):
        raise InvalidInput(
            f"there is no signature {short(parsed.signature)!r}, only {SIGNATURE_NAME!r}",
            field="model_spec.signature_name",
        )


def _encode(answer: Answer, _: Parsed, most: int) -> Reply:
    return encode_response(answer.outputs, name=answer.name, version=answer.version, most=most)


def _one_by_one(tensor: Tensor) -> bool:
    return dtype_of(tensor) not in (DType.FLOAT32, DType.FLOAT64, DType.BOOL)


WIRE = Wire(PREDICT, _check, _encode, _one_by_one, "model_spec.name", "model_spec.version")
