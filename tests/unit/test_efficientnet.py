"""EfficientNet-Lite0 and -Lite1 from their packages: state dicts, networks, what they see, the demo's images."""

from __future__ import annotations

import io
import itertools
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.errors import InvalidModel, NotFound
from agent.executor.graph import read_graph
from agent.executor.sessions import open_session
from agent.forge import torch_file
from agent.forge.demo_models import (
    INPUT,
    TOLERANCE,
    Reference,
    build_demo_images,
    class_names,
    image_stage,
    photographs,
    write_model,
)
from agent.forge.efficientnet import LITE0, LITE1, SOFTMAX, Variant
from agent.forge.torch_file import read_state_dict
from agent.images.reference import parse_reference
from agent.model.golden import read_golden
from agent.model.spec import Model, read_spec
from drivers.simulated import read_bitstream
from support.models import CLASSES, known_photographs
from support.pictures import encode, lent, photograph

# --- state dicts -----------------------------------------------------------------------------------------------------


class _Storage:
    """Pickles as a storage's persistent id does."""

    def __init__(self, key: str, values: np.ndarray, said: int | None = None) -> None:
        self.key, self.values, self.said = key, values, said


class _FloatStorage:
    def __reduce__(self) -> str:
        return "FloatStorage"


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.arguments = (storage, offset, shape, strides, False, OrderedDict())


def legacy_file(path: Path, tensors: dict[str, _Tensor], *, cut: int = 0) -> Path:
    """A file in PyTorch's legacy format, written by hand: opcodes for the names, the standard pickler for the rest."""
    storages: dict[str, _Storage] = {}

    class Pickler(pickle._Pickler):  # the Python one, which can write opcodes itself
        def persistent_id(self, thing: Any) -> Any:
            if isinstance(thing, _Storage):
                storages[thing.key] = thing
                return ("storage", _FloatStorage(), thing.key, "cpu", thing.said or thing.values.size, None)
            return None

        def save(self, thing: Any, save_persistent_id: bool = True) -> None:
            if isinstance(thing, _FloatStorage):
                self.write(b"ctorch\nFloatStorage\n")
            elif isinstance(thing, _Tensor):
                self.write(b"ctorch._utils\n_rebuild_tensor_v2\n")
                self.save(thing.arguments)
                self.write(b"R")
            else:
                super().save(thing, save_persistent_id)

    out = io.BytesIO()
    for head in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(head, out, protocol=2)
    Pickler(out, protocol=2).dump(OrderedDict(tensors))
    pickle.dump(list(storages), out, protocol=2)
    for storage in storages.values():
        out.write(struct.pack("<q", storage.values.size) + storage.values.astype("<f4").tobytes())
    path.write_bytes(out.getvalue()[: len(out.getvalue()) - cut])
    return path


def test_strides_and_offsets_are_honoured(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32)
    shared = _Storage("7", values)
    tensors = {
        "rows": _Tensor(shared, 0, (3, 4), (4, 1)),
        "columns": _Tensor(shared, 0, (4, 3), (1, 4)),
        "part": _Tensor(shared, 5, (2, 2), (4, 1)),
        "scalar": _Tensor(shared, 11, (), ()),
    }
    state = read_state_dict(legacy_file(tmp_path / "x.pth", tensors))
    rows = values.reshape(3, 4)
    np.testing.assert_array_equal(state["rows"], rows)
    np.testing.assert_array_equal(state["columns"], rows.T)
    np.testing.assert_array_equal(state["part"], rows[1:, 1:3])
    assert state["scalar"] == 11 and state["scalar"].shape == ()
    assert all(array.flags.c_contiguous and array.flags.owndata for array in state.values())


@pytest.mark.parametrize(
    ("offset", "shape", "strides"), [(0, (4, 4), (4, 1)), (9, (2, 2), (2, 1)), (0, (3,), (6,)), (-1, (1,), (1,))]
)
def test_a_tensor_outside_its_values_is_refused(tmp_path: Path, offset: int, shape: Any, strides: Any) -> None:
    tensor = _Tensor(_Storage("7", np.zeros(12)), offset, shape, strides)
    with pytest.raises(InvalidModel, match=r"larger than its values|impossible shape"):
        read_state_dict(legacy_file(tmp_path / "x.pth", {"x": tensor}))


def test_a_cut_or_lying_file_is_refused(tmp_path: Path) -> None:
    values = np.zeros(12)
    for cut in (1, 40, 60, 120, 250):
        tensor = _Tensor(_Storage("7", values), 0, (12,), (1,))
        path = legacy_file(tmp_path / "x.pth", {"x": tensor}, cut=cut)
        with pytest.raises(InvalidModel, match="not a state dict"):
            read_state_dict(path)
    path = legacy_file(tmp_path / "x.pth", {"x": _Tensor(_Storage("7", values, said=11), 0, (11,), (1,))})
    with pytest.raises(InvalidModel, match="size of a storage"):
        read_state_dict(path)


