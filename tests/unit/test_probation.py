"""Probation with fakes: what sends a new model back, what does not, and that nothing is left of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.config import ProbationConfig
from agent.errors import Cancelled, ExecutorDied, ProofFailed, SlotdError, SlotError, Unavailable
from agent.serving.dataplane import Trouble
from agent.slot import probation as module
from agent.slot.arbiter import Arbiter, Phase, Turn
from agent.slot.probation import Probation
from drivers.base import SlotHealth

NEW = "sha256:new"


class Bench:
    """The slot executor of a new model, in its probation."""

    def __init__(self, *, min_requests: int = 3) -> None:
        self.arbiter = Arbiter(committed="sha256:old")
        self.turn = Turn("d", "wish", digest=NEW)
        self.arbiter.ask(self.turn)
        self.arbiter.enter(self.turn, Phase.PROBATION)
        self.model = SimpleNamespace(digest=NEW, name="new")
        self.resident: Any = SimpleNamespace(model=self.model)
        self.on_death: list[Any] = []
        self.counters = SimpleNamespace(by_slot=0)
        self.listeners: list[Any] = []
        self.tied = True
        self.lock_broken = 0
        self.steps: list[str] = []
        self.proof: Exception | None = None
        self.load_gate: asyncio.Event | None = None
        self.health = SlotHealth()
        self.seat = self.fresh()
        self.first = self.seat
        self.deployment: Any = SimpleNamespace(turn=self.turn, notes={}, called_off=asyncio.Event())
        self.watch = Probation(
            ProbationConfig(duration=0.1, min_requests=min_requests),
            self.arbiter,
            SimpleNamespace(counters=self.counters, on_trouble=self.on_trouble),  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            self.resident,
        )

    def fresh(self) -> Any:
        self.seat = SimpleNamespace(key=id(object()), model=self.model, worker=SimpleNamespace(alive=True))
        return self.seat

    def on_trouble(self, callback: Any) -> Any:
        self.listeners.append(callback)
        return lambda: self.listeners.remove(callback)

    def die(self) -> None:
        seat, self.seat = self.seat, None
        seat.worker.alive = False
        for listener in tuple(self.on_death):
            listener(seat, ExecutorDied("it ended"))

    def trouble(self, kind: str, digest: str = NEW) -> None:
        for listener in self.listeners:
            listener(Trouble(kind, 1, digest, Unavailable("silent", code="DEVICE_HUNG")))

    # --- as the installer and the trials ------------------------------------------------------------------------------

    async def read_health(self) -> SlotHealth:
        return self.health

    async def prove(self, resident: Any, *, seed: int = 0) -> Any:
        self.steps.append("prove")
        await asyncio.sleep(0.005)
        if self.proof is not None:
            raise self.proof
        return SimpleNamespace(cases=1)

    async def release(self) -> None:
        self.steps.append("release")

    async def program(self, model: Any) -> None:
        self.steps.append("program")

    async def load(self, resident: Any) -> Any:
        self.steps.append("load")
        if self.load_gate is not None:
            try:
                await self.load_gate.wait()
            finally:
                await asyncio.sleep(0.02)  # a child is being reaped
                self.steps.append("loaded")
        return self.fresh()

    def trust(self, resident: Any, report: Any) -> None:
        self.steps.append("trust")

    async def verdict(self, key: int) -> bool:
        await asyncio.sleep(0.01)
        return self.tied

    async def run(self, seconds: float = 0.1) -> None:
        try:
            async with asyncio.timeout(5):
                await self.watch.watch(self.deployment, seconds, self.first)
        finally:
            assert self.on_death == []
            assert self.listeners == []
            assert not [task for task in asyncio.all_tasks() if task.get_name() == "probation-judge"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with capture_logs():
        yield


async def test_without_traffic_proof_cases_count() -> None:
    bench = Bench()
    await bench.run()
    assert bench.deployment.notes["probation"] == {"answers": 3, "proof_cases": 3}


async def test_with_traffic_none_are_needed() -> None:
    bench = Bench()
    asyncio.get_running_loop().call_later(0.02, setattr, bench.counters, "by_slot", 10)
    await bench.run()
    assert bench.steps == []


async def test_a_hang_sends_it_back_another_models_does_not() -> None:
    bench = Bench()
    asyncio.get_running_loop().call_later(0.02, bench.trouble, "slot", "sha256:old")
    await bench.run()
    bench = Bench()
    asyncio.get_running_loop().call_later(0.02, bench.trouble, "slot")
    with pytest.raises(Unavailable):
        await bench.run()


async def test_internal_errors_send_it_back() -> None:
    bench = Bench()
    for delay in (0.01, 0.02):
        asyncio.get_running_loop().call_later(delay, bench.trouble, "internal")
    with pytest.raises(ProofFailed) as failed:
        await bench.run(1.0)
    assert failed.value.code == "TOO_MANY_ERRORS"


async def test_heat_sends_it_back() -> None:
    bench = Bench()
    bench.health = SlotHealth(temperature_c=120.0, tripped=True)
    with pytest.raises(SlotError) as failed:
        await bench.run()
    assert failed.value.code == "OVER_TEMPERATURE"


async def test_called_off() -> None:
    bench = Bench()
    bench.turn.called_off = Cancelled("no")
    asyncio.get_running_loop().call_later(0.02, bench.deployment.called_off.set)
    with pytest.raises(Cancelled):
        await bench.run(60.0)


@pytest.mark.parametrize("tied", [True, False])
async def test_a_death(tied: bool) -> None:
    bench = Bench()
    bench.tied = tied
    asyncio.get_running_loop().call_later(0.02, bench.die)
    if tied:
        await bench.run(0.3)
        assert bench.steps[:5] == ["release", "program", "load", "prove", "trust"]
    else:
        with pytest.raises(ExecutorDied):
            await bench.run(0.3)
        assert bench.steps == []


async def test_a_death_during_a_proof_case_is_judged_too() -> None:
    """The proof failed with the executor, and a request that had ended it sent the model back."""
    bench = Bench()
    bench.proof = ExecutorDied("it ended")
    asyncio.get_running_loop().call_later(0.02, bench.die)

    async def cure() -> None:
        await asyncio.sleep(0.025)
        bench.proof = None

    curing = asyncio.create_task(cure())
    await bench.run(0.02)
    await curing
    assert "trust" in bench.steps


async def test_a_death_that_nobody_hears_of_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARD", 0.05)
    bench = Bench()
    bench.proof = ExecutorDied("it ended")
    bench.seat.worker.alive = False
    with pytest.raises(ExecutorDied):
        await bench.run(0.02)


async def test_the_bridges_death_does_not_speak_against_the_slot() -> None:
    bench = Bench()
    bench.proof = ExecutorDied("the bridge ended")
    asyncio.get_running_loop().call_later(0.012, setattr, bench, "proof", None)
    await bench.run(0.01)
    bench = Bench()
    bench.proof = ExecutorDied("the bridge ended")
    with pytest.raises(ExecutorDied):
        await bench.run(0.01)


@pytest.mark.parametrize("tied", [True, False])
async def test_a_death_before_anybody_listens(tied: bool) -> None:
    """With min_requests 0 a model was committed whose executor had ended at the switch."""
    bench = Bench(min_requests=0)
    bench.tied = tied
    bench.die()
    if tied:
        await bench.run(0.05)
        assert "trust" in bench.steps
    else:
        with pytest.raises(ExecutorDied):
            await bench.run(0.05)


async def test_the_end_waits_for_who_holds_the_device() -> None:
    """The roll-back began while the executor that was being loaded still had the device."""
    bench = Bench()
    bench.load_gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, bench.die)
    asyncio.get_running_loop().call_later(0.06, bench.trouble, "slot")
    with pytest.raises(Unavailable):
        await bench.run(60.0)
    assert bench.steps[-1] == "loaded"


async def test_our_own_mistake_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited for ever for an executor that nobody loaded any more."""
    bench = Bench()

    async def mistake(_: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(bench, "program", mistake)
    asyncio.get_running_loop().call_later(0.01, bench.die)
    with pytest.raises(SlotdError, match="unforeseen"):
        await bench.run(0.3)
