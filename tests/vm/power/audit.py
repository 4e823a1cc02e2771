"""What a power cut left on the disk, looked at from outside: the file system, the store, the models, what is committed.

The image is copied, its journal replayed by e2fsck, and read with debugfs: nothing of the guest and no mount is needed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from agent.errors import SlotdError
from agent.images.hashes import verify_hashes
from agent.journal.boot import read_boot
from vm.power.image import copy_sparse, environment, run


@dataclass
class Found:
    """`kept`: bytes of the image `wanted` that need not be fetched again; `faults`: what may never be."""

    committed: str | None = None
    previous: str | None = None
    kept: int = 0
    complete: set[str] = field(default_factory=set)
    """Blobs of the store, sha256 in hex."""
    faults: list[str] = field(default_factory=list)


def audit(image: Path, layout: Path, wanted: list[str], folder: Path) -> Found:
    """`layout` has the right blobs, `wanted` names those of the image in hand."""
    found = Found()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy = copy_sparse(image, folder / "copy.img")
    if not _check_file_system(copy, found):
        return found
    state = folder / "state"
    state.mkdir()
    run("debugfs", "-R", f"rdump / {state}", str(copy))
    copy.unlink()
    for check in (_check_boot, _check_store, _check_models, _check_journal):
        try:
            check(state, found)
        except (SlotdError, OSError, ValueError, KeyError, sqlite3.Error) as error:
            found.faults.append(f"{check.__name__.removeprefix('_check_')}: {type(error).__name__}: {error}")
    for name in wanted:
        whole = (layout / "blobs" / "sha256" / name).read_bytes()
        if name in found.complete:
            found.kept += len(whole)
            continue
        partial = state / "store" / "partial" / f"{name}.partial"
        if partial.exists():
            data = partial.read_bytes()
            if whole.startswith(data):
                found.kept += len(data)
    return found


def _check_file_system(copy: Path, found: Found) -> bool:
    # Preening replays the journal and frees orphans, as a mount does; nothing may be left to repair after that.
    for options, good in ((("-p",), (0, 1)), (("-f", "-n"), (0,))):
        done = subprocess.run(["e2fsck", *options, str(copy)], capture_output=True, text=True, env=environment())
        if done.returncode not in good:
            found.faults.append(f"e2fsck {options[0]}: {done.returncode}: {done.stdout[-500:]}")
            return False
    return True


def _check_boot(state: Path, found: Found) -> None:
    record = read_boot(state)
    found.committed = record.committed.digest if record.committed else None
    found.previous = record.previous.digest if record.previous else None
    if record.repaired:
        found.faults.append(f"boot.json: {record.repaired}")


def _check_store(state: Path, found: Found) -> None:
    store = state / "store"
    blobs = store / "blobs" / "sha256"
    for path in blobs.iterdir():
        if _sha256(path) == path.name:
            found.complete.add(path.name)
        else:
            found.faults.append(f"the blob {path.name} is not what its name says ({path.stat().st_size} bytes)")
    for entry in json.loads((store / "index.json").read_bytes())["manifests"]:
        name = entry["digest"].removeprefix("sha256:")
        if name not in found.complete:
            found.faults.append(f"index.json lists {name}, which is not there")
            continue
        manifest = json.loads((blobs / name).read_bytes())
        for blob in (manifest["config"], *manifest["layers"]):
            if blob["digest"].removeprefix("sha256:") not in found.complete:
                found.faults.append(f"index.json lists {name}, of which {blob['digest']} is not there")


def _check_models(state: Path, found: Found) -> None:
    models = state / "models"
    for folder in models.iterdir():
        if folder.name.endswith(".partial"):
            continue
        listed = verify_hashes(folder)
        if listed.digest != f"sha256:{folder.name}":
            found.faults.append(f"models/{folder.name} is {listed.digest}")
    for what, digest in (("committed", found.committed), ("previous", found.previous)):
        if digest is not None and not (models / digest.removeprefix("sha256:")).is_dir():
            found.faults.append(f"the {what} model {digest} is not there")


def _check_journal(state: Path, found: Found) -> None:
    with closing(sqlite3.connect(state / "journal.db")) as database:
        (answer,) = database.execute("PRAGMA integrity_check").fetchone()
    if answer != "ok":
        found.faults.append(f"journal.db: {answer}")
    for path in state.glob("journal.db.broken-*"):
        found.faults.append(f"{path.name}: a journal was put aside")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