def test_a_pickle_that_asks_for_code_gets_none(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "x.pth"
    for module, name in (("os", "system"), ("builtins", "eval"), ("torch", "load")):
        path.write_bytes(f"c{module}\n{name}\n(V touch {mark}\ntR.".encode())
        with pytest.raises(InvalidModel, match=rf"asks for {module}\.{name}"):
            read_state_dict(path)
    assert not mark.exists()
    assert set(torch_file._Unpickler.known) >= {("torch", "FloatStorage")}


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="No such file"):
        read_state_dict(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InvalidModel, match="not a state dict"):
        read_state_dict(tmp_path / "text.pth")


# --- the networks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, Path]:
    made = {variant: tmp_path_factory.mktemp(variant.name) for variant in (LITE0, LITE1)}
    for variant, folder in made.items():
        write_model(variant, folder)
    return made


@pytest.mark.parametrize("variant", [LITE0, LITE1], ids=lambda variant: variant.name)
def test_right_on_real_photographs(
    folders: dict[Variant, Path], variant: Variant, capsys: pytest.CaptureFixture[str]
) -> None:
    classify, names = Reference(folders[variant], image_stage(variant)), class_names()
    sure = 0
    for photo, path in known_photographs().items():
        answer = classify(path.read_bytes())
        top = int(answer.argmax())
        with capsys.disabled():
            print(f"\n  {variant.name}  {photo:16} {top:4} {names[top]:20} {answer[top]:.3f}", end="")
        assert top in CLASSES[photo], f"{photo}: {names[top]}"
        assert answer.sum() == pytest.approx(1, abs=1e-4)
        sure += bool(answer[top] >= 0.4)
    assert sure >= (4 if lent() else 2)


@pytest.mark.parametrize("variant", [LITE0, LITE1], ids=lambda variant: variant.name)
def test_graphs_take_any_batch(folders: dict[Variant, Path], variant: Variant) -> None:
    folder = folders[variant]
    (images,), (features,) = read_graph(folder / "featurizer.onnx")
    assert (images.name, images.shape) == ("images", (-1, 3, variant.side, variant.side))
    assert (features.name, features.shape) == ("features", (-1, 1280))
    _, (output,) = read_graph(folder / "classifier.onnx")
    assert (output.name, output.shape) == (SOFTMAX, (-1, 1000))
    session = open_session(folder / "featurizer.onnx", threads=1)
    batch = np.random.default_rng(1).uniform(-1, 1, (3, 3, variant.side, variant.side)).astype(np.float32)
    together = session.compute({"images": batch})["features"]
    alone = np.concatenate([session.compute({"images": batch[i : i + 1]})["features"] for i in range(3)])
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("variant", [LITE0, LITE1], ids=lambda variant: variant.name)
def test_golden_cases_are_real_and_discriminate(folders: dict[Variant, Path], variant: Variant) -> None:
    spec = read_spec(folders[variant])
    assert spec.signature is not None and list(spec.signature.inputs) == [INPUT]
    cases = read_golden(Model("", "", folders[variant], spec), spec.signature)
    assert len(cases) >= 3
    answers = [case.outputs[SOFTMAX] for case in cases]
    distance = min(float(np.abs(a - b).max()) for a, b in itertools.combinations(answers, 2))  # type: ignore[operator]
    assert distance / TOLERANCE["slot"] >= 5


def test_both_models_can_take_each_others_place(folders: dict[Variant, Path]) -> None:
    first, second = (read_spec(folders[variant]) for variant in (LITE0, LITE1))
    assert first.signature is not None and second.signature is not None
    assert first.signature.differences(second.signature) == []
    assert first.slot is not None and second.slot is not None
    assert first.slot.accelerator != second.slot.accelerator
    assert first.name != second.name
    for variant, spec in ((LITE0, first), (LITE1, second)):
        with (folders[variant] / "slot.bit").open("rb") as file:
            bitstream = read_bitstream(file.fileno())
        assert spec.slot is not None
        assert (bitstream.interface, bitstream.accelerator) == (spec.slot.interface, spec.slot.accelerator)


def test_the_models_differ_on_the_same_picture(folders: dict[Variant, Path]) -> None:
    item = encode(photograph("coffee", (320, 280)), "JPEG")
    answers = [Reference(folders[variant], image_stage(variant))(item) for variant in (LITE0, LITE1)]
    assert np.abs(answers[0] - answers[1]).max() > 0.05


def test_demo_images(tmp_path: Path) -> None:
    said: list[str] = []
    digests = build_demo_images(tmp_path / "layout", tmp_path / "models", said.append)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["efficientnet-lite0", "efficientnet-lite1"]
    assert list(digests) == ["efficientnet-lite0:1", "efficientnet-lite1:1"]
    assert all(parse_reference(tag) for tag in digests)
    assert len(said) >= 4
    assert build_demo_images(tmp_path / "layout", tmp_path / "again", said.append) == digests


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match="no-such-weights is not installed"):
        Variant("x", 224, "no_such_weights", "X").weights()
    monkeypatch.setattr("agent.forge.demo_models.find_spec", lambda _: None)
    with pytest.raises(NotFound, match="whose photographs"):
        photographs()


def test_class_names() -> None:
    names = class_names()
    assert len(names) == 1000
    assert (names[385], names[652], names[967]) == ("Indian elephant", "military uniform", "espresso")
