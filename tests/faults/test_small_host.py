"""Two large models on a small host: nobody is refused, whoever is killed for want of memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.small_host import PHASES, SmallHost

STALL = 0.005

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="root makes the cgroup, and becomes somebody else in it"),
]


@pytest.mark.timeout(3600)
def test_vgg_and_resnet_in_two_gib(tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    report = SmallHost(tmp_path, swaps=20).run()
    print(f"\n{report}")
    record_property("small host", str(report))
    seen = report.seen
    assert (seen.mismatches, seen.not_ok) == (0, 0), seen.faults
    assert report.same_process
    assert set(report.phases) == set(PHASES), "an executor was killed in each phase"
    assert report.rude.keys() == {"30 MB: INVALID_ARGUMENT", "2,000,000 strings: INVALID_ARGUMENT"}
    assert max((one.seconds for one in report.stalls), default=0.0) <= STALL, [str(one) for one in report.stalls[:10]]
