"""Files that a bad disk has cut, emptied, changed or lost while slotd was down: it serves, says so, and mends them.

More, at random: `python tests/faults/storage_damage.py --runs 200 --seed 1`.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from agent.journal.boot import read_boot
from agent.slot.arbiter import Phase
from support.damage import KINDS, X, check_going_on, check_serving, copy, damage, prepare, targets
from support.host import Host


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return prepare(tmp_path_factory.mktemp("past"), killed=False)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return prepare(tmp_path_factory.mktemp("killed"), killed=True)


def issues(host: Host) -> dict[str, dict[str, str]]:
    return {issue["id"]: issue for issue in host.status()["issues"]}


def started(host: Host) -> Host:
    return host.start(LOOK_EVERY="0.2")


def spread(*names: str) -> list[object]:
    """Each of these, damaged in one way in `make test`, in all ways on demand."""
    return [
        pytest.param(name, kind, id=f"{name}-{kind}", marks=[] if row % 4 == column else [pytest.mark.long])
        for row, name in enumerate(names)
        for column, kind in enumerate(KINDS)
    ]


@pytest.mark.parametrize(("name", "kind"), spread("boot.json", "boot.json.bak", "both"))
def test_boot_record(past: Host, tmp_path: Path, name: str, kind: str) -> None:
    host = copy(past, tmp_path)
    before = read_boot(tmp_path / "state")
    for file in ("boot.json", "boot.json.bak") if name == "both" else (name,):
        damage(tmp_path / "state" / file, kind, random.Random(kind))
    try:
        started(host)
        issue = issues(host)["boot-record"]
        assert issue["severity"] == ("critical" if name == "both" else "warning")
        assert issue["hint"] and "boot.json" in issue["message"]
        assert read_boot(tmp_path / "state") == before  # mended
        check_serving(host)
        assert host.status()["previous"]["version"] == "2"
        check_going_on(host)
        assert host.stop() == 0
        started(host)
        assert "boot-record" not in issues(host)
    finally:
        host.kill()


@pytest.mark.parametrize(("name", "kind"), spread("journal.db", "journal.db-wal", "reserve", "slotd.lock"))
def test_journal(killed: Host, tmp_path: Path, name: str, kind: str) -> None:
    host = copy(killed, tmp_path)
    for path in targets(host)[name]:
        damage(path, kind, random.Random(kind))
    try:
        started(host)
        if name == "journal.db" and kind in ("emptied", "gone"):
            issue = issues(host)["journal-lost"]
            assert issue["hint"] and "journal.db" in issue["message"]
        check_serving(host)
        check_going_on(host)
        assert "journal" not in issues(host)
        assert (tmp_path / "state" / "reserve").stat().st_size == 4 << 20
    finally:
        host.kill()


@pytest.mark.parametrize(
    "kind", ["flipped", *(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS if kind != "flipped")]
)
def test_files_of_the_committed_model(past: Host, tmp_path: Path, kind: str) -> None:
    """Damaged bytes are never loaded: the host is dark until they are whole again, from the store's blobs."""
    host = copy(past, tmp_path)
    shutil.rmtree(host.layout)  # no registry
    files = targets(host)["committed"]
    assert {"model.yaml", "slot.onnx", "tiny.bit", ".hashes.json"} <= {path.name for path in files}
    for path in files:
        damage(path, kind, random.Random(f"{kind} {path.name}"))
    try:
        started(host)
        check_serving(host)
        text = host.log.read_text()
        assert "committed_model_unusable" in text and "model_mended" in text
    finally:
        host.kill()


@pytest.mark.parametrize(
    "name",
    ["slot.onnx", *(pytest.param(name, marks=pytest.mark.long) for name in (".hashes.json", "tiny.bit", "model.yaml"))],
)
def test_one_file_and_the_blobs_as_well(past: Host, tmp_path: Path, name: str) -> None:
    """Dark, with the file named, while neither the store nor a registry has it; by itself when one has it again."""
    host = copy(past, tmp_path)
    chance = random.Random(name)
    found = targets(host)
    path = next(path for path in found["committed"] if path.name == name)
    damage(path, chance.choice(KINDS), chance)
    for blob in found["blobs"]:
        damage(blob, chance.choice(KINDS), chance)
    host.layout.rename(tmp_path / "away")
    try:
        started(host)
        assert host.status()["host"] == "dark"
        host.until(lambda: "made whole" in issues(host)["committed-model"]["message"])
        issue = issues(host)["committed-model"]
        assert issue["severity"] == "critical" and issue["hint"] and str(path.parent) in issue["message"], issue
        assert host.status()["reason"]["code"] in ("STORAGE", "SLOT_FAILED")
        (tmp_path / "away").rename(host.layout)
        check_serving(host)
        check_going_on(host)
    finally:
        host.kill()


@pytest.mark.parametrize(("name", "kind"), spread("previous", "blobs", "index"))
def test_what_is_not_needed_at_once(past: Host, tmp_path: Path, name: str, kind: str) -> None:
    host = copy(past, tmp_path)
    for path in targets(host)[name]:
        damage(path, kind, random.Random(f"{kind} {path.name}"))
    try:
        started(host)
        check_serving(host)
        if name == "previous":
            host.until(lambda: "damaged_model_mended" in host.log.read_text())
        if name == "index":
            issue = issues(host)["store"]
            assert issue["hint"] and ("index.json" in issue["message"] or "oci-layout" in issue["message"])
        assert host.ended(host.call("rollback")["task"])["outcome"] == "committed"
        assert host.status()["committed"]["version"] == "2"
        check_going_on(host)
    finally:
        host.kill()


@pytest.mark.parametrize("phase", [Phase.PULL, Phase.PROGRAM, Phase.PROBATION], ids=lambda phase: phase.value)
def test_cancelled_and_killed_before_it_had_ended(past: Host, tmp_path: Path, phase: Phase) -> None:
    """What was acknowledged as cancelled is not taken up by the next start."""
    host = copy(past, tmp_path)
    host.pack("tiny:4", scale=5.0, version="4")
    try:
        host.start(hold_at=phase.value)
        host.until_host("slot")
        task = host.call("deploy", image="tiny:4")["task"]
        host.until_phase(task, phase.value)
        host.call("cancel", task=task)
        host.kill()
        host.let_go()
        started(host)
        done = host.ended(task)
        assert done["outcome"] == "cancelled" and done["error"]["code"] == "CANCELLED", done
        check_serving(host)
        assert host.status()["deployment"] is None
        assert host.status()["last"]["id"] == task
        assert len(host.predict(X)) == 2
    finally:
        host.kill()
