"""The simulated card's runtime: a serial device on an absolute schedule, whose arithmetic is the CPU's."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from drivers.base import Arrays, Completion, Compute, DriverError, SlotStage
from drivers.simulated.card import Card
from drivers.simulated.faults import Fault, hang, take
from drivers.simulated.mark import device_key, mark

Outputs = dict[str, npt.NDArray[np.generic]]
_CLOSE_TIMEOUT = 5.0


@dataclass(frozen=True)
class _Job:
    ticket: int
    stage: int
    inputs: Arrays
    submitted: float


class SimulatedRuntime:
    """Computes submissions one after the other, in order; each ends `latency` seconds after it could start.

    start = max(submitted, end of the one before), end = start + latency: as long as two are outstanding the device
    has no gaps, however late the thread wakes up. An answer is never given before it was really computed.
    """

    def __init__(
        self, card: Card, port: int, stages: Sequence[SlotStage], *, latency: float, depth: int, secret: bool
    ) -> None:
        """Takes over the descriptor `port`, unless it raises."""
        self._card, self._port = card, port
        self._latency, self._depth = latency, depth
        self._files = tuple(str(stage.file) for stage in stages)
        self._accelerator = card.programmed().accelerator
        self._key = device_key(card.folder) if secret else None
        self._stages = {stage.index: stage for stage in stages}
        self._compute: dict[int, Compute] = {stage.index: stage.compute() for stage in stages}
        self._previous: dict[int, Outputs] = {}
        self._free_at = 0.0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._done: list[Completion] = []
        self._outstanding: set[int] = set()
        self._closed = False
        self._ready = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="simulated-slot", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        return self._depth

    def fileno(self) -> int:
        return self._ready

    def submit(self, ticket: int, stage: int, inputs: Arrays) -> None:
        """Queue one computation. Raises DriverError DEVICE_BUSY above `depth`, ValueError for a wrong call."""
        known = self._stages.get(stage)
        if known is None:
            raise ValueError(f"the slot has no stage {stage}")
        if set(inputs) != set(known.inputs):
            raise ValueError(f"stage {stage} takes {sorted(known.inputs)}, not {sorted(inputs)}")
        with self._lock:
            if self._closed:
                raise ValueError("the runtime is closed")
            if ticket in self._outstanding:
                raise ValueError(f"ticket {ticket} is outstanding")
            if len(self._outstanding) >= self._depth:
                raise DriverError("DEVICE_BUSY", f"{self._depth} submissions are outstanding already")
            self._outstanding.add(ticket)
        self._jobs.put(_Job(ticket, stage, inputs, time.monotonic()))

    def completions(self) -> Sequence[Completion]:
        with self._lock:
            if self._closed:
                return []
            try:
                os.eventfd_read(self._ready)
            except BlockingIOError:
                return []
            done, self._done = self._done, []
            self._outstanding.difference_update(completion.ticket for completion in done)
        return done

    def close(self) -> None:
        """Let go of the card; what was not computed yet never is. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._stop.set()
        self._jobs.put(None)
        self._thread.join(_CLOSE_TIMEOUT)  # a graph that never ends keeps its thread; the card is let go all the same
        os.close(self._ready)
        os.close(self._port)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None and not self._stop.is_set():
            outputs: Outputs = {}
            error: DriverError | None = None
            try:
                outputs = self._run(job)
            except DriverError as failure:
                error = failure
            except Exception as failure:  # whatever the graph raises is this submission's, not the device's
                error = DriverError("SLOT_FAILED", f"the stage could not be computed: {failure}")
            if self._stop.wait(max(0.0, self._free_at - time.monotonic())):
                return
            with self._lock:
                if self._closed:
                    return
                self._done.append(Completion(job.ticket, outputs, error))
                os.eventfd_write(self._ready, 1)
            del job, outputs  # nothing of a request is kept while the device is idle

    def _run(self, job: _Job) -> Outputs:
        start = max(job.submitted, self._free_at)
        self._free_at = start + self._latency
        self._card.require()
        fault = take(self._card.folder, "infer", self._accelerator, self._files)
        if fault is not None:
            self._suffer(fault)
        outputs = self._compute[job.stage](job.inputs)
        if fault is not None and fault.kind == "stale_result":
            stale = self._previous.get(job.stage) or {name: np.zeros_like(value) for name, value in outputs.items()}
            self._previous[job.stage], outputs = outputs, stale
        else:
            self._previous[job.stage] = outputs
        if fault is not None and fault.kind == "wrong_result":
            outputs = {name: _wrong(value) for name, value in outputs.items()}
        if self._key is not None:
            key = self._key
            outputs = {name: mark(key, value) for name, value in outputs.items()}
        self._card.count(inferences=1, busy_ns=int((self._free_at - start) * 1e9))
        return outputs

    def _suffer(self, fault: Fault) -> None:
        if fault.kind == "death":
            os.abort()
        if fault.kind == "hang":
            if not hang(self._card.folder, fault, self._stop.wait):
                raise DriverError("DEVICE_HUNG", "the simulated card hung until it was closed")
            self._free_at = time.monotonic()
        elif fault.kind == "slow":
            self._free_at += fault.seconds
        elif fault.kind == "hot":
            raise DriverError("OVER_TEMPERATURE", "the simulated card is too hot to compute")
        elif fault.kind == "error":
            raise DriverError(fault.code or "SLOT_FAILED", "the simulated card reports an error")


def _wrong(value: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Plausible, finite, of the right shape, and far from the truth."""
    wrong: npt.NDArray[np.generic]
    if value.dtype.kind == "b":
        wrong = np.logical_not(value)
    elif value.dtype.kind == "f":
        wrong = np.roll(value, 1, axis=-1) if value.ndim else value
        wrong = np.add(np.multiply(wrong, 1.25, dtype=value.dtype), 0.25, dtype=value.dtype)
    else:
        wrong = np.add(value, 1, dtype=value.dtype)
    return wrong
