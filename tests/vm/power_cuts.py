"""Cuts the power of a QEMU guest again and again: `python tests/vm/power_cuts.py --runs 50 --seed 1`."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm.power.cuts import BOOT, PHASES, cut_power, table
from vm.power.image import missing_tools


def main() -> int:
    """0 if every cut left a sound host."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50, help="how many cuts (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="which instants and which losses (default 1)")
    parser.add_argument("--lanes", type=int, default=min(2, os.cpu_count() or 1), help="how many guests at a time")
    parser.add_argument("--keep", type=Path, help="leave all that was made in this folder")
    parser.add_argument("--phase", choices=(*PHASES, BOOT), help="cut only in this phase")
    parser.add_argument("--careless", action="store_true", help="leave out the daemon's fsyncs: the faults must show")
    options = parser.parse_args()
    if missing := missing_tools():
        packages = "qemu-system-x86 e2fsprogs busybox-static cpio"
        print(f"not found: {', '.join(missing)}; on Debian: apt-get install {packages}", file=sys.stderr)
        return 69
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f}  {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="slotd-power-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = cut_power(
            options.runs,
            options.seed,
            lanes=options.lanes,
            folder=folder,
            say=say,
            phase=options.phase,
            careless=options.careless,
        )
    faulty = sum(bool(result.faults) for result in results)
    spent = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"\n{table(results)}\n")
    print(f"{len(results)} cuts with seed {options.seed}, {faulty} with faults; {spent:.0f} s of CPU")
    return 1 if faulty or len(results) < options.runs else 0


if __name__ == "__main__":
    sys.exit(main())
