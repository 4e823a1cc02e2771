"""The models on the CPU with fakes for their children: kept, lent, ended, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.config import Config
from agent.errors import ExecutorDied, ExecutorError, SlotError, StorageError, Unavailable
from agent.executor.seat import Decoders
from agent.model.signature import Strings
from agent.serving.dataplane import Dataplane
from agent.slot import residents as module
from agent.slot.admission import Admission
from agent.slot.arbiter import Answerer, Arbiter, Wait
from agent.slot.residents import Residents
from support.fake_executor import SIGNATURE, FakeWorker, fake_seat

DIGEST = "sha256:old"


def model(digest: str = DIGEST, *, image: bool = False) -> Any:
    picture = SimpleNamespace(size=(2, 2), source="x:0", to="x:0") if image else None
    spec = SimpleNamespace(image=picture, has_bridge=True, version="1", signature=None)
    return SimpleNamespace(digest=digest, name="toy", version=1, spec=spec)


class Bench:
    """`start` stands for Worker.start: it takes `seconds`, and fails with `error` as often as `failures` says."""

    def __init__(self) -> None:
        self.arbiter = Arbiter(committed=DIGEST)
        self.plane = Dataplane(self.arbiter, Admission(max_queue=10, max_wait=1.0), Config(embedded=True).serving)
        self.tasks: list[asyncio.Task[None]] = []
        config = Config.model_validate({"embedded": True, "slot": {"stop_timeout": 0.1, "drain_timeout": 0.1}})
        self.residents = Residents(config, self.arbiter, self.plane, self.spawn)
        self.workers: list[FakeWorker] = []
        self.seconds = 0.0
        self.error: Exception | None = None
        self.failures = 1 << 30
        self.make: Callable[[Any], FakeWorker] = lambda launch: FakeWorker()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    async def start(self, launch: Any, *, timeout: float) -> FakeWorker:
        await asyncio.sleep(self.seconds)
        if self.error is not None and self.failures > 0:
            self.failures -= 1
            raise self.error
        worker = self.make(launch)
        worker.role, worker.idle = launch.role, launch.idle
        self.workers.append(worker)
        return worker

    def of(self, role: str) -> list[FakeWorker]:
        return [worker for worker in self.workers if worker.role.startswith(role)]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "RESTART_FIRST", 0.01)
    monkeypatch.setattr(module, "RESTART_MAX", 0.02)
    with capture_logs():
        yield


@pytest.fixture
async def bench(quick: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    bench = Bench()

    def launch(role: str) -> Callable[..., Any]:
        return lambda *_, idle=False, **more: SimpleNamespace(role=more.get("role", role), idle=idle)

    async def measure(seat: Any, *, timeout: float, runs: int) -> float:
        return 0.01

    monkeypatch.setattr(module, "Worker", SimpleNamespace(start=bench.start))
    monkeypatch.setattr(module, "launch_model", launch("bridge"))
    monkeypatch.setattr(module, "launch_decoder", launch("decoder"))
    monkeypatch.setattr(module, "measure", measure)
    yield bench
    for worker in bench.workers:
        worker.stuck = None
    await bench.residents.close()
    assert all(not worker.alive for worker in bench.workers), "every child is ended"
    assert all(task.done() for task in bench.tasks)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_nobody_is_answered_before_the_files_are_known_to_be_whole(bench: Bench) -> None:
    intact: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    loading = asyncio.create_task(bench.residents.admit(model(), intact=intact))
    await asyncio.sleep(0.05)
    assert bench.workers and not bench.plane.seats and not loading.done()
    intact.set_result(None)
    await loading
    assert bench.plane.seats


async def test_damaged_files_end_what_was_loaded_from_them(bench: Bench) -> None:
    intact: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    intact.set_exception(StorageError("its content has changed on the disk"))
    with pytest.raises(StorageError):
        await bench.residents.admit(model(), intact=intact)
    assert not bench.plane.seats and not any(worker.alive for worker in bench.workers)


async def test_two_who_want_the_same_model_share_it(bench: Bench) -> None:
    """Both loaded it, and the first one's executors were never ended."""
    bench.seconds = 0.02
    one, other = await asyncio.gather(*(bench.residents.admit(model()) for _ in range(2)))
    assert one is other
    assert len(bench.workers) == 1


async def test_a_bridge_that_dies_is_started_again(bench: Bench) -> None:
    resident = await bench.residents.admit(model())
    first = bench.of("bridge")[0]
    bench.seconds = 0.03
    first.die()
    await bench.until(lambda: resident.bridge is None)
    assert isinstance(bench.arbiter.answerer(), Wait)
    assert resident.signature == SIGNATURE, "still known while it is away"
    await bench.until(lambda: resident.bridge is not None)
    assert isinstance(bench.arbiter.answerer(), Answerer)


async def test_a_bridge_that_cannot_be_started_keeps_nobody_waiting(bench: Bench) -> None:
    await bench.residents.admit(model())
    bench.error = ExecutorError("no")
    bench.of("bridge")[0].die()
    await bench.until(lambda: bench.failures < (1 << 30) - module.HOPELESS)
    bench.error = None
    await bench.until(lambda: isinstance(bench.arbiter.answerer(), Answerer))


