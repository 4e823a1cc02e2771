"""Golden cases: read as written, refused by name when anything is off, and never from outside the model's folder."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.errors import InvalidModel
from agent.model import golden
from agent.model.golden import GoldenCase, read_golden, write_golden
from agent.model.signature import DType, Signature, Strings, TensorSpec
from agent.model.spec import Model, ModelSpec

SIGNATURE = Signature(
    {"pic": TensorSpec("pic", DType.STRING, (-1,)), "x": TensorSpec("x", DType.FLOAT32, (-1, 3))},
    {
        "p": TensorSpec("p", DType.FLOAT32, (-1, 4)),
        "label": TensorSpec("label", DType.INT8, (-1,)),
        "word": TensorSpec("word", DType.STRING, (-1,)),
        "flag": TensorSpec("flag", DType.BOOL, ()),
    },
)
P = [[0.1, 0.2, 0.3, 0.4]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    (path / "golden").mkdir(parents=True)
    (path / "golden" / "a.jpg").write_bytes(b"\xff\xd8a\0")
    (path / "golden" / "b.jpg").write_bytes(b"\xff\xd8bb\0")
    np.save(path / "golden" / "x.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    (tmp_path / "outside.npy").write_bytes((path / "golden" / "x.npy").read_bytes())
    return path


def read(folder: Path, *paths: str, **kw: Any) -> list[GoldenCase]:
    spec = ModelSpec.model_validate(
        {"name": "m", "pipeline": [{"stage": "onnx", "file": "m.onnx"}], "golden": list(paths) or ["golden/c.json"]}
    )
    return read_golden(Model("sha256:0", "r", folder, spec), SIGNATURE, **kw)


def document(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "inputs": {"pic": {"files": ["a.jpg", "b.jpg"]}, "x": {"npy": "x.npy"}},
        "outputs": {"p": {"values": P}},
    }
    for path, value in changes.items():
        at = whole
        *parts, last = path.split("__")
        for part in parts:
            at = at.setdefault(part, {})
        if value is None:
            del at[last]
        else:
            at[last] = value
    return whole


def refused(folder: Path, content: Any, **kw: Any) -> InvalidModel:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (folder / "golden" / "c.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InvalidModel) as caught:
        read(folder, **kw)
    assert caught.value.field is not None and caught.value.field.startswith("golden/c.json")
    assert caught.value.hint
    return caught.value


def test_reads_files_arrays_and_values(folder: Path) -> None:
    case = document(
        outputs__label={"values": [-128, 127]},
        outputs__word={"values": ["ä", "b"]},
        outputs__flag={"values": True},
        tolerance={"slot": 0.03},
    )
    (folder / "golden" / "c.json").write_text(json.dumps(case))
    (found,) = read(folder)
    assert found.name == "golden/c.json"
    assert found.inputs["pic"] == Strings((2,), [b"\xff\xd8a\0", b"\xff\xd8bb\0"])
    x = found.inputs["x"]
    assert isinstance(x, np.ndarray) and x.dtype == np.float32 and x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.outputs["word"] == Strings((2,), ["ä".encode(), b"b"])
    label, flag = found.outputs["label"], found.outputs["flag"]
    assert isinstance(label, np.ndarray) and label.dtype == np.int8 and label.tolist() == [-128, 127]
    assert isinstance(flag, np.ndarray) and flag.shape == () and flag.dtype == np.bool_
    assert (found.tolerance_cpu, found.tolerance_slot) == (1e-4, 0.03)


def test_written_cases_read_back(folder: Path) -> None:
    inputs = {"pic": Strings((2,), [b"one\0", b""]), "x": np.ones((1, 3), np.float32)}
    outputs = {"p": np.asarray(P, np.float32), "word": Strings((1,), [b"cat"])}
    path = write_golden(folder / "golden", "case", inputs, outputs, {"cpu": 1e-3, "slot": 0.01})
    (found,) = read(folder, str(path.relative_to(folder)))
    assert found.inputs["pic"] == inputs["pic"] and found.outputs["word"] == outputs["word"]
    np.testing.assert_array_equal(found.inputs["x"], inputs["x"])
    np.testing.assert_array_equal(found.outputs["p"], outputs["p"])
    assert (found.tolerance_cpu, found.tolerance_slot) == (1e-3, 0.01)


@pytest.mark.parametrize("order", ["C", "F", ">"])
def test_array_layouts(folder: Path, order: str) -> None:
    array = np.arange(6, dtype=">f4" if order == ">" else "<f4").reshape(2, 3)
    np.save(folder / "golden" / "x.npy", np.asfortranarray(array) if order == "F" else array)
    (folder / "golden" / "c.json").write_text(json.dumps(document()))
    x = read(folder)[0].inputs["x"]
    assert isinstance(x, np.ndarray) and x.dtype == np.dtype("=f4") and x.flags.c_contiguous
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("content", "field", "says"),
    [
        ("{", "", "JSON"),
        ("[" * 50_000, "", "JSON"),
        (b"\xff\xfe", "", "JSON"),
        ([], "", "dictionary"),
        (" " * (golden.MAX_JSON + 1), "", "larger"),
        (document(colour="red"), "colour", "no such field"),
        (document(inputs__x=None), "inputs", "'x' is missing"),
        (document(inputs__z={"values": [1]}), "inputs.z", "no such input"),
        (document(outputs__z={"values": [1]}), "outputs.z", "no such output"),
        (document(outputs={}), "outputs", "at least 1"),
        (document(inputs__x={}), "inputs.x", "exactly one"),
        (document(inputs__x={"npy": "x.npy", "values": [[1, 2, 3]]}), "inputs.x", "exactly one"),
        (document(inputs__x={"npy": "../../outside.npy"}), "inputs.x.npy", "inside"),
        (document(inputs__x={"npy": "/etc/passwd"}), "inputs.x.npy", "inside"),
        (document(inputs__x={"npy": "link.npy"}), "inputs.x", "cannot be opened"),
        (document(inputs__x={"npy": "away/outside.npy"}), "inputs.x", "outside the model's folder"),
        (document(inputs__x={"npy": "pipe.npy"}), "inputs.x", "not a plain file"),
        (document(inputs__x={"npy": "none.npy"}), "inputs.x", "No such file"),
        (document(inputs__x={"npy": "a.jpg"}), "inputs.x", "not a .npy"),
        (document(inputs__x={"npy": "pickle.npy"}), "inputs.x", "not a .npy"),
        (document(inputs__x={"npy": "cut.npy"}), "inputs.x", "cut off"),
        (document(inputs__x={"npy": "vast.npy"}), "inputs.x", "cut off"),
        (document(inputs__x={"npy": "double.npy"}), "inputs.x", "float64"),
        (document(inputs__x={"values": [1, 2, 3]}), "inputs.x", "[3]"),
        (document(inputs__x={"values": [[1, 2], [3]]}), "inputs.x", "regular"),
        (document(inputs__x={"values": [["1", "2", "3"]]}), "inputs.x", "float32"),
        (document(inputs__x={"values": [[1e300, 0, 0]]}), "inputs.x", "outside"),
        (document(inputs__x={"files": ["a.jpg"]}), "inputs.x", "string"),
        (document(inputs__pic={"npy": "x.npy"}), "inputs.pic", "string"),
        (document(inputs__pic={"values": [1]}), "inputs.pic", "strings"),
        (document(inputs__pic={"values": ["a", ["b"]]}), "inputs.pic", "strings"),
        (document(inputs__pic={"files": []}), "inputs.pic.files", "at least 1"),
        (document(inputs__pic={"values": []}), "inputs.pic", "no elements"),
        (document(outputs__label={"values": [128]}), "outputs.label", "outside int8"),
        (document(outputs__label={"values": [1.5]}), "outputs.label", "int8"),
        (document(outputs__label={"values": [2**80]}), "outputs.label", "int8"),
        (document(outputs__flag={"values": 1}), "outputs.flag", "bool"),
        (document(outputs__p={"npy": "nan.npy"}), "outputs.p", "NaN"),
        (document(tolerance={"slot": 0.051}), "tolerance.slot", "allows"),
        (document(tolerance={"cpu": 1}), "tolerance.cpu", "allows"),
        (document(tolerance={"cpu": -1}), "tolerance.cpu", "greater"),
        (document(tolerance={"cpu": float("nan")}), "tolerance.cpu", "finite"),
    ],
)
def test_faults_are_named(folder: Path, content: Any, field: str, says: str) -> None:
    inside = folder / "golden"
    (inside / "link.npy").symlink_to("x.npy")
    (inside / "away").symlink_to(folder.parent)
    os.mkfifo(inside / "pipe.npy")
    np.save(inside / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (inside / "cut.npy").write_bytes((inside / "x.npy").read_bytes()[:-1])
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 3), }\n"
    (inside / "vast.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    np.save(inside / "double.npy", np.zeros((1, 3)))
    np.save(inside / "nan.npy", np.array([[0, 1, np.nan, 2]], np.float32))
    error = refused(folder, content)
    assert error.field == (f"golden/c.json: {field}" if field else "golden/c.json")
    assert says in error.message


def test_size_of_all_cases_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "MAX_BYTES", 140)
    for name in ("c", "d", "e"):
        (folder / "golden" / f"{name}.json").write_text(json.dumps(document()))
    read(folder, "golden/c.json", "golden/d.json")
    with pytest.raises(InvalidModel, match=r"golden/e.json.*MiB"):
        read(folder, "golden/c.json", "golden/d.json", "golden/e.json")


def test_tolerance_follows_the_hosts_cap(folder: Path) -> None:
    refused(folder, document(tolerance={"slot": 0.02}), max_tolerance=0.01)
    assert read(folder, max_tolerance=0.02)[0].tolerance_slot == 0.02
