"""What a bad disk does to files while slotd is not running, and a host that is started on them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np

from agent.journal.boot import read_boot
from support.host import Host

KINDS = ("emptied", "halved", "flipped", "gone")
X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)
PAST = ("tiny:1", "tiny:2", "tiny:3")
"""What was committed, in order."""


def damage(path: Path, kind: str, chance: random.Random) -> None:
    """`flipped`: a few bits, anywhere in it."""
    content = bytearray(path.read_bytes())
    match kind:
        case "gone":
            path.unlink()
            return
        case "emptied":
            content.clear()
        case "halved":
            del content[len(content) // 2 :]
        case "flipped":
            for _ in range(4):
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def prepare(folder: Path, *, killed: bool) -> Host:
    """A host's past: three models committed one after the other, and its end, in order or not."""
    host = Host(folder, slot={"program_timeout": "30s"})
    with host:
        for number, tag in enumerate(PAST, 1):
            host.pack(tag, scale=1.0 + number, version=str(number))
            assert host.deploy(tag)["outcome"] == "committed"
        if not killed:
            assert host.stop() == 0
    return host


def copy(host: Host, folder: Path) -> Host:
    """Another host with the same past."""
    for name in ("state", "layout", "card"):
        shutil.copytree(host.folder / name, folder / name, symlinks=True)
    return Host(folder, slot={"program_timeout": "30s"})


def targets(host: Host) -> dict[str, list[Path]]:
    """The files that matter, by what they are."""
    state = host.folder / "state"
    boot = read_boot(state)
    assert boot.committed is not None and boot.previous is not None
    committed, previous = (
        state / "models" / ref.digest.removeprefix("sha256:") for ref in (boot.committed, boot.previous)
    )
    return {
        "boot.json": [state / "boot.json"],
        "boot.json.bak": [state / "boot.json.bak"],
        "journal.db": [state / "journal.db"],
        "journal.db-wal": [state / "journal.db-wal"] if (state / "journal.db-wal").exists() else [],
        "reserve": [state / "reserve"],
        "slotd.lock": [state / "slotd.lock"] if (state / "slotd.lock").stat().st_size else [],
        "committed": sorted(path for path in committed.rglob("*") if path.is_file()),
        "previous": sorted(path for path in previous.rglob("*") if path.is_file()),
        "blobs": sorted((state / "store/blobs/sha256").iterdir()),
        "index": [state / "store/index.json", state / "store/oci-layout"],
    }


def check_serving(host: Host, *, timeout: float = 60) -> None:
    """The last model of the past answers from the slot, rightly, and can be replaced."""
    status = host.until_host("slot", timeout=timeout)
    assert status["committed"]["version"] == "3", status["committed"]
    np.testing.assert_allclose(host.predict(X)[0], X * 4 + 1, rtol=1e-6)
    assert "committed-model" not in {issue["id"] for issue in status["issues"]}


def check_going_on(host: Host) -> None:
    """Deployments work, and what is on the disk is right again."""
    done = host.deploy("tiny:1", force=True)
    assert done["outcome"] == "committed", done
    np.testing.assert_allclose(host.predict(X)[0], X * 2 + 1, rtol=1e-6)
    found = read_boot(host.folder / "state")
    assert found.repaired is None and found.committed is not None and found.committed.version == "1", found
