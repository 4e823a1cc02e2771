"""inference.GRPCInferenceService on real sockets, with gRPC's own client and the generated messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from agent.config import GrpcConfig, ServingConfig
from agent.errors import Overloaded
from agent.health.issues import Issues
from agent.model.signature import DType, Strings, Tensor, dtype_of
from agent.serving.binding import ModelFields
from agent.serving.listen import HELD_MESSAGES, GrpcServer
from agent.serving.protos import message
from support.fake_dataplane import FakeDataplane
from support.infer_client import infer_request, outputs_of
from support.stall import stall_probe
from support.tfs_client import CHANNEL_OPTIONS

X = np.arange(8, dtype=np.float32).reshape(2, 4)
NUMBERS = [dtype for dtype in DType if dtype is not DType.STRING]


class Client:
    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)

    async def ask(self, call: str, **fields: Any) -> Any:
        return await self.call(call, message(f"inference.{call}Request")(**fields))

    async def infer(self, inputs: dict[str, Tensor], **more: Any) -> Any:
        return await self.call("ModelInfer", infer_request(inputs, **more))

    async def call(self, call: str, request: Any, **more: Any) -> Any:
        response = message(f"inference.{call}Response")
        return await self._channel.unary_unary(
            f"/inference.GRPCInferenceService/{call}",
            request_serializer=lambda sent: sent if isinstance(sent, bytes) else sent.SerializeToString(),
            response_deserializer=response.FromString,
        )(request, **more)

    def stream(self, requests: Any, **more: Any) -> Any:
        return self._channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=lambda sent: sent if isinstance(sent, bytes) else sent.SerializeToString(),
            response_deserializer=message("inference.ModelStreamInferResponse").FromString,
        )(requests, **more)

    async def close(self) -> None:
        await self._channel.close()


class House:
    def __init__(self, server: GrpcServer, dataplane: FakeDataplane, address: str) -> None:
        self.server, self.dataplane, self.address = server, dataplane, address
        self.client = Client(address)


@asynccontextmanager
async def opened(run_dir: Path, **grpc_config: Any) -> AsyncIterator[House]:
    dataplane = FakeDataplane()
    dataplane.behave = lambda request: dict(request.inputs)
    config = ServingConfig(grpc=GrpcConfig(listen="127.0.0.1:0", **grpc_config), lame_duck=0.01, grace=1.0)
    server = GrpcServer(config, run_dir, dataplane, Issues())  # type: ignore[arg-type]
    house = House(server, dataplane, (await server.start())[0])
    try:
        yield house
    finally:
        await house.client.close()
        await server.stop(1.0)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as house:
        yield house


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def field(error: grpc.aio.AioRpcError) -> str:
    return str(dict(error.trailing_metadata() or ()).get("slotd-error-field"))


def every_dtype() -> dict[str, Tensor]:
    rng = np.random.default_rng(5)
    tensors: dict[str, Tensor] = {f"a {dtype.value}": (rng.random((2, 3)) * 2).astype(dtype.numpy) for dtype in NUMBERS}
    return tensors | {"s": Strings((2,), [b"", b"\xff\x00 two"]), "none": np.empty((0, 3), np.float32)}


def same(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, Strings) or isinstance(other, Strings):
        return isinstance(one, Strings) and isinstance(other, Strings) and list(one.items) == list(other.items)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("raw", [True, False])
async def test_every_dtype_comes_and_goes(house: House, raw: bool) -> None:
    sent = {name: tensor for name, tensor in every_dtype().items() if raw or dtype_of(tensor) is not DType.FLOAT16}
    response = await house.client.infer(sent, raw=raw, model="toy", version="3", id="r-7")
    assert (response.model_name, response.model_version, response.id) == ("toy", "3", "r-7")
    got = outputs_of(response)
    assert list(got) == list(sent)
    assert all(same(tensor, got[name]) for name, tensor in sent.items())
    assert all(answer.released for answer in house.dataplane.answers)


async def test_what_a_request_says_reaches_the_dataplane(house: House) -> None:
    await house.client.call(
        "ModelInfer",
        infer_request({"x": X}, model="toy", version="3", outputs=["x"]),
        timeout=20,
        metadata=[("slotd-priority", "4")],
    )
    await house.client.infer({"x": X})
    first, second = house.dataplane.requests
    assert (first.model, first.version, first.outputs, first.priority) == ("toy", 3, ("x",), 4)
    assert first.timeout is not None and 0 < first.timeout <= 20.2  # gRPC rounds what it tells up, by a hundredth
    assert (second.model, second.version, second.outputs, second.timeout) == ("", None, (), None)


async def test_a_large_one_is_the_same_bytes(house: House) -> None:
    large = np.random.default_rng(1).random((5, 1 << 20)).astype(np.float32)
    got = outputs_of(await house.client.infer({"x": large}))
    assert same(large, got["x"])
    typed = outputs_of(await house.client.infer({"x": large}, raw=False))  # by way of the child
    assert same(large, typed["x"])


def _wrong() -> dict[str, tuple[Any, str, str, str]]:
    """What is sent, the status, the field, and a word of what is said."""
    invalid = "INVALID_ARGUMENT"
    cases: dict[str, tuple[Any, str, str, str]] = {
        "garbage": (b"\xff" * 50, invalid, "request", "ModelInferRequest"),
        "a version that is no number": (
            infer_request({"x": X}, version="latest"),
            "NOT_FOUND",
            "model_version",
            "late",
        ),
        "too short": (infer_request({"x": X}), invalid, "x", "28 raw bytes"),
        "too many raw ones": (infer_request({"x": X}), invalid, "raw_input_contents", "2 entries for 1"),
        "raw and typed": (infer_request({"x": X}), invalid, "x", "raw and in fp32_contents"),
        "an unknown datatype": (infer_request({"x": X}), invalid, "x", "'FP31'"),
        "BF16": (infer_request({"x": X}), invalid, "x", "'BF16'"),
        "a negative size": (infer_request({"x": X}), invalid, "x", "[-2, 4]"),
        "too many dimensions": (infer_request({"x": X}), invalid, "x", "33 dimensions"),
        "a wrong count": (infer_request({"x": X}, raw=False), invalid, "x", "9 values in fp32_contents"),
        "the wrong list": (infer_request({"x": X}, raw=False), invalid, "x", "int_contents"),
        "half of typed": (infer_request({"x": X}), invalid, "x", "raw_input_contents only"),
        "an int8 that is none": (infer_request({"x": X.astype(np.int8)}, raw=False), invalid, "x", "int8"),
        "a bool that is none": (infer_request({"x": np.array([True])}), invalid, "x", "neither 0 nor 1"),
        "twice": (infer_request({"x": X}), invalid, "x", "twice"),
        "an output twice": (infer_request({"x": X}, outputs=["y", "y"]), invalid, "outputs", "twice"),
        "strings that end early": (infer_request({"s": Strings((2,), [b"a", b"b"])}), invalid, "s", "2 strings"),
        "strings that go on": (infer_request({"s": Strings((2,), [b"a", b"b"])}), invalid, "s", "2 strings"),
        "a string longer than all": (infer_request({"s": Strings((1,), [b"a"])}), invalid, "s", "1 strings"),
        "many strings": (infer_request({"s": Strings((20_000,), [b""] * 20_000)}), invalid, "s", "16384"),
        "many tensors": (infer_request({str(n): X for n in range(33)}), invalid, "inputs", "33"),
        "a long name": (infer_request({"x" * 2000: X}), invalid, "x" * 100 + "?", "2000 characters"),
        "shared memory in": (infer_request({"x": X}), "UNIMPLEMENTED", "x", "shared memory"),
        "shared memory out": (infer_request({"x": X}, outputs=["y"]), "UNIMPLEMENTED", "y", "shared memory"),
        "classification": (infer_request({"x": X}, outputs=["y"]), "UNIMPLEMENTED", "y", "classification"),
    }
    cases["too short"][0].raw_input_contents[0] = X.tobytes()[:-4]
    cases["too many raw ones"][0].raw_input_contents.append(b"")
    cases["raw and typed"][0].inputs[0].contents.fp32_contents.append(1)
    cases["an unknown datatype"][0].inputs[0].datatype = "FP31"
    cases["BF16"][0].inputs[0].datatype = "BF16"
    cases["a negative size"][0].inputs[0].shape[0] = -2
    cases["too many dimensions"][0].inputs[0].shape.extend([1] * 31)
    cases["a wrong count"][0].inputs[0].contents.fp32_contents.append(1)
    cases["the wrong list"][0].inputs[0].contents.int_contents.append(1)
    half = cases["half of typed"][0]
    half.inputs[0].datatype = "FP16"
    del half.raw_input_contents[:]
    cases["an int8 that is none"][0].inputs[0].contents.int_contents[0] = 200
    cases["a bool that is none"][0].raw_input_contents[0] = b"\x02"
    twice = cases["twice"][0]
    twice.inputs.add().CopyFrom(twice.inputs[0])
    twice.raw_input_contents.append(X.tobytes())
    cases["strings that end early"][0].raw_input_contents[0] = b"\x01\0\0\0a"
    cases["strings that go on"][0].raw_input_contents[0] += b"\0"
    cases["a string longer than all"][0].raw_input_contents[0] = b"\xff\xff\xff\xffa"
    for name, where in (("shared memory in", "inputs"), ("shared memory out", "outputs")):
        getattr(cases[name][0], where)[0].parameters["shared_memory_region"].string_param = "r"
    cases["classification"][0].outputs[0].parameters["classification"].int64_param = 3
    return cases


@pytest.mark.parametrize("name", _wrong())
async def test_what_is_wrong_is_named(house: House, name: str) -> None:
    request, status, where, said = _wrong()[name]
    error = await refused(house.client.call("ModelInfer", request))
    assert error.code().name == status, error.details()
    assert field(error) == where
    assert said in str(error.details())
    assert not house.dataplane.requests
    assert outputs_of(await house.client.infer({"x": X}))["x"].shape == (2, 4)


@pytest.mark.alone
async def test_two_million_strings(house: House) -> None:
    request = infer_request({"s": Strings((2_000_000,), [b""] * 2_000_000)}, raw=False).SerializeToString()
    async with stall_probe(label="2,000,000 strings in bytes_contents"):
        error = await refused(house.client.call("ModelInfer", request))
    assert (error.code(), field(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "s")


async def test_the_names_of_its_own_protocol(house: House) -> None:
    await house.client.infer({"x": X})
    assert house.dataplane.requests[0].fields == ModelFields("model_name", "model_version")


# --- questions --------------------------------------------------------------------------------------------------------


async def test_server_and_model_say_what_they_are(house: House) -> None:
    ask = house.client.ask
    assert (await ask("ServerLive")).live
    assert (await ask("ServerReady")).ready
    assert (await ask("ServerMetadata")).name == "slotd"
    assert (await ask("ModelReady", name="toy")).ready
    assert (await ask("ModelReady", name="toy", version="3")).ready
    for other in ({"name": "other"}, {"name": "toy", "version": "4"}, {"name": "toy", "version": "x"}):
        assert not (await ask("ModelReady", **other)).ready
    metadata = await ask("ModelMetadata", name="toy")
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("toy", ["3"], "slotd")
    (described,) = metadata.inputs
    assert (described.name, described.datatype, list(described.shape)) == ("x:0", "FP32", [-1, 4])
    for other, where in (({"name": "other"}, "name"), ({"name": "toy", "version": "4"}, "version")):
        error = await refused(ask("ModelMetadata", **other))
        assert (error.code(), field(error)) == (grpc.StatusCode.NOT_FOUND, where)


async def test_not_ready_while_nobody_answers_and_at_the_end(house: House) -> None:
    ask = house.client.ask
    house.dataplane.change(answering=False)
    assert (await ask("ServerLive")).live
    assert not (await ask("ServerReady")).ready
    assert not (await ask("ModelReady", name="toy")).ready
    house.dataplane.change(answering=True)
    assert (await ask("ServerReady")).ready
    await house.server.lame_duck()
    assert not (await ask("ServerReady")).ready
    house.dataplane.names = []
    error = await refused(ask("ModelMetadata", name="toy"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


# --- streams ----------------------------------------------------------------------------------------------------------


async def test_a_stream_answers_in_turn_and_goes_on_after_a_refusal(house: House) -> None:
    wrong = infer_request({"x": X}, id="2")
    wrong.raw_input_contents[0] = b""
    requests = [infer_request({"x": X + n}, id=str(n)) for n in range(2)]
    answers = [one async for one in house.client.stream(iter([*requests, wrong, infer_request({"x": X}, id="3")]))]
    assert [one.infer_response.id for one in answers] == ["0", "1", "", "3"]
    assert [bool(one.error_message) for one in answers] == [False, False, True, False]
    assert answers[2].error_message.startswith("[INVALID_ARGUMENT] x: ")
    assert same(outputs_of(answers[1].infer_response)["x"], X + 1)


async def test_a_stream_is_told_of_overload_and_goes_on(house: House) -> None:
    def busy(_: Any) -> Any:
        house.dataplane.behave = lambda request: dict(request.inputs)
        raise Overloaded("too much", retry_after=0.1)

    house.dataplane.behave = busy
    answers = [one async for one in house.client.stream(iter([infer_request({"x": X}), infer_request({"x": X})]))]
    assert answers[0].error_message.startswith("[RESOURCE_EXHAUSTED]")
    assert answers[1].infer_response.model_name == "toy"


async def test_shared_memory_in_a_stream_is_refused_alone(house: House) -> None:
    shared = infer_request({"x": X})
    shared.inputs[0].parameters["shared_memory_region"].string_param = "r"
    answers = [one async for one in house.client.stream(iter([shared, infer_request({"x": X})]))]
    assert answers[0].error_message.startswith("[UNIMPLEMENTED] x: shared memory")
    assert answers[1].infer_response.model_name == "toy"


async def test_requests_of_streams_count_while_they_are_in_hand(tmp_path: Path) -> None:
    """HELD_MESSAGES of the largest size fit; the next one is told to come again, and its stream goes on."""
    async with opened(tmp_path, max_message=1 << 20) as house:
        house.dataplane.hold = asyncio.Event()
        large = infer_request({"x": np.zeros((1, (1 << 18) - 100), np.float32)})
        streams = [house.client.stream(iter([large])) for _ in range(HELD_MESSAGES)]
        reads = [asyncio.create_task(stream.read()) for stream in streams]
        async with asyncio.timeout(20):
            while len(house.dataplane.requests) < HELD_MESSAGES:
                await asyncio.sleep(0.01)
        one_more = house.client.stream(iter([infer_request({"x": np.zeros((1, 1 << 15), np.float32)})]))
        try:
            async with asyncio.timeout(10):
                told = (await one_more.read()).error_message
        except grpc.aio.AioRpcError as error:  # by the wire, which counts it while it comes
            told = f"[{error.code().name}]"
        house.dataplane.hold.set()
        await asyncio.gather(*reads)
        assert told.startswith("[RESOURCE_EXHAUSTED]")
        assert outputs_of(await house.client.call("ModelInfer", large))["x"].size == (1 << 18) - 100


async def test_a_packed_message_in_a_stream(house: House) -> None:
    calls = house.client.stream(iter([infer_request({"x": X})]), compression=grpc.Compression.Gzip)
    (answer,) = [one async for one in calls]
    assert same(outputs_of(answer.infer_response)["x"], X)


async def test_a_stream_ends_with_its_deadline(house: House) -> None:
    house.dataplane.hold = asyncio.Event()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in house.client.stream(iter([infer_request({"x": X})]), timeout=0.3):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(5):
        while not house.dataplane.cancelled:
            await asyncio.sleep(0.01)
