"""Models in their executors: what graphs and model.yaml agree on, runs on the CPU and around the slot, decoders."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from agent.config import Config
from agent.errors import ExecutorDied, ExecutorError, InvalidInput, InvalidModel, SlotdError, SlotError
from agent.executor.client import Region, Worker, launch_decoder, launch_model
from agent.executor.graph import has_external_weights, read_graph
from agent.executor.stages.image import prepare
from agent.model.signature import DType, Signature, Strings, Tensor, TensorSpec
from agent.model.spec import Model, read_spec
from drivers.base import Wanted
from drivers.simulated import Fault, Simulated, inject, write_bitstream
from support import graphs
from support.children import DecodedMemory, soon
from support.graphs import BOOL, FLOAT, INT64, STRING
from support.pictures import shipped

SHELL = "9926ab6d6c925a68aabca7d84c545738"
ACCELERATOR = "d8424dc4a4a3c413f89e433683f9040b"
X4 = np.arange(8, dtype=np.float32).reshape(2, 4)
Start = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def load(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts executors of the model in tmp_path/models, with config fields; ends them all."""
    workers: list[Worker] = []

    async def start(
        spec: dict[str, Any] | None = None, *, target: str = "cpu", maps: Any = (), **options: Any
    ) -> Worker:
        model = write(tmp_path / "models", spec)
        launch = launch_model(config(tmp_path, **options), model, target, role=target, maps=maps)
        workers.append(await Worker.start(launch, timeout=30))
        return workers[-1]

    yield start
    for worker in workers:
        await worker.stop(grace=5)


def config(folder: Path, *, slot: dict[str, Any] | None = None, **executor: Any) -> Config:
    (folder / "state").mkdir(exist_ok=True)  # as the daemon does; the simulated card is made in it
    return Config.model_validate(
        {
            "embedded": True,
            "state_dir": folder / "state",
            "executor": {"threads": 1, "memory": 2 << 30, **executor},
            "slot": {"options": {"interface": SHELL, **(slot or {})}},
        }
    )


def write(folder: Path, spec: dict[str, Any] | None) -> Model:
    """A model with this model.yaml (defaults filled in), or none."""
    folder.mkdir(exist_ok=True)
    if spec is not None:
        (folder / "model.yaml").write_text(json.dumps({"schema": "slotd/v1", "name": "m", **spec}))
    return Model("sha256:" + "0" * 64, "test", folder, read_spec(folder))


async def run(worker: Worker, *tensors: Tensor | Region) -> dict[str, Tensor]:
    """The outputs of one run, by name."""
    call = worker.submit(list(enumerate(tensors)), deadline_ns=soon())
    with await call.result as reply:
        copies = [tensor if isinstance(tensor, Strings) else tensor.copy() for tensor in reply.outputs]
    return dict(zip(worker.ready["output_names"], copies, strict=True))


def io(shape: list[int], dtype: str = "float32", **names: Any) -> dict[str, Any]:
    """inputs x and outputs y of a model.yaml."""
    return {
        "inputs": {"x": {"dtype": dtype, "shape": shape}},
        "outputs": {"y": {"dtype": dtype, "shape": shape}},
        **names,
    }


# --- the CPU ---------------------------------------------------------------------------------------------------------


async def test_a_bare_graph_says_its_own_signature(load: Start, tmp_path: Path) -> None:
    graphs.scale(tmp_path / "models/m.onnx", 3.0, shape=["batch", 4])
    worker = await load()
    assert worker.ready["signature"] == {
        "inputs": {"x": {"dtype": "float32", "shape": [-1, 4]}},
        "outputs": {"y": {"dtype": "float32", "shape": [-1, 4]}},
    }
    assert worker.ready["executor_inputs"] == ["x"] and worker.ready["output_names"] == ["y"]
    assert worker.ready["rss_bytes"] > 1 << 20 and worker.ready["load_s"] >= 0 and worker.ready["depth"] >= 1
    assert np.array_equal((await run(worker, X4))["y"], X4 * 3)


