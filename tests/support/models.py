"""The real models of the demo, the photographs that they know, and small folders to pack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

from agent.forge.demo_models import photographs
from support.pictures import lent

# What each photograph shows, as ImageNet classes that a person would accept.
CLASSES: dict[str, frozenset[int]] = {
    "grace_hopper": frozenset({652}),  # military uniform
    "chelsea": frozenset(range(281, 286)),  # cats
    "coffee": frozenset({967, 504}),  # espresso, coffee mug
    "rocket": frozenset({657, 744, 812}),  # missile, projectile, space shuttle
    "cat": frozenset(range(281, 286)),
    "dog": frozenset(range(151, 269)),  # breeds
    "indian-elephant": frozenset({385}),
    "snowleopardgaze": frozenset({289}),
}


def known_photographs() -> dict[str, Path]:
    """Photographs of which CLASSES says what they show."""
    return {name: path for name, path in (photographs() | lent()).items() if name in CLASSES}


def matrix_graph(path: Path, weight: np.ndarray, *, batch: str | int = "n") -> None:
    """An ONNX file: `x` [batch, rows of weight] to `y` = x · weight."""
    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matrix",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, columns])],
        initializer=[numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    path.write_bytes(model.SerializeToString(deterministic=True))


def matrix_model(folder: Path, *, size: int = 4, name: str = "matrix", version: str = "1") -> Path:
    """A folder that `pack` takes: one graph with a weight of `size` x `size`, and model.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    matrix_graph(folder / "matrix.onnx", np.random.default_rng(size).standard_normal((size, size)))
    document = {
        "schema": "slotd/v1",
        "name": name,
        "version": version,
        "inputs": {"x": {"dtype": "float32", "shape": [-1, size]}},
        "outputs": {"y": {"dtype": "float32", "shape": [-1, size]}},
        "pipeline": [{"stage": "onnx", "file": "matrix.onnx", "on": "slot"}],
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(document))
    return folder


def largest_weight(path: Path) -> int:
    """Bytes of the largest weight that an ONNX file holds itself."""
    model = onnx.load(path, load_external_data=False)
    return max((len(weight.raw_data) for weight in model.graph.initializer), default=0)
