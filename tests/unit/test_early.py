"""What is hashed before anything else is there: believed only if every byte of it was found whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.images import early
from agent.images.hashes import NAME, HashList
from agent.journal.boot import BootRecord, ModelRef, write_boot

DIGEST = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / DIGEST.removeprefix("sha256:")
    folder.mkdir(parents=True)
    content = b"graph" * 1000
    (folder / "model.onnx").write_bytes(content)
    files = {"model.onnx": (hashlib.blake2b(content, digest_size=32).hexdigest(), len(content))}
    (folder / NAME).write_bytes(HashList(DIGEST, "r:1", files).dump())
    write_boot(tmp_path, BootRecord(1, ModelRef(DIGEST, "r:1", "m", "1"), None))
    return tmp_path


def model(state: Path) -> Path:
    return state / "models" / DIGEST.removeprefix("sha256:")


def test_a_whole_model_is_told_of_once(state: Path) -> None:
    early.begin(state)
    assert early.verified(DIGEST)
    assert not early.verified(DIGEST)


def test_nothing_was_begun() -> None:
    assert not early.verified(DIGEST)


def test_another_model_is_not_meant(state: Path) -> None:
    early.begin(state)
    assert not early.verified(OTHER)


@pytest.mark.parametrize(
    "harm",
    [
        lambda state: (model(state) / "model.onnx").write_bytes(b"graph" * 999 + b"grapf"),
        lambda state: (model(state) / "model.onnx").unlink(),
        lambda state: (model(state) / "more").write_bytes(b""),
        lambda state: (model(state) / NAME).write_bytes(b"{}"),
        lambda state: (model(state) / NAME).write_bytes(HashList(OTHER, "r:1", {}).dump()),
        lambda state: model(state).rename(state / "models" / "elsewhere"),
        lambda state: [(state / name).write_bytes(b"?") for name in ("boot.json", "boot.json.bak")],
        lambda state: [(state / name).unlink() for name in ("boot.json", "boot.json.bak")],
        lambda state: write_boot(state, BootRecord(2, None, None)),
    ],
)
def test_what_is_not_whole_is_found_by_whoever_asks(state: Path, harm: Callable[[Path], object]) -> None:
    harm(state)
    early.begin(state)
    assert not early.verified(DIGEST)
