"""What all power cuts have in common: a guest with a past, taken through one deployment and frozen on the way."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.fake_registry import FakeRegistry, fake_registry
from vm.power import image
from vm.power.disk import PowerDisk
from vm.power.machine import REGISTRY, Guest, Machine, Snapshot, freeze
from vm.power.past import DISK, Past, make_past

PHASES = {"pull": "verify", "unpack": "inspect", "committing": "gc", "gc": "ended"}
"""Where the guest is frozen, and what it says when that phase is over."""
RATE = 0.8e6
"""Bytes a second from the registry, so that a pull takes a while."""
PATIENCE = 900.0
"""Seconds; only for what has gone wrong: an emulated machine on a busy host is slow, and that is no fault."""


@dataclass(frozen=True)
class Point:
    """A guest at the beginning of a phase, its disk included; how long the phase took, and how much it wrote."""

    snapshot: Snapshot
    disk: Path
    cache: list[tuple[int, bytes]]
    seconds: float = 0.0
    writes: int = 0


class House:
    """All that cuts have in common: the guest's parts, the frozen machines, the past."""

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None], *, careless: bool = False) -> None:
        self.folder = folder
        self.careless = careless
        self.say = say
        self.points: dict[str, Point] = {}
        self.failed = False
        self.boot_writes = 1
        """How much a host writes until it serves."""
        self._ready = threading.Condition()
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            past = pool.submit(make_past, folder, seed)
            self.guest = self._parts()
            say(f"kernel and root image: {time.monotonic() - began:.0f} s")
            self.loaded = self._boot()
            self.past: Past = past.result()
        say(f"a guest booted and frozen, a past with two models: {time.monotonic() - began:.0f} s")

    def _parts(self) -> Guest:
        folder = self.folder
        root = image.root_image(folder / "root.img", folder / "staging")
        # As agent.serving has it, which the guest's program imports after gRPC.
        environment = "TMPDIR=/run GRPC_ENABLE_FORK_SUPPORT=0"
        program = f"{environment} {sys.executable} -I {image.REPOSITORY}/tests/vm/power/guest.py"
        initramfs = image.initramfs(folder / "initramfs", program)
        return Guest(image.vmlinuz(), initramfs, root, DISK)

    def _boot(self) -> Snapshot:
        machine = self.guest.boot(self.folder / "first")
        try:
            machine.wait_for("loaded", PATIENCE)
            time.sleep(0.5)  # it waits for its line by now
            return freeze(machine, self.folder, "loaded")
        finally:
            machine.kill()
            (machine.folder / "memory").unlink()

    def job(self, chance: random.Random, stops: Sequence[str] = ()) -> dict[str, Any]:
        """What a guest is told when it wakes up."""
        config = {
            "device": "guest",
            "state_dir": "/var/lib/slotd",
            "run_dir": "/run/slotd",
            "embedded": True,
            "slot": {
                "driver": "simulated",
                "options": {"device": "/run/card", "program_time": 0.1, "latency": 0.002},
                "program_timeout": "10m",
                "load_timeout": "10m",
                "prove_timeout": "10m",
            },
            "swap": {"probation": {"duration": "0.3s", "min_requests": 3}},
            "serving": {"grpc": {"listen": None}},
            "executor": {"threads": 1, "call_timeout": "10m"},
            "images": {"insecure_registries": [REGISTRY], "keep_free": "4MiB"},
            "link": {"enabled": False},
            "log": {"level": "info", "format": "json"},
        }
        images = [f"{REGISTRY}/tiny:{version}" for version in (1, 2, 3)]
        seed = chance.randbytes(32).hex()
        return {"seed": seed, "config": config, "images": images, "stops": list(stops), "careless": self.careless}

    def walk(self, seed: int) -> None:
        """One whole deployment, frozen where each phase begins; `points` fill up as it goes."""
        began = time.monotonic()
        folder = self.folder / "walk"
        folder.mkdir()
        heard: dict[str, tuple[float, int]] = {}

        with registry_of(self.past) as registry, power_disk(folder, self.past.disk) as (disk, path):

            def hear(document: dict[str, Any]) -> None:
                heard[document["at"]] = time.monotonic(), disk.writes

            machine = self.guest.clone(self.loaded, folder, path, port_of(registry), freezable=True, on_heard=hear)
            try:
                machine.tell(self.job(random.Random(seed), [*PHASES]))
                for phase, end in PHASES.items():
                    machine.wait_for(phase, PATIENCE)
                    self.boot_writes = heard["serves"][1]
                    point = self._freeze(machine, disk, phase)
                    since, writes = time.monotonic(), disk.writes
                    until = since + PATIENCE
                    machine.tell({})
                    while end not in heard and machine.process.poll() is None and time.monotonic() < until:
                        if phase == "pull" and not fetching(registry):
                            since = time.monotonic()  # until then the puller starts and nothing is at stake
                        time.sleep(0.005)
                    if end not in heard:
                        raise RuntimeError(f"the guest did not come to {end}:\n{machine.tail()}")
                    at, written = heard[end]
                    with self._ready:
                        self.points[phase] = replace(point, seconds=at - since, writes=max(1, written - writes))
                        self._ready.notify_all()
                    self.say(f"frozen at {phase}, which takes {at - since:.1f} s and {written - writes} writes")
            finally:
                disk.freeze()
                machine.kill()
                (folder / "memory").unlink()
        self.say(f"one deployment, frozen at {len(self.points)} points: {time.monotonic() - began:.0f} s")

    def _freeze(self, machine: Machine, disk: PowerDisk, phase: str) -> Point:
        image_, cache = self.folder / f"{phase}.disk", []
        snapshot = freeze(machine, self.folder, phase, lambda: cache.extend(disk.keep(image_)))
        return Point(snapshot, image_, cache)

    def point(self, phase: str) -> Point:
        """Where that phase begins; waits for the walk to come there."""
        with self._ready:
            if not self._ready.wait_for(lambda: phase in self.points or self.failed, 2 * PATIENCE) or self.failed:
                raise RuntimeError(f"no guest has come to {phase}")
            return self.points[phase]

    def give_up(self) -> None:
        """The walk has failed; nobody waits for it any more."""
        with self._ready:
            self.failed = True
            self._ready.notify_all()


@contextmanager
def power_disk(folder: Path, source: Path, cache: Sequence[tuple[int, bytes]] = ()) -> Iterator[tuple[PowerDisk, Path]]:
    """A disk of its own with the content of `source`, and its socket."""
    path = folder / "nbd"
    path.unlink(missing_ok=True)
    disk = PowerDisk(image.copy_sparse(source, folder / "disk.img"), path, cache)
    try:
        yield disk, path
    finally:
        disk.close()


@contextmanager
def registry_of(past: Past) -> Iterator[FakeRegistry]:
    """A slow registry with all images, which counts."""
    with fake_registry(past.layout) as registry:
        registry.rate = RATE
        yield registry


def port_of(registry: FakeRegistry) -> int:
    return int(registry.host.partition(":")[2])


def fetching(registry: FakeRegistry) -> bool:
    """Whether a blob has been asked for."""
    return any("/blobs/" in asked.path for asked in registry.asked)
