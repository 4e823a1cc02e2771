"""What a bridge that is too weak for the load means for a deployment."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from agent.config import parse_config
from agent.errors import Refused
from agent.slot import preflight


class Load:
    """Requests a second, as a test says."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.asked = 0

    def load(self) -> float:
        self.asked += 1
        return self.value


async def check(load: Load, **swap: Any) -> dict[str, Any]:
    config = parse_config(f"{{embedded: true, swap: {swap}}}")
    deployment: Any = SimpleNamespace(notes={})
    committed: Any = SimpleNamespace(bridge=object(), service=0.010)
    await preflight._check_load(config, load, deployment, committed)  # type: ignore[arg-type]
    return dict(deployment.notes)


async def test_proceed_tells_what_will_be_shed() -> None:
    notes = await check(Load(150.0))
    assert notes["bridge"] == {"capacity_per_s": 100.0, "load_per_s": 150.0, "shed_per_s": 50.0}


async def test_refuse() -> None:
    with pytest.raises(Refused, match="150 requests a second, the bridge answers 100") as refused:
        await check(Load(150.0), on_weak_bridge="refuse")
    assert refused.value.code == "WEAK_BRIDGE"
    assert "bridge" in await check(Load(99.0), on_weak_bridge="refuse")


async def test_wait_for_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "QUIET_EVERY", 0.01)
    load = Load(150.0)
    waiting = asyncio.create_task(check(load, on_weak_bridge="wait_for_quiet"))
    while load.asked < 4:
        await asyncio.sleep(0.01)
    assert not waiting.done()
    load.value = 50.0
    assert (await asyncio.wait_for(waiting, 5))["waits_for_quiet"] is False


async def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "QUIET_EVERY", 0.01)
    with pytest.raises(Refused, match=r"quiet_timeout|did not get quiet within 0\.05 s") as refused:
        await asyncio.wait_for(check(Load(150.0), on_weak_bridge="wait_for_quiet", quiet_timeout=0.05), 5)
    assert refused.value.code == "WEAK_BRIDGE"
