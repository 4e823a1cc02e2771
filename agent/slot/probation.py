"""A new model serves, and is watched: what speaks against it sends it back, what one request did does not count."""

from __future__ import annotations

import asyncio
import time

import structlog

from agent.config import ProbationConfig
from agent.errors import ExecutorDied, ProofFailed, SlotdError, SlotError
from agent.executor.seat import Seat
from agent.serving.dataplane import Dataplane, Trouble
from agent.serving.trials import Trials
from agent.slot.arbiter import Arbiter, Verdict
from agent.slot.attempt import Deployment
from agent.slot.installer import Installer
from agent.slot.residents import Resident

log = structlog.get_logger(__name__)

FEW = 20
"""An error rate over fewer answers than this means nothing."""
LOOK = 0.25
"""Seconds between two looks at the sensors."""
BEREFT = 3
"""Proofs in a row that may fail because the CPU executor to compare with has ended."""
HEARD = 5.0
"""Seconds within which the end of the slot executor must have been heard of."""


class Probation:
    """One probation; `watch` returns when it is passed."""

    def __init__(
        self,
        rules: ProbationConfig,
        arbiter: Arbiter,
        dataplane: Dataplane,
        installer: Installer,
        trials: Trials,
        resident: Resident,
    ) -> None:
        self.rules = rules
        self.arbiter = arbiter
        self.dataplane = dataplane
        self.installer = installer
        self.trials = trials
        self.resident = resident
        self.cases = 0
        self._fault: SlotdError | None = None
        self._internal = 0
        self._last: SlotdError | None = None
        self._loaded = asyncio.Event()
        self._loaded.set()
        self._judges: set[asyncio.Task[None]] = set()
        self._deaths = 0
        self._bereft = 0

    async def watch(self, deployment: Deployment, seconds: float, seat: Seat) -> None:
        """`seconds` *and* enough answers from the slot; the agent adds proof cases where clients send too few.

        `seat` is the executor that was switched to.

        Raises what speaks against the model (SlotError, ProofFailed, ExecutorDied), or what called it off.
        """
        until = time.monotonic() + seconds
        base = self.dataplane.counters.by_slot
        unsubscribe = self.dataplane.on_trouble(self._trouble)
        self.installer.on_death.append(self._death)
        try:
            if self.installer.seat is not seat:  # before anybody listened
                self._death(seat, ExecutorDied(f"the slot executor of {seat.model.name} ended at the switch"))
            while True:
                if deployment.turn.called_off is not None:
                    raise deployment.turn.called_off
                answers = self.dataplane.counters.by_slot - base + self.cases
                deployment.notes["probation"] = {"answers": answers, "proof_cases": self.cases}
                self._judge_so_far(answers)
                await self._check_sensors()
                left = until - time.monotonic()
                if left <= 0 and answers >= self.rules.min_requests and self._loaded.is_set():
                    return
                if left <= seconds / 2 and answers < self.rules.min_requests and self._loaded.is_set():
                    await self._add_cases()
                    continue
                await self._wait(deployment, min(LOOK, max(0.01, left)))
        finally:
            unsubscribe()
            self.installer.on_death.remove(self._death)
            judges = tuple(self._judges)
            for judge in judges:
                judge.cancel()
            await asyncio.gather(*judges, return_exceptions=True)  # one may hold the device

    async def _add_cases(self) -> None:
        seat, deaths = self.installer.seat, self._deaths
        try:
            report = await self.installer.prove(self.resident, seed=self.cases + 1)
        except ExecutorDied:
            if seat is not None and self.installer.seat is seat and seat.worker.alive:
                self._bereft += 1  # it was the bridge, which is being restarted
                if self._bereft > BEREFT:
                    raise
                return
            # Clients use the executor, too: whether one of them has ended it is being judged, or will be at once.
            until = time.monotonic() + HEARD
            while self._deaths == deaths and self._loaded.is_set():
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.01)
        else:
            self._bereft = 0
            self.cases += max(1, report.cases)

    def _judge_so_far(self, answers: int) -> None:
        if self._fault is not None:
            raise self._fault
        if self._internal > max(1.0, self.rules.max_internal_rate * max(answers, FEW)):
            raise ProofFailed(
                f"{self._internal} of {answers + self._internal} requests ended INTERNAL, the last one: {self._last}",
                code="TOO_MANY_ERRORS",
                hint="see the log of slotd",
            )

    async def _check_sensors(self) -> None:
        health = await self.installer.read_health()
        if health.tripped:
            raise SlotError(
                f"the slot is too hot ({health.temperature_c} °C) and has tripped",
                code="OVER_TEMPERATURE",
                hint="check the card's cooling",
            )

    async def _wait(self, deployment: Deployment, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await deployment.called_off.wait()
        except TimeoutError:
            pass

    def _trouble(self, trouble: Trouble) -> None:
        if trouble.digest != self.resident.model.digest:
            return
        if trouble.kind == "slot":
            self._fault = self._fault or trouble.error
        else:
            self._internal, self._last = self._internal + 1, trouble.error

    def _death(self, seat: Seat, error: SlotdError) -> None:
        if seat.model.digest != self.resident.model.digest:
            return
        self._deaths += 1
        self._loaded.clear()
        judge = asyncio.create_task(self._judge(seat.key, error), name="probation-judge")
        self._judges.add(judge)
        judge.add_done_callback(self._judges.discard)

    async def _judge(self, key: int, error: SlotdError) -> None:
        """A death that one request caused: the slot is loaded and proven again, and the probation goes on."""
        try:
            tied = await self.trials.verdict(key)
            if self.arbiter.executor_died(key, tied_to_request=tied) is not Verdict.RESTART:
                self._fault = self._fault or error
                return
            await self.installer.release()
            await self.installer.program(self.resident.model)
            await self.installer.load(self.resident)
            self.installer.trust(self.resident, await self.installer.prove(self.resident))
        except SlotdError as second:
            self._fault = self._fault or second
        except Exception as fault:  # our own mistake must not leave the probation without a verdict
            log.exception("probation_failed", model=self.resident.model.name)
            self._fault = self._fault or SlotdError(f"an unforeseen fault in the probation: {fault}")
        else:
            self._loaded.set()
