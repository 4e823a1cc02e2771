"""VGG-16 and ResNet-50 swapped on a small host: 2 GiB, two cores, not root, executors killed for want of memory.

While clients are answered, another one sends what no model takes: messages of 30 MB, and two million strings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from agent.executor.sessions import open_session
from agent.serving.protos import PredictRequest
from support.cgroups import MemoryGroup
from support.host import PREDICT, Host, request_bytes
from support.identity import Seen, open_load
from support.networks import INPUT, OUTPUT, SIDE, put_folder, write_network
from support.stall import Pause, recorded
from support.tfs_client import CHANNEL_OPTIONS

LIMIT = 2 << 30
UID = 65534
PHASES = (
    "resolve",
    "pull",
    "verify",
    "unpack",
    "inspect",
    "preflight",
    "drain",
    "release",
    "program",
    "load",
    "prove",
    "switch",
    "probation",
    "commit",
)
FRESH = {"pull": "2", "verify": "2", "unpack": "3"}
"""Images of these versions are on the disk no more when their phase's turn comes, and are pulled again."""
RATE = 0.5
"""Requests a second: VGG-16 takes a core for half a second, and two cores have to load models beside it."""
PATIENCE = 60.0


@dataclass
class Report:
    swaps: int
    seconds: float
    kills: int
    phases: list[str]
    """Where an executor was killed."""
    outcomes: dict[str, int]
    seen: Seen
    rude: dict[str, int]
    same_process: bool
    stalls: list[Pause]
    """When the loop stood still under load, the longest first; those while the kernel looked for
    somebody to kill, which halts all who want memory, are in `starved`."""
    starved: list[Pause]
    used_mib: int
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        seen = self.seen
        return (
            f"{self.swaps} swaps in {self.seconds:.0f} s, {self.outcomes}; {self.kills} killed for want of memory in "
            f"{self.phases}; {seen.sent} requests, {seen.by}, {seen.mismatches} mismatches, {seen.not_ok} not OK, "
            f"p99 {seen.p99_ms / 1e3:.1f} s, worst {seen.worst_ms / 1e3:.1f} s; beside them {self.rude}; "
            f"same process: {self.same_process}; most memory {self.used_mib} MiB; "
            "longest stalls of the loop (ms: its own doing, late by, user, system; faults, waits): "
            f"{_told(self.stalls)}; "
            f"while memory was taken away: {_told(self.starved)}\n"
            f"{seen.faults}"
        )


def _told(pauses: list[Pause]) -> str:
    return ", ".join(map(str, pauses[:8])) or "none"