async def test_stages_feed_each_other_by_the_clients_names(load: Start, tmp_path: Path) -> None:
    graphs.scale(tmp_path / "models/a.onnx", 2.0, x="input_1", y="dense/out:0")
    graphs.scale(tmp_path / "models/b.onnx", 5.0, x="in", y="out")
    worker = await load(
        {
            "inputs": {"Placeholder:0": {"dtype": "float32", "shape": [-1, 4]}},
            "outputs": {
                "probabilities": {"dtype": "float32", "shape": [-1, 4]},
                "dense/out:0": {"dtype": "float32", "shape": [-1, 4]},
            },
            "pipeline": [
                {"stage": "onnx", "file": "a.onnx", "inputs": {"input_1": "Placeholder:0"}},
                {
                    "stage": "onnx",
                    "file": "b.onnx",
                    "on": "cpu",
                    "inputs": {"in": "dense/out:0"},
                    "outputs": {"out": "probabilities"},
                },
            ],
        }
    )
    assert worker.ready["output_names"] == ["probabilities", "dense/out:0"]
    outputs = await run(worker, X4)
    assert np.array_equal(outputs["probabilities"], X4 * 10) and np.array_equal(outputs["dense/out:0"], X4 * 2)


async def test_the_cpu_runs_the_cpu_twin(load: Start, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/slot.onnx").write_bytes(b"for the slot only")
    graphs.scale(tmp_path / "models/cpu.onnx", 7.0)
    worker = await load(io([-1, 4], pipeline=[{"stage": "onnx", "file": "slot.onnx", "cpu": "cpu.onnx"}]))
    assert np.array_equal((await run(worker, X4))["y"], X4 * 7)


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        (FLOAT, np.array([1.5, np.nan], np.float32)),
        (INT64, np.array([1 << 62, -1], np.int64)),
        (BOOL, np.array([True, False])),
        (onnx.TensorProto.FLOAT16, np.array([1.5, 2], np.float16)),
        (onnx.TensorProto.UINT8, np.array([0, 255], np.uint8)),
        (STRING, Strings((3,), ["größer".encode(), b"nul\0", b""])),
    ],
)
async def test_every_type_passes(load: Start, tmp_path: Path, kind: int, tensor: Tensor) -> None:
    graphs.identity(tmp_path / "models/m.onnx", kind, [None])
    output = (await run(await load(), tensor))["y"]
    if isinstance(tensor, Strings):
        assert isinstance(output, Strings) and list(output.items) == list(tensor.items)
    else:
        assert np.array_equal(output, tensor, equal_nan=kind == FLOAT) and output.dtype == tensor.dtype


async def test_what_the_graph_does_not_take_is_the_senders_fault(load: Start, tmp_path: Path) -> None:
    graphs.scale(tmp_path / "models/m.onnx", 3.0)
    worker = await load()
    for wrong in (np.ones((2, 5), np.float32), np.ones(4, np.float32), np.ones((2, 4)), Strings((1,), [b"x"])):
        with pytest.raises(InvalidInput):
            await run(worker, wrong)
    with pytest.raises(InvalidInput) as caught:
        await worker.submit([], deadline_ns=soon()).result
    assert caught.value.field == "x"
    assert np.array_equal((await run(worker, X4))["y"], X4 * 3)


async def test_strings_that_onnx_cannot_hold(load: Start, tmp_path: Path) -> None:
    graphs.identity(tmp_path / "models/m.onnx", STRING, [None])
    with pytest.raises(InvalidInput, match="UTF-8") as caught:
        await run(await load(), Strings((1,), [b"\xff"]))
    assert caught.value.field == "x"


async def test_a_graph_that_never_ends_fails_its_call_only(load: Start, tmp_path: Path) -> None:
    graphs.endless(tmp_path / "models/m.onnx")
    worker = await load(call_timeout=0.3)
    for _ in range(2):
        with pytest.raises(ExecutorError) as caught:
            await run(worker, X4[0])
        assert caught.value.code == "CALL_TIMEOUT"
    assert worker.alive


async def test_a_graph_that_asks_for_too_much_memory_fails_its_call_only(load: Start, tmp_path: Path) -> None:
    graphs.greedy(tmp_path / "models/m.onnx", 8 << 30)
    worker = await load()
    for _ in range(2):
        with pytest.raises(ExecutorError) as caught:
            await run(worker, X4[0])
        assert caught.value.code == "OUT_OF_MEMORY"
    assert worker.alive


async def test_a_model_that_does_not_fit_into_its_memory(load: Start, tmp_path: Path) -> None:
    weights = np.ones((64 << 20,), np.float32)
    graphs.save(
        tmp_path / "models/m.onnx",
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [("x", FLOAT, [1])],
        [("y", FLOAT, [None])],
        {"w": weights},
    )
    with pytest.raises(ExecutorError) as caught:
        await load(memory=400 << 20)
    assert caught.value.code == "OUT_OF_MEMORY"


# --- models that cannot be -------------------------------------------------------------------------------------------

