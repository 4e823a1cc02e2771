"""Real architectures with random weights, ResNet-50 and VGG-16, as images in a layout folder: size and work are real.

And a small network, for what is done a thousand times.

Batch norms are folded, as a converter leaves them. Weights lie beside the graph, and the layer is not compressed:
random numbers cannot be.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

from support.images import describe, put_manifest

SIDE = 224
CLASSES = 1000
INPUT, OUTPUT = "images", "scores"
_LARGE = 1024
_ALIGN = 4096


class _Net:
    """A graph under construction: nodes, small constants inside, weights in a file."""

    def __init__(self, file: BinaryIO, location: str, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._file, self._location = file, location
        self._rng = np.random.default_rng(seed)

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node; the name of its output."""
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def weight(self, *shape: int, scale: float) -> str:
        """Normal numbers."""
        values = self._rng.standard_normal(shape, np.float32)
        return self._keep(np.multiply(values, np.float32(scale), out=values))

    def zeros(self, count: int) -> str:
        return self._keep(np.zeros(count, np.float32))

    def axis(self) -> str:
        """The second one, as Unsqueeze takes it."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array([1], np.int64), name))
        return name

    def _keep(self, values: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        if values.nbytes < _LARGE:
            self.weights.append(numpy_helper.from_array(values, name))
            return name
        self._file.seek(-(-self._file.tell() // _ALIGN) * _ALIGN)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=values.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", self._file.tell()), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        values.tofile(self._file)
        self.weights.append(tensor)
        return name

    def convolution(self, x: str, channels: tuple[int, int], size: int, *, stride: int = 1, gain: float = 1.0) -> str:
        """Zero padding that keeps the size, but for the stride."""
        came, goes = channels
        scale = gain * np.sqrt(2.0 / (came * size * size))
        kernel = self.weight(goes, came, size, size, scale=scale)
        return self.add(
            "Conv", x, kernel, self.zeros(goes), kernel_shape=[size] * 2, strides=[stride] * 2, pads=[size // 2] * 4
        )

    def dense(self, x: str, came: int, goes: int, *, gain: float = 1.0) -> str:
        weight = self.weight(came, goes, scale=gain * np.sqrt(2.0 / came))
        return self.add("Gemm", x, weight, self.zeros(goes))


def _resnet50(net: _Net) -> str:
    x = net.add("Relu", net.convolution(INPUT, (3, 64), 7, stride=2))
    x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    came = 64
    for block, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for unit in range(count):
            stride = 2 if block and not unit else 1
            goes = width * 4
            short = x if unit else net.convolution(x, (came, goes), 1, stride=stride, gain=0.7)
            y = net.add("Relu", net.convolution(x, (came, width), 1))
            y = net.add("Relu", net.convolution(y, (width, width), 3, stride=stride))
            x = net.add("Relu", net.add("Add", net.convolution(y, (width, goes), 1, gain=0.3), short))
            came = goes
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    return net.dense(x, came, CLASSES)


def _vgg16(net: _Net) -> str:
    x, came = INPUT, 3
    for goes, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            x = net.add("Relu", net.convolution(x, (came, goes), 3))
            came = goes
        x = net.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.add("Flatten", x)
    x = net.add("Relu", net.dense(x, 512 * 7 * 7, 4096))
    x = net.add("Relu", net.dense(x, 4096, 4096))
    return net.dense(x, 4096, CLASSES)


def _small(net: _Net) -> str:
    """Some milliseconds of work in a file of 150 KB."""
    x, came = INPUT, 3
    for goes, size in ((32, 7), (48, 3), (48, 3)):
        x = net.add("Relu", net.convolution(x, (came, goes), size, stride=2))
        came = goes
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    return net.dense(x, came, CLASSES)


ARCHITECTURES: dict[str, Callable[[_Net], str]] = {"resnet50": _resnet50, "vgg16": _vgg16, "small": _small}


def write_network(folder: Path, name: str, *, version: str = "1", seed: int = 1, twin_work: int = 0) -> Path:
    """A model folder with one of ARCHITECTURES, float32 [n,3,224,224] to [n,1000].

    `twin_work`: the CPU has a twin that says the same, and works so many times some ten milliseconds more for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stage = {"stage": "onnx", "file": "model.onnx", "on": "slot"}
    _write_graph(folder, "model", name, seed, 0)
    if twin_work:
        _write_graph(folder, "twin", name, seed, twin_work)
        stage["cpu"] = "twin.onnx"
    document = {
        "schema": "slotd/v1",
        "name": name,
        "version": version,
        "inputs": {INPUT: {"dtype": "float32", "shape": [-1, 3, SIDE, SIDE]}},
        "outputs": {OUTPUT: {"dtype": "float32", "shape": [-1, CLASSES]}},
        "pipeline": [stage],
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder


def _write_graph(folder: Path, stem: str, name: str, seed: int, work: int) -> None:
    with (folder / f"{stem}.bin").open("wb") as file:
        net = _Net(file, f"{stem}.bin", seed)
        last = ARCHITECTURES[name](net)
        for _ in range(work):
            nothing = net.add("ReduceMean", net.convolution(INPUT, (3, 32), 7), axes=[1, 2, 3], keepdims=0)
            nothing = net.add("Unsqueeze", net.add("Mul", nothing, net.zeros(1)), net.axis())
            last = net.add("Add", last, nothing)
    net.nodes[-1].output[0] = OUTPUT
    graph = helper.make_graph(
        net.nodes,
        name,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", CLASSES])],
        net.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / f"{stem}.onnx").write_bytes(model.SerializeToString())


def write_noise(path: Path, size: int, seed: int) -> None:
    """A file of bytes that nothing can compress."""
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, size, 1 << 24):
            file.write(rng.bytes(min(1 << 24, size - start)))


def put_folder(folder: Path, layout: Path, tag: str) -> str:
    """A model folder as an image with one plain layer, which is never whole in memory; the manifest's digest."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    with _staged(blobs) as path:
        with tarfile.open(path, "w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, f"models/{file.name}")
        with path.open("rb") as stream:
            name = hashlib.file_digest(stream, "sha256").hexdigest()
        size = path.stat().st_size
        path.rename(blobs / name)
    config = f'{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["sha256:{name}"]}}}}'
    document = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": describe(layout, "application/vnd.oci.image.config.v1+json", config.encode()),
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": f"sha256:{name}", "size": size}],
    }
    return put_manifest(layout, tag, document)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    staging = Path(tempfile.mkdtemp(prefix=".layer-", dir=folder))
    try:
        yield staging / "layer"
    finally:
        shutil.rmtree(staging)
