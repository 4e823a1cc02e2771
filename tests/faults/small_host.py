"""The small host by hand, as root: `python tests/faults/small_host.py --runs 20`. Exit code 1 on any fault."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.small_host import RATE, SmallHost

STALL = 0.005


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="swaps; the phases take turns")
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended in order
    with tempfile.TemporaryDirectory(prefix="slotd-small-") as folder:
        report = SmallHost(Path(folder), swaps=arguments.runs, rate=arguments.rate).run()
    print(report)
    whole = report.same_process and not report.seen.not_ok and not report.seen.mismatches
    return 0 if whole and max((one.seconds for one in report.stalls), default=0.0) <= STALL else 1


if __name__ == "__main__":
    sys.exit(main())
