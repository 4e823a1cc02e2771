"""A storm of requests, cancels, kills and lies: no answer crosses, every byte comes back, the agent lives."""

from __future__ import annotations

import pytest

from support.storm import Storm


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_answer_crosses_and_every_byte_comes_back(seed: int) -> None:
    report = await Storm(1500, seed).run()
    print(report)
    assert not report.faults
    outcomes = report.outcomes
    assert outcomes["answered"] > 500 and outcomes["cancelled"] > 100
    assert min(outcomes["killed"], outcomes["stopped"], outcomes["liars"], outcomes["died"]) > 0
