"""The gRPC server as clients meet it: real channels, a fake dataplane behind it."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from agent.config import GrpcConfig, ServingConfig
from agent.errors import Conflict, DeadlineExceeded, InvalidConfig, NotFound, Overloaded, SlotdError, Unavailable
from agent.health.issues import Issues
from agent.model.signature import Strings, Tensor
from agent.serving import listen
from agent.serving.listen import GrpcServer
from agent.serving.protos import PredictRequest, PredictResponse, message
from support.fake_dataplane import FakeDataplane
from support.stall import stall_probe
from support.tfs_client import CHANNEL_OPTIONS, PREDICT, TfsClient, predict_request, tensor_proto, trailing

X = np.arange(6, dtype=np.float32).reshape(2, 3)
SERVING, NOT_SERVING = 1, 2


class House:
    """A server with what tests need of it."""

    def __init__(self, run_dir: Path, *, keys: Path | None = None, **grpc_config: Any) -> None:
        self.dataplane = FakeDataplane()
        grpc_config.setdefault("listen", "127.0.0.1:0")
        config = ServingConfig(grpc=GrpcConfig(**grpc_config), keys=keys, lame_duck=0.05, grace=1.0)
        self.issues = Issues()
        self.server = GrpcServer(config, run_dir, self.dataplane, self.issues)  # type: ignore[arg-type]
        self.addresses: list[str] = []

    async def __aenter__(self) -> House:
        self.addresses = await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(1.0)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with House(tmp_path) as house:
        yield house


@pytest.fixture
async def client(house: House) -> AsyncIterator[TfsClient]:
    async with TfsClient(house.addresses[0]) as client:
        yield client


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


# --- what goes well ---------------------------------------------------------------------------------------------------


async def test_answers_on_both_addresses_and_says_who_answered(house: House) -> None:
    assert house.addresses[0].startswith("127.0.0.1:")
    assert house.addresses[1].startswith("unix:/")
    for address in house.addresses:
        async with TfsClient(address) as client:
            answer = await client.predict({"x:0": X}, model="toy", version=3)
        np.testing.assert_array_equal(answer.outputs["x:0"], X)
        assert list(answer.response.outputs["x:0"].float_val) == X.ravel().tolist()
        spec = answer.response.model_spec
        assert (spec.name, spec.version.value, spec.signature_name) == ("toy", 3, "serving_default")
        assert answer.trailing["slotd-served-by"] == "slot"
        assert answer.trailing["slotd-model-digest"] == "sha256:" + "ab" * 32
        assert answer.trailing["slotd-model-version"] == "3"
    assert all(answer.released for answer in house.dataplane.answers)


async def test_request_reaches_the_dataplane_as_the_client_meant_it(house: House, client: TfsClient) -> None:
    await client.predict(
        {"x": Strings((1,), [b"\xff\xd8"])},
        model="toy",
        version=0,
        outputs=["x"],
        timeout=5,
        metadata=[("slotd-priority", "7")],
    )
    await client.predict({"x": X}, timeout=None)
    first, second = house.dataplane.requests
    assert first.inputs == {"x": Strings((1,), [b"\xff\xd8"])}
    assert (first.model, first.version, first.outputs, first.priority) == ("toy", 0, ("x",), 7)
    assert first.timeout is not None and 0 < first.timeout <= 5.1  # on the wire gRPC rounds a timeout up
    assert first.size > 0
    assert (second.model, second.version, second.outputs, second.priority) == ("", None, (), 0)
    assert second.timeout is None


async def test_the_bytes_that_the_azureml_client_sends(house: House, client: TfsClient) -> None:
    """No model_spec, one DT_STRING of shape [1] in string_val: written here by hand."""
    tensor = b"\x08\x07" + b"\x12\x04\x12\x02\x08\x01" + b"\x42\x04JPEG"
    entry = b"\x0a\x01x" + b"\x12" + bytes([len(tensor)]) + tensor
    house.dataplane.behave = lambda request: {"scores": X}
    answer = await client.send(
        b"\x12" + bytes([len(entry)]) + entry,
        metadata=[("authorization", "Bearer k"), ("x-ms-aml-grpc-service-route", "/api/v1/service/toy")],
    )
    assert house.dataplane.requests[0].inputs == {"x": Strings((1,), [b"JPEG"])}
    assert list(answer.response.outputs["scores"].float_val) == X.ravel().tolist()


@pytest.mark.alone
async def test_large_request_and_reply_without_a_stall(house: House, client: TfsClient) -> None:
    big = np.arange(7 << 20, dtype=np.float32)
    data = predict_request({"x": big}, content=True).SerializeToString()
    # The client shares this loop: its own copies of the message count against it, so only the request's way is bounded.
    house.dataplane.behave = lambda request: {"sum": np.array([request.inputs["x"].sum(dtype=np.float64)])}  # type: ignore[union-attr]
    await client.send(data)
    async with stall_probe(limit=0.1, label="28 MiB request, client in the same loop"):
        answer = await client.send(data)
    assert answer.outputs["sum"] == big.sum(dtype=np.float64)
    house.dataplane.behave = lambda request: {"x": request.inputs["x"]}
    np.testing.assert_array_equal((await client.send(data)).outputs["x"], big)
    assert all(answer.released for answer in house.dataplane.answers)


async def test_many_clients_at_once_get_their_own_answers(house: House) -> None:
    async def one(address: str, number: int) -> None:
        async with TfsClient(address) as client:
            for turn in range(10):
                value = np.full((1, 1000), number * 100 + turn, np.int64)
                answer = await client.predict({"x": value}, content=bool(turn % 2))
                np.testing.assert_array_equal(answer.outputs["x"], value)

    await asyncio.gather(*(one(house.addresses[number % 2], number) for number in range(8)))


async def test_works_under_uvloop(tmp_path: Path) -> None:
    """As the daemon runs it: malloc tuned before gRPC is imported, uvloop, a large message through the child."""
    program = f"""
