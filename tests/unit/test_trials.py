"""Requests whose executor ended: who is poison, what is remembered, what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from agent.errors import DeadlineExceeded, ExecutorDied, InvalidInput, Poison, SlotError, Unavailable
from agent.executor.seat import Decoders, Prepared, Seat
from agent.model.signature import Strings
from agent.serving import trials as module
from agent.serving.trials import Trials
from support.fake_executor import FakeReply, FakeWorker, fake_model, fake_seat, x

DIGEST = "sha256:old"


class Watched(Prepared):
    """Tells whether it was given back."""

    released = False

    def release(self) -> None:
        self.released = True


class Bench:
    """Disposable executors are fakes; inputs of 13 end each of them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.spawned: list[Seat] = []
        self.discarded: list[Seat] = []
        self.spawn_error: Exception | None = None
        self.discard_error: Exception | None = None
        self.spawn_time = 0.0
        self.delay: float | None = 0.0
        self.decoders = Decoders()
        self.trials = Trials(self.spawn, self.discard, memory=600.0, clock=lambda: self.now + self.loop.time())
        self.loop = asyncio.get_running_loop()

    async def spawn(self, seat: Seat, own_decoder: bool) -> Seat:
        await asyncio.sleep(self.spawn_time)
        if self.spawn_error is not None:
            raise self.spawn_error
        worker = FakeWorker(scale=5.0, delay=self.delay)
        worker.deadly = lambda x: bool(x[0, 0] == 13)
        self.spawned.append(fake_seat(worker, "bridge", seat.model))
        if not own_decoder:
            self.spawned[-1].decoders = seat.decoders
        return self.spawned[-1]

    async def discard(self, seat: Seat) -> None:
        self.discarded.append(seat)
        await seat.worker.stop(grace=1.0)
        if self.discard_error is not None:
            raise self.discard_error

    def dead(self, digest: str = DIGEST) -> Seat:
        worker = FakeWorker()
        worker.alive = False
        seat = fake_seat(worker, "slot", fake_model(digest))
        seat.decoders = self.decoders
        return seat

    async def retry(self, seat: Seat, value: float, *, left: float = 5.0) -> float:
        tensor = x(value)
        prepared = Watched([(0, tensor)], 1, None)
        try:
            _, reply = await self.trials.retry(seat, {"x:0": tensor}, prepared, self.loop.time() + self.now + left)
        finally:
            self.prepared = prepared
        return float(reply.outputs[0][0, 0]) / value

    async def known(self, value: float, digest: str = DIGEST) -> bool:
        return await self.trials.known(digest, {"x:0": x(value)}) is not None


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with capture_logs():
        bench = Bench()
        yield bench
        await bench.trials.close()
        assert len(bench.discarded) == len(bench.spawned), "each is ended"
        assert not [task for task in asyncio.all_tasks() if task.get_name() in ("trial", "trials-reaper")]


async def test_the_innocent_are_answered_by_one_executor_in_turn(bench: Bench) -> None:
    seat = bench.dead()
    assert await asyncio.gather(*(bench.retry(seat, value) for value in (1.0, 2.0, 3.0))) == [5.0] * 3
    assert len(bench.spawned) == 1
    assert not await bench.trials.verdict(seat.key)
    assert not await bench.known(1.0)
    assert bench.prepared.released


async def test_poison_is_found_among_the_innocent_and_remembered(bench: Bench) -> None:
    seat = bench.dead()
    results = await asyncio.gather(*(bench.retry(seat, value) for value in (1.0, 13.0, 3.0)), return_exceptions=True)
    assert results[0] == results[2] == 5.0
    assert isinstance(results[1], Poison)
    assert await bench.trials.verdict(seat.key)
    assert await bench.known(13.0)
    assert not await bench.known(1.0)
    assert not await bench.known(13.0, "sha256:new"), "another model may take it"
    bench.now += 601.0
    assert not await bench.known(13.0)


async def test_the_verdict_waits_for_all_suspects(bench: Bench) -> None:
    bench.spawn_time = 0.15
    seat = bench.dead()
    trying = [asyncio.create_task(bench.retry(seat, value)) for value in (1.0, 13.0)]
    assert await bench.trials.verdict(seat.key)
    await asyncio.gather(*trying, return_exceptions=True)
    assert not await bench.trials.verdict(bench.dead().key), "nobody was in its hands"


@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_a_sender_that_goes_away_is_found_out_all_the_same(bench: Bench, how: str) -> None:
    """With a short deadline poison was never found: it ended executor after executor, and deployments with them."""
    bench.spawn_time = 0.1
    seat = bench.dead()
    trying = asyncio.create_task(bench.retry(seat, 13.0, left=0.02 if how == "deadline" else 5.0))
    await asyncio.sleep(0.03)
    if how == "cancel":
        trying.cancel()
    with pytest.raises(DeadlineExceeded if how == "deadline" else asyncio.CancelledError):
        await trying
    assert await bench.trials.verdict(seat.key)
    assert await bench.known(13.0)
    assert bench.prepared.released


