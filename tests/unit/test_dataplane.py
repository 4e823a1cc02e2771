"""Predict without processes: who answers, what a hang and a death cost, what is left when a caller goes away."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from agent.config import ServingConfig
from agent.errors import (
    DeadlineExceeded,
    ExecutorDied,
    ExecutorError,
    InvalidInput,
    NotFound,
    Overloaded,
    Poison,
    SlotdError,
    SlotError,
    Unavailable,
)
from agent.executor.seat import Prepared, Seat
from agent.serving import dataplane as module
from agent.serving.dataplane import Dataplane, Request, Trouble
from agent.slot.admission import Admission
from agent.slot.arbiter import Arbiter, Continuity, On, Phase, Turn
from support.fake_executor import FakeReply, FakeWorker, fake_model, fake_seat, x

OLD, NEW = "sha256:old", "sha256:new"


class Retrier:
    """Remembers who was tried again, and answers with scale 5."""

    def __init__(self) -> None:
        self.tried: list[Seat] = []
        self.poison = False
        self.seen: list[Mapping[str, Any]] = []
        self.refused: SlotdError | None = None

    async def known(self, digest: str, inputs: Mapping[str, Any]) -> SlotdError | None:
        self.seen.append(inputs)
        return self.refused

    async def retry(
        self, seat: Seat, inputs: Mapping[str, Any], prepared: Prepared | None, deadline: float
    ) -> tuple[Seat, Any]:
        self.tried.append(seat)
        if prepared is not None:
            prepared.release()
        if self.poison:
            raise Poison("both ended")
        spare = fake_seat(FakeWorker(scale=5.0), "bridge", seat.model)
        return spare, FakeReply([inputs["x:0"] * 5, inputs["x:0"] * -5])


class Bench:
    """A slot and a bridge of one model, both seated; the slot is trusted."""

    def __init__(self, *, known: bool = True, **config: Any) -> None:
        self.arbiter = Arbiter(committed=OLD)
        self.admission = Admission(max_queue=64, max_wait=10.0)
        self.retrier = Retrier()
        self.plane = Dataplane(self.arbiter, self.admission, ServingConfig(**config), self.retrier)
        self.arbiter.on_change = self.plane.changed
        self.slot, self.bridge = FakeWorker(scale=2.0), FakeWorker(scale=2.5)
        self.bridge_seat = self.add_bridge(self.bridge)
        self.slot_seat = self.add_slot(self.slot)
        if known:
            place = self.admission.places[self.slot.generation]
            for _ in range(module.HANG_KNOWN):
                place.started(0.0)
                place.ended(0.001, 0.001)
        self.troubles: list[Trouble] = []
        self.plane.on_trouble(self.troubles.append)

    def add_bridge(self, worker: FakeWorker, model: Any = None) -> Seat:
        seat = fake_seat(worker, "bridge", model)
        self.plane.seat(seat, on=On.BRIDGE, service=0.001)
        self.arbiter.bridge_ready(seat.model.digest, seat.key)
        return seat

    def add_slot(self, worker: FakeWorker, model: Any = None) -> Seat:
        seat = fake_seat(worker, "slot", model)
        self.plane.seat(seat, on=On.SLOT, service=0.001)
        self.arbiter.slot_loaded(seat.model.digest, seat.key)
        self.arbiter.slot_trusted(seat.key)
        return seat

    def release_slot(self) -> None:
        """As the installer does."""
        self.slot_seat.retired = True
        self.arbiter.slot_gone(self.slot_seat.key)
        self.plane.unseat(self.slot_seat.key)
        self.slot.die()

    async def ask(self, value: float = 1.0, **request: Any) -> tuple[float, str]:
        """What x was multiplied with, and who did it."""
        answer = await self.plane.predict(Request({"x": x(value)}, **{"timeout": 5.0, **request}))
        with answer:
            return float(answer.outputs["y"][0, 0]) / value, answer.served_by

    def asking(self, value: float = 1.0, **request: Any) -> asyncio.Task[tuple[float, str]]:
        return asyncio.create_task(self.ask(value, **request))

    def idle(self) -> None:
        """Every place is given back, nobody waits."""
        assert [place.busy for place in self.admission.places.values()] == [0] * len(self.admission.places)
        assert self.admission.queue == []
        assert self.plane._waiters == {}


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "x:0"])
async def test_names_with_and_without_zero(name: str) -> None:
    bench = Bench()
    for outputs in ((), ("y",), ("z",), ("z:0", "y"), ("y:0",)):
        with await bench.plane.predict(Request({name: x()}, outputs=outputs)) as answer:
            assert set(answer.outputs) == set(outputs or ("y", "z:0"))
            for wanted, tensor in answer.outputs.items():
                np.testing.assert_array_equal(tensor, x() * (-2 if wanted.startswith("z") else 2))
    bench.idle()


@pytest.mark.parametrize(
    ("request_", "kind", "field"),
    [
        (Request({"w": x()}), InvalidInput, "w"),
        (Request({}), InvalidInput, "x:0"),
        (Request({"x": x(), "x:0": x()}), InvalidInput, "x:0"),
        (Request({"x": x().astype(np.float64)}), InvalidInput, "x"),
        (Request({"x": np.zeros((1, 5), np.float32)}), InvalidInput, "x"),
        (Request({"x": x()}, outputs=("nothing",)), InvalidInput, "nothing"),
        (Request({"x": x()}, model="other"), NotFound, "model"),
        (Request({"x": x()}, version=2), NotFound, "version"),
        (Request({"x": x()}, timeout=0.0), DeadlineExceeded, None),
        (Request({"x": x()}, timeout=-1.0), DeadlineExceeded, None),
    ],
)
async def test_what_is_refused(request_: Request, kind: type[SlotdError], field: str | None) -> None:
    bench = Bench()
    with pytest.raises(kind) as refused:
        await bench.plane.predict(request_)
    assert refused.value.field == field
    assert bench.slot.calls == bench.bridge.calls == []
    assert bench.troubles == []
    bench.idle()


async def test_a_long_deadline_is_cut_and_none_is_the_longest() -> None:
    bench = Bench(max_deadline=2.0)
    for timeout in (None, 1000.0):
        await bench.ask(timeout=timeout)
    now = asyncio.get_running_loop().time()
    assert all(call.deadline_ns / 1e9 <= now + 2.0 for call in bench.slot.calls)


async def test_poison_is_known_by_the_models_own_names() -> None:
    """With the client's names, `x` for `x:0`, it was never recognised, and ended one executor after the other."""
    bench = Bench()
    await bench.ask()
    assert all(list(seen) == ["x:0"] for seen in bench.retrier.seen)
    bench.retrier.refused = Poison("known")
    with pytest.raises(Poison):
        await bench.ask()
    assert len(bench.slot.calls) == 1
    assert bench.troubles == []
    bench.idle()


