"""The slot is many times faster than the bridge: what the bridge cannot do is refused at once, the rest is in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest

from agent.serving.protos import PredictResponse
from support.host import PREDICT, Host, request_bytes
from support.tiny import scale_of

# Generator, bridge and slot share the cores of this machine; beside other work the figures are not the product's.
pytestmark = [pytest.mark.long, pytest.mark.alone]
WORK = 180
"""Multiplications that make the CPU twin tens of times slower than the simulated slot."""
DEADLINE = 1.0


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Host(
        tmp_path, slot={"options": {"device": str(tmp_path / "card"), "program_time": 4.0, "latency": 0.001}}
    ) as host:
        host.pack("tiny:1", cpu_work=WORK)
        host.pack("tiny:2", scale=3.0, version="2", cpu_work=WORK)
        done = host.deploy("tiny:1", timeout=90)
        assert done["outcome"] == "committed", done
        yield host


@dataclass
class Seen:
    """What an open-loop generator saw, by the time at which it sent."""

    answered: list[tuple[float, float, float, str]] = field(default_factory=list)
    refused: list[tuple[float, float]] = field(default_factory=list)
    other: list[tuple[float, str]] = field(default_factory=list)


async def open_loop(address: str, rate: float, over: asyncio.Event, seen: Seen) -> None:
    """Sends `rate` requests each second whether or not the ones before were answered."""
    rng = np.random.default_rng(3)
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(PREDICT)
        x = rng.normal(size=(1, 4)).astype(np.float32)
        data = request_bytes(x)

        async def one() -> None:
            start = time.monotonic()
            try:
                pending = call(data, timeout=DEADLINE)
                reply = PredictResponse.FromString(await pending)
                took = time.monotonic() - start
                metadata = dict(await pending.trailing_metadata())
                (proto,) = reply.outputs.values()
                scale = scale_of(x, np.array(proto.float_val, np.float32).reshape(1, 4))
                seen.answered.append((start, took, round(scale, 3), metadata["slotd-served-by"]))
            except grpc.aio.AioRpcError as error:
                took = time.monotonic() - start
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    seen.refused.append((start, took))
                else:
                    seen.other.append((start, f"{error.code()}: {error.details()}"))

        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            sent = 0
            while not over.is_set():
                now = time.monotonic() - begin
                while sent < now * rate:
                    group.create_task(one())
                    sent += 1
                await asyncio.sleep(0.002)


def swap_under(host: Host, rate: float) -> tuple[Seen, float, float]:
    """Deploys tiny:2 in the middle of an open-loop load; what was seen, and when the bridge answered."""
    seen = Seen()

    async def both() -> dict[str, object]:
        over = asyncio.Event()
        load = asyncio.create_task(open_loop(host.address, rate, over, seen))
        await asyncio.sleep(1.0)
        done = await asyncio.to_thread(host.deploy, "tiny:2")
        await asyncio.sleep(0.5)
        over.set()
        await load
        return done

    done = asyncio.run(both())
    assert done["outcome"] == "committed", done
    bridged = [start for start, _, _, served in seen.answered if served == "bridge"]
    return seen, min(bridged), max(bridged)


def capacity(host: Host) -> float:
    """The bridge's measured capacity, as preflight reports it."""
    last = host.status()["last"]
    return float(last["notes"]["capacity_per_s"])


def test_four_fifths_of_the_bridge(host: Host) -> None:
    rate = 0.8 * capacity(host)
    seen, _, _ = swap_under(host, rate)
    assert seen.other == []
    assert seen.refused == []
    assert {scale for _, _, scale, _ in seen.answered} == {2.0, 3.0}
    assert max(took for _, took, _, _ in seen.answered) <= DEADLINE


def test_three_times_the_bridge(host: Host) -> None:
    able = capacity(host)
    seen, begin, end = swap_under(host, 3 * able)
    assert seen.other == [], seen.other[:5]
    answered = [one for one in seen.answered if begin <= one[0] <= end]
    assert len(answered) / (end - begin) >= 0.9 * able, (len(answered), end - begin, able)
    assert max(took for _, took, _, _ in seen.answered) <= DEADLINE, "none late"
    assert {scale for _, _, scale, _ in seen.answered} == {2.0, 3.0}, "none wrong"
    assert seen.refused, "the excess is shed"
    times = sorted(took for _, took in seen.refused)
    assert times[int(len(times) * 0.95)] <= 0.020, f"refused at once: {times[-1]:.3f} s at worst"
