"""Swaps among three models under an open load, and every single reply compared with what its model must say.

The load comes from another process, at a rate that does not depend on the answers. Each reply names the digest that
gave it: from the bridge it must be that model's precomputed reply bit for bit, from the slot within its tolerance and
with the card's own mark.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agent.executor.sessions import open_session
from support.host import Host
from support.networks import INPUT, OUTPUT, SIDE, put_folder, write_network
from support.processes import descendants, gone, holdings, memory

TOLERANCE = 2.0**-11
"""Of what the slot says, relative: its mark changes less than 2^-13."""
PICTURES = 8
WORK = 3
"""Makes the CPU's twin take some 20 ms: generator, agent and slot share the cores with it, and are little beside it."""
SETTLED = 20
"""The swap after which memory is compared with that at the end."""
GENERATOR = Path(__file__).with_name("identity_load.py")


@dataclass
class Seen:
    """What the generator saw. `faults` are replies that were wrong or not OK, the first of each kind in words."""

    sent: int = 0
    by: dict[str, int] = field(default_factory=dict)
    mismatches: int = 0
    not_ok: int = 0
    faults: list[str] = field(default_factory=list)
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    worst_ms: float = 0.0
    lag_ms: float = 0.0
    """By how much the generator was late at worst: an open load is only one if this is small."""


@dataclass
class Report:
    swaps: int
    seconds: float
    capacity: float
    rate: float
    seen: Seen
    held: dict[int, dict[str, int]]
    """What the parent held, by the swap after which it was looked at."""
    left: set[int]
    """Children that outlived the host."""

    @property
    def growth(self) -> dict[str, int]:
        first, last = min(self.held), max(self.held)
        return {key: self.held[last][key] - self.held[first][key] for key in self.held[last]}

    def __str__(self) -> str:
        seen = self.seen
        return (
            f"{self.swaps} swaps in {self.seconds:.0f} s ({self.seconds / self.swaps:.2f} s each), bridge capacity "
            f"{self.capacity:.0f}/s, sent {self.rate:.0f}/s: {seen.sent} requests, {seen.by}, {seen.mismatches} "
            f"mismatches, {seen.not_ok} not OK; p50 {seen.p50_ms:.1f} p99 {seen.p99_ms:.1f} worst {seen.worst_ms:.0f} "
            f"ms, generator late by {seen.lag_ms:.0f} ms at worst\n{self.held}\ngrowth {self.growth}\n{seen.faults}"
        )


class IdentityStorm:
    """`run` one storm of `swaps`.

    `share`: the load over the bridge's capacity, as preflight has measured it; `deadline`: of each request, in seconds.
    """

    def __init__(
        self, folder: Path, swaps: int, seed: int, *, share: float = 0.8, deadline: float = 20.0, **settings: Any
    ) -> None:
        self.swaps, self.share, self.deadline = swaps, share, deadline
        self.folder = folder
        self._rng = random.Random(seed)
        options = {"device": str(folder / "card"), "program_time": 0.02, "latency": 0.002, "secret": True}
        self.host = Host(
            folder,
            slot={"options": options},
            swap={"probation": {"duration": "0.05s", "min_requests": 1}},
            **settings,
        )
        self.digests: dict[str, str] = {}
        self._expected = folder / "expected.npz"

    def prepare(self) -> None:
        """Three models as images, and what each must answer to each picture."""
        rng = np.random.default_rng(7)
        pictures = rng.standard_normal((PICTURES, 1, 3, SIDE, SIDE), np.float32)
        expected: dict[str, np.ndarray] = {"pictures": pictures}
        for number in (1, 2, 3):
            model = write_network(
                self.folder / f"model-{number}", "small", version=str(number), seed=number, twin_work=WORK
            )
            digest = put_folder(model, self.host.layout, f"small:{number}")
            session = open_session(model / "twin.onnx", threads=1)
            answers = [session.run({INPUT: picture})[OUTPUT] for picture in pictures]
            expected[digest] = np.stack([np.asarray(answer) for answer in answers])
            self.digests[f"small:{number}"] = digest
        answers = [expected[digest] for digest in self.digests.values()]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(answers[one] - answers[other]).max(-1).min() > 100 * TOLERANCE, "too alike to be told apart"
        np.savez(self._expected, **expected)

    def run(self) -> Report:
        self.prepare()
        tags = list(self.digests)
        held: dict[int, dict[str, int]] = {}
        with self.host as host:
            done = host.deploy(tags[0])
            assert done["outcome"] == "committed", done
            capacity = float(done["notes"]["capacity_per_s"])
            rate = self.share * capacity
            assert host.process is not None
            pid, current = host.process.pid, tags[0]
            with open_load(host.address, rate, self._expected, host.device, self.deadline) as seen:
                began = time.monotonic()
                for swap in range(1, self.swaps + 1):
                    current = self._rng.choice([tag for tag in tags if tag != current])
                    done = host.deploy(current)
                    assert done["outcome"] == "committed", (swap, done, host.tail())
                    assert done["digest"] == self.digests[current]
                    if swap in (min(SETTLED, self.swaps // 2), self.swaps) or swap % 100 == 0:
                        held[swap] = at_rest(host, pid)
                seconds = time.monotonic() - began
            children = descendants(pid)
            assert host.stop() == 0, host.tail()
            left = children if not gone(children, within=5) else set()
        return Report(self.swaps, seconds, capacity, rate, seen, held, left)


@contextmanager
def open_load(address: str, rate: float, expected: Path, card: Path, deadline: float = 20.0) -> Iterator[Seen]:
    """The generator runs inside; what it saw is there afterwards."""
    argv = [sys.executable, str(GENERATOR), address, str(rate), str(expected), str(card), str(deadline)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as generator:
        try:
            assert generator.stdout is not None and generator.stdin is not None
            assert generator.stdout.readline() == "sending\n"
            seen = Seen()
            yield seen
            generator.stdin.close()
            seen.__dict__.update(json.loads(generator.stdout.readline()))
        except BaseException:
            generator.kill()
            raise


def at_rest(host: Host, pid: int) -> dict[str, int]:
    """What the parent holds, once its counts are the same three times: the old model's executors have ended."""

    def steady() -> dict[str, int]:
        counts = []
        for _ in range(3):
            found = holdings(pid)
            found.pop("rss_kib")
            counts.append(found)
            time.sleep(0.2)
        return counts[0] | memory(pid) if counts[0] == counts[1] == counts[2] else {}

    return dict(host.until(steady))