import sys
from agent.memory import tune_malloc
assert tune_malloc()
assert not any(name.partition(".")[0] == "grpc" for name in sys.modules)
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import asyncio, pathlib, numpy as np, uvloop
from agent.config import GrpcConfig, ServingConfig
from agent.health.issues import Issues
from agent.serving.listen import GrpcServer
from support.fake_dataplane import FakeDataplane
from support.tfs_client import TfsClient
async def main():
    config = ServingConfig(grpc=GrpcConfig(listen="127.0.0.1:0"), lame_duck=0)
    server = GrpcServer(config, pathlib.Path({str(tmp_path)!r}), FakeDataplane(), Issues())
    for address in await server.start():
        async with TfsClient(address) as client:
            for count in (4, 3 << 20):
                sent = np.arange(count, dtype=np.float32)
                got = await client.predict({{"x": sent}}, content=True)
                assert (got.outputs["x"] == sent).all()
    await server.lame_duck()
    await server.stop(1)
uvloop.run(main())
print("good")
"""
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.endswith(b"good\n")


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "status", "said"),
    [
        ({"label": "stable"}, grpc.StatusCode.NOT_FOUND, "labels are not supported"),
        ({"signature": "train"}, grpc.StatusCode.INVALID_ARGUMENT, "'train'"),
        ({"signature": "serving_default"}, grpc.StatusCode.OK, ""),
    ],
)
async def test_model_spec(client: TfsClient, spec: dict[str, str], status: grpc.StatusCode, said: str) -> None:
    if status is grpc.StatusCode.OK:
        await client.predict({"x": X}, **spec)
        return
    error = await refused(client.predict({"x": X}, **spec))
    assert error.code() is status
    assert said in error.details()


async def test_a_wrong_tensor_name_names_the_right_ones(client: TfsClient) -> None:
    error = await refused(client.predict({"images": X}))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "images" in error.details() and "'x:0'" in error.details()
    assert trailing(error)["slotd-error-code"] == "INVALID_ARGUMENT"
    assert trailing(error)["slotd-error-field"] == "images"


@pytest.mark.parametrize(
    ("error", "status", "pushback"),
    [
        (Overloaded("the queue is full", retry_after=0.25, hint="wait: é"), "RESOURCE_EXHAUSTED", "250"),
        (Unavailable("no model", retry_after=2, hint="deploy one"), "UNAVAILABLE", "2000"),
        (Unavailable("stopping"), "UNAVAILABLE", None),
        (DeadlineExceeded("too late", hint="more time"), "DEADLINE_EXCEEDED", None),
        (NotFound("no such model", hint="see status"), "NOT_FOUND", None),
        (SlotdError("it broke" * 1000), "INTERNAL", None),
        (NotFound("é" * 500, field="ü" * 100, hint="ö" * 5000), "NOT_FOUND", None),
    ],
)
async def test_errors_of_the_dataplane(
    house: House, client: TfsClient, error: SlotdError, status: str, pushback: str | None
) -> None:
    def fail(_: object) -> dict[str, Tensor]:
        raise error

    house.dataplane.behave = fail
    seen = await refused(client.predict({"x": X}))
    metadata = trailing(seen)
    assert seen.code().name == status
    assert seen.details() == str(error).encode()[:1000].decode(errors="ignore")
    assert metadata["slotd-error-code"] == error.code
    assert metadata.get("slotd-error-hint") == (re.sub(r"[éö]", "?", error.hint)[:1000] if error.hint else None)
    assert metadata.get("retry-pushback-ms") == pushback
    assert metadata.get("grpc-retry-pushback-ms") == pushback
    assert "slotd-served-by" not in metadata


async def test_an_error_that_nobody_foresaw_is_told_without_details(house: House, client: TfsClient) -> None:
    def fail(_: object) -> dict[str, Tensor]:
        raise RuntimeError("secret")

    house.dataplane.behave = fail
    error = await refused(client.predict({"x": X}))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details() and "Traceback" not in error.details()
    assert trailing(error)["slotd-request-id"] in error.details()


@pytest.mark.parametrize("priority", ["-1", "10", "high", "", "5 5"])
async def test_a_wrong_priority_is_refused(client: TfsClient, priority: str) -> None:
    error = await refused(client.predict({"x": X}, metadata=[("slotd-priority", priority)]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "slotd-priority" in error.details()


@pytest.mark.alone
async def test_garbage_is_refused_and_changes_nothing(house: House, client: TfsClient) -> None:
    for data in (b"\xff" * 100, b"\x12\x05abc", os.urandom(1000), b"\x0b" * 70_000, b"\x12" + b"\xff" * 600_000):
        async with stall_probe(label=f"{len(data)} bytes of garbage"):
            error = await refused(client.send(data))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "PredictRequest" in error.details()
    assert not house.dataplane.requests
    await client.predict({"x": X})


@pytest.mark.alone
async def test_two_million_empty_strings(house: House, client: TfsClient) -> None:
    request = predict_request({"pictures": Strings((2_000_000,), [b""] * 2_000_000)}).SerializeToString()
    async with stall_probe(label="2,000,000 empty strings"):
        error = await refused(client.send(request))
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert "pictures" in error.details()
    assert not house.dataplane.requests


@pytest.mark.parametrize("unit", [b"\x12\x00", b"\x1a\x00", b"\x12\x04\x12\x02\x12\x00"])
@pytest.mark.alone
async def test_small_parts_without_end(client: TfsClient, unit: bytes) -> None:
    data = unit * ((4 << 20) // len(unit))
    async with stall_probe(label=f"4 MiB of {unit!r}"):
        error = await refused(client.send(data))
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)


async def test_a_message_over_the_limit_is_refused_by_grpc(house: House, client: TfsClient) -> None:
    error = await refused(client.send(bytes(33 << 20)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await client.predict({"x": X})


async def test_a_reply_over_the_limit(tmp_path: Path) -> None:
    async with House(tmp_path, max_message=1 << 20) as house, TfsClient(house.addresses[0]) as client:
        house.dataplane.behave = lambda _: {"y": np.zeros(1 << 20, np.float32)}
        error = await refused(client.predict({"x": X}))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "name the outputs" in trailing(error)["slotd-error-hint"]
        assert house.dataplane.answers[0].released


async def test_a_compressed_message_is_measured_unpacked(house: House) -> None:
    """64 MiB of zeros are 64 KB on the wire; they are refused for what they are."""
    options = (("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
    assert len(gzip.compress(bytes(64 << 20))) < 1 << 20
    async with TfsClient(house.addresses[0], options) as client:
        error = await refused(client.send(bytes(64 << 20), compression=grpc.Compression.Gzip))
        assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED)
        await client.predict({"x": X})


async def test_requests_in_hand_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "HELD_MESSAGES", 1)
    async with House(tmp_path, max_message=1 << 20) as house, TfsClient(house.addresses[0]) as client:
        house.dataplane.hold = asyncio.Event()
        data = predict_request({"x": np.zeros(150_000, np.float32)}, content=True).SerializeToString()
        first = asyncio.create_task(client.send(data))
        while not house.dataplane.requests:
            await asyncio.sleep(0.01)
        error = await refused(client.send(data))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(trailing(error)["retry-pushback-ms"]) > 0
        broadcast = PredictRequest(inputs={"x": tensor_proto(np.array(1, np.float32))})
        broadcast.inputs["x"].tensor_shape.dim.add(size=200_000)
        error = await refused(client.send(broadcast.SerializeToString()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        house.dataplane.hold.set()
        await first
        await client.send(data)
        await client.send(broadcast.SerializeToString())


async def test_the_parse_child_may_die(house: House, client: TfsClient) -> None:
    data = predict_request({"x": np.zeros(2 << 20, np.int32)}, content=False).SerializeToString()
    await client.send(data)
    (child,) = _parse_children()
    child.kill()  # idle: nobody notices
    child.wait(5)
    await client.send(data)
    (child,) = _parse_children()
    child.suspend()  # with a message in hand: its sender is told
    sending = asyncio.create_task(client.send(data))
    await asyncio.sleep(0.2)
    child.kill()
    error = await refused(sending)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    answer = await client.send(data)
    assert answer.outputs["x"].shape == (2 << 20,)
    assert len(_parse_children()) == 1


async def test_a_client_that_cancels_or_runs_out_of_time(house: House, client: TfsClient) -> None:
    house.dataplane.hold = asyncio.Event()
    call = client.call(predict_request({"x": X}).SerializeToString())
    while not house.dataplane.requests:
        await asyncio.sleep(0.01)
    call.cancel()
    error = await refused(client.predict({"x": X}, timeout=0.2))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    while house.dataplane.cancelled < 2:
        await asyncio.sleep(0.01)
    house.dataplane.hold.set()
    await client.predict({"x": X})


# --- health and reflection --------------------------------------------------------------------------------------------


async def test_health_tells_the_truth(house: House) -> None:
    async with grpc.aio.insecure_channel(house.addresses[0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def check(service: str) -> int:
            return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)

        services = (
            "tensorflow.serving.PredictionService",
            "tensorflow.serving.ModelService",
            "inference.GRPCInferenceService",
        )
        names = ("", "toy", *services, "slotd.slot")
        assert [await check(name) for name in names] == [SERVING] * 6
        house.dataplane.change(on_slot=False)
        assert [await check(name) for name in names] == [SERVING] * 5 + [NOT_SERVING]
        house.dataplane.change(answering=False)
        assert [await check(name) for name in names] == [NOT_SERVING] * 6
        listed = await stub.List(health_pb2.HealthListRequest())
        assert {name: status.status for name, status in listed.statuses.items()} == dict.fromkeys(names, NOT_SERVING)
        error = await refused(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_tells_changes_and_ends_at_the_stop(house: House) -> None:
    async with grpc.aio.insecure_channel(house.addresses[0]) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="slotd.slot"))
        unknown = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="other"))

        async def told(stream: Any) -> int:
            return int((await asyncio.wait_for(stream.read(), 5)).status)

        assert await told(watch) == SERVING
        assert await told(unknown) == 3
        house.dataplane.change(on_slot=False)
        assert await told(watch) == NOT_SERVING
        house.dataplane.names = ["other"]
        house.dataplane.change(on_slot=True)
        assert await told(watch) == SERVING
        assert await told(unknown) == SERVING
        await house.server.lame_duck()
        assert await told(watch) == NOT_SERVING
        async with TfsClient(house.addresses[0]) as client:
            await client.predict({"x": X})
        await asyncio.wait_for(house.server.stop(30), 5)
        assert await watch.read() is grpc.aio.EOF


async def test_reflection_gives_what_a_client_needs_to_call(house: House) -> None:
    async with grpc.aio.insecure_channel(house.addresses[0]) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask(**question: Any) -> Any:
            stream = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)]))
            return await stream.read()

        services = [service.name for service in (await ask(list_services="")).list_services_response.service]
        assert services == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            "inference.GRPCInferenceService",
            "tensorflow.serving.ModelService",
            "tensorflow.serving.PredictionService",
        ]
        for service in services:
            answer = await ask(file_containing_symbol=service)
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(file)
                for file in answer.file_descriptor_response.file_descriptor_proto
            ]
            known = {file.name for file in files}
            assert all(dependency in known for file in files for dependency in file.dependency)
            assert service in {f"{file.package}.{entry.name}" for file in files for entry in file.service}
        assert (await ask(file_containing_symbol="nobody")).error_response.error_code == 5


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", ":0", "192.0.2.1:0"])
async def test_nothing_beyond_loopback(tmp_path: Path, address: str) -> None:
    house = House(tmp_path, listen=address)
    with pytest.raises(InvalidConfig) as caught:
        await house.server.start()
    assert caught.value.field == "serving.grpc.listen"
    assert "127.0.0.1" in str(caught.value.hint)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:70000", "::1:5", "127.0.0.1:http"])
async def test_an_address_that_is_none(tmp_path: Path, address: str) -> None:
    with pytest.raises(InvalidConfig, match="host:port"):
        await House(tmp_path, listen=address).server.start()


async def test_localhost_and_no_tcp_at_all(tmp_path: Path) -> None:
    async with House(tmp_path, listen="localhost:0") as house, TfsClient(house.addresses[0]) as client:
        await client.predict({"x": X})
    async with House(tmp_path, listen=None) as house, TfsClient(house.addresses[0]) as client:
        assert len(house.addresses) == 1
        await client.predict({"x": X})


async def test_a_port_in_use_names_who_has_it(tmp_path: Path, house: House) -> None:
    other = House(tmp_path / "other", listen=house.addresses[0])
    with pytest.raises(Conflict) as caught:
        await other.server.start()
    assert house.addresses[0] in str(caught.value)
    assert f"process {os.getpid()}" in str(caught.value)
    async with TfsClient(house.addresses[0]) as client:
        await client.predict({"x": np.zeros(2 << 20, np.int32)})  # which needs our own child
    assert len(_parse_children()) == 1  # the other's is gone


async def test_a_socket_in_use_names_who_has_it_and_stays(tmp_path: Path, house: House) -> None:
    other = House(tmp_path)
    with pytest.raises(Conflict) as caught:
        await other.server.start()
    assert str(tmp_path / "grpc.sock") in str(caught.value)
    assert f"process {os.getpid()}" in str(caught.value)
    async with TfsClient(house.addresses[1]) as client:
        await client.predict({"x": X})


async def test_the_socket_is_for_its_group_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "grpc.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    (tmp_path / ".bind-999999999").mkdir()
    async with House(tmp_path) as house:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert [entry.name for entry in tmp_path.iterdir()] == ["grpc.sock"]
        async with TfsClient(house.addresses[1]) as client:
            await client.predict({"x": X})
    assert not list(tmp_path.iterdir())
    assert not _parse_children()


async def test_a_stop_leaves_the_successors_socket_alone(tmp_path: Path) -> None:
    path = tmp_path / "grpc.sock"
    async with House(tmp_path) as first:
        path.unlink()
        async with House(tmp_path) as second:
            await first.server.stop(0)
            async with TfsClient(second.addresses[1]) as client:
                await client.predict({"x": X})


async def test_a_file_in_the_sockets_place_is_kept(tmp_path: Path) -> None:
    (tmp_path / "grpc.sock").write_text("precious")
    with pytest.raises(InvalidConfig, match="not a socket"):
        await House(tmp_path).server.start()
    assert (tmp_path / "grpc.sock").read_text() == "precious"


async def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="too long"):
        await House(tmp_path, socket=tmp_path / ("s" * 110)).server.start()


# --- the stop ---------------------------------------------------------------------------------------------------------


async def test_a_stop_lets_requests_end_and_refuses_new_ones(house: House, client: TfsClient) -> None:
    house.dataplane.hold = asyncio.Event()
    running = asyncio.create_task(client.predict({"x": X}))
    while not house.dataplane.requests:
        await asyncio.sleep(0.01)
    stopping = asyncio.create_task(house.server.stop(10))
    await asyncio.sleep(0.1)
    error = await refused(client.predict({"x": X}, timeout=2))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    house.dataplane.hold.set()
    np.testing.assert_array_equal((await running).outputs["x"], X)
    await asyncio.wait_for(stopping, 5)


async def test_a_stop_is_bounded(house: House, client: TfsClient) -> None:
    house.dataplane.hold = asyncio.Event()
    running = asyncio.create_task(client.predict({"x": X}))
    while not house.dataplane.requests:
        await asyncio.sleep(0.01)
    await asyncio.wait_for(house.server.stop(0.2), 5)
    await refused(running)
    assert house.dataplane.cancelled == 1


async def test_connections_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "MAX_CONNECTIONS", 2)
    async with House(tmp_path) as house:
        channels = [TfsClient(house.addresses[0]) for _ in range(2)]
        for channel in channels:
            await channel.predict({"x": X})
        async with TfsClient(house.addresses[0]) as third:
            error = await refused(third.predict({"x": X}, timeout=3))
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            for channel in channels:
                await channel.channel.close()


async def test_an_unknown_method(house: House) -> None:
    async with grpc.aio.insecure_channel(house.addresses[0]) as channel:
        error = await refused(channel.unary_unary(PREDICT.replace("Predict", "Regress"))(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_what_a_reply_is_made_of_is_plain_protobuf(house: House, client: TfsClient) -> None:
    house.dataplane.behave = lambda _: {
        "b": np.array([True, False]),
        "i": np.array([-1, 300], np.int32),
        "s": Strings((2,), [b"", b"\x00\xff"]),
    }
    reply = PredictResponse.FromString(await client.call(predict_request({"x": X}).SerializeToString()))
    assert list(reply.outputs["b"].bool_val) == [True, False]
    assert list(reply.outputs["i"].int_val) == [-1, 300]
    assert list(reply.outputs["s"].string_val) == [b"", b"\x00\xff"]


def _parse_children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "agent.serving.parse_child" in child.cmdline()
    ]


# --- what a model is --------------------------------------------------------------------------------------------------


async def ask(house: House, path: str, request: bytes) -> bytes:
    async with grpc.aio.insecure_channel(house.addresses[0]) as channel:
        return bytes(await channel.unary_unary(f"/tensorflow.serving.{path}")(request))


def question(kind: str, **fields: Any) -> bytes:
    return bytes(message(f"tensorflow.serving.{kind}Request")(**fields).SerializeToString())


async def test_a_models_signature(house: House) -> None:
    asked = question("GetModelMetadata", model_spec={"name": "toy"}, metadata_field=["signature_def"])
    answer = message("tensorflow.serving.GetModelMetadataResponse").FromString(
        await ask(house, "PredictionService/GetModelMetadata", asked)
    )
    assert (answer.model_spec.name, answer.model_spec.version.value) == ("toy", 3)
    packed = answer.metadata["signature_def"]
    assert packed.type_url == "type.googleapis.com/tensorflow.serving.SignatureDefMap"
    signature = message("tensorflow.serving.SignatureDefMap").FromString(packed.value).signature_def["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    for side in (signature.inputs, signature.outputs):
        (name,) = side
        assert (name, side[name].name, side[name].dtype) == ("x:0", "x:0", 1)
        assert [dim.size for dim in side[name].tensor_shape.dim] == [-1, 4]


async def test_a_models_status(house: House) -> None:
    asked = question("GetModelStatus", model_spec={"name": "toy", "version": {"value": 3}})
    answer = message("tensorflow.serving.GetModelStatusResponse").FromString(
        await ask(house, "ModelService/GetModelStatus", asked)
    )
    (status,) = answer.model_version_status
    assert (status.version, status.state, status.status.error_code) == (3, 30, 0)


@pytest.mark.parametrize(
    ("path", "request_", "status", "field"),
    [
        ("PredictionService/GetModelMetadata", question("GetModelMetadata"), "INVALID_ARGUMENT", "metadata_field"),
        (
            "PredictionService/GetModelMetadata",
            question("GetModelMetadata", metadata_field=["warmup"]),
            "INVALID_ARGUMENT",
            "metadata_field",
        ),
        (
            "PredictionService/GetModelMetadata",
            question("GetModelMetadata", model_spec={"name": "other"}, metadata_field=["signature_def"]),
            "NOT_FOUND",
            "model_spec.name",
        ),
        (
            "ModelService/GetModelStatus",
            question("GetModelStatus", model_spec={"name": "toy", "version": {"value": 0}}),
            "NOT_FOUND",
            "model_spec.version",
        ),
        (
            "ModelService/GetModelStatus",
            question("GetModelStatus", model_spec={"version_label": "stable"}),
            "NOT_FOUND",
            "model_spec.version_label",
        ),
        ("ModelService/GetModelStatus", b"\xff", "INVALID_ARGUMENT", "request"),
        ("ModelService/HandleReloadConfigRequest", b"", "UNIMPLEMENTED", ""),
        ("PredictionService/Classify", b"", "UNIMPLEMENTED", ""),
        ("PredictionService/MultiInference", b"", "UNIMPLEMENTED", ""),
    ],
)
async def test_what_is_asked_in_vain(house: House, path: str, request_: bytes, status: str, field: str) -> None:
    error = await refused(ask(house, path, request_))
    assert error.code().name == status
    told = trailing(error)
    assert told.get("slotd-error-field", "") == field
    if status == "UNIMPLEMENTED":
        assert told["slotd-error-hint"]


# --- keys -------------------------------------------------------------------------------------------------------------


async def test_keys_are_asked_for_over_tcp(tmp_path: Path) -> None:
    one, two = "a" * 24, "b" * 24
    keys = tmp_path / "keys"
    keys.touch(0o640)
    keys.write_text(f"{one}\n")
    async with House(tmp_path, keys=keys) as house:
        tcp, unix = house.addresses
        async with TfsClient(tcp) as client, TfsClient(unix) as local:

            async def code(authorization: str | None) -> str:
                metadata = [("authorization", authorization)] if authorization is not None else []
                try:
                    await client.predict({"x": X}, metadata=metadata)
                except grpc.aio.AioRpcError as error:
                    told = error
                else:
                    return "OK"
                assert one not in str(told.details()) and trailing(told)["slotd-error-field"] == "authorization"
                return str(told.code().name)

            assert await code(f"Bearer {one}") == "OK"
            assert await code(one) == "OK", "as clients of the older service send it"
            assert [await code(wrong) for wrong in (None, "", two, f"Bearer {two}")] == ["UNAUTHENTICATED"] * 4
            await local.predict({"x": X})
            # What has no key is refused before its message has come.
            before = len(house.dataplane.requests)
            with grpc.insecure_channel(tcp, CHANNEL_OPTIONS) as channel, pytest.raises(grpc.RpcError) as caught:
                await asyncio.to_thread(channel.unary_unary(PREDICT), bytes(30 << 20), timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, caught.value
            assert len(house.dataplane.requests) == before
            async with grpc.aio.insecure_channel(tcp) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
            with grpc.insecure_channel(tcp) as channel:
                asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
                described = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=20)
                with pytest.raises(grpc.RpcError) as caught:
                    await asyncio.to_thread(list, described)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            # Another key, while it runs.
            keys.write_text(f"{two}\n{one}\n")
            async with asyncio.timeout(10):
                while await code(two) != "OK":
                    await asyncio.sleep(0.05)
            assert await code(one) == "OK"
            keys.write_text(f"{two}\n")
            async with asyncio.timeout(10):
                while await code(one) == "OK":
                    await asyncio.sleep(0.05)
            assert await code(two) == "OK"
    assert not house.issues.list()
