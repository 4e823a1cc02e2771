"""TensorFlow Serving's REST: /v1/models/NAME[/versions/N], with :predict and /metadata.

Source: TensorFlow Serving, "RESTful API".
"""

from __future__ import annotations

from typing import Any

from agent.errors import InvalidInput
from agent.executor.seat import Seat
from agent.model.signature import Strings, Tensor, TensorSpec
from agent.serving.dataplane import Answer
from agent.serving.encode import SIGNATURE_NAME
from agent.serving.forms import PREDICT_JSON
from agent.serving.http.exchange import Exchange
from agent.serving.http.messages import Body, Request, Response, json_response
from agent.serving.jsonrequests import predict_context
from agent.serving.jsontensors import write_name, write_tensor
from agent.serving.protos import DataType
from agent.serving.tensorproto import Parsed
from agent.serving.tfserving import METADATA, METHOD, NUMBERS, check_signature


async def predict(exchange: Exchange, request: Request, seat: Seat, name: str, version: int | None) -> Response:
    """`predictions` for `instances`, `outputs` for `inputs`. Raises SlotdError."""
    reader = exchange.reader(PREDICT_JSON, predict_context(seat.signature.inputs), name, version)

    async def read(body: Body) -> Parsed:
        parsed = await reader(body)
        check_signature(parsed.signature, "signature_name")
        return parsed

    return await exchange.answer(request, read, encode)


def encode(answer: Answer, parsed: Parsed) -> Response:
    """The answer as its request came: row by row, or by column. Raises InvalidInput if it has no rows."""
    outputs = answer.outputs
    if not parsed.rows:
        pieces: list[Body] = [b'{"outputs":', *_columns(outputs), b"}"]
        return Response(200, pieces)
    lengths = {tensor.shape[0] if tensor.shape else None for tensor in outputs.values()}
    if len(lengths) != 1 or None in lengths:
        raise InvalidInput(
            "the outputs are not row by row: they differ in their first axis",
            field="instances",
            hint="send inputs in the place of instances",
        )
    if len(outputs) == 1:
        (only,) = outputs.values()
        return Response(200, [b'{"predictions":', *write_tensor(only), b"}"])
    count = lengths.pop() or 0
    pieces = [b'{"predictions":[']
    for row in range(count):
        pieces.append(b",{" if row else b"{")
        for number, (name, tensor) in enumerate(outputs.items()):
            pieces += [b"," if number else b"", write_name(name), *write_tensor(_row(tensor, row))]
        pieces.append(b"}")
    return Response(200, [*pieces, b"]}"])


def _columns(outputs: dict[str, Tensor]) -> list[Body]:
    if len(outputs) == 1:
        (only,) = outputs.values()
        return list(write_tensor(only))
    pieces: list[Body] = [b"{"]
    for number, (name, tensor) in enumerate(outputs.items()):
        pieces += [b"," if number else b"", write_name(name), *write_tensor(tensor)]
    return [*pieces, b"}"]


def _row(tensor: Tensor, row: int) -> Tensor:
    if not isinstance(tensor, Strings):
        return tensor[row]  # type: ignore[no-any-return]
    step = len(tensor.items) // tensor.shape[0]
    return Strings(tensor.shape[1:], tensor.items[row * step : (row + 1) * step])


def status(seat: Seat) -> Response:
    """The versions that answer: one."""
    version = {"version": str(seat.model.version), "state": "AVAILABLE"}
    return json_response({"model_version_status": [version | {"status": {"error_code": "OK", "error_message": ""}}]})


def metadata(seat: Seat) -> Response:
    """The signature, as protobuf's JSON has it."""
    signature = {
        "inputs": {spec.name: _described(spec) for spec in seat.signature.inputs.values()},
        "outputs": {spec.name: _described(spec) for spec in seat.signature.outputs.values()},
        "method_name": METHOD,
    }
    spec = {"name": seat.model.name, "signature_name": "", "version": str(seat.model.version)}
    return json_response({"model_spec": spec, "metadata": {METADATA: {METADATA: {SIGNATURE_NAME: signature}}}})


def _described(spec: TensorSpec) -> dict[str, Any]:
    dims = [{"size": str(size), "name": ""} for size in spec.shape]
    dtype = DataType.values_by_number[NUMBERS[spec.dtype]].name
    return {"dtype": dtype, "tensor_shape": {"dim": dims, "unknown_rank": False}, "name": spec.name}
