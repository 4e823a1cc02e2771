#!/usr/bin/python3 -I
"""Which slotd runs: the trees under /opt/slotd, the link `current`, and the trial of a new version.

    /opt/slotd/package       what dpkg unpacked; nothing runs from it
    /opt/slotd/<version>     a tree that can run: hard links to the files of that package, which stay when dpkg replaces
                             them; the current one and the one before are kept, others go
    /opt/slotd/current       the tree that starts; moved by an atomic rename
    /opt/slotd/trial.json    while a new version is on trial
    /opt/slotd/taken-back.json   what a new version was taken back for, until the next installation

A new version is on trial until it has been READY for ten minutes in one go. Three failed starts before that, whatever
they failed of, move `current` back to the version that was there before. A version that was taken back is not tried
again by itself, and the older one is never on trial then: this cannot go round in circles.

Standard library only, and no module of slotd: it must work when the new version does not even import. systemd calls
`starting`, `ready` and `stopped` around each start (slotd.service.d/upgrade-guard.conf), `failed` when it has given up.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path("/opt/slotd")
PACKAGE, CURRENT, PREVIOUS = "package", "current", "previous"
TRIAL, TAKEN_BACK = "trial.json", "taken-back.json"
BUILD = "BUILD"
"""In each tree: its version and the hash of its files. Written last, so a tree without one is not whole."""
LIMIT = 3
"""Failed starts that end a trial."""
HEALTHY = 600.0
"""Seconds of READY in one go that end a trial well."""
PAUSE = 2.0
"""Seconds before a service that systemd has given up is started once more."""
MARK = "# By slotd-versions: the unit of the version that was gone back to. The next installation removes it.\n"
UNITS = ("slotd.service", "slotd-slot-helper.service", "slotd-slot-helper.socket")


def _run(*command: str) -> None:
    """A command whose failure is told and changes nothing: what counts is on the disk already."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        say(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}", level=4)


def say(text: str, *, level: int = 6) -> None:
    """One line for the journal, with its priority, or for a terminal."""
    print(text if sys.stdout.isatty() else f"<{level}>{text}", flush=True)


def _boottime() -> tuple[str, float]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, time.clock_gettime(time.CLOCK_BOOTTIME)


