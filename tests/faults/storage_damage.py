"""Storage damage by hand: `python tests/faults/storage_damage.py --runs 200 --seed 1`. Exit code 1 on any fault.

Each run damages one to four files of a host that was stopped or killed, starts it, and wants its committed model in the
slot, a deployment that works, and a right boot.json.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.damage import KINDS, check_going_on, check_serving, copy, damage, prepare, targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory(prefix="storage-damage-") as name:
        pasts = []
        for killed in (False, True):
            folder = Path(name, f"killed-{killed}")
            folder.mkdir()
            pasts.append(prepare(folder, killed=killed))
        for run in range(arguments.seed, arguments.seed + arguments.runs):
            chance = random.Random(run)
            folder = Path(name, str(run))
            folder.mkdir()
            host = copy(chance.choice(pasts), folder)
            files = targets(host)
            done = []
            for _ in range(chance.randint(1, 4)):
                kind, what = chance.choice(KINDS), chance.choice([one for one, paths in files.items() if paths])
                path = chance.choice(files[what])
                if path.exists() and path.stat().st_size:
                    damage(path, kind, chance)
                    done.append(f"{path.relative_to(folder / 'state')} {kind}")
            try:
                host.start(LOOK_EVERY="0.2")
                check_serving(host)
                check_going_on(host)
                assert host.stop() == 0
            except Exception as error:
                faults += 1
                print(f"run {run}: {'; '.join(done)}: {error}")
            finally:
                host.kill()
            shutil.rmtree(folder)
    print(f"{arguments.runs} runs, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
