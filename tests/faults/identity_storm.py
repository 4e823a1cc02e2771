"""The identity storm by hand: `python tests/faults/identity_storm.py --runs 200 --seed 1`. Exit code 1 on any fault."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.identity import IdentityStorm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="swaps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.8, help="load over the bridge's measured capacity")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended in order
    with tempfile.TemporaryDirectory(prefix="slotd-storm-") as folder:
        report = IdentityStorm(Path(folder), arguments.runs, arguments.seed, share=arguments.share).run()
    print(report)
    return 1 if report.seen.mismatches or report.seen.not_ok or report.left else 0


if __name__ == "__main__":
    sys.exit(main())