# --- hangs ------------------------------------------------------------------------------------------------------------


async def test_a_silent_slot_is_backed_by_the_bridge_and_two_make_it_suspect() -> None:
    bench = Bench()
    bench.slot.delay = None
    assert await bench.ask() == (2.5, "bridge")
    assert bench.plane.counters.hedged == 1
    await asyncio.sleep(module.HANG_CONFIRM + 0.1)
    assert bench.troubles == []
    assert await bench.ask() == (2.5, "bridge")
    await asyncio.sleep(module.HANG_CONFIRM + 0.1)
    assert [(trouble.kind, trouble.key) for trouble in bench.troubles] == [("slot", bench.slot_seat.key)]
    assert bench.plane.busy(bench.slot_seat.key) == 2, "the regions are still the executor's"
    for call in bench.slot.calls:
        call.answer()
    await settle()
    bench.idle()


async def test_a_late_answer_clears_the_slot() -> None:
    bench = Bench()
    bench.slot.delay = None
    await asyncio.gather(bench.ask(), bench.ask())
    for call in bench.slot.calls:
        call.answer()
    await asyncio.sleep(module.HANG_CONFIRM + 0.1)
    assert bench.troubles == []
    bench.idle()


@pytest.mark.alone
async def test_short_deadlines_bring_a_slow_slot_into_no_doubt() -> None:
    bench = Bench()
    bench.slot.delay = 0.03
    for _ in range(5):
        with pytest.raises(DeadlineExceeded):
            await bench.ask(timeout=0.01)
        await asyncio.sleep(0.03)
    await asyncio.sleep(module.HANG_CONFIRM + 0.1)
    assert bench.troubles == []
    assert bench.bridge.calls == []
    bench.idle()