PIPELINE = [{"stage": "onnx", "file": "m.onnx"}]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (io([-1, 5], pipeline=PIPELINE), r"pipeline\.0.*x: float32 \[-1, 5\]"),
        (io([-1, 4], "float64", pipeline=PIPELINE), r"pipeline\.0.*float64"),
        (io([4], pipeline=PIPELINE), r"pipeline\.0"),
        (
            {**io([-1, 4], pipeline=PIPELINE), "outputs": {"z": {"dtype": "float32", "shape": [4]}}},
            r"outputs\.z.*no graph",
        ),
        ({**io([-1, 4], pipeline=PIPELINE), "outputs": {"x": {"dtype": "float32", "shape": [4]}}}, r"outputs\.x"),
        (
            {**io([-1, 4], pipeline=PIPELINE), "outputs": {"y": {"dtype": "int64", "shape": [-1, 4]}}},
            r"outputs\.y.*int64",
        ),
        ({**io([-1, 4], pipeline=PIPELINE), "inputs": {"in": {"dtype": "float32", "shape": [-1, 4]}}}, r"'x'"),
        (
            {
                **io([-1, 4], pipeline=PIPELINE),
                "inputs": {name: {"dtype": "float32", "shape": [-1, 4]} for name in ("x", "more")},
            },
            r"inputs\.more.*no graph takes",
        ),
        (io([-1, 4], pipeline=[{**PIPELINE[0], "inputs": {"nothing": "x"}}]), r"pipeline\.0\.inputs.*'nothing'"),
        (io([-1, 4], pipeline=[{**PIPELINE[0], "outputs": {"nothing": "x"}}]), r"pipeline\.0\.outputs.*'nothing'"),
        (io([-1, 4], pipeline=[{**PIPELINE[0], "cpu": "none"}]), r"no CPU twin"),
    ],
)
async def test_model_yaml_and_graph_must_agree(load: Start, tmp_path: Path, spec: dict[str, Any], words: str) -> None:
    graphs.scale(tmp_path / "models/m.onnx", 3.0)
    with pytest.raises(InvalidModel) as caught:
        await load(spec)
    assert re.search(words, str(caught.value)), str(caught.value)


async def test_graphs_that_do_not_load(load: Start, tmp_path: Path) -> None:
    path = graphs.scale(tmp_path / "models/m.onnx", 3.0)
    whole = path.read_bytes()
    for content in (b"", b"no graph", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InvalidModel) as caught:
            await load()
        assert caught.value.field == "m.onnx"
    complex_ = onnx.TensorProto.COMPLEX64
    graphs.identity(path, complex_, [None])
    with pytest.raises(InvalidModel):
        await load()


def put_outside(path: Path, place: str) -> None:
    """The graph's weight lies in the file `place`, as its own folder sees it."""
    model = onnx.load(path)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=place)
    path.write_bytes(model.SerializeToString())


async def test_weights_beside_the_graph_are_taken(load: Start, tmp_path: Path) -> None:
    path = graphs.scale(tmp_path / "models/m.onnx", 3.0)
    assert not has_external_weights(path)
    put_outside(path, "weights.bin")
    (tmp_path / "models/weights.bin").write_bytes(np.float32(3).tobytes())
    assert has_external_weights(path)
    assert np.array_equal((await run(await load(), X4))["y"], X4 * 3)


@pytest.mark.parametrize("place", ["../outside.bin", "/etc/passwd", "link.bin"])
async def test_weights_outside_the_folder_are_refused(load: Start, tmp_path: Path, place: str) -> None:
    path = graphs.scale(tmp_path / "models/m.onnx", 3.0)
    (tmp_path / "outside.bin").write_bytes(np.float32(3).tobytes())
    (tmp_path / "models/link.bin").symlink_to(tmp_path / "outside.bin")
    put_outside(path, place)
    with pytest.raises(InvalidModel):
        await load()


# --- the slot --------------------------------------------------------------------------------------------------------


def in_slot(tmp_path: Path) -> dict[str, Any]:
    """A model of three stages with the middle one in the slot, programmed."""
    folder = tmp_path / "models"
    graphs.scale(folder / "before.onnx", 2.0, x="x", y="a")
    graphs.scale(folder / "device.onnx", 3.0, x="a", y="b")
    graphs.scale(folder / "after.onnx", 5.0, x="b", y="y")
    write_bitstream(folder / "m.bit", SHELL, ACCELERATOR, b"bits" * 1000)
    device = Simulated(config(tmp_path).driver_options)
    with (folder / "m.bit").open("rb") as file:
        device.program(file.fileno(), Wanted(SHELL, ACCELERATOR))
    return io(
        [-1, 4],
        pipeline=[
            {"stage": "onnx", "file": "before.onnx", "on": "cpu"},
            {"stage": "onnx", "file": "device.onnx", "on": "slot"},
            {"stage": "onnx", "file": "after.onnx", "on": "cpu"},
        ],
        slot={"interface": SHELL, "accelerator": ACCELERATOR, "bitstream": "m.bit"},
    )


