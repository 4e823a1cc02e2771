"""Pictures come out as in the models' own TensorFlow graphs (`make test-tensorflow` makes the environment for it)."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.errors import InvalidInput
from agent.executor.stages.image import prepare
from agent.executor.stages.picture import decode
from agent.model.spec import ImageStage
from support.pictures import bad, good, lent, shipped

pytestmark = pytest.mark.tensorflow

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SLOTD_TENSORFLOW", ROOT / ".venv-tensorflow" / "bin" / "python"))
MEAN = [123.68, 116.779, 103.939]
STAGES: dict[str, dict[str, Any]] = {
    "resnet50": {"resize": {"shorter": 256}, "crop": [224, 224], "mean": MEAN},
    "densenet121": {"resize": {"shorter": 256}, "crop": [224, 224], "mean": MEAN, "order": "BGR", "scale": 0.017},
    "ssd-vgg": {"resize": {"exact": [300, 300]}, "mean": MEAN},
    "efficientnet-lite1": {
        "resize": {"shorter": 274},
        "crop": [240, 240],
        "mean": [127.0] * 3,
        "std": [128.0] * 3,
        "layout": "NCHW",
    },
}


def stage(name: str) -> ImageStage:
    return ImageStage.model_validate({"stage": "image", "from": "Placeholder:0", "to": "images", **STAGES[name]})


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    found = {**good(), **{name: content for name, (content, _) in bad().items()}}
    return found | {name: path.read_bytes() for name, path in (shipped() | lent()).items()}


@pytest.fixture(scope="module")
def reference(pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not PYTHON.exists():
        pytest.fail(f"no TensorFlow environment at {PYTHON}: run `make test-tensorflow`")
    folder = tmp_path_factory.mktemp("tensorflow")
    (folder / "pictures.pickle").write_bytes(pickle.dumps(pictures))
    documents = {name: stage(name).model_dump(mode="json") for name in STAGES}
    (folder / "stages.json").write_text(json.dumps(documents))
    script = ROOT / "tests" / "support" / "tensorflow_graph.py"
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(PYTHON), str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = pickle.loads((folder / "results.pickle").read_bytes())
    return results


def test_decodes_to_the_same_grey_levels(pictures: dict[str, bytes], reference: dict[str, Any]) -> None:
    for name in [*good(), *shipped(), *lent()]:
        assert not isinstance(reference[name], str), f"TensorFlow refuses {name!r}: {reference[name]}"
        pixels = decode(pictures[name])
        for kind in ("decode_jpeg", "decode_png"):
            np.testing.assert_array_equal(pixels, reference[name][kind], err_msg=f"{name}, {kind}")


def test_prepares_the_same_tensors(
    pictures: dict[str, bytes], reference: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    worst: dict[str, float] = {}
    names = [*good(), *shipped(), *lent()]
    for name in names:
        for kind in STAGES:
            want = reference[name][kind]
            out = np.full(want.shape, np.nan, np.float32)
            prepare(stage(kind), pictures[name], out)
            difference = float(np.abs(out - want).max())
            assert difference <= 1e-3, f"{name}, {kind}: {difference}"
            worst[kind] = max(worst.get(kind, 0.0), difference)
    with capsys.disabled():
        for kind, difference in worst.items():
            print(f"\n{kind}: {len(names)} pictures, largest difference from TensorFlow {difference:g}", end="")


def test_refuses_what_tensorflow_refuses(pictures: dict[str, bytes], reference: dict[str, Any]) -> None:
    for name in bad():
        assert isinstance(reference[name], str), f"TensorFlow takes {name!r}"
        with pytest.raises(InvalidInput):
            decode(pictures[name])
