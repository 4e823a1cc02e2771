"""A model that is loaded somewhere: one executor, and the decoders in front of it."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.errors import ExecutorDied, ExecutorError, Unavailable
from agent.executor.client import Call, Region, Reply, Worker
from agent.model.signature import DType, Signature, Strings, Tensor, signature_from
from agent.model.spec import Model

UNKNOWN_OUTPUT = 64 * 1024
"""Bytes reserved for an output of unknown shape; a larger one comes back in a memfd of its own."""
MAX_RESERVE = 16 << 20


class Prepared:
    """What an executor takes: tensors as they came, pictures as decoded regions. Shared by all who compute it."""

    def __init__(self, tensors: list[tuple[int, Tensor | Region]], rows: int, decoded: Reply | None) -> None:
        self.tensors = tensors
        self.rows = rows
        self._decoded = decoded

    def release(self) -> None:
        """The decoded pictures are not needed any more (executors that still read them keep them leased)."""
        if self._decoded is not None:
            self._decoded.release()
            self._decoded = None


class Decoders:
    """The decoder processes of one image stage; each request goes to the one with the least to do."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self._kept = False
        self._hopeless = False
        self._changed = asyncio.Event()

    def change(self, *, kept: bool = True, hopeless: bool = False) -> None:
        """One is there again, or cannot be started; `kept`: whether those that end are started again."""
        self._kept, self._hopeless = kept, hopeless
        self._changed.set()
        self._changed = asyncio.Event()

    async def _alive(self, deadline_ns: int) -> list[Worker]:
        """Those that run; waits for one that is being started again."""
        while not (alive := [worker for worker in self.workers if worker.alive]):
            if not self._kept:
                raise ExecutorDied("the decoders have ended")
            left = deadline_ns / 1e9 - time.monotonic()
            if self._hopeless or left <= 0:
                raise Unavailable("the decoders are being restarted", retry_after=0.5)
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                continue
        return alive

    async def decode(self, pictures: Strings, deadline_ns: int, nbytes: int) -> Reply:
        """The pictures as one tensor in a decoder's memory. Raises InvalidInput, ExecutorDied, Unavailable."""
        alive = await self._alive(deadline_ns)
        worker = min(alive, key=lambda one: one.in_flight)
        call = worker.submit([(0, pictures)], deadline_ns=deadline_ns, reserve=[nbytes])
        try:
            return await asyncio.shield(call.result)
        finally:
            call.cancel()


@dataclass(eq=False)
class Seat:
    """One executor with one model. `on` is slot or bridge; `retired` says that slotd itself is ending it."""

    model: Model
    on: str
    worker: Worker
    decoders: Decoders
    signature: Signature
    outputs: list[str]
    inputs: list[str]
    depth: int
    retired: bool = False
    _row_bytes: list[int | None] = field(default_factory=list)

    @classmethod
    def of(cls, model: Model, on: str, worker: Worker, decoders: Decoders) -> Seat:
        """From what the child said when it was ready. Raises ExecutorError if that is nonsense; it is killed then."""
        try:
            return cls._of(model, on, worker, decoders)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            worker.signal(signal.SIGKILL)
            raise ExecutorError(f"the {worker.role} child of {model.name} says nonsense of itself: {error!r}") from None

    @classmethod
    def _of(cls, model: Model, on: str, worker: Worker, decoders: Decoders) -> Seat:
        ready = worker.ready
        signature = signature_from(ready["signature"])
        outputs = [str(name) for name in ready["output_names"]]
        seat = cls(
            model=model,
            on=on,
            worker=worker,
            decoders=decoders,
            signature=signature,
            outputs=outputs,
            inputs=[str(name) for name in ready["executor_inputs"]],
            depth=int(ready["depth"]),
        )
        for name in outputs:
            spec = signature.outputs[name]
            rest = spec.shape[1:]
            known = spec.dtype is not DType.STRING and -1 not in rest
            seat._row_bytes.append(math.prod(rest) * spec.dtype.numpy.itemsize if known else None)
        return seat

    @property
    def key(self) -> int:
        """Unlike any other executor's."""
        return self.worker.generation

    @property
    def window(self) -> int:
        """How many requests it may have in hand, so that it never waits for the next."""
        return self.depth + (len(self.decoders.workers) if self.model.spec.image else 0)

    async def prepare(self, inputs: Mapping[str, Tensor], deadline_ns: int) -> Prepared:
        """Pictures are decoded; everything else goes as it is. Raises InvalidInput, ExecutorDied."""
        image = self.model.spec.image
        tensors: list[tuple[int, Tensor | Region]] = []
        decoded: Reply | None = None
        rows = 1
        for index, name in enumerate(self.inputs):
            if image is not None and name == image.to:
                pictures = inputs[image.source]
                assert isinstance(pictures, Strings), "bound to a string tensor"
                rows = len(pictures.items)
                height, width = image.size
                decoded = await self.decoders.decode(pictures, deadline_ns, rows * height * width * 3 * 4)
                tensors.append((index, decoded.regions[0]))
            else:
                tensor = inputs[name]
                rows = tensor.shape[0] if tensor.shape else 1
                tensors.append((index, tensor))
        return Prepared(tensors, rows, decoded)

    def submit(self, prepared: Prepared, deadline_ns: int) -> Call:
        """Hand it over. Raises ExecutorDied, Overloaded."""
        reserve = [
            min(MAX_RESERVE, row * max(1, prepared.rows)) if row is not None else UNKNOWN_OUTPUT
            for row in self._row_bytes
        ]
        return self.worker.submit(prepared.tensors, deadline_ns=deadline_ns, reserve=reserve)

    async def run(self, inputs: Mapping[str, Tensor], deadline_ns: int) -> dict[str, Tensor]:
        """One whole run with copies of the outputs: for proofs and measurements, not for traffic."""
        prepared = await self.prepare(inputs, deadline_ns)
        try:
            call = self.submit(prepared, deadline_ns)
            try:
                reply = await asyncio.shield(call.result)
            finally:
                call.cancel()
        finally:
            prepared.release()
        with reply:
            return {
                name: tensor if isinstance(tensor, Strings) else tensor.copy()
                for name, tensor in zip(self.outputs, reply.outputs, strict=True)
            }
