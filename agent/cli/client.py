"""A gRPC client of slotd's Predict, and files as the tensors that it sends. No protobuf or gRPC until it is called."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.cli.output import plain

if TYPE_CHECKING:
    from agent.errors import SlotdError
    from agent.model.signature import Tensor

METHOD = "/tensorflow.serving.PredictionService/Predict"
_REPLY = 1 << 31
"""Bytes, or strings, that a reply may have."""


@dataclass(frozen=True)
class Reply:
    """What came back. `ms` is the round trip of the call, without making the connection."""

    name: str
    version: int
    digest: str
    served_by: str
    ms: float
    outputs: dict[str, Tensor]


def call(address: str, inputs: Mapping[str, Tensor], *, model: str = "", key: str = "", timeout: float = 30.0) -> Reply:
    """One Predict; `key` where the host asks for one.

    Raises the SlotdError that the server told, Unavailable if nobody is there.
    """
    import os

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    from agent.serving.protos import PredictRequest, PredictResponse
    from agent.serving.tensorproto import read_tensor

    request = PredictRequest()
    request.model_spec.name = model
    for name, tensor in inputs.items():
        _fill(request.inputs[name], tensor)
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        began = time.monotonic()
        _wait_for(channel, address, timeout)
        stub = channel.unary_unary(
            METHOD,
            request_serializer=PredictRequest.SerializeToString,
            response_deserializer=PredictResponse.FromString,
        )
        began, left = time.monotonic(), timeout - (time.monotonic() - began)
        try:
            response, done = stub.with_call(
                request, timeout=max(0.001, left), metadata=[("authorization", f"Bearer {key}")] if key else None
            )
        except grpc.RpcError as error:
            raise _error(error) from None
        took = time.monotonic() - began
        metadata = {key: value for key, value in done.trailing_metadata() or () if isinstance(value, str)}
    return Reply(
        name=response.model_spec.name,
        version=response.model_spec.version.value,
        digest=metadata.get("slotd-model-digest", ""),
        served_by=metadata.get("slotd-served-by", ""),
        ms=took * 1000,
        outputs={
            name: read_tensor(name, proto, most=_REPLY, strings=_REPLY) for name, proto in response.outputs.items()
        },
    )


def read_inputs(images: Iterable[Path], image_input: str, arrays: Iterable[str]) -> dict[str, Tensor]:
    """Files as the tensors that they stand for. Raises NotFound, InvalidInput naming the file or option."""
    from agent.errors import InvalidInput
    from agent.model.signature import Strings

    found: dict[str, Tensor] = {}
    items = [read_file(path) for path in images]
    if items:
        found[image_input] = Strings((len(items),), items)
    for argument in arrays:
        name, equals, file = argument.rpartition("=")
        if not equals or not name:
            raise InvalidInput(f"{argument!r} is not NAME=FILE.npy", field="--input")
        if name in found:
            raise InvalidInput("is given twice", field=name)
        found[name] = _array(Path(file))
    return found


def read_file(path: Path) -> bytes:
    """Its content. Raises NotFound."""
    from agent.errors import NotFound

    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(f"cannot be read: {error.strerror}", field=str(path)) from None


def _array(path: Path) -> Tensor:
    import io

    import numpy as np

    from agent.errors import InvalidInput
    from agent.model.signature import DType, Strings

    try:
        array = np.load(io.BytesIO(read_file(path)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InvalidInput(f"is not a .npy file: {error}", field=str(path), hint="write it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise InvalidInput("holds several arrays", field=str(path), hint="write one with numpy.save, not savez")
    if array.dtype.kind in "SU":
        items = [item if isinstance(item, bytes) else item.encode() for item in array.reshape(-1).tolist()]
        return Strings(array.shape, items)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        DType.of(array.dtype)
    except ValueError:
        raise InvalidInput(f"has dtype {array.dtype}, which no model takes", field=str(path)) from None
    return array


def _fill(proto: Any, tensor: Tensor) -> None:
    import numpy as np

    from agent.model.signature import Strings, dtype_of
    from agent.serving.tensorproto import FIELDS

    proto.dtype = next(number for number, dtype, _ in FIELDS if dtype is dtype_of(tensor))
    for length in tensor.shape:
        proto.tensor_shape.dim.add(size=length)
    if isinstance(tensor, Strings):
        proto.string_val.extend(tensor.items)
    else:
        proto.tensor_content = np.ascontiguousarray(tensor).tobytes()


def _wait_for(channel: Any, address: str, timeout: float) -> None:
    """Until the channel is connected; a refusal counts at once. Raises Unavailable."""
    import queue

    import grpc

    from agent.errors import Unavailable

    states: queue.SimpleQueue[Any] = queue.SimpleQueue()
    channel.subscribe(states.put, try_to_connect=True)
    end = time.monotonic() + timeout
    try:
        while True:
            state = states.get(timeout=max(0.0, end - time.monotonic()))
            if state is grpc.ChannelConnectivity.READY:
                return
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                break
    except queue.Empty:
        pass
    finally:
        channel.unsubscribe(states.put)
    raise Unavailable(f"nobody answers at {address}", hint="slotd status shows where it listens; or give --address")


def _error(error: Any) -> SlotdError:
    """What the server told, as the error that it was."""
    from agent.errors import revive

    told = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    document = {"code": told.get("slotd-error-code", error.code().name), "message": plain(error.details())}
    if "slotd-error-code" not in told and error.code().name == "UNIMPLEMENTED":
        document["hint"] = "is it a slotd that listens there?"
    if "slotd-error-hint" in told:
        document["hint"] = told["slotd-error-hint"]
    return revive(document)
