"""Changed conversations: nothing of ours fails, whatever a peer says."""

from __future__ import annotations

import pytest

from support.h2_storm import storm


@pytest.mark.parametrize("runs", [3000, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.timeout(3600)
async def test_changed_conversations(runs: int) -> None:
    report = await storm(runs, seed=runs)
    print(f"\n{report}")
    assert not report.faults, report.faults
    assert report.answered > runs / 4, "else nothing was tried"
    assert len(report.closed) >= 5, "connections that ended for many reasons"
