"""pack: a folder becomes an image that any OCI tool can read, always the same one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from agent.config import ImagesConfig
from agent.errors import InvalidImage, InvalidInput, InvalidModel
from agent.executor.sessions import open_session
from agent.forge.pack import pack
from agent.images.layout import Store
from agent.images.pull import pull, resolve, unpack
from agent.model.golden import write_golden
from support.models import largest_weight, matrix_graph, matrix_model


def blob(layout: Path, digest: str) -> bytes:
    data = (layout / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()
    assert "sha256:" + hashlib.sha256(data).hexdigest() == digest
    return data


def document(layout: Path, digest: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(blob(layout, digest))
    return found


def members(layout: Path, digest: str) -> list[tarfile.TarInfo]:
    layer = document(layout, digest)["layers"][0]["digest"]
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(blob(layout, layer)))) as archive:
        return archive.getmembers()


def test_everything_is_where_oci_wants_it(tmp_path: Path) -> None:
    folder, layout = matrix_model(tmp_path / "m"), tmp_path / "layout"
    digest = pack(folder, layout, "matrix:1", labels={"owner": "me"})
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "matrix:1"}
    assert entry["digest"] == digest and entry["size"] == len(blob(layout, digest))
    manifest = document(layout, digest)
    assert manifest["mediaType"] == entry["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    (layer,) = manifest["layers"]
    data = blob(layout, layer["digest"])
    assert layer["size"] == len(data)
    config = document(layout, manifest["config"]["digest"])
    diff_id = "sha256:" + hashlib.sha256(gzip.decompress(data)).hexdigest()
    assert config["rootfs"] == {"type": "layers", "diff_ids": [diff_id]}
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    labels = config["config"]["Labels"]
    assert labels["owner"] == "me" and labels["org.opencontainers.image.title"] == "matrix"


def test_nothing_of_this_machine_is_in_the_layer(tmp_path: Path) -> None:
    folder = matrix_model(tmp_path / "m")
    (folder / "notes").mkdir()
    (folder / "notes" / "read.me").write_text("hello")
    os.chmod(folder / "notes" / "read.me", 0o700)
    found = members(tmp_path / "layout", pack(folder, tmp_path / "layout", "matrix:1"))
    assert [entry.name for entry in found] == [
        "models",
        "models/notes",
        "models/matrix.onnx",
        "models/model.yaml",
        "models/notes/read.me",
    ]
    assert {(entry.uid, entry.gid, entry.uname, entry.gname, entry.mtime) for entry in found} == {(0, 0, "", "", 0)}
    assert {entry.mode for entry in found} == {0o755, 0o644}


def test_the_same_folder_is_the_same_image(tmp_path: Path) -> None:
    first = matrix_model(tmp_path / "a", size=600)
    second = matrix_model(tmp_path / "b", size=600)
    for path in sorted(second.iterdir(), reverse=True):
        os.utime(path, (1, 1))
        os.chmod(path, 0o600)
    digest = pack(first, tmp_path / "one", "matrix:1")
    assert pack(second, tmp_path / "two", "other:7") == digest
    matrix_model(second, size=600, version="2")
    assert pack(second, tmp_path / "two", "other:8") != digest


def test_a_tag_moves_and_other_entries_stay(tmp_path: Path) -> None:
    folder, layout = matrix_model(tmp_path / "m"), tmp_path / "layout"
    foreign = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": "sha256:" + "0" * 64,
        "size": 7,
        "platform": {"os": "linux", "architecture": "arm64"},
        "annotations": {"org.opencontainers.image.ref.name": "theirs", "note": "kept"},
    }
    pack(folder, layout, "matrix:1")
    index = json.loads((layout / "index.json").read_text())
    index["manifests"].append(foreign)
    (layout / "index.json").write_text(json.dumps(index))
    digest = pack(matrix_model(folder, version="2"), layout, "matrix:1")
    entries = json.loads((layout / "index.json").read_text())["manifests"]
    assert entries[0] == foreign
    assert [entry["digest"] for entry in entries[1:]] == [digest]


def test_nothing_is_left_beside(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    digest = pack(matrix_model(tmp_path / "m", size=600), layout, "matrix:1")
    manifest = document(layout, digest)
    known = {digest, manifest["config"]["digest"], manifest["layers"][0]["digest"]}
    assert {f"sha256:{path.name}" for path in (layout / "blobs" / "sha256").iterdir()} == known
    assert not [path for path in layout.iterdir() if path.name.startswith(".")]


async def test_our_own_puller_takes_it(tmp_path: Path) -> None:
    folder, layout = matrix_model(tmp_path / "m", size=600), tmp_path / "layout"
    digest = pack(folder, layout, "matrix:1")
    config = ImagesConfig(layouts=[layout], keep_free=0)
    store = Store(tmp_path / "state", config)
    await store.open()
    assert await resolve("matrix:1", config) == digest
    await pull("matrix:1", digest, store, config, lambda _: None)
    unpacked = await unpack(digest, store, config, lambda _: None)
    assert (unpacked / "model.yaml").read_bytes() == (folder / "model.yaml").read_bytes()
    # 1.4 MB of weights lie beside the graph now, and the graph computes what it did.
    assert (unpacked / "matrix.onnx.data").stat().st_size == 600 * 600 * 4
    assert largest_weight(unpacked / "matrix.onnx") == 0 < largest_weight(folder / "matrix.onnx")
    x = np.random.default_rng(3).standard_normal((2, 600)).astype(np.float32)
    results = [open_session(where / "matrix.onnx", threads=1).compute({"x": x})["y"] for where in (folder, unpacked)]
    # Weights beside a graph are not packed anew for the CPU, so sums are made in another order.
    np.testing.assert_allclose(*results, atol=1e-3)


def test_external_data_can_be_left_off(tmp_path: Path) -> None:
    folder, layout = matrix_model(tmp_path / "m", size=600), tmp_path / "layout"
    names = [e.name for e in members(layout, pack(folder, layout, "matrix:1", external_data=False))]
    assert names == ["models", "models/matrix.onnx", "models/model.yaml"]


def test_graphs_in_folders_keep_their_weights_beside_them(tmp_path: Path) -> None:
    folder = matrix_model(tmp_path / "m")
    (folder / "cpu").mkdir()
    matrix_graph(folder / "cpu" / "twin.onnx", np.ones((600, 600)))
    model = yaml.safe_load((folder / "model.yaml").read_text())
    model["pipeline"][0]["cpu"] = "cpu/twin.onnx"
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    found = members(tmp_path / "layout", pack(folder, tmp_path / "layout", "matrix:1"))
    assert {"models/cpu", "models/cpu/twin.onnx", "models/cpu/twin.onnx.data"} <= {entry.name for entry in found}


def test_a_single_graph_needs_no_yaml(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    matrix_graph(folder / "only.onnx", np.eye(3))
    digest = pack(folder, tmp_path / "layout", "only:1")
    assert document(tmp_path / "layout", digest)["annotations"]["org.opencontainers.image.title"] == "only"


def refused(tmp_path: Path, folder: Path, match: str, kind: type[Exception] = InvalidModel, tag: str = "m:1") -> None:
    with pytest.raises(kind, match=match):
        pack(folder, tmp_path / "layout", tag)
    index = tmp_path / "layout" / "index.json"
    assert not index.exists() or json.loads(index.read_text())["manifests"] == []


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, matrix_model(tmp_path / "tag"), "is not a tag", InvalidInput, tag="a b")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", r"no model\.yaml")
    bad = matrix_model(tmp_path / "yaml")
    (bad / "model.yaml").write_text("schema: slotd/v1\nname: X\n")
    refused(tmp_path, bad, "model.yaml")
    link = matrix_model(tmp_path / "link")
    (link / "passwd").symlink_to("/etc/passwd")
    refused(tmp_path, link, "passwd: is neither a file nor a folder")
    pipe = matrix_model(tmp_path / "pipe")
    os.mkfifo(pipe / "pipe")
    refused(tmp_path, pipe, "pipe: is neither")
    kept = matrix_model(tmp_path / "kept")
    (kept / ".hashes.json").write_text("{}")
    refused(tmp_path, kept, "keeps for itself")
    odd = matrix_model(tmp_path / "odd")
    (odd / "new\nline").write_text("")
    refused(tmp_path, odd, "cannot be printed")
    assert not (tmp_path / "layout").exists()
    graph = matrix_model(tmp_path / "graph")
    (graph / "matrix.onnx").write_bytes(b"\xff" * (2 << 20))
    refused(tmp_path, graph, "matrix.onnx: is not an ONNX graph")
    taken = matrix_model(tmp_path / "taken", size=600)
    (taken / "matrix.onnx.data").write_text("mine")
    refused(tmp_path, taken, "is the name for the weights")


def test_a_golden_case_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = matrix_model(tmp_path / "m")
    model = yaml.safe_load((folder / "model.yaml").read_text())
    model["golden"] = ["golden/one.json"]
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    x = np.ones((1, 4), np.float32)
    write_golden(folder / "golden", "one", {"x": x}, {"z": x}, {"cpu": 1e-3, "slot": 1e-2})
    refused(tmp_path, folder, "no such output")
    write_golden(folder / "golden", "one", {"x": x}, {"y": x}, {"cpu": 1e-3, "slot": 1e-2})
    pack(folder, tmp_path / "layout", "m:1")


def test_a_layout_inside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = matrix_model(tmp_path / "m")
    with pytest.raises(InvalidInput, match="lies in the folder"):
        pack(folder, folder / "layout", "m:1")


def test_a_foreign_folder_is_not_written_to(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    layout.mkdir()
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    (layout / "index.json").write_text('{"manifests": []}')
    with pytest.raises(InvalidImage, match="layout version"):
        pack(matrix_model(tmp_path / "m"), layout, "m:1")
    assert json.loads((layout / "index.json").read_text()) == {"manifests": []}
