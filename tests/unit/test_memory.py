"""What a process sets for itself; each in one of its own, for it is for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    return done.stdout.split()


def test_malloc_is_tuned() -> None:
    assert run("from agent.memory import tune_malloc; print(tune_malloc())") == ["True"]


def test_what_runs_stays_in_memory() -> None:
    """Files that are mapped to be read or run; only those of their pages that are used (MLOCK_ONFAULT)."""
    program = """
import re
from pathlib import Path
from agent.memory import keep_code
kept = keep_code()
flags = Path("/proc/self/smaps").read_text().split("VmFlags:")
print(kept, sum(" lo " in one.splitlines()[0] + " " for one in flags[1:]))
print(re.search(r"VmLck:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
    kept, areas, locked = map(int, run(program))
    assert kept > 0 and areas > 0
    assert locked << 10 == kept


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may go before others")
def test_children_go_behind_the_agent() -> None:
    program = """
import asyncio, os
from agent.executor.spawn import start_new
os.setpriority(os.PRIO_PROCESS, 0, -10)
child = asyncio.run(start_new(("/bin/sleep", "60"))).child
print(os.getpriority(os.PRIO_PROCESS, 0), os.getpriority(os.PRIO_PROCESS, child.pid))
child.kill()
"""
    assert run(program) == ["-10", "0"]
