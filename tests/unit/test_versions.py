"""slotd-versions: trees, the link, and the trial of a new version."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "packaging" / "versions.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slotd_versions", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


versions = _load()


class Host:
    """/opt/slotd, systemd's folders and a clock."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "opt/slotd"
        self.root.mkdir(parents=True)
        self.system = folder
        (folder / "etc/systemd/system").mkdir(parents=True)
        (folder / "usr/lib/systemd/system").mkdir(parents=True)
        self.boot = "boot-1"
        self.time = 1000.0
        self.ran: list[tuple[str, ...]] = []

    @property
    def versions(self) -> Any:
        """As a new process sees it."""
        return versions.Versions(
            self.root, system=self.system, now=lambda: (self.boot, self.time), run=lambda *c: self.ran.append(c)
        )

    def unpack(self, version: str, content: str = "", unit: str = "") -> None:
        """What dpkg does: new files by rename."""
        package = self.root / "package"
        files = {"BUILD": f"{version} {content or version}\n", "lib/code": content or version, "bin/python": "#!"}
        if unit:
            files["systemd/slotd.service"] = unit
            (self.system / "usr/lib/systemd/system/slotd.service").write_text(unit)
        for name, text in files.items():
            path = package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(path.name + ".dpkg-new")
            new.write_text(text)
            new.rename(path)

    def install(self, version: str, content: str = "", unit: str = "") -> str:
        self.unpack(version, content, unit)
        return self.versions.install()

    def run(self, result: str = "exit-code", *, ready: float | None = None) -> None:
        """A start, READY for so many seconds, and its end."""
        self.versions.starting()
        self.time += 1
        if ready is not None:
            self.versions.ready()
            self.time += ready
        self.versions.stopped(result, "1")

    @property
    def current(self) -> str:
        return os.readlink(self.root / "current")

    def trees(self) -> set[str]:
        return {path.name for path in self.root.iterdir() if path.is_dir() and not path.is_symlink()} - {"package"}

    def code(self) -> str:
        return (self.root / "current" / "lib/code").read_text()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def upgraded(host: Host) -> Host:
    host.install("1")
    host.install("2")
    return host


# --- trees -----------------------------------------------------------------------------------------------------------


def test_a_first_installation_is_not_on_trial(host: Host) -> None:
    assert host.install("1") == "1"
    assert (host.current, host.trees()) == ("1", {"1"})
    for _ in range(5):
        host.run()
    assert host.current == "1" and host.versions.trial() is None


def test_a_tree_shares_its_files_with_the_package_and_survives_the_next_one(host: Host) -> None:
    host.install("1")
    assert (host.root / "1/lib/code").samefile(host.root / "package/lib/code")
    host.unpack("2")
    assert host.code() == "1"
    host.versions.install()
    assert host.code() == "2" and (host.root / "1/lib/code").read_text() == "1"


def test_only_current_and_previous_are_kept(host: Host) -> None:
    for version in "1234":
        host.install(version)
        host.run("success", ready=700)
    assert host.trees() == {"3", "4"} and host.versions.link("previous") == "3"


def test_a_tree_that_a_process_uses_is_kept_until_that_ends(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.Versions, "_used", lambda _: {"1"})
    for version in "123":
        host.install(version)
        host.run("success", ready=700)
    assert host.trees() == {"1", "2", "3"}
    monkeypatch.undo()
    host.versions.ready()
    assert host.trees() == {"2", "3"}


