"""A TensorFlow Serving client over our own message classes, and the pieces of one for hand-made requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from agent.model.signature import Strings, Tensor, dtype_of
from agent.serving.protos import PredictRequest, PredictResponse, TensorProto
from agent.serving.tensorproto import FIELDS, read_tensor

PREDICT = "/tensorflow.serving.PredictionService/Predict"
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 1 << 30),
    ("grpc.max_send_message_length", 1 << 30),
    ("grpc.use_local_subchannel_pool", 1),
)


def tensor_proto(tensor: Tensor, *, content: bool = False) -> Any:
    """A TensorProto in the typed list of its dtype, or in tensor_content."""
    dtype = dtype_of(tensor)
    number, field = next((number, field) for number, known, field in FIELDS if known is dtype)
    proto = TensorProto(dtype=number)
    proto.tensor_shape.SetInParent()
    for size in tensor.shape:
        proto.tensor_shape.dim.add(size=size)
    if isinstance(tensor, Strings):
        proto.string_val.extend(tensor.items)
    elif content:
        proto.tensor_content = tensor.tobytes()
    else:
        values = tensor.view(np.uint16) if tensor.dtype == np.float16 else tensor
        getattr(proto, field).extend(values.ravel().tolist())
    return proto


def predict_request(
    inputs: Mapping[str, Tensor],
    *,
    model: str = "",
    version: int | None = None,
    label: str = "",
    signature: str = "",
    outputs: Sequence[str] = (),
    content: bool = False,
) -> Any:
    request = PredictRequest(output_filter=outputs)
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    if version is not None:
        request.model_spec.version.value = version
    if label:
        request.model_spec.version_label = label
    for name, tensor in inputs.items():
        request.inputs[name].CopyFrom(tensor_proto(tensor, content=content))
    return request


@dataclass
class Predicted:
    outputs: dict[str, Tensor]
    response: Any
    trailing: dict[str, str]


class TfsClient:
    """Over grpc.aio; errors are grpc.aio.AioRpcError."""

    def __init__(self, address: str, options: Sequence[tuple[str, Any]] = CHANNEL_OPTIONS) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=options)
        self.call = self.channel.unary_unary(PREDICT)

    async def __aenter__(self) -> TfsClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def predict(
        self,
        inputs: Mapping[str, Tensor],
        *,
        timeout: float | None = 20,
        metadata: Sequence[tuple[str, str]] = (),
        **spec: Any,
    ) -> Predicted:
        return await self.send(predict_request(inputs, **spec).SerializeToString(), timeout=timeout, metadata=metadata)

    async def send(
        self, data: bytes, *, timeout: float | None = 20, metadata: Sequence[tuple[str, str]] = (), **options: Any
    ) -> Predicted:
        """Wire bytes as they are."""
        call = self.call(data, timeout=timeout, metadata=tuple(metadata), **options)
        response = PredictResponse.FromString(await call)
        outputs = {
            name: read_tensor(name, proto, most=1 << 30, strings=1 << 20) for name, proto in response.outputs.items()
        }
        return Predicted(outputs, response, {key: str(value) for key, value in await call.trailing_metadata()})


def trailing(error: grpc.aio.AioRpcError) -> dict[str, str]:
    return {key: str(value) for key, value in error.trailing_metadata()}
