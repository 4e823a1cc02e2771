"""The store: opening, verifying, garbage collection, repair; and reading somebody's layout folder."""

from __future__ import annotations

import json
import os

import pytest

from agent.config import ImagesConfig
from agent.errors import Conflict, InvalidImage, InvalidInput, InvalidModel, NotFound, StorageError
from agent.images import blobs
from agent.images.blobs import Incoming, Layout, StoreLayout
from agent.images.layout import Store
from agent.images.manifest import Descriptor, digest_of, parse_manifest
from agent.images.unpack import Limits, unpack
from support.images import make_image, put_manifest

LIMITS = Limits(1 << 30, 100, 0)
MODEL = {"models/a.onnx": b"graph", "models/weights.bin": os.urandom(100_000)}


@pytest.fixture
async def store(tmp_path):
    made = Store(tmp_path / "state", ImagesConfig())
    await made.open()
    return made


def put(store: Store, tag: str, files: dict[str, bytes], **how) -> str:
    digest = make_image(store.layout.path, tag, files, **how)
    unpack(store.layout, store.models, digest, f"host/{tag}", LIMITS, lambda count, total: None)
    return digest


async def test_an_empty_store_is_an_oci_layout(store):
    assert json.loads((store.layout.path / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    assert json.loads((store.layout.path / "index.json").read_bytes()) == {"schemaVersion": 2, "manifests": []}
    assert (store.layout.path / "blobs/sha256").is_dir()
    assert store.manifests() == []
    await store.open()


async def test_a_model_is_read_and_every_bit_of_it_counts(store):
    digest = put(store, "a:1", MODEL)
    assert store.has(digest)
    model = store.model(digest)
    assert (model.digest, model.reference, model.name, model.version) == (digest, "host/a:1", "a", 1)
    assert store.model(digest, "other/name:2").reference == "other/name:2"
    weights = model.folder / "weights.bin"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(StorageError, match=r"weights\.bin.*changed") as caught:
        store.model(digest)
    assert "deploy" in (caught.value.hint or "")
    weights.write_bytes(good[:-1])
    with pytest.raises(StorageError, match=r"weights\.bin.*99999 bytes instead of 100000"):
        store.model(digest)
    weights.unlink()
    with pytest.raises(StorageError, match=r"weights\.bin"):
        store.model(digest)
    weights.symlink_to("/etc/hostname")
    with pytest.raises(StorageError, match="symlink"):
        store.model(digest)
    weights.unlink()
    weights.write_bytes(good)
    (model.folder / "extra").write_bytes(b"")
    with pytest.raises(StorageError, match=r"extra.*does not belong"):
        store.model(digest)


async def test_models_that_are_none(store):
    with pytest.raises(NotFound):
        store.model("sha256:" + "0" * 64)
    with pytest.raises(InvalidInput):
        store.model("../../etc")
    for files, match in (
        ({"models/readme.txt": b""}, "no model.yaml and no .onnx"),
        ({"models/a.onnx": b"", "models/b.onnx": b""}, "2 .onnx files"),
        ({"models/model.yaml": b"name: [broken"}, "not YAML"),
    ):
        digest = put(store, "bad:1", files)
        with pytest.raises(InvalidModel, match=match):
            store.model(digest)


async def test_collect_keeps_what_is_kept_and_frees_the_rest(store):
    shared = os.urandom(50_000)
    one = put(store, "a:1", {"models/a.onnx": b"1", "models/s": shared}, layers=2)
    two = put(store, "a:2", {"models/a.onnx": b"2", "models/s": shared}, layers=2)
    before = {path.name for path in store.layout.blobs.iterdir()}
    freed = await store.collect({two})
    after = {path.name for path in store.layout.blobs.iterdir()}
    assert [item.digest for item in store.manifests()] == [two]
    assert not store.has(one) and store.has(two)
    assert len(before - after) == 3  # manifest, config and one layer; the shared layer stays
    assert 50_000 < freed < 60_000
    assert store.model(two).digest == two
    unpack(store.layout, store.models, two, "", LIMITS, lambda count, total: None)
    assert await store.collect({two}) == 0
    assert await store.remove(two) > 0
    assert store.manifests() == [] and list(store.models.iterdir()) == [] and list(store.layout.blobs.iterdir()) == []


async def test_collect_keeps_half_done_blobs_that_may_be_gone_on_with(store):
    fresh, old = (store.layout.partials / f"{digit * 64}.partial" for digit in "01")
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert await store.collect(set()) == 4
    assert fresh.exists() and not old.exists()


async def test_collect_removes_no_blob_when_a_damaged_manifest_does_not_say_which(store):
    digest = put(store, "a:1", MODEL)
    other = put(store, "b:1", {"models/a.onnx": b"other"})
    blobs = sorted(path.name for path in store.layout.blobs.iterdir())
    good = store.layout.blob(digest).read_bytes()
    store.layout.blob(digest).write_bytes(b"{}")
    assert 0 in [item.size for item in store.manifests()]
    await store.collect({digest})
    assert sorted(path.name for path in store.layout.blobs.iterdir()) == blobs
    assert store.has(digest) and not store.has(other)  # models are told by their names
    assert store.model(digest).digest == digest  # what serves does not need its blobs
    store.layout.blob(digest).write_bytes(good)
    assert await store.collect({digest}) > 0
    assert len(list(store.layout.blobs.iterdir())) == 3


async def test_an_index_that_is_gone_is_made_anew(store, tmp_path):
    digest = put(store, "a:1", MODEL)
    for name in ("index.json", "oci-layout"):
        (store.layout.path / name).unlink()
        again = Store(tmp_path / "state", ImagesConfig())
        await again.open()
        assert name in (again.repaired or "")
        assert [item.digest for item in again.manifests()] == [digest]
    again = Store(tmp_path / "state", ImagesConfig())
    await again.open()
    assert again.repaired is None


async def test_collect_is_not_stopped_by_what_somebody_has_put_there(store):
    digest = put(store, "a:1", MODEL)
    (store.models / "notes.txt").write_bytes(b"do not touch")
    (store.models / "link").symlink_to("/etc")
    assert await store.collect({digest}) > 0
    assert [path.name for path in store.models.iterdir()] == [digest.removeprefix("sha256:")]


async def test_a_damaged_model_stays_until_there_is_a_better_one(store):
    """Its blobs may be no better."""
    digest = put(store, "a:1", MODEL)
    weights = store.folder(digest) / "weights.bin"
    weights.write_bytes(b"damaged")
    layer = max(store.layout.blobs.iterdir(), key=lambda path: path.stat().st_size)
    good = layer.read_bytes()
    layer.write_bytes(good[:-100])
    for _ in range(2):
        with pytest.raises((StorageError, InvalidImage, NotFound)):
            unpack(store.layout, store.models, digest, "", LIMITS, lambda count, total: None)
        assert weights.read_bytes() == b"damaged"
        assert [path.name for path in store.models.iterdir()] == [digest.removeprefix("sha256:")]
    layer.write_bytes(good)
    unpack(store.layout, store.models, digest, "", LIMITS, lambda count, total: None)
    assert store.model(digest).hashes["weights.bin"]
    assert [path.name for path in store.models.iterdir()] == [digest.removeprefix("sha256:")]


async def test_collect_waits_for_a_pull_and_then_says_so(store, monkeypatch):
    monkeypatch.setattr("agent.images.layout.LOCK_WAIT", 0.1)
    with store.layout.lock(0), pytest.raises(Conflict, match="another process"):
        await store.collect(set())


async def test_open_clears_half_unpacked_models_and_repairs_the_index(store):
    digest = put(store, "a:1", MODEL)
    half = store.models / ("0" * 64 + ".partial")
    (half / "sub").mkdir(parents=True)
    (half / "sub/file").write_bytes(b"x")
    for bad in (b"", b"[]", b'{"manifests": [{"digest": 1}]}'):
        (store.layout.path / "index.json").write_bytes(bad)
        await store.open()
        assert [item.digest for item in store.manifests()] == [digest]
    assert not half.exists()
    assert (store.layout.path / "index.json.broken").exists()
    (store.layout.path / "oci-layout").unlink()
    await store.open()
    assert [item.digest for item in store.manifests()] == [digest]


async def test_a_title_moves_as_a_tag_does(store):
    one, two = (Descriptor("application/vnd.oci.image.manifest.v1+json", f"sha256:{d * 64}", 1) for d in "12")
    store.layout.add(one, "host/a:1")
    store.layout.add(one, "host/a:1")
    store.layout.add(two, "host/a:1")
    store.layout.add(two, "host/a:2")
    found = store.layout.entries()
    assert [(entry.digest[7], entry.annotations.get("org.opencontainers.image.ref.name")) for entry in found] == [
        ("1", None),
        ("2", "host/a:1"),
        ("2", "host/a:2"),
    ]
    assert store.layout.find(frozenset({"host/a:1"})) == found[1]
    store.layout.add(one, "host/a:1")
    assert [entry.digest[7] for entry in store.layout.entries()] == ["2", "2", "1"]


def test_a_half_done_blob_is_gone_on_with_and_lies_about_size_are_found(tmp_path):
    layout = StoreLayout(tmp_path)
    layout.create()
    data = os.urandom(3_000_000)
    blob = Descriptor("x", digest_of(data), len(data))
    with Incoming(layout, blob, 0) as incoming:
        incoming.write(data[:1_234_567])
    with Incoming(layout, blob, 0) as incoming:
        assert incoming.length == 1_234_567 and not incoming.complete
        incoming.write(data[1_234_567:])
        with pytest.raises(InvalidImage, match="larger than"):
            incoming.write(b"x")
        assert incoming.right
        incoming.commit()
    assert layout.intact(blob)
    assert list(layout.partials.iterdir()) == []
    with pytest.raises(InvalidImage, match="is said to have 5 bytes"):
        layout.intact(Descriptor("x", blob.digest, 5))
    with Incoming(layout, Descriptor("x", "sha256:" + "0" * 64, 3), 0) as incoming:
        incoming.write(b"abc")
        assert incoming.complete and not incoming.right


def test_what_a_slow_link_brings_is_made_durable_after_a_while(tmp_path, monkeypatch):
    layout = StoreLayout(tmp_path)
    layout.create()
    synced, now = [], 0.0
    monkeypatch.setattr(blobs.os, "fdatasync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(blobs, "sync_folder", lambda folder: synced.append(folder.name))
    monkeypatch.setattr(blobs.time, "monotonic", lambda: now)
    with Incoming(layout, Descriptor("x", "sha256:" + "0" * 64, 100), 0) as incoming:
        for second in range(13):
            now = float(second)
            incoming.write(b"12345")
    assert synced == [30, "partial", 55]


def test_a_layout_that_is_none(tmp_path):
    with pytest.raises(NotFound):
        Layout(tmp_path).entries()
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    with pytest.raises(InvalidImage, match=r"2\.0\.0"):
        Layout(tmp_path).entries()
    (tmp_path / "oci-layout").unlink()
    os.mkfifo(tmp_path / "oci-layout")
    with pytest.raises(StorageError, match="plain file"):
        Layout(tmp_path).entries()


MANIFEST = "application/vnd.oci.image.manifest.v1+json"
GOOD = {
    "schemaVersion": 2,
    "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": "sha256:" + "1" * 64, "size": 1},
    "layers": [
        {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + "2" * 64, "size": 1},
    ],
}


def altered(**changes):
    return json.dumps(GOOD | changes).encode()


def layer(**changes):
    return altered(layers=[GOOD["layers"][0] | changes])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (altered(mediaType="application/vnd.docker.distribution.manifest.v2+json"), "came as"),
        (altered(schemaVersion=1), "schema 1"),
        (altered(manifests=[]), "at once"),
        (altered(layers=[]), "has no layers"),
        (altered(layers=GOOD["layers"] * 300), "more than 256"),
        (altered(config={}), "config: has no mediaType"),
        (altered(artifactType="application/vnd.cncf.model.manifest.v1+json"), "ModelPack"),
        (altered(config=GOOD["config"] | {"mediaType": "application/vnd.oci.empty.v1+json"}), "artifact"),
        (layer(mediaType="application/vnd.oci.image.layer.v1.tar+gzip+encrypted"), "encrypted"),
        (layer(mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "foreign"),
        (layer(mediaType="application/x-rar"), "unknown type 'application/x-rar'"),
        (layer(digest="sha512:" + "1" * 128), "no sha256 digest"),
        (layer(digest="sha256:../../../etc/passwd"), "no sha256 digest"),
        (layer(size=-1), "no valid size"),
        (layer(size=True), "no valid size"),
        (layer(size=10**30), "no valid size"),
        (altered(layers=[GOOD["layers"][0], GOOD["layers"][0] | {"size": 2}]), "two sizes"),
    ],
)
def test_manifests_that_are_refused(data, match):
    with pytest.raises(InvalidImage, match=match):
        parse_manifest(data, MANIFEST, "here")


def test_the_platform_is_chosen_from_an_index(tmp_path):
    def entry(digit, **platform):
        found = {"mediaType": MANIFEST, "digest": f"sha256:{digit * 64}", "size": 1}
        return found | ({"platform": platform} if platform else {})

    def index(*entries):
        kind = "application/vnd.oci.image.index.v1+json"
        digest = put_manifest(tmp_path, "i", {"schemaVersion": 2, "mediaType": kind, "manifests": list(entries)})
        return parse_manifest(Layout(tmp_path).document(digest), kind, "index")

    (tmp_path / "blobs/sha256").mkdir(parents=True)
    unknown = entry("0", os="unknown", architecture="unknown")
    arm7 = entry("1", os="linux", architecture="arm", variant="v7")
    arm6 = entry("2", os="linux", architecture="arm", variant="v6")
    amd = entry("3", os="linux", architecture="amd64")
    found = index(unknown, arm7, arm6, amd)
    assert found.choose("linux/amd64", "x").digest[7] == "3"
    assert found.choose("linux/arm", "x").digest[7] == "1"
    assert found.choose("linux/arm/v6", "x").digest[7] == "2"
    with pytest.raises(InvalidImage, match=r"no image for linux/riscv64.*linux/amd64, linux/arm/v6"):
        found.choose("linux/riscv64", "x")
    assert index(entry("4")).choose("linux/amd64", "x").digest[7] == "4"