class SmallHost:
    def __init__(self, folder: Path, *, swaps: int, rate: float = RATE) -> None:
        self.folder, self.swaps, self.rate = folder, swaps, rate
        self.images = folder / "images"
        options = {"device": str(folder / "host" / "card"), "program_time": 0.1, "latency": 0.01, "secret": True}
        self.host = Host(
            folder / "host",
            slot={"options": options, "load_timeout": "120s", "prove_timeout": "120s", "drain_timeout": "10s"},
            swap={"probation": {"duration": "0.2s", "min_requests": 1}},
            executor={"threads": 2},
            images={"layouts": [str(self.images)]},
        )
        self._expected = folder / "expected.npz"
        self._starving: list[tuple[float, float]] = []

    def prepare(self) -> None:
        """Both as images, with what each answers."""
        pictures = np.random.default_rng(7).standard_normal((4, 1, 3, SIDE, SIDE), np.float32)
        expected: dict[str, np.ndarray] = {"pictures": pictures}
        for name in ("resnet50", "vgg16"):
            model = write_network(self.folder / name, name)
            session = open_session(model / "model.onnx", threads=2)
            answers = np.stack([np.asarray(session.run({INPUT: picture})[OUTPUT]) for picture in pictures])
            for version in sorted({"1", *FRESH.values()}):
                (model / "note.txt").write_text(version)
                expected[put_folder(model, self.images, f"{name}:{version}")] = answers
            shutil.rmtree(model)
        np.savez(self._expected, **expected)

    def run(self) -> Report:
        """Needs root, for the cgroup and to become somebody else."""
        self.prepare()
        stalls = self.host.folder / "stalls"
        self.host.folder.mkdir()
        for path in (self.folder, self.host.folder):
            os.chmod(path, 0o755)
        os.chown(self.host.folder, UID, UID)
        outcomes: dict[str, int] = {}
        killed_in: list[str] = []
        self._starving.clear()
        with MemoryGroup(LIMIT) as group:
            script = Path(__file__).with_name("confined.py")
            self.host.prefix = (sys.executable, str(script), str(group.path), str(UID))
            host = self.host
            try:
                host.start(hold_at="asked", STALLS=str(stalls))
                done = self._deploy("resnet50:1")
                assert done["outcome"] == "committed", (done, host.tail())
                assert host.process is not None
                pid = host.process.pid
                began = time.monotonic()
                current = "resnet50"
                load = open_load(host.address, self.rate, self._expected, host.device, PATIENCE)
                with load as seen, Rude(host.address) as rude:
                    for swap in range(self.swaps):
                        phase = PHASES[swap % len(PHASES)]
                        current = "vgg16" if current == "resnet50" else "resnet50"
                        outcome, killed = self._swap(f"{current}:{FRESH.get(phase, '1')}", phase, group)
                        killed_in += [phase] * killed
                        outcomes[outcome] = outcomes.get(outcome, 0) + 1
                ended = time.monotonic()
                seconds = ended - began
                same = host.process.poll() is None and host.status()["pid"] == pid
                kills, used = group.kills, group.most >> 20
                assert host.stop(timeout=60) == 0, host.tail()
            finally:
                host.kill()
        found: tuple[list[Pause], list[Pause]] = ([], [])
        for pause in recorded(stalls):
            if began <= pause.at <= ended:
                starved = any(start <= pause.at <= end + pause.late for start, end in self._starving)
                found[starved].append(pause)
        return Report(
            self.swaps,
            seconds,
            kills,
            killed_in,
            outcomes,
            seen,
            rude.answers,
            same,
            *(sorted(some, key=lambda pause: -pause.seconds) for some in found),
            used,
        )

    def _swap(self, tag: str, phase: str, group: MemoryGroup) -> tuple[str, bool]:
        """One swap with an executor killed in `phase`; if that has sent it back, once more in peace."""
        host = self.host
        host.hold_in(phase)
        task = host.call("deploy", image=tag)["task"]
        host.until(lambda: reached(host.call("task", task=task), phase), timeout=300)
        killed = False
        if reached(host.call("task", task=task), phase) == "there":
            began = time.monotonic()
            killed = starve(group)
            self._starving.append((began, time.monotonic()))
        host.let_go()
        done = host.ended(task, timeout=300)
        outcome = done["outcome"]
        if outcome != "committed":
            assert killed, (done, host.tail())
            outcome = f"{outcome}, then " + self._deploy(tag)["outcome"]
        host.until_host("slot", timeout=120)
        return outcome, killed

    def _deploy(self, tag: str) -> dict[str, Any]:
        return self.host.deploy(tag, timeout=300)


def reached(task: dict[str, Any], phase: str) -> str:
    """`there` in that phase, `over` after it; empty before."""
    if task["outcome"]:
        return "over"
    names = [step["phase"] for step in task["phases"]]
    if names and names[-1] == phase:
        return "there"
    later = PHASES[PHASES.index(phase) + 1 :]
    return "over" if names and names[-1] in later else ""


def starve(group: MemoryGroup, *, timeout: float = 60.0) -> bool:
    """Takes memory until the kernel has killed somebody else for it."""
    before = group.kills
    script = Path(__file__).with_name("glutton.py")
    with subprocess.Popen([sys.executable, str(script), str(group.path)], stdout=subprocess.PIPE) as glutton:
        try:
            until = time.monotonic() + timeout
            while group.kills == before and glutton.poll() is None and time.monotonic() < until:
                time.sleep(0.002)
            itself = glutton.poll() is not None
        finally:
            glutton.kill()
    return group.kills > before + itself


class Rude:
    """Sends what is refused, as large as it may be, until the end of the block."""

    PAUSE = 0.5

    def __init__(self, address: str) -> None:
        self._address = address
        self._over = threading.Event()
        self.answers: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Rude:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        large = request_bytes(np.zeros((30_000_000 // 4,), np.float32), INPUT)
        strings = PredictRequest()
        strings.inputs[INPUT].dtype = 7
        strings.inputs[INPUT].tensor_shape.dim.add().size = 2_000_000
        strings.inputs[INPUT].string_val.extend([b""] * 2_000_000)
        many = strings.SerializeToString()
        with grpc.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
            call = channel.unary_unary(PREDICT)
            while not self._over.wait(self.PAUSE):
                for data, what in ((large, "30 MB"), (many, "2,000,000 strings")):
                    try:
                        call(data, timeout=60)
                        code = "OK"
                    except grpc.RpcError as error:
                        code = error.code().name
                    key = f"{what}: {code}"
                    self.answers[key] = self.answers.get(key, 0) + 1