async def test_the_slot_computes_its_stage_and_the_cpu_the_others(load: Start, tmp_path: Path) -> None:
    spec = in_slot(tmp_path)
    worker = await load(spec, target="slot", slot={"depth": 3})
    assert worker.ready["depth"] == 3
    assert np.array_equal((await run(worker, X4))["y"], X4 * 30)
    with pytest.raises(InvalidInput):
        await run(worker, np.ones((2, 5), np.float32))
    many = await asyncio.gather(*(run(worker, X4 + place) for place in range(30)))
    assert all(np.array_equal(outputs["y"], (X4 + place) * 30) for place, outputs in enumerate(many))
    inject(Path(config(tmp_path).driver_options["device"]), Fault("infer", "wrong_result"))
    assert not np.allclose((await run(worker, X4))["y"], X4 * 30), "the device, not the CPU, computes it"


async def test_the_device_never_waits_while_there_is_work(load: Start, tmp_path: Path) -> None:
    spec = in_slot(tmp_path)
    worker = await load(spec, target="slot", slot={"latency": 0.02})
    loop = asyncio.get_running_loop()
    started = loop.time()
    calls = [worker.submit([(0, X4)], deadline_ns=soon()) for _ in range(25)]
    await asyncio.gather(*(call.result for call in calls))
    taken = loop.time() - started
    assert taken >= 25 * 0.02
    assert taken < 25 * 0.02 * 1.5, "it has no gaps, for it is serial and 20 ms each"


async def test_a_bare_graph_in_the_slot(load: Start, tmp_path: Path) -> None:
    graphs.scale(tmp_path / "models/m.onnx", 3.0)
    worker = await load(target="slot")
    assert worker.ready["signature"]["inputs"] == {"x": {"dtype": "float32", "shape": [-1, 4]}}
    assert np.array_equal((await run(worker, X4))["y"], X4 * 3)


async def test_what_the_slot_reports_fails_the_call_and_nothing_else(load: Start, tmp_path: Path) -> None:
    spec = in_slot(tmp_path)
    worker = await load(spec, target="slot")
    device = Path(config(tmp_path).driver_options["device"])
    inject(device, Fault("infer", "error", code="DEVICE_HUNG"))
    with pytest.raises(SlotError) as caught:
        await run(worker, X4)
    assert caught.value.code == "DEVICE_HUNG"
    inject(device, Fault("infer", "hot"))
    with pytest.raises(SlotError) as caught:
        await run(worker, X4)
    assert caught.value.code == "OVER_TEMPERATURE"
    assert np.array_equal((await run(worker, X4))["y"], X4 * 30)
    inject(device, Fault("infer", "death"))
    with pytest.raises(ExecutorDied, match="SIGABRT"):
        await run(worker, X4)


@pytest.mark.parametrize(
    ("slot", "code"),
    [
        ({"runtime": False}, "NO_RUNTIME"),
        ({"present": False}, "DEVICE_ABSENT"),
        ({"interface": "0" * 32}, "INCOMPATIBLE_BITSTREAM"),
    ],
)
async def test_a_slot_that_cannot_be_opened_says_why(
    load: Start, tmp_path: Path, slot: dict[str, Any], code: str
) -> None:
    spec = in_slot(tmp_path)
    with pytest.raises(SlotdError) as caught:
        await load(spec, target="slot", slot=slot)
    assert caught.value.code == code and isinstance(caught.value, SlotError)


async def test_one_device_one_executor(load: Start, tmp_path: Path) -> None:
    spec = in_slot(tmp_path)
    first = await load(spec, target="slot")
    with pytest.raises(SlotError) as caught:
        await load(spec, target="slot")
    assert caught.value.code == "DEVICE_BUSY"
    await first.stop(grace=5)
    second = await load(spec, target="slot")
    assert np.array_equal((await run(second, X4))["y"], X4 * 30)


async def test_stop_while_the_slot_computes(load: Start, tmp_path: Path) -> None:
    spec = in_slot(tmp_path)
    worker = await load(spec, target="slot", slot={"latency": 0.1})
    calls = [worker.submit([(0, X4)], deadline_ns=soon()) for _ in range(4)]
    await worker.stop(grace=5)
    for call in calls:
        (await call.result).release()
    assert (await worker.died).code == 0
    hung = await load(spec, target="slot")
    inject(Path(config(tmp_path).driver_options["device"]), Fault("infer", "hang"))
    lost = hung.submit([(0, X4)], deadline_ns=soon())
    await hung.stop(grace=0.3)
    with pytest.raises(ExecutorDied):
        await lost.result