async def test_an_answer_that_nobody_waits_for_is_given_back(bench: Bench) -> None:
    bench.spawn_time = 0.05
    with pytest.raises(DeadlineExceeded):
        await bench.retry(bench.dead(), 1.0, left=0.01)
    await asyncio.sleep(0.1)
    reply = bench.spawned[0].worker.calls[0].reply  # type: ignore[attr-defined]
    assert isinstance(reply, FakeReply)
    assert reply.released == 1


async def test_one_that_hangs_is_given_up_and_the_next_has_a_fresh_executor(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VERDICT", 0.05)
    bench.delay = None
    with pytest.raises(DeadlineExceeded):
        await bench.retry(bench.dead(), 1.0, left=0.05)
    bench.delay = 0.0
    assert await bench.retry(bench.dead(), 1.0) == 5.0
    assert len(bench.spawned) == 2
    assert bench.discarded == bench.spawned[:1]


async def test_what_the_model_says_of_it_is_told(bench: Bench) -> None:
    await bench.retry(bench.dead(), 1.0)
    bench.spawned[0].worker.error = InvalidInput("no", field="x")  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput):
        await bench.retry(bench.dead(), 1.0)
    assert bench.discarded == []


async def test_an_executor_that_dies_while_it_loads_has_not_seen_the_request(bench: Bench) -> None:
    bench.spawn_error = ExecutorDied("killed")
    with pytest.raises(ExecutorDied):
        await bench.retry(bench.dead(), 1.0)
    assert not await bench.known(1.0)
    bench.spawn_error = Unavailable("not loaded on the CPU")
    with pytest.raises(Unavailable):
        await bench.retry(bench.dead(), 1.0)


async def test_one_that_does_not_end_is_nobodys_fault(bench: Bench) -> None:
    await bench.retry(bench.dead(), 1.0)
    bench.discard_error = SlotError("it does not end", code="DEVICE_STUCK")
    assert await bench.retry(bench.dead("sha256:new"), 1.0) == 5.0


async def test_a_decoders_death_is_not_laid_at_the_executors_door(bench: Bench) -> None:
    """The poison of a decoder excused the next death of the slot executor beside it."""
    seat = fake_seat(FakeWorker(), "slot")
    with pytest.raises(Poison):
        await bench.retry(seat, 13.0)
    seat.worker.alive = False
    assert not await bench.trials.verdict(seat.key)


async def test_memory_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_POISON", 10)
    monkeypatch.setattr(module, "MAX_SUSPECTS", 10)
    for count in range(1, 31):
        tensor = np.full((count, 4), 13.0, np.float32)
        with pytest.raises(Poison):
            await bench.trials.retry(bench.dead(), {"x:0": tensor}, Prepared([(0, tensor)], 1, None), 1e9)
    assert sum(map(len, bench.trials._poison.values())) == 10
    assert len(bench.trials._suspects) <= 10
    for _ in range(30):
        await bench.retry(bench.dead(), 1.0)
    assert len(bench.trials._suspects) <= 10


async def test_close_ends_what_is_being_tried(bench: Bench) -> None:
    bench.delay = None
    trying = asyncio.create_task(bench.retry(bench.dead(), 1.0, left=60.0))
    await asyncio.sleep(0.02)
    async with asyncio.timeout(2.0):
        await bench.trials.close()
    await asyncio.wait((trying,))
    assert bench.prepared.released


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)),
        (np.zeros(9000, np.float32), np.r_[np.zeros(8999, np.float32), np.float32(1)]),
        (Strings((1,), [b"ab"]), Strings((2,), [b"a", b"b"])),
        (Strings((2,), [b"ab", b"c"]), Strings((2,), [b"a", b"bc"])),
        (Strings((1,), [b"x" * 9000]), Strings((1,), [b"x" * 8999 + b"y"])),
    ],
)
async def test_only_the_same_bytes_are_refused(bench: Bench, one: Any, other: Any) -> None:
    await bench.trials._remember(DIGEST, {"x": one})
    assert await bench.trials.known(DIGEST, {"x": one}) is not None
    assert await bench.trials.known(DIGEST, {"x": other}) is None
    assert await bench.trials.known(DIGEST, {"y": one}) is None


async def test_the_same_ends_but_another_middle(bench: Bench) -> None:
    one, other = np.zeros(9000, np.float32), np.zeros(9000, np.float32)
    other[4500] = 1
    await bench.trials._remember(DIGEST, {"x": one})
    await bench.trials._remember(DIGEST, {"x": other})
    assert await bench.trials.known(DIGEST, {"x": one}) is not None
    other[4501] = 1
    assert await bench.trials.known(DIGEST, {"x": other}) is None


async def test_nothing_is_known_of_empty_tensors(bench: Bench) -> None:
    for empty in (np.zeros((0, 4), np.float32), Strings((0,), []), np.array(1.0, np.float32)):
        await bench.trials._remember(DIGEST, {"x": empty})
        assert await bench.trials.known(DIGEST, {"x": empty}) is not None