class Versions:
    """The trees under `root` and what is known of them. Changes survive a power cut at any instant."""

    def __init__(
        self,
        root: Path = ROOT,
        *,
        system: Path = Path("/"),
        healthy: float = HEALTHY,
        now: Callable[[], tuple[str, float]] = _boottime,
        run: Callable[..., None] = _run,
    ) -> None:
        self.root = root
        self._packaged_units = system / "usr/lib/systemd/system"
        self._local_units = system / "etc/systemd/system"
        self._healthy = healthy
        self._now = now
        self._run = run

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One at a time: dpkg, systemd and people may all call at once."""
        fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    # --- what is there ------------------------------------------------------------------------------------------------

    def link(self, name: str) -> str | None:
        """The whole tree that a link names; None if it names none."""
        try:
            target = os.readlink(self.root / name)
        except OSError:
            return None
        return target if self.whole(target) else None

    def whole(self, name: str) -> bool:
        """Whether a tree of this name can be started."""
        return "/" not in name and all((self.root / name / part).is_file() for part in (BUILD, "bin/python"))

    def trial(self) -> dict[str, Any] | None:
        """The trial of the current version; one of another version is over."""
        trial = self._read(TRIAL)
        return trial if trial and trial.get("version") == self.link(CURRENT) else None

    def taken_back(self) -> dict[str, Any] | None:
        """What was taken back, if the version that it was taken back to is the current one."""
        record = self._read(TAKEN_BACK)
        return record if record and record.get("to") == self.link(CURRENT) else None

    # --- dpkg ---------------------------------------------------------------------------------------------------------

    def install(self) -> str:
        """Makes what dpkg unpacked the current version; its name. On trial if there is one to go back to."""
        build = (self.root / PACKAGE / BUILD).read_text()
        name = self._tree_for(build)
        was, trial = self.link(CURRENT), self.trial()
        if was is None:
            self._forget(TRIAL)
        elif trial and trial["previous"] == name:  # back to what is known to work
            self._forget(TRIAL)
            self._point(PREVIOUS, was)
        elif was != name:
            # A version that was still on trial has not shown that it is one to go back to.
            good = trial["previous"] if trial and self.whole(trial["previous"]) else was
            self._write(TRIAL, {"version": name, "previous": good, "failures": [], "run": None, "again": 0})
            self._point(PREVIOUS, good)
        self._point(CURRENT, name)
        self._forget(TAKEN_BACK)
        self._remove_units()
        self.prune()
        return name

    def _tree_for(self, build: str) -> str:
        """The tree with this content, made if there is none. One that exists is never changed: it may be running."""
        version = build.split()[0]
        number = 1
        while True:
            name = version if number == 1 else f"{version}.r{number}"
            tree = self.root / name
            if not tree.exists():
                break
            if self.whole(name) and (tree / BUILD).read_text() == build:
                return name
            number += 1
        partial = self.root / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.root / PACKAGE, partial, symlinks=True, copy_function=_link)
        for folder, _, _ in os.walk(partial):
            _sync(Path(folder))
        partial.rename(tree)
        _sync(self.root)
        return name

    def prune(self) -> None:
        """Removes the trees that are neither current nor previous, nor used by a process that still runs."""
        keep = {PACKAGE, self.link(CURRENT), self.link(PREVIOUS)}
        spare = [
            tree
            for tree in self.root.iterdir()
            if tree.name not in keep and tree.is_dir() and not tree.is_symlink() and (tree / BUILD).exists()
        ]
        used = self._used() if spare else set()
        for tree in spare:
            if tree.name not in used:
                (tree / BUILD).unlink()  # from here on it is no tree, however far we come
                shutil.rmtree(tree)
        for tree in self.root.iterdir():  # what an interrupted removal left
            if tree.name not in keep and tree.is_dir() and not tree.is_symlink() and not (tree / BUILD).exists():
                shutil.rmtree(tree)

    def _used(self) -> set[str]:
        inside = re.compile(re.escape(str(self.root.resolve())) + r"/([^/\n]+)/")
        found: set[str] = set()
        for maps in Path("/proc").glob("[0-9]*/maps"):
            with contextlib.suppress(OSError):  # it has just ended
                found.update(inside.findall(maps.read_text(errors="replace")))
        return found

    # --- systemd ------------------------------------------------------------------------------------------------------

    def starting(self) -> None:
        """Before each start. A start that was cut off before READY has failed: it may be what took the host down."""
        trial = self.trial()
        run = trial["run"] if trial else None
        if trial is not None:
            if run is not None and self._lasted(run):
                self._passed(trial)
            elif run is not None and run["ready"] is None:
                self._failed(trial, "cut off before READY")
            elif len(trial["failures"]) >= LIMIT:  # cut off while it was taken back
                self._take_back(trial)
            trial = self.trial()
        if trial is not None:
            boot, _ = self._now()
            self._write(TRIAL, {**trial, "run": {"boot": boot, "ready": None}})

    def ready(self) -> None:
        """After READY."""
        trial = self.trial()
        if trial is not None and trial["run"] is not None:
            boot, at = self._now()
            trial["run"] = {"boot": boot, "ready": at}
            self._write(TRIAL, trial)
        self.prune()

    def stopped(self, result: str, status: str) -> None:
        """After each end, however early; `result` and `status` are systemd's SERVICE_RESULT and EXIT_STATUS."""
        trial = self.trial()
        if trial is None or trial["run"] is None:  # the one that ended was started before the installation
            return
        run, trial["run"] = trial["run"], None
        if self._lasted(run):
            self._passed(trial)
        elif result == "success":
            self._write(TRIAL, trial)
        else:
            when = "before READY" if run["ready"] is None else "after READY"
            self._failed(trial, f"{result} {status}".strip() + f" {when}")

    def failed(self) -> None:
        """systemd has given the service up (a limit, or an exit status that forbids a restart): while on trial, and
        once after it was taken back, it is started all the same."""
        trial = self.trial()
        if trial is not None:
            trial["again"] += 1
            if trial["again"] > LIMIT:
                trial["failures"].append("given up by systemd")
                self._take_back(trial)
            else:
                self._write(TRIAL, trial)
        else:
            record = self.taken_back()
            if record is None or record["started"]:
                return
        record = self.taken_back()
        if record is not None:
            self._write(TAKEN_BACK, {**record, "started": True})
        time.sleep(PAUSE)
        self._run("systemctl", "reset-failed", "slotd.service")
        self._run("systemctl", "--no-block", "start", "slotd.service")

    def back(self) -> str:
        """By hand: the previous version becomes the current one, without a trial; its name."""
        name, was = self.link(PREVIOUS), self.link(CURRENT)
        if name is None or was is None or name == was:
            raise SystemExit("slotd-versions: there is no previous version")
        self._forget(TRIAL)
        self._point(CURRENT, name)
        self._point(PREVIOUS, was)
        self._forget(TAKEN_BACK)
        self._place_units(name)
        self._run("systemctl", "--no-block", "try-restart", "slotd.service")
        return name

    def _lasted(self, run: dict[str, Any]) -> bool:
        boot, at = self._now()
        return run["ready"] is not None and run["boot"] == boot and at - run["ready"] >= self._healthy

    def _passed(self, trial: dict[str, Any]) -> None:
        self._forget(TRIAL)
        say(f"slotd {trial['version']} has passed its trial")

    def _failed(self, trial: dict[str, Any], why: str) -> None:
        trial["failures"].append(why)
        count = len(trial["failures"])
        say(f"slotd {trial['version']} is on trial: failed start {count} of {LIMIT} ({why})", level=4)
        if count >= LIMIT:
            self._take_back(trial)
        else:
            self._write(TRIAL, trial)

    def _take_back(self, trial: dict[str, Any]) -> None:
        """The record first, the link next, the trial last: cut off anywhere, the next start does it again."""
        bad, good = trial["version"], trial["previous"]
        if not self.whole(good):
            self._forget(TRIAL)
            say(f"slotd {bad} does not stay up and there is no {good} to go back to", level=2)
            return
        record = {"version": bad, "to": good, "at": time.time(), "failures": trial["failures"], "started": False}
        self._write(TRIAL, trial)
        self._write(TAKEN_BACK, record)
        self._point(CURRENT, good)
        self._point(PREVIOUS, bad)
        self._forget(TRIAL)
        say(f"slotd {bad} was taken back after {len(trial['failures'])} failed starts: {good} is current", level=2)
        self._place_units(good)

    # --- units --------------------------------------------------------------------------------------------------------

    def _place_units(self, name: str) -> None:
        """The units that a version came with, where they differ from the package's and nobody wrote his own."""
        self._remove_units()
        for unit in UNITS:
            try:
                own = (self.root / name / "systemd" / unit).read_text()
                packaged = (self._packaged_units / unit).read_text()
            except OSError:
                continue  # a unit that one of the two does not have
            local = self._local_units / unit
            if own != packaged and not local.exists() and not local.is_symlink():
                self._replace(local, MARK + own)
        self._run("systemctl", "daemon-reload")

    def _remove_units(self) -> None:
        for unit in UNITS:
            local = self._local_units / unit
            if local.is_file() and local.read_text(errors="replace").startswith(MARK):
                local.unlink()

    # --- the disk -----------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            document = json.loads((self.root / name).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            say(f"{self.root / name} cannot be read and is ignored: {error}", level=3)
            return None
        return document if isinstance(document, dict) else None

    def _write(self, name: str, document: dict[str, Any]) -> None:
        self._replace(self.root / name, json.dumps(document, indent=1) + "\n")

    def _replace(self, path: Path, text: str) -> None:
        new = path.with_name(f".{path.name}.new")
        with new.open("w") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        new.rename(path)
        _sync(path.parent)

    def _point(self, name: str, target: str) -> None:
        new = self.root / f".{name}.new"
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.rename(self.root / name)
        _sync(self.root)

    def _forget(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)
        _sync(self.root)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
        _sync(Path(target))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _show(versions: Versions) -> None:
    trial, record = versions.trial(), versions.taken_back()
    print(f"current   {versions.link(CURRENT) or '-'}")
    print(f"previous  {versions.link(PREVIOUS) or '-'}")
    if trial:
        print(f"on trial  {trial['version']}, {len(trial['failures'])} failed starts, else {trial['previous']}")
    if record:
        print(f"taken back  {record['version']}: {'; '.join(record['failures'])}")