@pytest.mark.alone
async def test_a_deadline_not_much_beyond_a_hangs_time_is_kept() -> None:
    """Between one and two times the patience there was no hedge at all."""
    bench = Bench()
    bench.slot.delay = None
    assert await bench.ask(timeout=0.09) == (2.5, "bridge")


async def test_no_hedge_where_the_bridge_would_be_too_late() -> None:
    bench = Bench()
    bench.slot.delay = None
    bench.admission.places[bench.bridge_seat.key].service = 1.0
    with pytest.raises(DeadlineExceeded):
        await bench.ask(timeout=0.2)
    assert bench.bridge.calls == []


async def test_the_slot_may_still_win() -> None:
    bench = Bench()
    bench.slot.delay, bench.bridge.delay = 0.4, 2.0
    assert await bench.ask() == (2.0, "slot")
    assert bench.bridge.calls[0].cancelled
    bench.bridge.calls[0].answer()
    await settle()
    bench.idle()


async def test_the_models_own_refusal_is_told_at_once_though_the_slot_is_silent() -> None:
    """It was told when the deadline was over."""
    bench = Bench()
    bench.slot.delay, bench.bridge.error = None, InvalidInput("no picture", field="x")
    async with asyncio.timeout(1.0):
        with pytest.raises(InvalidInput):
            await bench.ask(timeout=30.0)


async def test_a_bridge_that_ends_while_it_stands_in_makes_a_suspect() -> None:
    """The request waited for the silent slot until its deadline."""
    bench = Bench()
    bench.slot.delay = None
    bench.bridge.deadly = lambda x: True
    async with asyncio.timeout(1.0):
        assert await bench.ask(timeout=30.0) == (5.0, "bridge")
    assert len(bench.retrier.tried) == 1


async def test_a_bridge_that_fails_otherwise_leaves_the_slot_its_time() -> None:
    bench = Bench()
    bench.slot.delay, bench.bridge.error = 0.2, ExecutorError("out of memory", code="OUT_OF_MEMORY")
    assert await bench.ask() == (2.0, "slot")


async def test_a_device_fault_is_answered_by_the_bridge() -> None:
    """Clients got the slot's UNAVAILABLE though a bridge was there, and nothing was said against the slot."""
    bench = Bench()
    bench.slot.error = SlotError("the device is lost", code="DEVICE_HUNG")
    assert await bench.ask() == (2.5, "bridge")
    assert bench.troubles == []
    assert await bench.ask() == (2.5, "bridge")
    assert [trouble.kind for trouble in bench.troubles] == ["slot"]
    assert bench.troubles[0].error.code == "DEVICE_HUNG"
    await settle()
    bench.idle()


async def test_a_device_fault_now_and_then_is_no_trouble() -> None:
    bench = Bench()
    for _ in range(5):
        bench.slot.error = SlotError("once")
        assert await bench.ask() == (2.5, "bridge")
        bench.slot.error = None
        assert await bench.ask() == (2.0, "slot")
    assert bench.troubles == []


async def test_a_device_fault_without_a_bridge_is_told() -> None:
    bench = Bench()
    bench.slot.error = SlotError("the device is lost", code="DEVICE_HUNG")
    bench.arbiter.bridge_gone(OLD)
    bench.plane.unseat(bench.bridge_seat.key)
    with pytest.raises(SlotError):
        await bench.ask()
    bench.idle()


# --- deaths -----------------------------------------------------------------------------------------------------------


async def test_a_death_is_tried_again() -> None:
    bench = Bench()
    bench.slot.delay = None
    asking = [bench.asking() for _ in range(2)]
    await settle()
    bench.slot.die()
    assert [await one for one in asking] == [(5.0, "bridge")] * 2
    assert bench.retrier.tried == [bench.slot_seat] * 2
    assert bench.bridge.calls == [], "the bridge runs only what has killed nothing"
    assert bench.troubles == []
    bench.idle()


async def test_poison_is_told_its_sender_and_speaks_against_nobody() -> None:
    bench = Bench()
    bench.slot.deadly = lambda x: True
    bench.retrier.poison = True
    with pytest.raises(Poison):
        await bench.ask()
    assert bench.troubles == []
    assert bench.plane.counters.failed == 1
    bench.idle()


