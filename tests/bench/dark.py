"""A swap as clients see it: for how long the slot gave no answers, over what programming and loading take alone."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from pairs import Noise, Result, Spread

from support.host import Host

PROGRAM = 1.0


def run(folder: Path, swaps: int, noise: Noise) -> list[Result]:
    """Tiny models, and a card that takes a second to program: what is measured is what slotd adds."""
    ratios, silent, darks, alone = [], [], [], []
    slot = {"options": {"device": str(folder / "card"), "program_time": PROGRAM, "latency": 0.002}}
    with Host(folder, slot=slot) as host:
        for number in (1, 2):
            host.pack(f"tiny:{number}", scale=1.0 + number, version=str(number))
        assert host.deploy("tiny:1")["outcome"] == "committed"
        for swap in range(swaps):
            noise.tick()
            with host.load(2, pause=0.001) as load:
                time.sleep(0.3)
                done = host.deploy(f"tiny:{2 - swap % 2}")
                time.sleep(0.3)
            assert done["outcome"] == "committed" and not load.errors, (done, load.errors[:3])
            answers = sorted((start + took, by) for start, took, _, by, _ in load.answers)
            own = sum(phase["seconds"] for phase in done["phases"] if phase["phase"] in ("program", "load"))
            by_slot = [at for at, by in answers if by == "slot"]
            darks.append(longest(by_slot))
            silent.append(longest([at for at, _ in answers]) * 1e3)
            alone.append(own)
            ratios.append(darks[-1] / own)
    details = {
        "no answer from the slot, s": str(Spread(tuple(darks))),
        "programming and loading, s": str(Spread(tuple(alone))),
        "no answer from anybody (the bridge answers meanwhile), ms": str(Spread(tuple(silent))),
        "the last swap's phases, s": phases(done),
    }
    return [Result("dark time of a swap / programming and loading", Spread(tuple(ratios)), details=details)]


def longest(times: list[float]) -> float:
    """The longest time between two."""
    return max(after - before for before, after in pairwise(times))


def phases(done: dict[str, Any]) -> str:
    return ", ".join(f"{phase['phase']} {phase['seconds']:.3f}" for phase in done["phases"])
