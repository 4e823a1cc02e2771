"""POST /score: a picture as it is, and the list of its scores."""

from __future__ import annotations

from agent.errors import InvalidInput, Unimplemented
from agent.model.signature import DType, Strings, Tensor
from agent.serving.dataplane import Answer
from agent.serving.http import tfserving
from agent.serving.http.exchange import Exchange, as_bytes
from agent.serving.http.messages import JSON, Body, Request, Response
from agent.serving.jsontensors import write_name, write_tensor
from agent.serving.tensorproto import Parsed

METHOD_TEXT = "POST a picture (JPEG or PNG) to /score; its scores come back as a JSON list.\n"


async def score(exchange: Exchange, request: Request) -> Response:
    """The only picture's scores; a JSON body is answered as TensorFlow Serving does. Raises SlotdError."""
    seat = exchange.served("", None)
    if request.content_type == JSON:
        return await tfserving.predict(exchange, request, seat, "", None)
    taken = [spec for spec in seat.signature.inputs.values() if spec.dtype is DType.STRING]
    if len(seat.signature.inputs) != 1 or not taken or len(taken[0].shape) > 1:
        raise Unimplemented(
            f"{seat.model.name} takes no pictures but tensors", hint="send JSON, or call /v1/models or /v2/models"
        )
    name, shape = taken[0].name, (1,) * len(taken[0].shape)

    async def read(body: Body) -> Parsed:
        if not len(body):
            raise InvalidInput("is empty", field="request", hint="send a picture: curl --data-binary @picture.jpg")
        return Parsed({name: Strings(shape, [await as_bytes(body)])})

    return await exchange.answer(request, read, encode)


def encode(answer: Answer, _: Parsed) -> Response:
    """The scores of one picture: a list, or one for each output by its name."""
    outputs = {name: _only(tensor) for name, tensor in answer.outputs.items()}
    if len(outputs) == 1:
        (only,) = outputs.values()
        return Response(200, list(write_tensor(only)))
    pieces: list[Body] = [b"{"]
    for number, (name, tensor) in enumerate(outputs.items()):
        pieces += [b"," if number else b"", write_name(name), *write_tensor(tensor)]
    return Response(200, [*pieces, b"}"])


def _only(tensor: Tensor) -> Tensor:
    """Without the first axis, if that is of one picture."""
    if not tensor.shape or tensor.shape[0] != 1:
        return tensor
    return Strings(tensor.shape[1:], tensor.items) if isinstance(tensor, Strings) else tensor[0]