async def test_what_a_dead_executor_never_saw_is_no_suspect() -> None:
    """Each of them was tried alone in a disposable executor, one after the other."""
    bench = Bench()
    bench.slot.alive = False  # it has ended; nobody has heard of it yet
    asking = [bench.asking() for _ in range(10)]
    await asyncio.sleep(0.01)
    assert not any(one.done() for one in asking)
    bench.arbiter.slot_gone(bench.slot_seat.key, ExecutorDied("it ended"))
    assert [await one for one in asking] == [(2.5, "bridge")] * 10
    assert bench.retrier.tried == []
    bench.idle()


async def test_a_death_while_it_hangs_is_decided_by_the_bridge() -> None:
    bench = Bench()
    bench.slot.delay, bench.bridge.delay = None, 0.1
    asking = bench.asking()
    await asyncio.sleep(0.08)
    bench.slot.die()
    assert await asking == (2.5, "bridge")
    bench.idle()


async def test_a_retired_executor_takes_nobody_with_it() -> None:
    bench = Bench()
    bench.slot.delay = None
    asking = [bench.asking() for _ in range(4)]  # two in the slot, two queued
    await settle()
    bench.release_slot()
    assert [await one for one in asking] == [(2.5, "bridge")] * 4
    assert bench.retrier.tried == []
    bench.idle()


async def test_an_executor_retired_between_hand_over_and_start() -> None:
    bench = Bench()
    bench.slot.delay = None
    first = [bench.asking() for _ in range(2)]
    await settle()
    third = bench.asking()
    await settle()
    for call in bench.slot.calls:
        call.answer()  # the third is handed over in this turn of the loop
    bench.release_slot()
    await asyncio.gather(*first)
    assert await third == (2.5, "bridge")
    bench.idle()


async def test_without_a_retrier_the_death_is_told() -> None:
    bench = Bench()
    bench.plane.retrier = None
    bench.slot.deadly = lambda x: True
    with pytest.raises(ExecutorDied):
        await bench.ask()
    bench.idle()


# --- swaps ------------------------------------------------------------------------------------------------------------


async def test_a_request_is_checked_against_the_model_that_runs_it() -> None:
    bench = Bench()
    bench.slot.delay = None
    pinned = [bench.asking(version=1) for _ in range(3)]
    free = bench.asking()
    await settle()
    model = fake_model(NEW, version=2)
    new = bench.add_bridge(FakeWorker(scale=7.0), model)
    bench.arbiter.committed = NEW
    bench.release_slot()
    bench.plane.changed()
    results = await asyncio.gather(*pinned, return_exceptions=True)
    assert all(isinstance(result, NotFound) for result in results), results
    assert await free == (7.0, "bridge")
    assert new.worker.calls  # type: ignore[attr-defined]
    bench.idle()


async def test_the_new_model_waits_for_the_old_ones_answers() -> None:
    bench = Bench()
    bench.release_slot()
    bench.bridge.delay = None
    old = bench.asking()
    await settle()
    turn = Turn("d", "new", digest=NEW)
    bench.arbiter.ask(turn)
    slot = FakeWorker(scale=7.0)
    bench.add_bridge(FakeWorker(scale=7.5), fake_model(NEW))
    bench.add_slot(slot, fake_model(NEW))
    bench.arbiter.enter(turn, Phase.SWITCH)
    new = bench.asking()
    await asyncio.sleep(0.06)
    assert slot.calls == []
    bench.bridge.calls[0].answer()
    assert await old == (2.5, "bridge")
    assert await new == (7.0, "slot")
    bench.idle()


async def test_queue_waits_and_reject_refuses() -> None:
    for continuity in (Continuity.QUEUE, Continuity.REJECT):
        bench = Bench()
        bench.arbiter.continuity = continuity
        turn = Turn("d", "new", digest=NEW)
        bench.arbiter.ask(turn)
        bench.arbiter.enter(turn, Phase.DRAIN)
        if continuity is Continuity.REJECT:
            with pytest.raises(Unavailable) as refused:
                await bench.ask()
            assert refused.value.retry_after
            continue
        asking = bench.asking()
        await asyncio.sleep(0.02)
        assert not asking.done()
        bench.arbiter.failed(turn, SlotError("no"))
        assert await asking == (2.0, "slot")
        bench.idle()


