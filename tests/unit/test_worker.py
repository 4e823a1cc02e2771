"""Children of the agent: calls and answers, cancels, death, lies, and how they are ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import structlog

from agent.errors import DeadlineExceeded, ExecutorDied, ExecutorError, InvalidInput, Overloaded, SlotError
from agent.executor.client import Launch, Region, Worker
from agent.executor.sandbox import probe
from agent.model.signature import Strings, Tensor
from support.children import DecodedMemory, launch, open_files, soon, start
from support.hash_child import digest, filler
from support.lying_child import LIES
from support.stall import stall_probe


def order(seed: int, wait: int, *sizes: int) -> np.ndarray:
    """What the hash child is told: it answers a digest and outputs of these sizes."""
    return np.array([seed, 1 + len(sizes), wait, *sizes], np.int64)


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = await start("hash_child")
    yield worker
    await worker.stop(grace=5)


async def ask(worker: Worker, *tensors: Tensor | Region, sizes: tuple[int, ...] = (), reserve: tuple[int, ...] = ()):
    """One right answer, checked."""
    inputs = [(0, order(5, 0, *sizes)), *enumerate(tensors, 1)]
    reply = await worker.submit(inputs, deadline_ns=soon(), reserve=reserve).result
    plain = {i: tensor.tensor() if isinstance(tensor, Region) else tensor for i, tensor in enumerate(tensors, 1)}
    assert np.array_equal(reply.outputs[0], digest(plain))
    for place, size in enumerate(sizes, 1):
        wanted, got = filler(5, place, size), reply.outputs[place]
        if isinstance(wanted, Strings):
            assert isinstance(got, Strings) and list(got.items) == wanted.items
        else:
            assert np.array_equal(got, wanted)
    return reply


async def test_numbers_and_strings_go_and_come_back(worker: Worker) -> None:
    tensors = [
        np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float16),
        np.empty((0, 4), np.float64),
        np.array(3, np.uint8),
        Strings((2, 2), [b"", b"a\0b", b"\xff" * 1000, b"end\0"]),
        Strings((0,), []),
        np.arange(60)[::-7],
    ]
    with await ask(worker, *tensors, sizes=(0, 100, -3, 70_000), reserve=(32, 10, 100, 1000, 70_000)) as reply:
        assert worker.arena.used > 0
        assert not reply.outputs[0].flags.writeable
        assert reply.timings["run_ns"] > 0
    assert worker.arena.used == 0 and worker.in_flight == 0
    reply.release()
    assert worker.arena.used == 0


@pytest.mark.parametrize("reserve", [(), (32,), (0, 0, 0), (32, 1 << 20, 1 << 20), (1, 1, 1)])
async def test_outputs_of_any_size_whatever_was_reserved(worker: Worker, reserve: tuple[int, ...]) -> None:
    before = open_files()
    for _ in range(3):
        (await ask(worker, np.arange(7), sizes=(1_000_000, 5), reserve=reserve)).release()
    assert worker.arena.used == 0 and open_files() == before


async def test_overflow_lives_as_long_as_its_tensor(worker: Worker) -> None:
    before = open_files()
    reply = await ask(worker, np.arange(7), sizes=(50_000,), reserve=(32, 1))
    kept = reply.outputs[1]
    reply.release()
    await worker.stop(grace=5)
    assert np.array_equal(kept, filler(5, 1, 50_000))
    del kept
    assert open_files() < before


@pytest.mark.alone
async def test_large_tensors_do_not_hold_the_loop() -> None:
    worker = await start("hash_child", arena=256 << 20)
    large = np.random.default_rng(1).integers(0, 255, 64 << 20, np.uint8)
    names = Strings((200_000,), [b"name %d" % place for place in range(200_000)])
    async with stall_probe(0.08):
        call = worker.submit([(0, order(1, 0, -50_000)), (1, large), (2, names)], deadline_ns=soon())
        reply = await call.result
    wanted = await asyncio.to_thread(digest, {1: large, 2: names})
    assert np.array_equal(reply.outputs[0], wanted)
    assert isinstance(reply.outputs[1], Strings) and len(reply.outputs[1].items) == 50_000
    reply.release()
    await worker.stop(grace=5)
    assert worker.arena.used == 0


async def test_more_than_fits_waits_its_turn_in_order(worker: Worker) -> None:
    large = np.ones(5 << 20, np.uint8)
    calls = [worker.submit([(0, order(seed, 0)), (1, large)], deadline_ns=soon(), reserve=[32]) for seed in range(12)]
    small = worker.submit([(0, order(99, 0)), (1, np.arange(3))], deadline_ns=soon(), reserve=[32])
    assert worker.in_flight == 13
    wanted = digest({1: large})
    for call in calls:
        with await call.result as reply:
            assert np.array_equal(reply.outputs[0], wanted)
    (await small.result).release()
    assert worker.arena.used == 0 and worker.in_flight == 0


async def test_replies_that_are_kept_only_delay_the_others(worker: Worker) -> None:
    large = np.ones(7 << 20, np.uint8)
    replies = [await ask(worker, large), await ask(worker, large)]
    waiting = worker.submit([(0, order(1, 0)), (1, large)], deadline_ns=soon(), reserve=[32])
    late = worker.submit([(0, order(1, 0)), (1, large)], deadline_ns=soon(0.01), reserve=[32])
    await asyncio.sleep(0.05)
    assert not waiting.result.done()
    for reply in replies:
        reply.release()
    (await waiting.result).release()
    with pytest.raises(DeadlineExceeded):
        await late.result
    assert worker.arena.used == 0


async def test_what_can_never_fit_is_refused(worker: Worker) -> None:
    with pytest.raises(Overloaded):
        worker.submit([(0, np.ones(17 << 20, np.uint8))], deadline_ns=soon())
    with pytest.raises(InvalidInput):
        worker.submit([(0, np.ones((1,) * 9))], deadline_ns=soon())
    with pytest.raises(InvalidInput):
        worker.submit([(0, np.ones(1, np.complex64))], deadline_ns=soon())
    with pytest.raises(InvalidInput):
        worker.submit([(0, Strings((1_000_001,), [b""] * 1_000_001))], deadline_ns=soon())
    with pytest.raises(InvalidInput):
        worker.submit([(place, np.ones(1)) for place in range(33)], deadline_ns=soon())
    too_long = Strings((400_000,), [b"x" * 40] * 400_000)
    with pytest.raises(Overloaded):
        await worker.submit([(0, too_long)], deadline_ns=soon()).result
    (await ask(worker, np.ones(10 << 20, np.uint8), reserve=(32, 10 << 20))).release()
    assert worker.arena.used == 0 and worker.in_flight == 0


async def test_a_deadline_that_has_passed_is_never_run(worker: Worker) -> None:
    slow = worker.submit([(0, order(1, 100))], deadline_ns=soon())
    late = worker.submit([(0, order(2, 0))], deadline_ns=soon(0.05))
    (await slow.result).release()
    with pytest.raises(DeadlineExceeded):
        await late.result
    assert worker.arena.used == 0


async def test_errors_come_back_as_they_were(worker: Worker) -> None:
    with pytest.raises(InvalidInput, match="refused 4") as caught:
        await worker.submit([(0, order(4, -1))], deadline_ns=soon()).result
    assert caught.value.field == "input"
    with pytest.raises(ExecutorError, match="KeyError"):
        await worker.submit([(1, order(4, 0))], deadline_ns=soon()).result
    (await ask(worker, np.arange(3))).release()


async def test_a_cancelled_call_keeps_its_region_until_the_child_answers(worker: Worker) -> None:
    call = worker.submit([(0, order(1, 150)), (1, np.ones(1000))], deadline_ns=soon(), reserve=[32])
    used = worker.arena.used
    await asyncio.sleep(0.02)
    call.cancel()
    assert call.result.cancelled() and worker.in_flight == 1
    (await ask(worker, np.arange(9))).release()
    assert used > 0 and worker.arena.used == 0 and worker.in_flight == 0


async def test_a_call_cancelled_before_it_was_sent_is_never_run(worker: Worker) -> None:
    large = np.ones(12 << 20, np.uint8)
    first = worker.submit([(0, order(1, 100)), (1, large)], deadline_ns=soon())
    queued = worker.submit([(0, order(2, 10_000)), (1, large)], deadline_ns=soon())
    task = asyncio.ensure_future(worker.submit([(0, order(3, 10_000)), (1, large)], deadline_ns=soon()).result)
    await asyncio.sleep(0.01)
    queued.cancel()
    task.cancel()
    (await first.result).release()
    (await asyncio.wait_for(worker.submit([(0, order(4, 0)), (1, large)], deadline_ns=soon()).result, 5)).release()
    assert worker.arena.used == 0 and worker.in_flight == 0


async def test_a_reply_that_nobody_takes_gives_its_memory_back(worker: Worker) -> None:
    call = worker.submit([(0, order(1, 0))], deadline_ns=soon(), reserve=[32])
    await call.result
    assert worker.arena.used > 0
    del call
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert worker.arena.used == 0


async def test_a_child_that_does_not_read_makes_requests_wait(worker: Worker) -> None:
    worker.signal(signal.SIGSTOP)
    calls = [worker.submit([(0, order(seed, 0))], deadline_ns=soon(), reserve=[32]) for seed in range(3000)]
    for call in calls[::3]:
        call.cancel()
    await asyncio.sleep(0.05)
    worker.signal(signal.SIGCONT)
    for place, call in enumerate(calls):
        if place % 3:
            (await call.result).release()
    (await ask(worker, np.arange(3))).release()
    assert worker.arena.used == 0 and worker.in_flight == 0


async def test_death_ends_every_call_and_gives_everything_back() -> None:
    before = open_files()
    worker = await start("hash_child")
    kept = await ask(worker, np.arange(1000), sizes=(1000,), reserve=(32, 1000))
    calls = [worker.submit([(0, order(seed, 10_000))], deadline_ns=soon()) for seed in range(5)]
    large = [worker.submit([(0, order(9, 0)), (1, np.ones(9 << 20, np.uint8))], deadline_ns=soon()) for _ in range(3)]
    calls[1].cancel()
    worker.signal(signal.SIGKILL)
    for call in [calls[0], *calls[2:], *large]:
        with pytest.raises(ExecutorDied):
            await call.result
    end = await worker.died
    assert end.signal == signal.SIGKILL and str(end) == "SIGKILL"
    assert not worker.alive and worker.in_flight == 0
    assert np.array_equal(kept.outputs[1], filler(5, 1, 1000))
    kept.release()
    assert worker.arena.used == 0
    with pytest.raises(ExecutorDied):
        worker.submit([(0, order(1, 0))], deadline_ns=soon())
    await worker.stop(grace=1)
    del kept
    until = time.monotonic() + 5  # a copy in a thread keeps the arena until it is done
    while open_files() > before and time.monotonic() < until:
        await asyncio.sleep(0.05)
    assert open_files() == before


async def test_answers_given_before_death_still_count() -> None:
    worker = await start("hash_child")
    worker.submit([(0, order(1, 0))], deadline_ns=soon()).cancel()
    calls = [worker.submit([(0, order(seed, 0))], deadline_ns=soon(), reserve=[32]) for seed in range(20)]
    time.sleep(0.3)  # the loop does not look meanwhile
    worker.signal(signal.SIGKILL)
    for call in calls:
        (await call.result).release()
    await worker.died
    assert worker.arena.used == 0


@pytest.mark.parametrize("name", sorted(LIES))
async def test_lies_end_the_liar_and_nobody_else(name: str) -> None:
    before = open_files()
    liar = await start("lying_child", {"lie": name})
    inputs = [(0, np.arange(100))]
    calls = [liar.submit(inputs, deadline_ns=soon(), reserve=[64, 64]) for _ in range(2)]
    with structlog.testing.capture_logs() as logs:
        results = await asyncio.wait_for(asyncio.gather(*(c.result for c in calls), return_exceptions=True), 10)
        end = await asyncio.wait_for(liar.died, 10)
    assert isinstance(results[1], ExecutorDied)
    assert name in ("double_reply", "a_flood") or isinstance(results[0], ExecutorDied)
    if name == "truncates_the_arena":
        assert end.code == 7
    elif name != "an_empty_datagram":
        assert any(entry["event"] == "child_broke_the_rules" for entry in logs)
    del results, calls
    assert not liar.alive and liar.in_flight == 0
    await asyncio.sleep(0)
    assert liar.arena.used == 0
    assert open_files() == before


async def test_a_child_that_is_never_ready() -> None:
    before = open_files()
    with pytest.raises(ExecutorError) as caught:
        await Worker.start(launch("lying_child", {"lie": "silent"}), timeout=0.5)
    assert caught.value.code == "LOAD_TIMEOUT"
    with pytest.raises(ExecutorDied):
        await Worker.start(launch("lying_child", {"lie": "ready that is no JSON"}), timeout=10)
    task = asyncio.create_task(Worker.start(launch("lying_child", {"lie": "silent"}), timeout=60))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert open_files() == before
    assert not [line for line in _children() if "lying_child" in line]


async def test_last_words_reach_the_error_and_the_log() -> None:
    script = "import sys; print('no card in slot 3', file=sys.stderr); sys.exit(9)"
    odd = Launch("odd", {}, 1 << 20, 1 << 30, argv=(sys.executable, "-I", "-c", script))
    words = r"exit code 9.*no card in slot 3"
    with structlog.testing.capture_logs() as logs, pytest.raises(ExecutorDied, match=words):
        await Worker.start(odd, timeout=10)
    assert [entry["line"] for entry in logs if entry["event"] == "child_says"] == ["no card in slot 3"]
    with pytest.raises(ExecutorError, match="cannot be started"):
        await Worker.start(Launch("none", {}, 1 << 20, 1 << 30, argv=("/nonexistent",)), timeout=10)


async def test_a_chatty_child_does_not_fill_the_log() -> None:
    script = "print('x' * 100_000); [print('line', n) for n in range(100_000)]"
    odd = Launch("odd", {}, 1 << 20, 1 << 30, argv=(sys.executable, "-I", "-c", script))
    with structlog.testing.capture_logs() as logs, pytest.raises(ExecutorDied, match="line 99999"):
        await Worker.start(odd, timeout=10)
    assert len(logs) < 500


async def test_stop_lets_it_finish_then_insists() -> None:
    worker = await start("hash_child")
    call = worker.submit([(0, order(1, 100))], deadline_ns=soon(), reserve=[32])
    await worker.stop(grace=5)
    (await call.result).release()
    assert (await worker.died).code == 0

    busy = await start("hash_child")
    call = busy.submit([(0, order(1, 60_000))], deadline_ns=soon())
    await busy.stop(grace=0.2)
    assert (await busy.died).signal == signal.SIGTERM
    with pytest.raises(ExecutorDied):
        await call.result

    stopped = await start("hash_child")
    stopped.signal(signal.SIGSTOP)
    await asyncio.gather(stopped.stop(grace=0.2), stopped.stop(grace=0.2))
    assert (await stopped.died).signal == signal.SIGKILL
    assert worker.arena.used == busy.arena.used == stopped.arena.used == 0


async def test_a_child_that_will_not_die_is_said_to_be_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await start("hash_child")
    call = worker.submit([(0, order(1, 60_000))], deadline_ns=soon(), reserve=[32])
    with monkeypatch.context() as patch:
        patch.setattr(worker._process, "signal", lambda number: None)  # as if the kernel held it
        with pytest.raises(SlotError) as caught:
            await worker.stop(grace=0.05)
    assert caught.value.code == "DEVICE_STUCK"
    assert worker.arena.used > 0, "what it may still write to is not given back"
    worker.signal(signal.SIGKILL)
    await worker.died
    assert worker.arena.used == 0 and isinstance(call.result.exception(), ExecutorDied)


async def test_a_child_ends_when_the_agent_does() -> None:
    script = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[1])\n"
        "from support.children import start\n"
        "async def main():\n"
        "    worker = await start('hash_child'); print(worker.pid, flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    tests = os.path.dirname(os.path.dirname(__file__))
    parent = subprocess.Popen([sys.executable, "-c", script, tests], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    parent.kill()
    await asyncio.to_thread(parent.wait)
    parent.stdout.close()
    until = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and _state(pid) != "Z" and time.monotonic() < until:
        await asyncio.sleep(0.02)
    assert not os.path.exists(f"/proc/{pid}") or _state(pid) == "Z"


async def test_priority_is_lifted_from_outside() -> None:
    worker = await start("hash_child", idle=True)
    assert os.sched_getscheduler(worker.pid) == os.SCHED_IDLE
    worker.normal_priority()
    threads = [int(name) for name in os.listdir(f"/proc/{worker.pid}/task")]
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_OTHER}
    await worker.stop(grace=5)
    worker.normal_priority()


async def test_a_child_is_confined() -> None:
    worker = await start("hash_child")
    with open(f"/proc/{worker.pid}/status") as file:
        status = dict(line.split(":", 1) for line in file if ":" in line)
    assert status["NoNewPrivs"].strip() == "1" and status["Umask"].strip() == "0077"
    with open(f"/proc/{worker.pid}/limits") as file:
        limits = file.read()
    assert any(line.startswith("Max core file size") and line.split()[4] == "0" for line in limits.splitlines())
    assert any(line.startswith("Max data size") and line.split()[3] == str(2 << 30) for line in limits.splitlines())
    files = {os.readlink(f"/proc/{worker.pid}/fd/{fd}").split(":")[0] for fd in os.listdir(f"/proc/{worker.pid}/fd")}
    named = {name for name in files if name.startswith("/") and "memfd" not in name}
    assert named <= {"/dev/null", f"/proc/{worker.pid}"}
    with open(f"/proc/{worker.pid}/environ", "rb") as file:
        names = {entry.split(b"=")[0] for entry in file.read().split(b"\0") if entry}
    threads = {b"OPENBLAS_NUM_THREADS", b"OMP_NUM_THREADS", b"MKL_NUM_THREADS"}
    assert names <= {b"PATH", b"LANG", b"LC_ALL", b"LC_CTYPE", b"TZ", b"LD_LIBRARY_PATH"} | threads
    assert status["Seccomp"].strip() == "2" and int(status["CapPrm"], 16) == 0
    with open(f"/proc/{worker.pid}/oom_score_adj") as file:
        assert int(file.read()) >= 500
    kernel = probe()
    assert worker.ready["sandbox"] == kernel and kernel["lacks"] == []
    await worker.stop(grace=5)


# --- regions of a decoder --------------------------------------------------------------------------------------------


async def test_a_region_is_handed_on_without_a_copy() -> None:
    memory = DecodedMemory(16 << 20)
    decoder = await start("hash_child", output=memory)
    executor = await start("hash_child", maps=(memory.fd,), arena=1 << 20)
    stranger = await start("hash_child")
    decoded = await ask(decoder, np.arange(5), sizes=(4 << 20,), reserve=(32, 4 << 20))
    region = decoded.regions[1]
    assert isinstance(region, Region) and memory.used > 0 and decoder.arena.used == 0
    (await ask(executor, region, np.arange(2))).release()  # 4 MiB do not fit into its arena of 1 MiB
    (await ask(stranger, region)).release()  # which does not map it: copied
    overflow = await ask(decoder, np.arange(5), sizes=(9000,), reserve=(32, 10))
    assert isinstance(overflow.regions[1], np.ndarray)
    (await ask(executor, overflow.regions[1])).release()
    overflow.release()
    decoded.release()
    with pytest.raises(ValueError):
        _ = decoded.regions
    assert memory.used == executor.arena.used == 0
    for worker in (decoder, executor, stranger):
        await worker.stop(grace=5)
    memory.close()


async def test_an_executor_that_still_reads_keeps_the_region_leased() -> None:
    memory = DecodedMemory(16 << 20)
    decoder = await start("hash_child", output=memory)
    executor = await start("hash_child", maps=(memory.fd,))
    decoded = await ask(decoder, np.arange(5), sizes=(1000,), reserve=(32, 1000))
    call = executor.submit([(0, order(1, 10_000)), (1, decoded.regions[1])], deadline_ns=soon())
    decoded.release()
    call.cancel()
    await asyncio.sleep(0.05)
    assert memory.used > 0, "the executor has not answered"
    executor.signal(signal.SIGKILL)
    await executor.died
    assert memory.used == 0
    await decoder.stop(grace=5)
    memory.close()


async def test_a_decoders_memory_outlives_it() -> None:
    memory = DecodedMemory(1 << 20)
    first = await start("hash_child", output=memory)
    executor = await start("hash_child", maps=(memory.fd,))
    decoded = await ask(first, np.arange(5), sizes=(100_000,), reserve=(32, 100_000))
    lost = first.submit([(0, order(1, 10_000))], deadline_ns=soon(), reserve=[32, 800_000])
    full = first.submit([(0, order(1, 0))], deadline_ns=soon(), reserve=[900_000])
    first.signal(signal.SIGKILL)
    for call in (lost, full):
        with pytest.raises(ExecutorDied):
            await call.result
    await first.died
    second = await start("hash_child", output=memory)
    again = await ask(second, np.arange(6), sizes=(800_000,), reserve=(32, 800_000))
    for reply in (decoded, again):
        (await ask(executor, reply.regions[1])).release()
        reply.release()
    with pytest.raises(Overloaded):
        second.submit([(0, order(1, 0))], deadline_ns=soon(), reserve=[2 << 20])
    assert memory.used == 0
    for worker in (second, executor):
        await worker.stop(grace=5)
    memory.close()


async def test_an_executor_cannot_write_where_a_decoder_does() -> None:
    memory = DecodedMemory(1 << 20)
    executor = await start("hash_child", maps=(memory.fd,))
    with open(f"/proc/{executor.pid}/maps") as file:
        modes = [line.split()[1] for line in file if "slotd-pictures" in line]
    assert modes == ["r--s"]
    await executor.stop(grace=5)
    memory.close()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


def _children() -> list[str]:
    return subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True
    ).stdout.splitlines()
