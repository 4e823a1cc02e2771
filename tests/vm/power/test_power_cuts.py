"""Ten power cuts, spread over pull, unpack, commit, gc and the boot after one; power_cuts.py makes more of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vm.power.cuts import cut_power, describe, plan, table
from vm.power.image import missing_tools

RUNS = 10


def test_cuts_cover_each_phase_evenly() -> None:
    cuts = plan(50, 1)
    assert [cut.number for cut in cuts] == list(range(50))
    assert cuts == plan(50, 1) != plan(50, 2)
    for phase in ("pull", "unpack", "committing", "gc", "boot"):
        instants = sorted(cut.at for cut in cuts if cut.phase == phase)
        assert len(instants) >= 5
        assert all(number <= at * len(instants) <= number + 1 for number, at in enumerate(instants))


@pytest.mark.vm
@pytest.mark.timeout(1800)
def test_after_each_power_cut_the_host_serves_the_old_or_the_new(tmp_path: Path) -> None:
    assert not missing_tools(), "apt-get install qemu-system-x86 e2fsprogs busybox-static cpio"
    results = cut_power(RUNS, 1, lanes=min(2, os.cpu_count() or 1), folder=tmp_path, say=print)
    faulty = [describe(result) for result in results if result.faults]
    assert not faulty, "\n".join(faulty)
    assert len(results) == RUNS
    assert {result.outcome for result in results} == {"old", "new"}
    pulls = [result for result in results if result.again is not None]
    assert pulls and any(result.kept for result in pulls), table(results)
