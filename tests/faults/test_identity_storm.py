"""Swap after swap under load: no reply of another model, none refused, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.identity import IdentityStorm

CONSTANT = 24 << 10
"""KiB that memory may grow by, however many swaps there were: what the allocator keeps at the top of its heap for the
next message (agent.memory, 16 MiB), SQLite's page cache (2 MiB), the deployments that are remembered (50)."""

PATIENT = {"max_wait": "60s", "max_queue": 5000, "max_deadline": "120s"}
"""A machine that is slower for some seconds than when the bridge was measured makes them wait, and sheds none."""


# Alone: beside other work the bridge falls below the capacity that was measured, and sheds.
@pytest.mark.alone
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("swaps", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_swaps_under_load(swaps: int, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    report = IdentityStorm(tmp_path, swaps, seed=1, serving=PATIENT, deadline=90.0).run()
    print(f"\n{report}")
    record_property("storm", str(report))
    seen = report.seen
    assert (seen.mismatches, seen.not_ok) == (0, 0), seen.faults
    assert seen.by["slot"] > swaps and seen.by["bridge"] > swaps, "both have answered"
    assert not report.left, "children that outlived the host"
    growth = report.growth
    for key in ("rss_kib", "pss_kib", "shared_kib"):
        first = report.held[min(report.held)][key]
        assert growth.pop(key) <= max(CONSTANT, first * 0.02), (key, report.held)
    assert set(growth.values()) == {0}, report.held