async def test_those_who_wait_are_told_when_nobody_answers_any_more() -> None:
    bench = Bench()
    bench.slot.delay = None
    asking = [bench.asking() for _ in range(3)]
    await settle()
    bench.arbiter.bridge_gone(OLD)
    bench.plane.unseat(bench.bridge_seat.key)
    bench.arbiter.slot_doubted(bench.slot_seat.key, SlotError("hangs"))
    with pytest.raises(Unavailable):
        await asking[2]
    for call in bench.slot.calls:
        call.answer()
    await asyncio.gather(*asking[:2])
    bench.idle()


async def test_who_is_overtaken_is_told_at_once() -> None:
    bench = Bench()
    bench.slot.delay = None
    bench.admission.max_queue = 2
    places = bench.slot_seat.window
    asking = [bench.asking() for _ in range(places + 2)]
    await settle()
    with pytest.raises(Overloaded):
        await bench.ask()
    urgent = bench.asking(priority=9)
    await settle()
    with pytest.raises(Overloaded, match="more urgent"):
        await asyncio.wait_for(asking[-1], 1.0)
    while any(not one.done() for one in (*asking, urgent)):
        for call in bench.slot.calls:
            if not call.result.done():
                call.answer()
        await settle()
    assert urgent.result()[1] == "slot"
    bench.idle()


async def test_what_the_slower_one_cannot_do_is_shed() -> None:
    bench = Bench()
    bench.slot.delay = bench.bridge.delay = None
    bench.admission.places[bench.bridge_seat.key].service = 0.5
    asking = [bench.asking(timeout=3.0) for _ in range(20)]
    await settle()
    bench.arbiter.slot_doubted(bench.slot_seat.key, SlotError("hangs"))
    await settle()
    shed = [one for one in asking if one.done()]
    assert len(shed) > 8
    for one in shed:
        with pytest.raises(Overloaded):
            one.result()
    for one in asking:
        one.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    for worker in (bench.slot, bench.bridge):
        for call in worker.calls:
            call.answer()
    await settle()
    bench.idle()


# --- callers that go away ---------------------------------------------------------------------------------------------


async def test_the_deadline_passes_in_the_queue() -> None:
    bench = Bench()
    bench.slot.delay = None
    first = [bench.asking() for _ in range(2)]
    await settle()
    with pytest.raises(DeadlineExceeded):
        await bench.ask(timeout=0.03)
    assert len(bench.slot.calls) == 2, "it was not run"
    for call in bench.slot.calls:
        call.answer()
    await asyncio.gather(*first)
    await settle()
    bench.idle()


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("queued", [False, True])
async def test_cancelled_at_each_await(turns: int, queued: bool) -> None:
    bench = Bench()
    bench.slot.delay = 0.0 if not queued else 0.005
    before = [bench.asking() for _ in range(2 if queued else 0)]
    await settle()
    asking = bench.asking()
    for _ in range(turns):
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait((asking,))
    await asyncio.gather(*before)
    await asyncio.sleep(0.02)
    bench.idle()
    assert await bench.ask() == (2.0, "slot")


async def test_cancelled_in_a_hang_and_in_a_race() -> None:
    bench = Bench()
    bench.slot.delay = bench.bridge.delay = None
    for wait in (0.02, 0.08):
        asking = bench.asking()
        await asyncio.sleep(wait)
        asking.cancel()
        await asyncio.wait((asking,))
    assert bench.plane.busy(bench.slot_seat.key) == 2
    await asyncio.sleep(module.HANG_CONFIRM + 0.2)
    assert [trouble.kind for trouble in bench.troubles] == ["slot"], "a hang is seen though the clients have gone"
    for worker in (bench.slot, bench.bridge):
        for call in worker.calls:
            call.answer()
    await settle()
    bench.idle()


async def test_answers_are_released_once() -> None:
    bench = Bench()
    answer = await bench.plane.predict(Request({"x": x()}))
    reply = bench.slot.calls[0].reply
    assert reply is not None
    assert reply.released == 0
    answer.release()
    assert reply.released == 1
    assert answer.outputs == {}
    gc.collect()
    assert bench.plane.counters.by_slot == 1