def test_use_is_seen_in_the_maps_of_processes(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.install("1")
    library = host.root / "1/lib/library.so"
    library.write_bytes(b"\0" * 4096)
    code = "import mmap,sys; f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=1); print(1,flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline()
        assert host.versions._used() == {"1"}
    assert host.versions._used() == set()


def test_the_same_version_with_other_content_gets_a_tree_of_its_own(host: Host) -> None:
    host.install("1", "first")
    assert host.install("1", "second") == "1.r2"
    assert host.code() == "second" and (host.root / "1/lib/code").read_text() == "first"
    for _ in range(3):
        host.run()
    assert host.code() == "first"


def test_an_installation_again_changes_nothing(upgraded: Host) -> None:
    upgraded.run()
    assert upgraded.versions.install() == "2"
    assert upgraded.trees() == {"1", "2"} and upgraded.versions.trial()["failures"] == ["exit-code 1 before READY"]


def test_an_installation_that_was_cut_off_is_done_again(host: Host) -> None:
    """A copy that is not finished is no tree; a trial of a version that is not current is none."""
    host.install("1")
    host.unpack("2")
    partial = host.root / ".partial"
    partial.mkdir()
    (partial / "rest").write_text("")
    (host.root / "trial.json").write_text(json.dumps({"version": "2", "previous": "1", "failures": []}))
    for _ in range(4):
        host.run()
    assert host.current == "1"
    assert host.versions.install() == "2" and not partial.exists()
    assert host.versions.trial()["failures"] == []


def test_a_file_system_without_hard_links(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links")

    monkeypatch.setattr(versions.os, "link", refuse)
    host.install("1")
    assert host.code() == "1"


# --- the trial -------------------------------------------------------------------------------------------------------


def test_three_failed_starts_move_current_back(upgraded: Host) -> None:
    for _ in range(2):
        upgraded.run()
        assert upgraded.current == "2"
    upgraded.run("watchdog", ready=50)
    assert upgraded.code() == "1" and upgraded.versions.trial() is None
    record = upgraded.versions.taken_back()
    assert record["version"] == "2" and record["to"] == "1"
    assert record["failures"] == ["exit-code 1 before READY"] * 2 + ["watchdog 1 after READY"]


def test_it_never_goes_round_in_circles(upgraded: Host) -> None:
    for _ in range(20):
        upgraded.run()
    assert upgraded.current == "1" and len(upgraded.versions.taken_back()["failures"]) == 3


def test_ready_for_ten_minutes_ends_the_trial(upgraded: Host) -> None:
    upgraded.run()
    upgraded.run()
    upgraded.run("watchdog", ready=600)
    for _ in range(5):
        upgraded.run()
    assert upgraded.current == "2" and upgraded.versions.taken_back() is None


def test_stops_that_were_asked_for_are_no_failures(upgraded: Host) -> None:
    for _ in range(5):
        upgraded.run("success", ready=10)
    assert upgraded.current == "2" and upgraded.versions.trial()["failures"] == []


def test_the_end_of_the_old_version_does_not_count(upgraded: Host) -> None:
    """It ends when the new one is current already."""
    for _ in range(5):
        upgraded.versions.stopped("exit-code", "75")
    assert upgraded.versions.trial()["failures"] == []


def test_a_version_that_takes_the_host_down_before_ready_is_taken_back(upgraded: Host) -> None:
    for number in range(3):
        upgraded.versions.starting()
        upgraded.boot, upgraded.time = f"boot-{number + 2}", 5.0
    assert upgraded.current == "2"
    upgraded.versions.starting()
    assert upgraded.current == "1" and upgraded.versions.trial() is None


def test_power_cuts_after_ready_are_not_its_fault(upgraded: Host) -> None:
    for number in range(5):
        upgraded.versions.starting()
        upgraded.versions.ready()
        upgraded.boot, upgraded.time = f"boot-{number + 2}", 5.0
    upgraded.versions.starting()
    assert upgraded.current == "2" and upgraded.versions.trial()["failures"] == []


def test_what_fails_is_taken_back_to_the_last_version_that_passed(upgraded: Host) -> None:
    upgraded.run("success", ready=700)
    upgraded.install("3")
    upgraded.install("4")  # before 3 has shown anything
    for _ in range(3):
        upgraded.run()
    assert upgraded.current == "2"


def test_the_way_back_by_a_package_has_no_trial(upgraded: Host) -> None:
    upgraded.run()
    assert upgraded.install("1") == "1"
    for _ in range(5):
        upgraded.run()
    assert upgraded.current == "1" and upgraded.versions.taken_back() is None


def test_what_was_taken_back_is_tried_again_when_it_is_installed_again(upgraded: Host) -> None:
    for _ in range(3):
        upgraded.run()
    assert upgraded.install("2") == "2"
    assert upgraded.versions.taken_back() is None and upgraded.versions.trial()["previous"] == "1"


def test_nothing_to_go_back_to(upgraded: Host) -> None:
    (upgraded.root / "1/BUILD").unlink()
    for _ in range(4):
        upgraded.run()
    assert upgraded.current == "2" and upgraded.versions.trial() is None


@pytest.mark.parametrize("step", range(8))
def test_a_power_cut_while_it_is_taken_back(upgraded: Host, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each change on the disk: the next start finishes it."""
    for _ in range(2):
        upgraded.run()
    upgraded.versions.starting()
    count = 0

    class Cut(Exception):
        pass

    real = versions._sync

    def sync(path: Path) -> None:
        nonlocal count
        real(path)
        count += 1
        if count > step:
            raise Cut

    monkeypatch.setattr(versions, "_sync", sync)
    try:
        upgraded.versions.stopped("exit-code", "1")
    except Cut:
        pass
    monkeypatch.undo()
    upgraded.boot, upgraded.time = "boot-2", 5.0
    upgraded.versions.starting()
    assert upgraded.code() == "1"
    assert upgraded.versions.taken_back()["version"] == "2" and upgraded.versions.trial() is None


# --- when systemd gives up -------------------------------------------------------------------------------------------


def test_a_service_that_was_given_up_is_started_until_it_is_taken_back_and_once_after(
    upgraded: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "PAUSE", 0)
    start = ("systemctl", "--no-block", "start", "slotd.service")
    for _ in range(3):
        upgraded.ran.clear()
        upgraded.run()
        upgraded.versions.failed()
        assert start in upgraded.ran
    assert upgraded.current == "1"
    upgraded.ran.clear()
    upgraded.run()
    upgraded.versions.failed()
    assert start not in upgraded.ran


def test_starts_that_never_come_to_anything_are_bounded_too(upgraded: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start limit: nothing of ours is called between two of them."""
    monkeypatch.setattr(versions, "PAUSE", 0)
    for _ in range(10):
        upgraded.versions.failed()
    assert upgraded.current == "1"
    assert upgraded.ran.count(("systemctl", "--no-block", "start", "slotd.service")) == 4


def test_without_a_trial_a_service_that_was_given_up_stays_so(host: Host) -> None:
    host.install("1")
    host.versions.failed()
    assert host.ran == []


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_back_and_forth_by_hand(upgraded: Host) -> None:
    assert upgraded.versions.back() == "1" and upgraded.code() == "1" and upgraded.versions.trial() is None
    assert upgraded.versions.back() == "2" and upgraded.code() == "2"


def test_back_without_a_previous_version(host: Host) -> None:
    host.install("1")
    with pytest.raises(SystemExit, match="no previous"):
        host.versions.back()


def test_the_units_of_the_version_come_back_with_it_and_go_with_the_next(host: Host) -> None:
    host.install("1", unit="[Service]\nold\n")
    host.install("2", unit="[Service]\nnew\n")
    local = host.system / "etc/systemd/system/slotd.service"
    for _ in range(3):
        host.run()
    assert local.read_text().endswith("[Service]\nold\n") and ("systemctl", "daemon-reload") in host.ran
    host.install("3", unit="[Service]\nnewest\n")
    assert not local.exists()


def test_a_unit_that_somebody_wrote_stays(host: Host) -> None:
    local = host.system / "etc/systemd/system/slotd.service"
    local.write_text("mine")
    host.install("1", unit="[Service]\nold\n")
    host.install("2", unit="[Service]\nnew\n")
    for _ in range(3):
        host.run()
    host.install("3", unit="[Service]\nnewest\n")
    assert local.read_text() == "mine"


def test_unreadable_records_stop_nothing(upgraded: Host) -> None:
    (upgraded.root / "trial.json").write_text("{")
    upgraded.run()
    assert upgraded.current == "2"


def test_the_program_itself(upgraded: Host) -> None:
    """As systemd calls it: standard library only, and the three starts in processes of their own."""

    def call(verb: str, **environment: str) -> str:
        return subprocess.run(
            [sys.executable, "-I", "-S", SOURCE, "--root", upgraded.root, verb],
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    for _ in range(3):
        call("starting")
        said = call("stopped", SERVICE_RESULT="core-dump", EXIT_STATUS="SEGV")
    assert "<2>slotd 2 was taken back" in said
    assert "current   1" in call("show") and "core-dump SEGV before READY" in call("show")
