"""The generator of an identity storm: `identity_load.py ADDRESS RATE EXPECTED.npz CARD DEADLINE`.

Until its input is closed it sends RATE requests a second, whether or not the ones before were answered, and compares
every reply; then it prints what it saw as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from agent.serving.protos import PredictResponse
from drivers.simulated import is_marked
from support.host import PREDICT, request_bytes
from support.identity import TOLERANCE, Seen
from support.networks import INPUT
from support.tfs_client import CHANNEL_OPTIONS

CHANNELS = 4
KEPT = 10


class Load:
    def __init__(self, rate: float, expected: Any, card: Path, deadline: float) -> None:
        self.rate, self.card, self.deadline = rate, card, deadline
        self.requests = [request_bytes(picture, INPUT) for picture in expected["pictures"]]
        self.expected = {name: expected[name] for name in expected.files if name != "pictures"}
        self.seen = Seen()
        self.times: list[float] = []

    async def run(self, address: str) -> None:
        over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        channels = [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for _ in range(CHANNELS)]
        calls = [channel.unary_unary(PREDICT) for channel in channels]
        print("sending", flush=True)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not over.done():
                due = began + self.seen.sent / self.rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                self.seen.lag_ms = max(self.seen.lag_ms, (time.monotonic() - due) * 1e3)
                number = self.seen.sent
                self.seen.sent += 1
                group.create_task(self.one(calls[number % CHANNELS], number % len(self.requests)))
        for channel in channels:
            await channel.close()

    async def one(self, call: Any, picture: int) -> None:
        begun = time.monotonic()
        try:
            pending = call(self.requests[picture], timeout=self.deadline)
            reply = await pending
            told = dict(await pending.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            self.seen.not_ok += 1
            self.fault(f"{error.code()} after {time.monotonic() - begun:.3f} s: {error.details()}")
            return
        self.times.append(time.monotonic() - begun)
        served, digest = str(told["slotd-served-by"]), str(told["slotd-model-digest"])
        self.seen.by[served] = self.seen.by.get(served, 0) + 1
        (proto,) = PredictResponse.FromString(reply).outputs.values()
        answer = np.array(proto.float_val, np.float32)
        wrong = self.compare(answer, picture, served, digest)
        if wrong:
            self.seen.mismatches += 1
            self.fault(f"picture {picture} by {served} of {digest}: {wrong}")

    def compare(self, answer: np.ndarray, picture: int, served: str, digest: str) -> str:
        """What is wrong with it; empty if nothing is."""
        if digest not in self.expected:
            return "no such model"
        wanted = self.expected[digest][picture].reshape(-1)
        if answer.shape != wanted.shape:
            return f"{answer.shape} values"
        if served == "bridge":
            return "" if answer.tobytes() == wanted.tobytes() else f"not bit for bit, off by {off(answer, wanted)}"
        if not np.allclose(answer, wanted, rtol=TOLERANCE, atol=TOLERANCE):
            return f"off by {off(answer, wanted)}"
        return "" if is_marked(self.card, answer.reshape(1, -1)) else "without the card's mark"

    def fault(self, text: str) -> None:
        if len(self.seen.faults) < KEPT:
            self.seen.faults.append(text)


def off(answer: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(answer - wanted).max())


def main() -> None:
    address, rate, expected, card, deadline = sys.argv[1:]
    load = Load(float(rate), np.load(expected), Path(card), float(deadline))
    asyncio.run(load.run(address))
    times = np.array(load.times or [0.0]) * 1e3
    seen = load.seen
    seen.p50_ms, seen.p99_ms, seen.worst_ms = (float(np.quantile(times, share)) for share in (0.5, 0.99, 1.0))
    print(json.dumps(seen.__dict__), flush=True)


main()
