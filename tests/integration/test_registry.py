"""Pulls from a real docker-registry, and of images that other tools have made; and other tools read our store."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time

import pytest

from agent.errors import InvalidImage, NotFound, RegistryDenied, RegistryError, RegistryRefused, StorageError
from agent.images.pull import pull, resolve, unpack
from support.images import describe, file_member, make_image, make_image_of_tars, pack_tar, push_image, put_manifest
from support.pulling import fetch, images_config, open_store
from support.registry import running_registry

PASSWORD = "tr0ub4dor-and-3"
MODEL = {"models/a.onnx": b"graph", "models/weights.bin": os.urandom(2_500_000), "etc/os-release": b"x"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    with running_registry(tmp_path_factory.mktemp("locked"), PASSWORD) as running:
        yield running


def logins(path, host, password):
    auth = base64.b64encode(f"puller:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return path


def run(*argv):
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("compression", "docker"), [("gzip", True), ("gzip", False), ("zstd", False), ("none", False)])
async def test_an_image_comes_whole(tmp_path, registry, compression, docker):
    digest = make_image(tmp_path / "made", "t", MODEL, layers=3, compression=compression, docker=docker)
    push_image(tmp_path / "made", "t", registry.host, f"models/{compression}{int(docker)}", "1")
    config = images_config(insecure_registries=[registry.host])
    store = await open_store(tmp_path / "state", config)
    reference = f"{registry.host}/models/{compression}{int(docker)}:1"
    told = []
    assert await resolve(reference, config) == digest
    await pull(reference, digest, store, config, told.append)
    folder = await unpack(digest, store, config, told.append)
    model = store.model(digest)
    assert (model.digest, model.reference, model.folder) == (digest, reference, folder)
    assert (folder / "weights.bin").read_bytes() == MODEL["models/weights.bin"]
    assert told and all(0 <= item["bytes"] <= item["total"] for item in told)
    assert told[-1]["bytes"] == told[-1]["total"]
    # Pinned and stored: no registry is asked, so a name that does not resolve does no harm.
    pinned = f"registry.invalid/gone@{digest}"
    assert await resolve(pinned, config, store=store) == digest
    await pull(pinned, digest, store, config, told.append)


async def test_other_tools_read_the_store(tmp_path, registry):
    make_image(tmp_path / "made", "t", MODEL, layers=2)
    push_image(tmp_path / "made", "t", registry.host, "tools/a", "1")
    config = images_config(insecure_registries=[registry.host])
    store = await open_store(tmp_path / "state", config)
    reference = f"{registry.host}/tools/a:1"
    model = await fetch(reference, store, config)
    run("skopeo", "copy", f"oci:{store.layout.path}:{reference}", f"oci:{tmp_path}/copy:x")
    copied = json.loads((tmp_path / "copy/index.json").read_bytes())["manifests"][0]
    assert copied["digest"] == model.digest
    assert reference in run("umoci", "ls", "--layout", str(store.layout.path))


async def test_images_that_skopeo_and_umoci_made(tmp_path, registry):
    layout, bundle = tmp_path / "umoci", tmp_path / "bundle"
    run("umoci", "init", "--layout", str(layout))
    run("umoci", "new", "--image", f"{layout}:base")
    run("umoci", "unpack", "--rootless", "--image", f"{layout}:base", str(bundle))
    models = bundle / "rootfs/models"
    models.mkdir()
    (models / "old.onnx").write_bytes(b"old")
    (models / "data").mkdir()
    (models / "data/x").write_bytes(b"x" * 70_000)
    run("umoci", "repack", "--image", f"{layout}:one", str(bundle))
    second = tmp_path / "second"
    run("umoci", "unpack", "--rootless", "--image", f"{layout}:one", str(second))
    (second / "rootfs/models/old.onnx").unlink()
    (second / "rootfs/models/new.onnx").write_bytes(b"new")
    os.link(second / "rootfs/models/data/x", second / "rootfs/models/linked")
    run("umoci", "repack", "--image", f"{layout}:two", str(second))
    for kind, name in (("oci", "umoci/oci"), ("v2s2", "umoci/docker")):
        target = f"docker://{registry.host}/{name}:1"
        run("skopeo", "copy", "--format", kind, "--dest-tls-verify=false", f"oci:{layout}:two", target)
        config = images_config(insecure_registries=[registry.host])
        store = await open_store(tmp_path / kind, config)
        model = await fetch(f"{registry.host}/{name}:1", store, config)
        names = {str(path.relative_to(model.folder)) for path in model.folder.rglob("*") if path.is_file()}
        assert names == {"new.onnx", "data/x", "linked", ".hashes.json"}
        assert (model.folder / "linked").read_bytes() == b"x" * 70_000
        assert model.name == "new"


async def test_the_right_platform_of_an_index(tmp_path, registry):
    made, entries = tmp_path / "made", []
    for machine in ("arm64", "amd64"):
        tar = pack_tar([file_member(f"models/{machine}.onnx", b"x")])
        make_image_of_tars(made, machine, [tar], platform=("linux", machine))
        found = json.loads((made / "index.json").read_bytes())["manifests"][-1]
        entries.append({k: found[k] for k in ("mediaType", "digest", "size")})
        entries[-1]["platform"] = {"os": "linux", "architecture": machine}
    kind = "application/vnd.oci.image.index.v1+json"
    index = put_manifest(made, "both", {"schemaVersion": 2, "mediaType": kind, "manifests": entries})
    push_image(made, "both", registry.host, "both", "1")
    for platform, entry in (("linux/arm64", entries[0]), ("linux/amd64", entries[1])):
        config = images_config(insecure_registries=[registry.host], platform=platform)
        reference = f"{registry.host}/both:1"
        assert await resolve(reference, config) == entry["digest"]
        assert await resolve(reference, config, digest=index) == entry["digest"]
        store = await open_store(tmp_path / platform, config)
        assert (await fetch(f"{registry.host}/both@{index}", store, config)).name == platform.removeprefix("linux/")
        with pytest.raises(InvalidImage, match="is an index"):
            await pull(reference, index, store, config, lambda progress: None)
    with pytest.raises(InvalidImage, match="no image for linux/riscv64"):
        await resolve(
            f"{registry.host}/both:1", images_config(insecure_registries=[registry.host], platform="linux/riscv64")
        )


async def test_a_password_opens_and_a_wrong_one_does_not(tmp_path, locked, caplog, capfd):
    made = tmp_path / "made"
    digest = make_image(made, "t", MODEL)
    push_image(made, "t", locked.host, "secret/a", "1", auth=locked.auth)
    reference = f"{locked.host}/secret/a:1"
    good = images_config(
        insecure_registries=[locked.host], credentials=logins(tmp_path / "good.json", locked.host, PASSWORD)
    )
    store = await open_store(tmp_path / "state", good)
    assert (await fetch(reference, store, good)).digest == digest
    wrong = good.model_copy(update={"credentials": logins(tmp_path / "wrong.json", locked.host, "not-the-passw0rd")})
    none = good.model_copy(update={"credentials": None})
    for config, match in ((wrong, "not accepted"), (none, "wants credentials")):
        with pytest.raises(RegistryDenied, match=match) as caught:
            await resolve(reference, config)
        assert caught.value.code == "REGISTRY_DENIED" and "images.credentials" in (caught.value.hint or "")
        assert "passw0rd" not in json.dumps(caught.value.as_dict())
    said = caplog.text + "".join(capfd.readouterr())
    assert PASSWORD not in said and "passw0rd" not in said


async def test_tls_with_the_hosts_own_authorities(tmp_path, monkeypatch):
    made = tmp_path / "made"
    digest = make_image(made, "t", MODEL)
    with running_registry(tmp_path / "tls", tls=True) as secured:
        push_image(made, "t", secured.host, "a", "1", ca=tmp_path / "tls/ca.pem")
        config = images_config()
        store = await open_store(tmp_path / "state", config)
        with pytest.raises(RegistryRefused, match="certificate is not trusted: self-signed"):
            await resolve(f"{secured.host}/a:1", config)
        with pytest.raises(RegistryRefused, match="answered 400"):
            await resolve(f"{secured.host}/a:1", images_config(insecure_registries=[secured.host]))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "tls/ca.pem"))
        assert (await fetch(f"{secured.host}/a:1", store, config)).digest == digest


async def test_what_is_not_there(tmp_path, registry):
    config = images_config(insecure_registries=[registry.host], layouts=[])
    with pytest.raises(NotFound, match="not in the registry"):
        await resolve(f"{registry.host}/no/such:1", config)
    with pytest.raises(NotFound, match="not in the registry"):
        await resolve(f"{registry.host}/no/such@sha256:{'0' * 64}", config)
    with pytest.raises(NotFound, match="none of the layouts"):
        await resolve("no-host/name:1", config)
    started = time.monotonic()
    with pytest.raises(RegistryError, match="cannot be reached"):
        await resolve("127.0.0.1:9/a:1", images_config(insecure_registries=["127.0.0.1:9"]))
    assert time.monotonic() - started < 20
    with pytest.raises(RegistryError, match="does not speak TLS") as caught:
        await resolve(f"{registry.host}/no/such:1", images_config())
    assert "insecure_registries" in (caught.value.hint or "")


async def test_a_blob_that_is_damaged_in_the_registry(tmp_path, registry):
    make_image(tmp_path / "made", "t", {"models/a.onnx": os.urandom(400_000)}, compression="none")
    push_image(tmp_path / "made", "t", registry.host, "damaged", "1")
    config = images_config(insecure_registries=[registry.host])
    store = await open_store(tmp_path / "state", config)
    digest = await resolve(f"{registry.host}/damaged:1", config)
    layer = json.loads((tmp_path / "made/blobs/sha256" / digest[7:]).read_bytes())["layers"][0]["digest"]
    blob = registry.blob(layer)
    good = blob.read_bytes()
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(InvalidImage, match="other bytes"):
        await pull(f"{registry.host}/damaged:1", digest, store, config, lambda progress: None)
    assert not store.layout.has(layer) and store.manifests() == []
    blob.write_bytes(good)
    assert (await fetch(f"{registry.host}/damaged:1", store, config)).digest == digest


async def test_a_layout_folder_is_looked_into_before_any_registry(tmp_path):
    made = tmp_path / "made"
    digest = make_image(made, "registry.invalid/demo/a:1", MODEL, compression="zstd")
    other = make_image(made, "b", {"models/b.onnx": b"b"})
    config = images_config(layouts=[tmp_path / "made"])
    store = await open_store(tmp_path / "state", config)
    for reference, wanted in (
        ("registry.invalid/demo/a:1", digest),
        (f"registry.invalid/demo/a@{digest}", digest),
        (f"oci:{made}:registry.invalid/demo/a:1", digest),
        (f"oci:{made}:b", other),
        (f"oci:{made}@{other}", other),
    ):
        assert (await fetch(reference, store, config)).digest == wanted
    with pytest.raises(NotFound, match="none of the layouts"):
        await resolve(f"oci:{made}:c", config)
    with pytest.raises(NotFound, match="not there"):
        await resolve(f"oci:{tmp_path}/nowhere:c", config)


async def test_a_blob_that_is_damaged_in_a_layout_folder(tmp_path):
    made = tmp_path / "made"
    digest = make_image(made, "t", MODEL)
    config = images_config()
    store = await open_store(tmp_path / "state", config)
    blob = max((made / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    good = blob.read_bytes()
    for bad, match in (
        (good[:-1] + bytes([good[-1] ^ 1]), "content is not"),
        (good[:-5], "instead of"),
        (good + b"x", "larger"),
    ):
        blob.write_bytes(bad)
        with pytest.raises(InvalidImage, match=match):
            await pull(f"oci:{made}:t", digest, store, config, lambda progress: None)
        assert store.manifests() == []
    blob.write_bytes(good)
    assert (await fetch(f"oci:{made}:t", store, config)).digest == digest
    # Damage in our own store heals by deploying again.
    ours = store.layout.blob(f"sha256:{blob.name}")
    ours.write_bytes(bytes(len(good)))
    assert (await fetch(f"oci:{made}:t", store, config)).digest == digest
    assert ours.read_bytes() == good


async def test_bounds_are_checked_before_anything_is_fetched(tmp_path, registry):
    make_image(tmp_path / "made", "t", MODEL)
    push_image(tmp_path / "made", "t", registry.host, "bounds", "1")
    reference = f"{registry.host}/bounds:1"
    roomy = images_config(insecure_registries=[registry.host])
    store = await open_store(tmp_path / "state", roomy)
    digest = await resolve(reference, roomy)
    with pytest.raises(InvalidImage, match="more than the 1000 that are allowed"):
        await pull(reference, digest, store, roomy.model_copy(update={"max_image": 1000}), lambda progress: None)
    with pytest.raises(StorageError, match="must stay free"):
        await pull(reference, digest, store, roomy.model_copy(update={"keep_free": 1 << 49}), lambda progress: None)
    assert list(store.layout.blobs.iterdir()) == []
    config = describe(tmp_path / "made", "application/vnd.oci.image.config.v1+json", b'{"rootfs": {"diff_ids": []}}')
    bad = json.loads((tmp_path / "made/blobs/sha256" / digest[7:]).read_bytes()) | {"config": config}
    wrong = put_manifest(tmp_path / "made", "wrong", bad)
    push_image(tmp_path / "made", "wrong", registry.host, "bounds", "2")
    with pytest.raises(InvalidImage, match="one diff_id for each of 1 layers"):
        await pull(f"{registry.host}/bounds:2", wrong, store, roomy, lambda progress: None)
    assert not any(store.layout.has(layer["digest"]) for layer in bad["layers"])
