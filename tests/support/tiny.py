"""Tiny models whose answer tells which model gave it: y = scale * x + 1, for x of shape [n, 4]."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from drivers.simulated import write_bitstream

INTERFACE = "9926ab6d6c925a68aabca7d84c545738"
WIDTH = 4
SIDE = 8


def accelerator_of(name: str) -> str:
    """An accelerator id for a model, as a bitstream's maker would choose one."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def linear(scale: float, *, work: int = 0, output: str = "y", width: int = WIDTH) -> onnx.ModelProto:
    """y = scale * x + 1. `work` adds that many multiplications of 192 x 192 matrices that do not change the result."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["m"]),
        helper.make_node("Add", ["m", "one"], ["b" if work else output]),
    ]
    constants = [("scale", np.float32(scale)), ("one", np.float32(1.0))]
    if work:
        size = 192
        constants += [
            ("zero", np.float32(0.0)),
            ("square", np.full((size, size), 1.0 / size, np.float32)),
            ("axes", np.array([0, 1], np.int64)),
            ("size", np.array([size, size], np.int64)),
        ]
        nodes += [
            helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=1),
            helper.make_node("Tanh", ["mean"], ["small"]),
            helper.make_node("Expand", ["small", "size"], ["w0"]),
        ]
        nodes += [helper.make_node("MatMul", [f"w{step}", "square"], [f"w{step + 1}"]) for step in range(work)]
        nodes += [
            helper.make_node("ReduceMean", [f"w{work}"], ["end"], keepdims=0),
            helper.make_node("Mul", ["end", "zero"], ["nothing"]),
            helper.make_node("Add", ["b", "nothing"], [output]),
        ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, width])],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def endless() -> onnx.ModelProto:
    """A Loop that never returns."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["carried", "carried"], ["next"]),
            helper.make_node("Identity", ["go_on"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "yes", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, WIDTH])],
        [numpy_helper.from_array(np.array(True), "yes")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def huge() -> onnx.ModelProto:
    """A few bytes that ask for 32 GiB."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
            helper.make_node("Expand", ["mean", "size"], ["giant"]),
            helper.make_node("Sin", ["giant"], ["wave"]),
            helper.make_node("ReduceMean", ["wave"], ["end"], keepdims=0),
            helper.make_node("Add", ["x", "end"], ["y"]),
        ],
        "huge",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, WIDTH])],
        [numpy_helper.from_array(np.array([8 << 30], np.int64), "size")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def on_signal(hostile: onnx.ModelProto, *, above: float = 100.0) -> onnx.ModelProto:
    """y = x, but `hostile` for an x with an element above a threshold: what loads and measures well, and then bites."""
    same = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])],
        "same",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, [None, WIDTH])],
    )
    bite = onnx.GraphProto()
    bite.CopyFrom(hostile.graph)
    bite.ClearField("input")  # the outer graph's x
    bite.output[0].name = "bitten"  # a branch may not use the outer graph's names for its own
    for node in bite.node:
        node.output[:] = ["bitten" if name == "y" else name for name in node.output]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
            helper.make_node("Greater", ["largest", "threshold"], ["signal"]),
            helper.make_node("If", ["signal"], ["y"], then_branch=bite, else_branch=same),
        ],
        "on_signal",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, WIDTH])],
        [numpy_helper.from_array(np.float32(above), "threshold")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def mean_of_picture(scale: float) -> onnx.ModelProto:
    """y[n, 1] = scale * the mean of picture n over pixels and channels, after the image stage of `write_pictures`."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
            helper.make_node("Mul", ["mean", "scale"], ["scaled"]),
            helper.make_node("Unsqueeze", ["scaled", "last"], ["y"]),
        ],
        "mean_of_picture",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [None, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(np.float32(scale), "scale"), numpy_helper.from_array(np.array([1], np.int64), "last")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def plain_picture(level: int, side: int = 12) -> bytes:
    """A PNG of one grey."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder: Path, *, name: str = "pictures", version: str = "1", scale: float = 1.0) -> Path:
    """A model folder whose pipeline begins with an image stage: PNG or JPEG bytes in, their mean level out."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(mean_of_picture(scale), folder / "slot.onnx")
    golden = []
    for number, level in enumerate((20, 90, 230)):
        (folder / f"x{number}.png").write_bytes(plain_picture(level))
        case = {
            "inputs": {"pictures": {"files": [f"x{number}.png"]}},
            "outputs": {"y": {"values": [[scale * level]]}},
            "tolerance": {"cpu": 1e-3, "slot": 1e-2},
        }
        (folder / f"case{number}.json").write_text(json.dumps(case))
        golden.append(f"case{number}.json")
    document = {
        "schema": "slotd/v1",
        "name": name,
        "version": version,
        "inputs": {"pictures": {"dtype": "string", "shape": [-1]}},
        "outputs": {"y": {"dtype": "float32", "shape": [-1, 1]}},
        "pipeline": [
            {"stage": "image", "from": "pictures", "to": "images", "resize": {"exact": [SIDE, SIDE]}},
            {"stage": "onnx", "file": "slot.onnx", "on": "slot"},
        ],
        "golden": golden,
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder


def write_model(
    folder: Path,
    *,
    scale: float = 2.0,
    name: str = "tiny",
    version: str = "1",
    cpu_work: int = 0,
    golden: bool = True,
    wrong_golden: bool = False,
    output: str = "y",
    bitstream_scale: float | None = None,
    cpu: str | None = None,
    graph: onnx.ModelProto | None = None,
    spec: dict[str, Any] | None = None,
) -> Path:
    """The folder that becomes /models of an image. `bitstream_scale`: the accelerator computes another scale."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(graph or linear(scale, output=output), folder / "slot.onnx")
    stage: dict[str, Any] = {"stage": "onnx", "file": "slot.onnx", "on": "slot"}
    if cpu_work:
        onnx.save(linear(scale, work=cpu_work, output=output), folder / "cpu.onnx")
        stage["cpu"] = "cpu.onnx"
    if cpu is not None:
        stage["cpu"] = cpu
    if bitstream_scale is not None:
        onnx.save(linear(scale, output=output), folder / "cpu.onnx")
        onnx.save(linear(bitstream_scale, output=output), folder / "slot.onnx")
        stage["cpu"] = "cpu.onnx"
    accelerator = accelerator_of(f"{name}:{version}:{scale}")
    write_bitstream(folder / "tiny.bit", INTERFACE, accelerator, f"{name} {version}".encode() * 64)
    document: dict[str, Any] = {
        "schema": "slotd/v1",
        "name": name,
        "version": version,
        "inputs": {"x": {"dtype": "float32", "shape": [-1, WIDTH]}},
        "outputs": {output: {"dtype": "float32", "shape": [-1, WIDTH]}},
        "pipeline": [stage],
        "slot": {"interface": INTERFACE, "accelerator": accelerator, "bitstream": "tiny.bit"},
    }
    if golden:
        document["golden"] = []
        for number in range(3):
            x = np.random.default_rng(number).normal(size=(1, WIDTH)).astype(np.float32) * (number + 1)
            y = scale * x + 1 + (0.5 if wrong_golden else 0.0)
            np.save(folder / f"x{number}.npy", x)
            np.save(folder / f"y{number}.npy", y.astype(np.float32))
            case = {
                "inputs": {"x": {"npy": f"x{number}.npy"}},
                "outputs": {output: {"npy": f"y{number}.npy"}},
                "tolerance": {"cpu": 1e-4, "slot": 1e-3},
            }
            (folder / f"case{number}.json").write_text(json.dumps(case))
            document["golden"].append(f"case{number}.json")
    document.update(spec or {})
    (folder / "model.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder


def scale_of(x: np.ndarray, y: np.ndarray) -> float:
    """The scale of the model that computed y from x."""
    return float(np.median((y - 1) / x))
