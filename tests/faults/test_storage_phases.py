"""The disk fails in each phase of a deployment, under load: nobody sees an error, nothing is committed by halves.

What is wrong is said, and when the disk works again the host goes on by itself.

One fault for each phase in `make test`; all of them: pytest -m long tests/faults/test_storage_phases.py
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import SlotdError, StorageError
from agent.journal.boot import read_boot
from agent.slot.arbiter import Phase
from support.faulty_disk import FaultyDisk, can_mount
from support.host import Host

pytestmark = pytest.mark.skipif(not can_mount(), reason="needs root and /dev/fuse")
PHASES = list(Phase)
FAULTS = ("ENOSPC", "EROFS", "EIO")
ISSUES = {"disk", "journal", "boot-record", "store"}


class Site:
    """One host for all cases: its state folder is on the disk that fails."""

    def __init__(self, folder: Path, disk: FaultyDisk) -> None:
        self.disk = disk
        self.host = Host(folder, state_dir=str(disk.path), slot={"program_timeout": "30s", "stop_timeout": "5s"})
        self.host.prefix = disk.enter
        self.numbers = itertools.count(1)
        self.scales: dict[str, float] = {}

    def image(self) -> str:
        """One that the host has never seen."""
        number = next(self.numbers)
        scale = 1.0 + number / 8
        self.scales[self.host.pack(f"tiny:{number}", scale=scale, version=str(number))] = scale
        return f"tiny:{number}"

    def issues(self) -> set[str]:
        return {issue["id"] for issue in self.host.status()["issues"]} & ISSUES

    def well(self) -> None:
        """Until the host says that the disk is."""
        self.host.until(lambda: not self.issues())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with FaultyDisk(folder / "backing", folder / "disk") as disk:
        site = Site(folder, disk)
        site.host.start(hold_at="asked", LOOK_EVERY="0.2")
        try:
            assert site.host.deploy(site.image())["outcome"] == "committed"
            site.host.until_host("slot")
            yield site
            assert site.host.stop() == 0
        finally:
            site.host.kill()
        with sqlite3.connect(disk.backing / "journal.db") as journal:  # also what had ended while the disk was bad
            assert journal.execute("SELECT id FROM deployments WHERE outcome IS NULL").fetchall() == []
            assert journal.execute("SELECT * FROM attempts").fetchall() == []


CASES = [
    pytest.param(phase, fault, id=f"{phase.value}-{fault}", marks=[] if row % 3 == column else [pytest.mark.long])
    for row, phase in enumerate(PHASES)
    for column, fault in enumerate(FAULTS)
]


@pytest.mark.parametrize(("phase", "fault"), CASES)
def test_the_disk_fails_in_a_phase(site: Site, phase: Phase, fault: str) -> None:
    host, disk = site.host, site.disk
    image = site.image()
    before = read_boot(disk.backing)
    host.hold_in(phase.value)
    with host.load(2, pause=0.02) as load:
        task = host.call("deploy", image=image)["task"]
        host.until_phase(task, phase.value)
        disk.fail(fault)
        try:
            host.let_go()
            done = host.ended(task)
            assert done["outcome"] == ("rolled_back" if phase.touches_slot else "failed"), done
            assert done["error"]["code"] == "STORAGE", done
            assert done["error"]["hint"] and str(disk.path) in str(done["error"]), done
            with pytest.raises(StorageError) as refused:
                host.call("deploy", image=image)
            assert refused.value.hint and str(disk.path) in str(refused.value)
            host.until(site.issues)
            for issue in host.status()["issues"]:
                assert issue["hint"] and str(disk.path) in issue["message"], issue
            assert read_boot(disk.backing) == before
            assert host.until_host("slot")["committed"]["digest"] == before.committed.digest
        finally:
            disk.cure()
        site.well()
        again = host.deploy(image)
        assert again["outcome"] == "committed", again
        assert read_boot(disk.backing).generation == before.generation + 1
    assert load.errors == []
    assert load.wrong(site.scales) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_started_on_a_bad_disk(site: Site, fault: str) -> None:
    """After a crash in the middle of a deployment: the committed model serves, and when the disk works, all does."""
    host, disk = site.host, site.disk
    image = site.image()
    before = read_boot(disk.backing)
    host.hold_in("prove")
    task = host.call("deploy", image=image)["task"]
    host.until_phase(task, "prove")
    host.kill()
    host.let_go()
    disk.fail(fault)
    try:
        host.start(hold_at="asked", LOOK_EVERY="0.2")
        with host.load(2, pause=0.02) as load:
            status = host.until_host("slot")
            assert status["committed"]["digest"] == before.committed.digest
            host.until(site.issues)
            with pytest.raises(SlotdError) as refused:
                host.call("deploy", image=site.image())
            assert refused.value.code == "STORAGE" and refused.value.hint
            assert read_boot(disk.backing) == before
            disk.cure()
            site.well()
            # What was cut off is taken up now.
            host.until(lambda: read_boot(disk.backing).generation == before.generation + 1)
            host.until(lambda: host.status()["deployment"] is None)
            assert host.call("task", task=task)["error"]["code"] == "INTERRUPTED"
        assert load.errors == []
        assert load.wrong(site.scales) == []
    finally:
        disk.cure()


@pytest.mark.parametrize("operation", ["fsyncdir", "rename", "write"])
def test_a_commit_that_the_disk_does_not_confirm(site: Site, operation: str) -> None:
    """What the file says after it, the process says as well."""
    host, disk = site.host, site.disk
    image = site.image()
    before = read_boot(disk.backing)
    host.hold_in("commit")
    with host.load(2, pause=0.02) as load:
        task = host.call("deploy", image=image)["task"]
        host.until_phase(task, "commit")
        disk.fail("EIO", path=r"^\.$" if operation == "fsyncdir" else r"boot\.json", ops=(operation,))
        try:
            host.let_go()
            done = host.ended(task)
            found, said = read_boot(disk.backing), host.status()["committed"]["digest"]
            assert found.committed is not None and found.committed.digest == said
            if operation == "fsyncdir":
                assert done["outcome"] == "committed" and found.generation == before.generation + 1
                issue = host.until(lambda: next((i for i in host.status()["issues"] if i["id"] == "boot-record"), None))
                assert "power cut" in issue["message"], issue
            else:
                assert done["outcome"] == "rolled_back" and found == before
            host.until_host("slot")
        finally:
            disk.cure()
        site.well()
        assert host.deploy(site.image())["outcome"] == "committed"
    assert load.errors == []
    assert load.wrong(site.scales) == []
