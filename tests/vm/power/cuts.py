"""Cuts the power of a host in the middle of things, and looks at what it finds when the power is back.

One guest is booted, deploys the third model over the second, and is frozen at the beginning of each phase. Each cut
clones it there, lets it go on, kills QEMU at a seeded instant (after so many writes and flushes, or after a delay),
and drops a seeded part of what the disk had not been told to flush. The disk is then looked at from outside, and
booted: the committed model has to answer.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.fake_registry import FakeRegistry
from vm.power.audit import Found, audit
from vm.power.disk import Loss, PowerDisk
from vm.power.house import PATIENCE, PHASES, House, fetching, port_of, power_disk, registry_of
from vm.power.machine import Machine

BOOT = "boot"
"""A second cut, while the host comes back from a first one."""
SHARE = ("pull", "unpack", "committing", "gc", "pull", "unpack", "committing", "gc", BOOT, "unpack")


@dataclass(frozen=True)
class Cut:
    """One instant: a share `at` (0 to 1) of the phase is over, counted by its writes and flushes or by its seconds."""

    number: int
    phase: str
    seed: int
    at: float
    by_writes: bool


@dataclass
class Result:
    cut: Cut
    outcome: str = "?"
    loss: Loss = field(default_factory=lambda: Loss(0, 0, "-"))
    received: int = 0
    """Bytes of the image that the registry had sent."""
    kept: int = 0
    """Bytes of it that are on the disk."""
    again: int | None = None
    """Bytes that the next pull fetched; None if it was not watched."""
    seconds: float = 0.0
    """From power on to the first right answer."""
    faults: list[str] = field(default_factory=list)


def plan(runs: int, seed: int, only: str | None = None) -> list[Cut]:
    """Instants that cover each phase evenly, each with its own seed."""
    phases = [only or SHARE[number % len(SHARE)] for number in range(runs)]
    chance = random.Random(seed)
    cuts = []
    for phase in dict.fromkeys(phases):
        mine = [number for number, name in enumerate(phases) if name == phase]
        slots = list(range(len(mine)))
        chance.shuffle(slots)
        for number, slot in zip(mine, slots, strict=True):
            at = (slot + chance.random()) / len(mine)
            by_writes = phase != "pull" or chance.random() < 0.3  # a pull mostly waits for the network
            cuts.append(Cut(number, phase, chance.getrandbits(32), at, by_writes))
    return sorted(cuts, key=lambda cut: cut.number)


class Lane:
    """Makes one cut after the other, in a folder of its own."""

    def __init__(self, house: House, folder: Path) -> None:
        self.house = house
        self.past = house.past
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def run(self, cut: Cut) -> Result:
        """The cut, what is found on the disk, and the boot after it."""
        result = Result(cut)
        chance = random.Random(cut.seed)
        phase = cut.phase if cut.phase != BOOT else chance.choice([*PHASES])
        try:
            self._run(result, phase, chance)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            result.faults.append(f"{type(error).__name__}: {error}")
        return result

    def _run(self, result: Result, phase: str, chance: random.Random) -> None:
        cut, point = result.cut, self.house.point(phase)
        with (
            registry_of(self.past) as registry,
            power_disk(self.folder, point.disk, point.cache) as (disk, path),
        ):
            machine = self.house.guest.clone(point.snapshot, self.folder / "cut", path, port_of(registry))
            at = cut.at if cut.phase == phase else chance.random()
            after, delay = (1 + int(at * point.writes), None) if cut.by_writes else (None, at * point.seconds)
            begun = (lambda: fetching(registry)) if phase == "pull" else lambda: True
            told = self._until_cut(machine, disk, after, delay, PHASES[phase], {}, begun)
            result.loss = disk.cut(chance)
            found = self._audit(result, disk)
            known = phase == "gc" or "committed" in told
            self._judge(result, found, begun=known or phase == "committing", known=known)
            self._check_kept(result, found, registry)

            if cut.phase == BOOT:
                disk.power_on()
                machine = self.house.guest.clone(self.house.loaded, self.folder / "cut", path, port_of(registry))
                after = 1 + int(cut.at * self.house.boot_writes)
                self._until_cut(machine, disk, after, None, "serves", self.house.job(chance))
                loss = disk.cut(chance)
                result.loss = Loss(result.loss.unflushed + loss.unflushed, result.loss.lost + loss.lost, loss.rule)
                before = found.committed
                found = self._audit(result, disk)
                if found.committed != before:
                    result.faults.append(f"a cut while it boots turned {before} into {found.committed}")

            asked = len(registry.asked)
            disk.power_on()
            began = time.monotonic()
            machine = self.house.guest.clone(self.house.loaded, self.folder / "boot", path, port_of(registry))
            try:
                machine.tell(self.house.job(chance))
                self._check_served(result, found, machine.wait_for("serves", PATIENCE))
                result.seconds = time.monotonic() - began
                if cut.phase == "pull":
                    machine.wait_for("verify", PATIENCE)
                    self._check_resumed(result, found, registry, asked)
            finally:
                disk.freeze()
                machine.kill()
            text = machine.console.read_text(errors="replace")
            result.faults += [line for line in text.splitlines() if "EXT4-fs error" in line or "I/O error" in line]

    def _until_cut(
        self,
        machine: Machine,
        disk: PowerDisk,
        after: int | None,
        delay: float | None,
        end: str,
        document: dict[str, Any],
        begun: Callable[[], bool] = lambda: True,
    ) -> set[str]:
        """Lets the guest go on, and kills it at the instant, or soon after the phase's end; what it has told.

        The delay counts from when something is `begun`.
        """
        gone = threading.Event()
        told: set[str] = set()
        try:
            if after is not None:
                disk.cut_after(after, gone.set)
            until = time.monotonic() + PATIENCE
            machine.tell(document)
            while not gone.is_set() and time.monotonic() < until:
                if delay is not None and begun():
                    until, delay = min(until, time.monotonic() + delay), None
                try:
                    item = machine.heard.get(timeout=min(0.02, max(0.0, until - time.monotonic())))
                except queue.Empty:
                    continue
                if item is None:
                    raise RuntimeError(f"the guest ended by itself:\n{machine.tail()}")
                told.add(item[1]["at"])
                if item[1]["at"] == end:
                    until = min(until, time.monotonic() + 1.0)
        finally:
            disk.freeze()
            machine.kill()
        while (item := machine.heard.get()) is not None:
            told.add(item[1]["at"])
        return told

    def _audit(self, result: Result, disk: PowerDisk) -> Found:
        wanted = self.past.blobs(self.past.digests[2])[1:]
        found = audit(disk.image, self.past.layout, wanted, self.folder / "audit")
        result.faults += found.faults
        result.kept = found.kept
        return found

    def _judge(self, result: Result, found: Found, *, begun: bool, known: bool) -> None:
        """Old or new, and nothing else; new only if the commit had begun, old only if it had not ended."""
        first, old, new = self.past.digests
        result.outcome = {old: "old", new: "new"}.get(found.committed or "", f"neither: {found.committed}")
        allowed = {"new"} if known else {"old", "new"} if begun else {"old"}
        if result.outcome not in allowed:
            result.faults.append(f"committed is {result.outcome}, may be {' or '.join(sorted(allowed))}")
        if found.previous != (old if result.outcome == "new" else first):
            result.faults.append(f"previous is {found.previous}")

    def _check_kept(self, result: Result, found: Found, registry: FakeRegistry) -> None:
        """A blob is fetched when the one before it is durable."""
        fetched = [asked for asked in registry.asked if "/blobs/" in asked.path]
        result.received = sum(asked.sent for asked in fetched)
        for asked in fetched[:-1]:
            name = asked.path.rpartition(":")[2]
            if asked.path != fetched[-1].path and name not in found.complete:
                result.faults.append(f"the blob {name} was complete and is lost")

    def _check_served(self, result: Result, found: Found, served: dict[str, Any]) -> None:
        digest = found.committed or ""
        if served["committed"] != digest or served["digest"] != digest:
            result.faults.append(f"{served['digest']} answers, {served['committed']} is in force, {digest} was on disk")
        if digest in self.past.digests and abs(served["scale"] - self.past.scale(digest)) > 1e-4:
            result.faults.append(f"wrong answer: {served['scale']} instead of {self.past.scale(digest)}")
        bad = {"boot-record", "journal-lost", "journal", "store", "committed-model"} & set(served["issues"])
        if bad:
            result.faults.append(f"after the boot: {', '.join(sorted(bad))}")

    def _check_resumed(self, result: Result, found: Found, registry: FakeRegistry, since: int) -> None:
        """Nothing is fetched again that was on the disk."""
        blobs = self.past.blobs(self.past.digests[2])[1:]
        size = sum((self.past.layout / "blobs" / "sha256" / name).stat().st_size for name in blobs)
        result.again = sum(asked.sent for asked in registry.asked[since:] if "/blobs/" in asked.path)
        if result.again != size - found.kept:
            result.faults.append(f"{result.again} bytes were fetched again, {size - found.kept} were missing")


def cut_power(
    runs: int,
    seed: int,
    *,
    lanes: int,
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
    phase: str | None = None,
    careless: bool = False,
) -> list[Result]:
    """`runs` cuts on `lanes` guests at a time; all that is made on the way goes to `folder`. Raises RuntimeError.

    `phase`: only in this one. `careless`: with a daemon that never waits for the disk, which must not go unnoticed.
    """
    house = House(folder, seed, say, careless=careless)
    results: list[Result] = []
    with ThreadPoolExecutor(lanes + 1) as pool:
        walk = pool.submit(house.walk, seed)
        walk.add_done_callback(lambda done: house.give_up() if done.exception() else None)
        waiting = queue.SimpleQueue[Cut]()
        # Those that need little of the walk come first, so that nobody has to wait for the end of it.
        for cut in sorted(plan(runs, seed, phase), key=lambda cut: [*PHASES, BOOT].index(cut.phase)):
            waiting.put(cut)

        def work(lane: Lane) -> None:
            while not house.failed:
                try:
                    cut = waiting.get_nowait()
                except queue.Empty:
                    return
                result = lane.run(cut)
                results.append(result)
                say(describe(result))

        done = [pool.submit(work, Lane(house, folder / f"lane{number}")) for number in range(lanes)]
        walk.result()
        for one in done:
            one.result()
    return sorted(results, key=lambda result: result.cut.number)


def describe(result: Result) -> str:
    """One line."""
    cut, loss = result.cut, result.loss
    instant = f"{cut.at:.0%} of its {'writes' if cut.by_writes else 'time'}"
    pulled = "" if result.again is None else f", {result.received} received, {result.kept} kept, {result.again} again"
    faults = "".join(f"\n    FAULT {fault}" for fault in result.faults)
    return (
        f"cut {cut.number} in {cut.phase} at {instant}: {result.outcome}, "
        f"lost {loss.lost} of {loss.unflushed} unflushed ({loss.rule}){pulled}, "
        f"answered after {result.seconds:.1f} s{faults}"
    )


def table(results: list[Result]) -> str:
    """All of them by phase."""
    lines = [
        f"{'phase':<12}{'cuts':>5}{'old':>5}{'new':>5}{'unflushed':>12}{'lost':>12}{'again/image':>13}{'faults':>8}"
    ]
    for phase in (*PHASES, BOOT):
        mine = [result for result in results if result.cut.phase == phase]
        again = [result.again for result in mine if result.again is not None]
        whole = [result.again + result.kept for result in mine if result.again is not None]
        share = f"{sum(again) / sum(whole):.0%}" if whole else "-"
        lines.append(
            f"{phase:<12}{len(mine):>5}{sum(r.outcome == 'old' for r in mine):>5}"
            f"{sum(r.outcome == 'new' for r in mine):>5}{sum(r.loss.unflushed for r in mine):>12}"
            f"{sum(r.loss.lost for r in mine):>12}{share:>13}{sum(bool(r.faults) for r in mine):>8}"
        )
    return "\n".join(lines)
