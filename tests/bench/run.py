"""The bench: `make bench`, or `python tests/bench/run.py [--only echo busy] [--quick] [--json FILE]`.

Everything is a ratio of two things measured turn by turn in this run, and the machine's own noise is shown beside it.
The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pairs import Noise, Result

PARTS = {"echo": 15, "busy": 5, "first": 7, "dark": 5, "pull": 3}
"""How many pairs, windows or swaps each part has."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a third of the rounds: a hint, no more")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    results: list[Result] = []
    noises: dict[str, str] = {}
    for part in arguments.only:
        rounds = max(1, PARTS[part] // 3) if arguments.quick else PARTS[part]
        noise = Noise()
        with tempfile.TemporaryDirectory(prefix="slotd-bench-") as folder:
            found = importlib.import_module(part).run(Path(folder), rounds, noise)
        results += found
        noises[part] = str(noise)
        print(*found, f"    the machine: {noise}", sep="\n", flush=True)
    if arguments.json:
        document = {"results": [result.as_dict() for result in results], "machine": noises}
        arguments.json.write_text(json.dumps(document, indent=1))
    return 0 if all(result.met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
