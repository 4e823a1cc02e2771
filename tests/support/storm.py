"""The arena storm: many requests to children that are stopped, killed and replaced, beside children that lie.

Every answer is compared with what it must be: one that belongs to another request, or was overwritten, shows.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agent.errors import DeadlineExceeded, ExecutorDied, InvalidInput, Overloaded, SlotdError
from agent.executor.client import Call, Region, Reply, Worker
from agent.model.signature import Strings, Tensor
from support.children import DecodedMemory, open_files, soon, start
from support.hash_child import digest, filler
from support.lying_child import LIES

ARENA = 160 << 20
MEMORY = 64 << 20
LARGEST = 64 << 20
_POOL = LARGEST + (1 << 20)


@dataclass
class Report:
    """What happened; `faults` must be empty."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    bytes_in: int = 0
    seconds: float = 0.0
    stall: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{counts}\n{self.bytes_in / (1 << 30):.2f} GiB in, {self.seconds:.1f} s, "
            f"longest stall of the loop {self.stall * 1000:.0f} ms\nfaults: {self.faults or 'none'}"
        )


class Storm:
    """`runs` requests by `clients` at a time to `workers` honest children and one decoder."""

    def __init__(self, runs: int, seed: int, *, clients: int = 12, workers: int = 2) -> None:
        self.runs, self.clients = runs, clients
        self.chance = random.Random(seed)
        self.report = Report()
        self.pool = np.random.default_rng(seed).integers(0, 255, _POOL, np.uint8)
        self.memory: DecodedMemory
        self.honest: list[Worker | None] = [None] * workers
        self.decoder: Worker | None = None
        self.graves: list[Worker] = []
        self.left = runs
        self.serial = 0

    async def run(self) -> Report:
        """The whole storm, and then the accounts."""
        files, started = open_files(), time.monotonic()
        self.memory = DecodedMemory(MEMORY)
        await self._replace()
        clock = asyncio.create_task(self._clock())
        others = [asyncio.create_task(self._chaos()), asyncio.create_task(self._liars())]
        clients = [asyncio.create_task(self._client()) for _ in range(self.clients)]
        try:
            await asyncio.gather(*clients)
        finally:
            self.left = 0
            clock.cancel()
            ends = await asyncio.gather(*others, *clients, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end
        await self._settle()
        self.report.seconds = time.monotonic() - started
        self.memory.close()
        await asyncio.sleep(0.05)
        if (more := open_files() - files) > 0:
            self._fault(f"{more} descriptors too many")
        return self.report

    def _fault(self, what: str) -> None:
        self.report.faults.append(what)

    # --- what is asked ------------------------------------------------------------------------------------------------

    def _size(self, largest: int) -> int:
        """Log-uniform from nothing."""
        return int(2 ** self.chance.uniform(0, np.log2(largest + 1))) - 1

    def _tensor(self) -> Tensor:
        kind = self.chance.random()
        if kind < 0.15:
            count = self._size(2000 if self.chance.random() < 0.97 else 50_000)
            start = self.chance.randrange(1 << 20)
            items = [self.pool[start + at : start + at + at % 23].tobytes() for at in range(count)]
            return Strings((count,), items)
        size = self._size(LARGEST if self.chance.random() < 0.02 else 256 << 10)
        start = self.chance.randrange(_POOL - size)
        data = self.pool[start : start + size]
        if kind < 0.5 and size >= 8:
            whole = data[: size // 8 * 8].copy() if size < 1 << 16 else data[: size // 8 * 8]
            return whole.view(np.float32 if kind < 0.4 else np.int64).reshape(-1, 1, 1) if size < 1 << 16 else whole
        return data

    def _sizes(self) -> list[int]:
        sizes = []
        for _ in range(self.chance.choice((0, 0, 1, 1, 2, 3, 11))):
            if self.chance.random() < 0.15:
                sizes.append(-self._size(300) - 1)
            else:
                sizes.append(self._size((2 << 20) if self.chance.random() < 0.02 else 16 << 10))
        return sizes

    def _reserve(self, sizes: Sequence[int]) -> list[int]:
        """Right, too small for some, too large, or none."""
        way = self.chance.random()
        if way < 0.15:
            return []
        real = [32] + [size if size >= 0 else -size * 40 for size in sizes]
        if way < 0.5:
            return real
        return [
            self.chance.choice((size, size // 2, size * 2, 0)) for size in real[: self.chance.randint(1, len(real))]
        ]

    async def _client(self) -> None:
        while self.left > 0:
            self.left -= 1
            self.serial += 1
            decoded: Reply | None = None
            tensors: list[Tensor | Region] = [self._tensor() for _ in range(self.chance.choice((1, 1, 1, 2, 3)))]
            try:
                if self.chance.random() < 0.2 and self.decoder is not None:
                    size = self._size(1 << 20) + 1
                    decoded = await self._one(
                        self.decoder, self.serial, [np.arange(3)], [size], [32, size], cancel=False
                    )
                    if decoded is not None:
                        tensors.append(decoded.regions[1])
                while (worker := self.chance.choice(self.honest)) is None:
                    await asyncio.sleep(0.005)
                sizes = self._sizes()
                cancel = self.chance.random() < 0.3
                reply = await self._one(worker, self.serial, tensors, sizes, self._reserve(sizes), cancel=cancel)
                if reply is not None:
                    if self.chance.random() < 0.05:
                        await asyncio.sleep(self.chance.random() * 0.02)  # a slow reader
                    reply.release()
            finally:
                if decoded is not None:
                    decoded.release()

    async def _one(
        self,
        worker: Worker,
        seed: int,
        tensors: Sequence[Tensor | Region],
        sizes: list[int],
        reserve: list[int],
        *,
        cancel: bool,
    ) -> Reply | None:
        """One request, its answer checked; None if there was none to be had."""
        outcomes = self.report.outcomes
        outcomes["requests"] += 1
        refuse = self.chance.random() < 0.02
        hurried = self.chance.random() < 0.03
        wait = -1 if refuse else self.chance.choice((0, 0, 0, 0, 0, 0, 0, 1))
        order = np.array([seed, 1 + len(sizes), wait, *sizes], np.int64)
        inputs: list[tuple[int, Any]] = [(0, order), *enumerate(tensors, 1)]
        self.report.bytes_in += sum(tensor.nbytes for _, tensor in inputs)
        try:
            call = worker.submit(inputs, deadline_ns=soon(0.002 if hurried else 60), reserve=reserve)
        except ExecutorDied:
            outcomes["died"] += 1
            return None
        except Overloaded:
            outcomes["too large"] += 1
            return None
        try:
            if cancel:
                await self._cancel(call)
                if call.result.cancelled():
                    outcomes["cancelled"] += 1
                    return None
            reply = await asyncio.wait_for(asyncio.shield(call.result), 60)
        except ExecutorDied:
            outcomes["died"] += 1
        except InvalidInput as error:
            outcomes["refused"] += 1
            if not refuse or str(seed) not in error.message:
                self._fault(f"request {seed} got the refusal {error}")
        except DeadlineExceeded:
            outcomes["late"] += 1
            if not hurried:
                self._fault(f"request {seed} was late without need")
        except SlotdError as error:
            self._fault(f"request {seed} ended in {error!r}")
        except TimeoutError:
            self._fault(f"request {seed} never ended")
        else:
            outcomes["answered"] += 1
            plain = {i: t.tensor() if isinstance(t, Region) else t for i, t in enumerate(tensors, 1)}
            large = sum(tensor.nbytes for tensor in plain.values()) > 1 << 18
            wanted = await asyncio.to_thread(digest, plain) if large else digest(plain)
            if not self._right(reply, seed, wanted, sizes):
                self._fault(f"request {seed} got a wrong answer")
            return reply
        return None

    async def _cancel(self, call: Call) -> None:
        """At any instant: at once, while it is copied, sent, run, or answered."""
        way = self.chance.random()
        if way > 0.2:
            await asyncio.sleep(0 if way < 0.4 else 10 ** self.chance.uniform(-4, -1.5))
        if self.chance.random() < 0.5:
            call.cancel()
        else:
            call.result.cancel()  # what a cancelled `await call.result` does

    def _right(self, reply: Reply, seed: int, wanted: np.ndarray, sizes: Sequence[int]) -> bool:
        if len(reply.outputs) != 1 + len(sizes) or not np.array_equal(reply.outputs[0], wanted):
            return False
        for place, size in enumerate(sizes, 1):
            should, got = filler(seed, place, size), reply.outputs[place]
            if isinstance(should, Strings):
                if not isinstance(got, Strings) or list(got.items) != list(should.items):
                    return False
            elif not np.array_equal(got, should):
                return False
        return True

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    async def _replace(self) -> None:
        """Children where there are none."""
        for place, worker in enumerate(self.honest):
            if worker is None:
                self.honest[place] = await start("hash_child", arena=ARENA, maps=(self.memory.fd,))
                self.report.outcomes["children"] += 1
        if self.decoder is None:
            self.decoder = await start("hash_child", output=self.memory)
            self.report.outcomes["children"] += 1

    async def _chaos(self) -> None:
        """Stops, continues and kills; what has died is replaced when its exit was reaped."""
        while self.left > 0:
            await asyncio.sleep(self.chance.uniform(0.02, 0.3))
            place = self.chance.randrange(len(self.honest) + 1)
            worker = self.decoder if place == len(self.honest) else self.honest[place]
            if worker is None:
                continue
            way = self.chance.random()
            if way < 0.6:
                worker.signal(signal.SIGSTOP)
                await asyncio.sleep(self.chance.uniform(0, 0.1))
                worker.signal(signal.SIGCONT)
                self.report.outcomes["stopped"] += 1
            if way > 0.5:
                worker.signal(signal.SIGKILL)
                await worker.died
                self.report.outcomes["killed"] += 1
                await self._bury(worker)
                if worker is self.decoder:
                    self.decoder = None
                else:
                    self.honest[place] = None
                await self._replace()

    async def _liars(self) -> None:
        names = sorted(LIES)
        while self.left > 0:
            await asyncio.sleep(self.chance.uniform(0.1, 0.6))
            name = self.chance.choice(names)
            liar = await start("lying_child", {"lie": name}, maps=(self.memory.fd,))
            inputs = [(0, self.pool[:1000])]
            try:
                calls = [liar.submit(inputs, deadline_ns=soon(), reserve=[64, 64]) for _ in range(4)]
            except ExecutorDied:  # some lies need no request, and were seen before there was one
                await liar.died
                self.report.outcomes["liars"] += 1
                await self._bury(liar)
                continue
            calls[3].cancel()
            ends = await asyncio.gather(*(call.result for call in calls[:3]), return_exceptions=True)
            if not all(isinstance(end, ExecutorDied) for end in ends[1:]):
                self._fault(f"the liar {name} was believed: {ends}")
            await liar.died
            self.report.outcomes["liars"] += 1
            del ends, calls
            await asyncio.sleep(0)
            await self._bury(liar)

    async def _clock(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            self.report.stall = max(self.report.stall, time.perf_counter() - before - 0.001)

    # --- the accounts -------------------------------------------------------------------------------------------------

    async def _bury(self, worker: Worker) -> None:
        self.graves.append(worker)
        until = time.monotonic() + 30
        while worker.in_flight and time.monotonic() < until:  # strings that a thread was counting when the child died
            await asyncio.sleep(0.005)
        if worker.alive or worker.in_flight:
            self._fault(f"a dead child is alive={worker.alive} with {worker.in_flight} in flight")

    async def _settle(self) -> None:
        """All is answered and given back; then the children end."""
        living = [worker for worker in (*self.honest, self.decoder) if worker is not None]
        until = time.monotonic() + 30
        while any(worker.in_flight for worker in living if worker.alive) and time.monotonic() < until:
            for worker in living:
                worker.signal(signal.SIGCONT)
            await asyncio.sleep(0.01)
        for worker in living:
            if worker.alive and (worker.in_flight or worker.arena.used):
                self._fault(f"{worker.in_flight} calls and {worker.arena.used} bytes are left in a living child")
            await worker.stop(grace=5)
        for worker in (*self.graves, *living):
            if worker.arena.used or worker.in_flight:
                self._fault(f"{worker.arena.used} bytes are left in a dead child")
        if self.memory.used:
            self._fault(f"{self.memory.used} bytes are left in the decoder's memory")
