"""Small ONNX graphs for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, STRING, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BOOL
Value = tuple[str, int, Sequence[Any] | None]


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: dict[str, np.ndarray] | None = None,
) -> Path:
    """A graph in a file; inputs and outputs are (name, element type, shape)."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def scale(path: Path, factor: float, *, x: str = "x", y: str = "y", shape: Sequence[Any] = (None, 4)) -> Path:
    """y = x * factor."""
    node = helper.make_node("Mul", [x, "factor"], [y])
    return save(path, [node], [(x, FLOAT, shape)], [(y, FLOAT, shape)], {"factor": np.array(factor, np.float32)})


def identity(path: Path, kind: int, shape: Sequence[Any]) -> Path:
    """y = x, of any type."""
    return save(path, [helper.make_node("Identity", ["x"], ["y"])], [("x", kind, shape)], [("y", kind, shape)])


def endless(path: Path) -> Path:
    """A `Loop` that never returns; y = x if it did."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["goes_on"]), helper.make_node("Identity", ["carried"], ["carries"])],
        "body",
        [
            helper.make_tensor_value_info("turn", INT64, []),
            helper.make_tensor_value_info("going", BOOL, []),
            helper.make_tensor_value_info("carried", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("goes_on", BOOL, []),
            helper.make_tensor_value_info("carries", FLOAT, None),
        ],
    )
    node = helper.make_node("Loop", ["", "always", "x"], ["y"], body=body)
    return save(path, [node], [("x", FLOAT, [None])], [("y", FLOAT, [None])], {"always": np.array(True)})


def greedy(path: Path, elements: int) -> Path:
    """A few bytes that ask for `elements` floats."""
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return save(path, nodes, [("x", FLOAT, [None])], [("y", FLOAT, [None])], {"size": np.array([elements], np.int64)})