def main() -> None:
    """The verbs; `show` without any."""
    parser = argparse.ArgumentParser(prog="slotd-versions", description="Which installed slotd runs.")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--healthy", type=float, default=HEALTHY, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb, text in (
        ("show", "the current and the previous version, and how a trial stands"),
        ("back", "make the previous version the current one"),
        ("install", "make what dpkg has unpacked the current version (for its scripts)"),
        ("starting", "before a start (for systemd)"),
        ("ready", "after READY (for systemd)"),
        ("stopped", "after an end (for systemd)"),
        ("failed", "systemd has given up (for systemd)"),
    ):
        verbs.add_parser(verb, help=text)
    arguments = parser.parse_args()
    versions = Versions(arguments.root, healthy=arguments.healthy)
    verb = arguments.verb or "show"
    if verb == "show":
        return _show(versions)
    try:
        _change(versions, verb)
    except OSError as error:
        say(f"slotd-versions {verb}: {error}", level=3)
        raise SystemExit(74) from None
    return None


def _change(versions: Versions, verb: str) -> None:
    with versions.locked():
        if verb in ("install", "back"):
            print(f"slotd-versions: current is {getattr(versions, verb)()}")
        elif verb == "stopped":
            versions.stopped(os.environ.get("SERVICE_RESULT", ""), os.environ.get("EXIT_STATUS", ""))
        else:
            getattr(versions, verb)()


if __name__ == "__main__":
    main()
