"""KServe's REST: /v2 and what is below it.

Source: KServe's Open Inference Protocol, "HTTP/REST"; Triton's "Binary Tensor Data Extension".
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from agent import __version__
from agent.errors import InvalidInput
from agent.executor.seat import Seat
from agent.model.signature import Strings, Tensor, TensorSpec, dtype_of
from agent.serving.dataplane import Answer
from agent.serving.forms import INFER_JSON
from agent.serving.http.exchange import Exchange
from agent.serving.http.messages import BINARY, Body, Request, Response, json_response
from agent.serving.infer import DATATYPES
from agent.serving.jsonrequests import infer_context
from agent.serving.jsontensors import write_name, write_tensor
from agent.serving.kserve import PLATFORM
from agent.serving.tensorproto import Parsed

HEAD = "inference-header-content-length"
_LENGTH = struct.Struct("<I")


async def infer(exchange: Exchange, request: Request, name: str, version: int | None) -> Response:
    """The outputs, as JSON or as bytes behind it. Raises SlotdError."""
    read = exchange.reader(INFER_JSON, infer_context(_head(request)), name, version)
    return await exchange.answer(request, read, encode)


def encode(answer: Answer, parsed: Parsed) -> Response:
    """JSON, and behind it the outputs that are wanted as bytes."""
    default = parsed.binary.get("", False)
    document: list[Body] = [b"{", write_name("model_name"), *_text(answer.name)]
    document += [b",", write_name("model_version"), *_text(str(answer.version))]
    if parsed.id:
        document += [b",", write_name("id"), *_text(parsed.id)]
    document.append(b',"outputs":[')
    behind: list[Body] = []
    for number, (name, tensor) in enumerate(answer.outputs.items()):
        document += [b",{" if number else b"{", write_name("name"), *_text(name)]
        document += [b',"datatype":"', DATATYPES[dtype_of(tensor)].encode(), b'","shape":']
        document.append(str(list(tensor.shape)).encode())
        if parsed.binary.get(name, default):
            raw = _raw(tensor)
            document.append(b',"parameters":{"binary_data_size":%d}}' % sum(map(len, raw)))
            behind += raw
        else:
            document += [b',"data":', *write_tensor(tensor, flat=True), b"}"]
    document.append(b"]}")
    if not any(parsed.binary.get(name, default) for name in answer.outputs):
        return Response(200, document)
    head = sum(map(len, document))
    return Response(200, [*document, *behind], BINARY, ((HEAD, str(head)),))


def _raw(tensor: Tensor) -> list[Body]:
    if isinstance(tensor, Strings):
        return [b"".join(piece for item in tensor.items for piece in (_LENGTH.pack(len(item)), item))]
    if not tensor.size:
        return []
    # A copy: the answer's memory is given back before all of it has been sent.
    return [np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).copy().data]


def _text(text: str) -> list[Body]:
    return [write_name(text)[:-1]]


def _head(request: Request) -> int | None:
    text = request.headers.get(HEAD)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise InvalidInput("is no number of bytes", field=HEAD)
    return int(text)


def server() -> Response:
    """Who this is."""
    return json_response({"name": "slotd", "version": __version__, "extensions": ["binary_tensor_data"]})


def model(seat: Seat) -> Response:
    """What it takes and gives."""
    return json_response(
        {
            "name": seat.model.name,
            "versions": [str(seat.model.version)],
            "platform": PLATFORM,
            "inputs": list(map(_described, seat.signature.inputs.values())),
            "outputs": list(map(_described, seat.signature.outputs.values())),
        }
    )


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": list(spec.shape)}
