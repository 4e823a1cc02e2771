"""The puller killed, cancelled, orphaned: nothing half-done shows, and what had arrived is not fetched again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import uvloop

from agent.errors import PullerDied
from agent.images.pull import pull, resolve
from support.fake_registry import fake_registry
from support.images import make_image
from support.pulling import fetch, images_config, open_store

BIG = 6 << 20


def pullers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "agent.images.puller" in child.cmdline()]


@pytest.fixture
def image(tmp_path):
    """(layout folder, manifest digest, digest of the one large layer)."""
    made = tmp_path / "made"
    digest = make_image(made, "1", {"models/a.onnx": os.urandom(BIG)}, compression="none")
    manifest = json.loads((made / "blobs/sha256" / digest[7:]).read_bytes())
    return made, digest, manifest["layers"][0]


async def until(condition, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{what}: not within 12 s")


async def killed_halfway(reference, digest, store, config, partial: Path, end) -> BaseException:
    """Start a pull, `end` it when a third of the layer has arrived; how the pull ended."""
    task = asyncio.create_task(pull(reference, digest, store, config, lambda progress: None))
    await until(lambda: partial.exists() and partial.stat().st_size > BIG // 3, "a third of the blob")
    end(task)
    result = (await asyncio.gather(task, return_exceptions=True))[0]
    assert isinstance(result, BaseException)
    return result


async def kill_and_resume(tmp_path, image, end, expected) -> None:
    made, digest, layer = image
    with fake_registry(made) as registry:
        config = images_config(insecure_registries=[registry.host])
        store = await open_store(tmp_path / "state", config)
        reference = f"{registry.host}/a:1"
        partial = store.layout.partials / f"{layer['digest'][7:]}.partial"
        registry.rate = 4 << 20
        result = await killed_halfway(reference, digest, store, config, partial, end)
        assert isinstance(result, expected)
        assert pullers() == []
        assert store.manifests() == [] and not store.layout.has(layer["digest"])
        had = partial.stat().st_size
        assert BIG // 3 < had < layer["size"]
        registry.rate = 0
        store = await open_store(tmp_path / "state", config)  # as the next start of the agent does
        assert (await fetch(reference, store, config)).digest == digest
        second = registry.blobs(layer["digest"])[-1]
        assert (second.status, second.headers["range"]) == (206, f"bytes={had}-")
        assert second.sent == layer["size"] - had
        assert list(store.layout.partials.iterdir()) == []
        # All there: nothing is asked for a second time.
        count = len(registry.asked)
        await pull(reference, digest, store, config, lambda progress: None)
        assert len(registry.asked) == count


def kill(task) -> None:
    for child in pullers():
        child.send_signal(signal.SIGKILL)


async def test_killed_in_the_middle_of_a_blob_only_the_rest_is_fetched(tmp_path, image):
    await kill_and_resume(tmp_path, image, kill, PullerDied)


async def test_cancelled_in_the_middle_of_a_blob(tmp_path, image):
    await kill_and_resume(tmp_path, image, lambda task: task.cancel(), asyncio.CancelledError)


def test_the_same_under_uvloop(tmp_path, image):
    uvloop.run(kill_and_resume(tmp_path, image, lambda task: task.cancel(), asyncio.CancelledError))


async def test_a_half_that_was_damaged_is_fetched_again_from_the_start(tmp_path, image):
    made, digest, layer = image
    with fake_registry(made) as registry:
        config = images_config(insecure_registries=[registry.host])
        store = await open_store(tmp_path / "state", config)
        partial = store.layout.partials / f"{layer['digest'][7:]}.partial"
        for damage in (bytes(1 << 20), bytes(layer["size"]), bytes(layer["size"] + 7)):
            partial.write_bytes(damage)  # what a power cut can leave
            assert (await fetch(f"{registry.host}/a:1", store, config)).digest == digest
            assert registry.blobs(layer["digest"])[-1].sent == layer["size"]
            await store.collect(set())


async def test_a_registry_without_ranges_starts_over(tmp_path, image):
    made, digest, layer = image
    with fake_registry(made) as registry:
        registry.ranges = False
        config = images_config(insecure_registries=[registry.host])
        store = await open_store(tmp_path / "state", config)
        good = (made / "blobs/sha256" / layer["digest"][7:]).read_bytes()
        (store.layout.partials / f"{layer['digest'][7:]}.partial").write_bytes(good[:1000])
        assert (await fetch(f"{registry.host}/a:1", store, config)).digest == digest
        assert [(asked.status, asked.sent) for asked in registry.blobs(layer["digest"])] == [(200, layer["size"])]


async def test_a_line_that_is_cut_again_and_again_is_gone_on_with(tmp_path, image):
    made, digest, layer = image
    with fake_registry(made) as registry:
        registry.cut_after = 2 << 20
        config = images_config(insecure_registries=[registry.host], retries=1)
        store = await open_store(tmp_path / "state", config)
        assert (await fetch(f"{registry.host}/a:1", store, config)).digest == digest
        tries = registry.blobs(layer["digest"])
        assert len(tries) == 4
        assert sum(asked.sent for asked in tries) == layer["size"]


async def test_the_puller_ends_when_its_parent_does(tmp_path, image):
    made, _, layer = image
    with fake_registry(made) as registry:
        registry.rate = 1 << 20
        config = images_config(insecure_registries=[registry.host])
        store = await open_store(tmp_path / "state", config)
        digest = await resolve(f"{registry.host}/a:1", config)
        program = (
            "import asyncio, sys; from pathlib import Path; from agent.config import ImagesConfig;"
            "from agent.images.layout import Store; from agent.images.pull import pull;"
            "c = ImagesConfig.model_validate_json(sys.argv[4]);"
            "asyncio.run(pull(sys.argv[1], sys.argv[2], Store(Path(sys.argv[3]), c), c, lambda p: None))"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program, f"{registry.host}/a:1", digest, store.state_dir, config.model_dump_json()]
        )
        partial = store.layout.partials / f"{layer['digest'][7:]}.partial"
        try:
            await until(lambda: partial.exists() and partial.stat().st_size > 0, "the first bytes")
            orphans = pullers()
            assert len(orphans) == 1
        finally:
            parent.kill()
            parent.wait()
        await asyncio.to_thread(psutil.wait_procs, orphans, 10)
        assert not orphans[0].is_running() or orphans[0].status() == psutil.STATUS_ZOMBIE
        with store.layout.lock(0):
            pass


async def test_killed_while_it_unpacks_nothing_shows(tmp_path):
    made = tmp_path / "made"
    files = {f"models/part{number}.bin": os.urandom(200_000) for number in range(150)} | {"models/a.onnx": b"graph"}
    digest = make_image(made, "1", files, compression="none")
    config = images_config()
    store = await open_store(tmp_path / "state", config)
    partial = store.models / f"{digest[7:]}.partial"
    await pull(f"oci:{made}:1", digest, store, config, lambda progress: None)
    for count in (1, 40, 120):
        task = asyncio.create_task(fetch(f"oci:{made}:1", store, config))
        await until(lambda: task.done() or (partial.exists() and len(os.listdir(partial)) >= count), "some files")
        kill(task)
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        if isinstance(result, PullerDied):
            assert not store.has(digest)
        await store.open()
        assert not partial.exists()
    model = await fetch(f"oci:{made}:1", store, config)
    assert (model.folder / "part7.bin").read_bytes() == files["models/part7.bin"]


async def test_what_the_puller_may_do_and_who_knows_the_password(tmp_path, image):
    made, digest, _ = image
    secret = "c0rrect-horse"
    logins = tmp_path / "logins.json"
    with fake_registry(made) as registry:
        logins.write_text(json.dumps({"auths": {registry.host: {"username": "u", "password": secret}}}))
        registry.rate = 4 << 20
        config = images_config(insecure_registries=[registry.host], credentials=logins)
        store = await open_store(tmp_path / "state", config)
        task = asyncio.create_task(pull(f"{registry.host}/a:1", digest, store, config, lambda progress: None))
        await until(lambda: bool(list(store.layout.partials.iterdir())), "the first bytes")
        (child,) = pullers()
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert status["NoNewPrivs"] == "1"
        assert child.nice() == 10
        assert child.ionice() == (psutil.IOPRIO_CLASS_BE, 7)
        assert child.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert child.rlimit(psutil.RLIMIT_DATA)[0] == 512 << 20
        assert child.rlimit(psutil.RLIMIT_FSIZE)[0] == config.max_image
        assert secret not in " ".join(child.cmdline()) + json.dumps(child.environ())
        loaded = Path(f"/proc/{child.pid}/maps").read_text()
        assert "grpc" not in loaded and "numpy" not in loaded and "onnxruntime" not in loaded
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
