"""Executors without processes: a worker that answers, hangs and dies as a test tells it to, under a real Seat."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from agent.errors import ExecutorDied
from agent.executor.seat import Decoders, Seat
from agent.model.signature import DType, Signature, Strings, Tensor, TensorSpec

_keys = itertools.count(1000)
SIGNATURE = Signature(
    {"x:0": TensorSpec("x:0", DType.FLOAT32, (-1, 4))},
    {"y": TensorSpec("y", DType.FLOAT32, (-1, 4)), "z:0": TensorSpec("z:0", DType.FLOAT32, (-1, 4))},
)


class FakeReply:
    """Counts what is given back."""

    def __init__(self, outputs: list[Tensor]) -> None:
        self.outputs = outputs
        self.released = 0

    def release(self) -> None:
        self.released += 1


class FakeCall:
    """As agent.executor.call.Call: `cancel` frees the caller, `ended` comes when the child is done with it."""

    def __init__(self, worker: FakeWorker, inputs: Sequence[tuple[int, Any]], deadline_ns: int) -> None:
        loop = asyncio.get_running_loop()
        self.worker, self.inputs, self.deadline_ns = worker, list(inputs), deadline_ns
        self.result: asyncio.Future[Any] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.reply: FakeReply | None = None

    @property
    def cancelled(self) -> bool:
        return self.result.cancelled()

    def cancel(self) -> None:
        if not self.result.done():
            self.result.cancel()

    def answer(self) -> None:
        """y and z are x times the worker's scale."""
        if self.ended.done():
            return
        self.ended.set_result(None)
        if not self.result.done():
            given = self.inputs[0][1]
            value = x() if isinstance(given, Strings) else given
            outputs: list[Tensor] = [value * self.worker.scale, value * -self.worker.scale]
            self.reply = FakeReply(outputs)
            self.result.set_result(self.reply)

    def fail(self, error: Exception, *, ended: bool = True) -> None:
        if ended and not self.ended.done():
            self.ended.set_result(None)
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()


class FakeWorker:
    """`delay`: seconds to an answer; None: it is left to the test. `deadly(x)`: which inputs end it."""

    def __init__(self, *, scale: float = 2.0, delay: float | None = 0.0) -> None:
        self.generation = next(_keys)
        self.role = "fake"
        self.scale, self.delay = scale, delay
        self.alive = True
        self.calls: list[FakeCall] = []
        self.error: Exception | None = None
        self.deadly = lambda x: False
        self.ready = {
            "signature": SIGNATURE.as_dict(),
            "output_names": ["y", "z:0"],
            "executor_inputs": ["x:0"],
            "depth": 2,
        }
        self.stopped = False
        self.stuck: Exception | None = None
        self.pid = 0
        self.idle = False
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def died(self) -> asyncio.Future[str]:
        return asyncio.shield(self._gone)

    def normal_priority(self) -> None:
        self.idle = False

    @property
    def in_flight(self) -> int:
        return sum(not call.ended.done() for call in self.calls)

    def submit(self, inputs: Sequence[tuple[int, Any]], *, deadline_ns: int, reserve: Sequence[int] = ()) -> FakeCall:
        if not self.alive:
            raise ExecutorDied("it is not running")
        call = FakeCall(self, inputs, deadline_ns)
        self.calls.append(call)
        loop = asyncio.get_running_loop()
        if self.deadly(inputs[0][1]):
            loop.call_later(self.delay or 0.0, self.die)
        elif self.error is not None:
            loop.call_soon(call.fail, self.error)
        elif self.delay is not None:
            loop.call_later(self.delay, call.answer)
        return call

    def die(self) -> None:
        self.alive = False
        for call in self.calls:
            call.fail(ExecutorDied("it ended"))
        if not self._gone.done():
            self._gone.set_result("signal 9")

    async def stop(self, *, grace: float) -> None:
        self.stopped = True
        self.die()
        if self.stuck is not None:
            raise self.stuck

    def signal(self, number: int) -> None:
        self.die()


def fake_model(digest: str = "sha256:old", *, name: str = "toy", version: int = 1) -> Any:
    return SimpleNamespace(
        digest=digest,
        name=name,
        version=version,
        spec=SimpleNamespace(image=None, has_bridge=True, version=str(version)),
    )


def fake_seat(worker: FakeWorker, on: str, model: Any = None) -> Seat:
    """A real Seat around a fake worker."""
    return Seat.of(model or fake_model(), on, worker, Decoders())  # type: ignore[arg-type]


def x(value: float = 1.0, rows: int = 1) -> np.ndarray:
    return np.full((rows, 4), value, np.float32)