# --- what a graph says of itself -------------------------------------------------------------------------------------


def test_the_reader_agrees_with_onnx(tmp_path: Path) -> None:
    path = graphs.save(
        tmp_path / "m.onnx",
        [helper.make_node("Add", ["x", "w"], ["y"]), helper.make_node("Identity", ["n"], ["m"])],
        [("x", FLOAT, ["batch", 3, None]), ("w", FLOAT, [3]), ("n", INT64, []), ("s", STRING, [2])],
        [("y", FLOAT, ["batch", 3, None]), ("m", INT64, [])],
        {"w": np.ones(3, np.float32)},
    )
    inputs, outputs = read_graph(path)
    assert inputs == [
        TensorSpec("x", DType.FLOAT32, (-1, 3, -1)),
        TensorSpec("n", DType.INT64, ()),
        TensorSpec("s", DType.STRING, (2,)),
    ]
    assert outputs == [TensorSpec("y", DType.FLOAT32, (-1, 3, -1)), TensorSpec("m", DType.INT64, ())]


def test_the_reader_takes_anything_and_ends(tmp_path: Path) -> None:
    whole = graphs.endless(tmp_path / "m.onnx").read_bytes()
    chance = np.random.default_rng(1)
    path = tmp_path / "bad.onnx"
    for size in range(0, len(whole), 11):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidModel):
            read_graph(path)
    for _ in range(400):
        bad = bytearray(whole)
        for _ in range(chance.integers(1, 6)):
            bad[chance.integers(len(bad))] = chance.integers(256)
        path.write_bytes(bad)
        try:
            Signature({spec.name: spec for spec in read_graph(path)[0]}, {})
        except InvalidModel:
            continue


# --- decoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
async def test_pictures_are_decoded_beside_the_executor(load: Start, tmp_path: Path, layout: str) -> None:
    shape = [None, 64, 48, 3] if layout == "NHWC" else [None, 3, 64, 48]
    graphs.scale(tmp_path / "models/m.onnx", 2.0, x="images", shape=shape)
    spec = {
        "inputs": {"Placeholder:0": {"dtype": "string", "shape": [-1]}},
        "outputs": {"y": {"dtype": "float32", "shape": [-1 if size is None else size for size in shape]}},
        "pipeline": [
            {
                "stage": "image",
                "from": "Placeholder:0",
                "to": "images",
                "resize": {"shorter": 80},
                "crop": [64, 48],
                "mean": [123.0, 116.0, 103.0],
                "layout": layout,
            },
            {"stage": "onnx", "file": "m.onnx"},
        ],
    }
    memory = DecodedMemory(8 << 20)
    worker = await load(spec, maps=(memory.fd,))
    model = write(tmp_path / "models", spec)
    decoder = await Worker.start(launch_decoder(config(tmp_path), model, memory), timeout=30)
    assert worker.ready["executor_inputs"] == ["images"]
    assert worker.ready["signature"]["inputs"] == spec["inputs"]
    pictures = [shipped()[name].read_bytes() for name in ("grace_hopper", "chelsea")]
    stage = model.spec.image
    assert stage is not None
    wanted = np.zeros((2, *[size for size in shape if size is not None]), np.float32)
    for place, item in enumerate(pictures):
        prepare(stage, item, wanted[place])
    with await decoder.submit(
        [(0, Strings((2,), pictures))], deadline_ns=soon(), reserve=[wanted.nbytes]
    ).result as reply:
        region = reply.regions[0]
        assert isinstance(region, Region) and np.array_equal(region.tensor(), wanted)
        assert np.array_equal((await run(worker, region))["y"], wanted * 2)
    broken = Strings((2,), [pictures[0], pictures[1][:100]])
    with pytest.raises(InvalidInput, match="picture 1") as caught:
        await decoder.submit([(0, broken)], deadline_ns=soon(), reserve=[wanted.nbytes]).result
    assert caught.value.field == "Placeholder:0"
    with pytest.raises(InvalidInput):
        await decoder.submit([(0, np.ones(3))], deadline_ns=soon(), reserve=[wanted.nbytes]).result
    assert memory.used == 0
    await decoder.stop(grace=5)
    memory.close()


def test_children_import_only_what_they_need() -> None:
    script = (
        "import sys, agent.executor.worker, agent.executor.pipeline\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "onnxruntime" in loaded
    assert not {"grpc", "aiomqtt", "typer", "pydantic", "yaml", "structlog", "asyncio"} & set(loaded)