async def test_one_that_is_lifted_while_it_restarts_runs_at_normal_priority(bench: Bench) -> None:
    resident = await bench.residents.admit(model(image=True), idle=True)
    assert all(worker.idle for worker in bench.workers)
    bench.seconds = 0.03
    for worker in tuple(bench.workers):
        worker.die()
    await bench.until(lambda: resident.bridge is None)
    await asyncio.sleep(0.01)
    bench.residents.lift(resident)
    await bench.until(lambda: len([worker for worker in bench.workers if worker.alive]) == 2)
    assert not any(worker.idle for worker in bench.workers if worker.alive)


async def test_a_child_that_says_nonsense_of_itself_is_ended(bench: Bench) -> None:
    def liar(_: Any) -> FakeWorker:
        worker = FakeWorker()
        worker.ready = {"signature": {"inputs": {}, "outputs": {}}, "output_names": ["y"], "executor_inputs": 3}
        return worker

    bench.make = liar
    with pytest.raises(ExecutorError, match="nonsense"):
        await bench.residents.admit(model())
    assert bench.residents.models == {}
    assert not bench.workers[0].alive


@pytest.mark.parametrize("own_decoder", [False, True])
async def test_disposable_executors_leave_no_descriptor(bench: Bench, own_decoder: bool) -> None:
    """The memory of a disposable decoder was never closed."""
    pictures = model(image=True)
    await bench.residents.admit(pictures)
    seat = fake_seat(FakeWorker(), "slot", pictures)
    before = descriptors()
    for _ in range(5):
        disposable = await bench.residents.spawn_disposable(seat, own_decoder)
        await bench.residents.discard_disposable(disposable)
    assert descriptors() == before
    bench.seconds, bench.error = 0.01, ExecutorDied("it ended while it loaded")
    for _ in range(5):
        with pytest.raises(ExecutorDied):
            await bench.residents.spawn_disposable(seat, own_decoder)
    bench.error = None
    for wait in (0.005, 0.015):
        spawning = asyncio.create_task(bench.residents.spawn_disposable(seat, own_decoder))
        await asyncio.sleep(wait)
        spawning.cancel()
        await asyncio.wait((spawning,))
        if not spawning.cancelled():
            await bench.residents.discard_disposable(spawning.result())
    await asyncio.sleep(0.05)
    assert descriptors() == before
    assert not any(worker.alive for worker in bench.of("disposable"))


async def test_without_the_model_on_the_cpu_there_is_no_second_try(bench: Bench) -> None:
    with pytest.raises(Unavailable):
        await bench.residents.spawn_disposable(fake_seat(FakeWorker(), "slot", model()), False)


async def test_dismiss_ends_the_rest_though_one_is_stuck(bench: Bench) -> None:
    """Decoders and their memory stayed when the bridge did not end."""
    before = descriptors()
    await bench.residents.admit(model(image=True))
    bench.of("bridge")[0].stuck = SlotError("it does not end", code="DEVICE_STUCK")
    with pytest.raises(SlotError):
        await bench.residents.dismiss(DIGEST)
    assert all(worker.stopped for worker in bench.workers)
    assert descriptors() == before
    assert bench.residents.models == {}


# --- decoders ---------------------------------------------------------------------------------------------------------

PICTURES = Strings((1,), [b"picture"])


def soon(seconds: float) -> int:
    return int((time.monotonic() + seconds) * 1e9)


async def test_requests_wait_for_a_decoder_that_is_being_restarted(bench: Bench) -> None:
    """With one decoder (two cores), each request that came while it was restarted failed with UNAVAILABLE."""
    resident = await bench.residents.admit(model(image=True))
    bench.seconds = 0.05
    bench.of("decoder")[0].die()
    await bench.until(lambda: not bench.of("decoder")[0].alive)
    waiting = asyncio.create_task(resident.decoders.decode(PICTURES, soon(2.0), 48))
    late = asyncio.create_task(resident.decoders.decode(PICTURES, soon(0.01), 48))
    with pytest.raises(Unavailable):
        await late
    assert (await waiting).outputs


async def test_nobody_waits_for_decoders_that_cannot_be_started(bench: Bench) -> None:
    resident = await bench.residents.admit(model(image=True))
    bench.error = ExecutorError("no")
    bench.of("decoder")[0].die()
    async with asyncio.timeout(2.0):
        with pytest.raises(Unavailable):
            await resident.decoders.decode(PICTURES, soon(60.0), 48)


async def test_who_waits_for_a_decoder_hears_that_the_model_is_dismissed(bench: Bench) -> None:
    resident = await bench.residents.admit(model(image=True))
    bench.seconds = 10.0
    bench.of("decoder")[0].die()
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(resident.decoders.decode(PICTURES, soon(60.0), 48))
    await asyncio.sleep(0.01)
    await bench.residents.dismiss(DIGEST)
    with pytest.raises(ExecutorDied):
        await waiting


async def test_decoders_that_nobody_keeps() -> None:
    with pytest.raises(ExecutorDied):
        await Decoders().decode(PICTURES, soon(60.0), 48)
