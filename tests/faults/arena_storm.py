"""The arena storm by hand: `python tests/faults/arena_storm.py --runs 100000 --seed 1`. Exit code 1 on any fault."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

import structlog
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.storm import Storm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--uvloop", action="store_true")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    storm = Storm(arguments.runs, arguments.seed, clients=arguments.clients)
    report = uvloop.run(storm.run()) if arguments.uvloop else asyncio.run(storm.run())
    print(report)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
