"""Takes memory in a cgroup until it is killed by its parent; the kernel kills others first. `glutton.py CGROUP`."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time
from pathlib import Path

STEP = 8 << 20

(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
with contextlib.suppress(PermissionError):  # in a container; slotd's children, at +500, still go first
    Path("/proc/self/oom_score_adj").write_text("-1000")
taken = []
print("ready", flush=True)
while True:
    memory = mmap.mmap(-1, STEP)
    for page in range(0, STEP, mmap.PAGESIZE):
        memory[page] = 1
    taken.append(memory)
    time.sleep(0)
