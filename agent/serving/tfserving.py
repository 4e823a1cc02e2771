"""tensorflow.serving's services: errors as their clients expect them.

Source: prediction_service.proto and model_service.proto of TensorFlow Serving.
"""

from __future__ import annotations

from typing import Any

from agent.errors import InvalidInput, NotFound, Unimplemented
from agent.executor.seat import Seat
from agent.model.signature import DType, Tensor, TensorSpec, dtype_of
from agent.serving.binding import ModelFields
from agent.serving.dataplane import Answer, Dataplane
from agent.serving.encode import SIGNATURE_NAME, encode_response
from agent.serving.exchange import Exchange, Wire, served
from agent.serving.forms import PREDICT
from agent.serving.h2.call import QUESTION, Call, Method, Reply
from agent.serving.protos import message, parse
from agent.serving.tensorproto import FIELDS, Parsed, short

SERVICE = "tensorflow.serving.PredictionService"


MODEL_SERVICE = "tensorflow.serving.ModelService"
METADATA = "signature_def"
METHOD = "tensorflow/serving/predict"
_NO_HEAD = ("Classify", "Regress", "MultiInference")


class PredictionService:
    """Predict and GetModelMetadata, ModelService's GetModelStatus, and clear refusals of the rest."""

    def __init__(self, exchange: Exchange, dataplane: Dataplane) -> None:
        self._exchange = exchange
        self._dataplane = dataplane
        self.routes = {
            f"/{SERVICE}/Predict": Method(unary=self._predict),
            f"/{SERVICE}/GetModelMetadata": Method(unary=self._metadata, most=QUESTION),
            f"/{MODEL_SERVICE}/GetModelStatus": Method(unary=self._status, most=QUESTION),
            f"/{MODEL_SERVICE}/HandleReloadConfigRequest": Method(unary=_no_reload, most=QUESTION),
        } | {f"/{SERVICE}/{name}": Method(unary=_no_head, most=QUESTION) for name in _NO_HEAD}

    async def _predict(self, data: bytes | memoryview, call: Call) -> Reply:
        return await self._exchange.answer(data, call, WIRE)

    async def _metadata(self, data: bytes | memoryview, _: Call) -> Reply:
        asked = parse(_MetadataRequest, data)
        if not asked.metadata_field:
            raise InvalidInput("names nothing", field="metadata_field", hint=f"ask for {METADATA!r}")
        for field in asked.metadata_field:
            if field != METADATA:
                raise InvalidInput(f"there is no {short(field)!r}, only {METADATA!r}", field="metadata_field")
        seat = self._model(asked.model_spec)
        signature = _SignatureDef(method_name=METHOD)
        for specs, side in ((seat.signature.inputs, signature.inputs), (seat.signature.outputs, signature.outputs)):
            for spec in specs.values():
                side[spec.name].CopyFrom(_described(spec))
        answer = _MetadataResponse(model_spec=_spec(seat))
        answer.metadata[METADATA].Pack(_SignatureDefMap(signature_def={SIGNATURE_NAME: signature}))
        written: bytes = answer.SerializeToString()
        return written

    async def _status(self, data: bytes | memoryview, _: Call) -> Reply:
        """AVAILABLE for the model that answers: another one is not there for a client before it does."""
        seat = self._model(parse(_StatusRequest, data).model_spec)
        status = {"version": seat.model.version, "state": "AVAILABLE", "status": {}}
        written: bytes = _StatusResponse(model_version_status=[status]).SerializeToString()
        return written

    def _model(self, spec: Any) -> Seat:
        choice = spec.WhichOneof("version_choice")
        if choice == "version_label":
            raise no_label(spec.version_label)
        version = spec.version.value if choice == "version" else None
        return served(self._dataplane, spec.name, version, WIRE.fields)


_MetadataRequest = message("tensorflow.serving.GetModelMetadataRequest")
_MetadataResponse = message("tensorflow.serving.GetModelMetadataResponse")
_StatusRequest = message("tensorflow.serving.GetModelStatusRequest")
_StatusResponse = message("tensorflow.serving.GetModelStatusResponse")
_SignatureDef = message("tensorflow.SignatureDef")
_SignatureDefMap = message("tensorflow.serving.SignatureDefMap")
_TensorInfo = message("tensorflow.TensorInfo")
NUMBERS = {dtype: number for number, dtype, _ in FIELDS}


def _described(spec: TensorSpec) -> Any:
    shape = {"dim": [{"size": size} for size in spec.shape]}
    return _TensorInfo(name=spec.name, dtype=NUMBERS[spec.dtype], tensor_shape=shape)


def _spec(seat: Seat) -> dict[str, object]:
    return {"name": seat.model.name, "version": {"value": seat.model.version}}


async def _no_head(_: bytes | memoryview, __: Call) -> Reply:
    raise no_head()


async def _no_reload(_: bytes | memoryview, __: Call) -> Reply:
    raise Unimplemented(
        "models are not changed by clients", hint="slotd deploy IMAGE on the host, or its command over MQTT"
    )


def no_head() -> Unimplemented:
    """For what takes examples instead of tensors."""
    return Unimplemented("the model takes tensors, and has no head for examples", hint="call Predict")


def no_label(label: str, field: str = "model_spec.version_label") -> NotFound:
    """No version has one."""
    return NotFound(
        f"no version is labelled {short(label)!r}; labels are not supported",
        field=field,
        hint="leave the label out, or name the version",
    )


def _check(parsed: Parsed) -> None:
    if parsed.label is not None:
        raise no_label(parsed.label)
    check_signature(parsed.signature, "model_spec.signature_name")


def check_signature(name: str, field: str) -> None:
    """Raises InvalidInput for another one than the one that there is."""
    if name not in ("", SIGNATURE_NAME):
        raise InvalidInput(f"there is no signature {short(name)!r}, only {SIGNATURE_NAME!r}", field=field)


def _encode(answer: Answer, _: Parsed, most: int) -> Reply:
    return encode_response(answer.outputs, name=answer.name, version=answer.version, most=most)


def _one_by_one(tensor: Tensor) -> bool:
    return dtype_of(tensor) not in (DType.FLOAT32, DType.FLOAT64, DType.BOOL)


WIRE = Wire(PREDICT, _check, _encode, _one_by_one, ModelFields("model_spec.name", "model_spec.version"))
