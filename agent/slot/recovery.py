"""Brings the committed model back into the slot: at boot, after a failed deployment, after a fault.

The ladder is climbed once each time: executor, port, reprogram, function reset. If the slot cannot be won back the
bridge answers, and the ladder is tried again with back-off, for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from agent.config import Config
from agent.errors import SlotdError, SlotError
from agent.serving.dataplane import Dataplane, Trouble
from agent.slot.arbiter import Arbiter, Phase
from agent.slot.installer import Installer
from agent.slot.proof import ProofReport
from agent.slot.residents import Resident, Residents

log = structlog.get_logger(__name__)

HOPELESS = frozenset({"DEVICE_ABSENT", "NO_RUNTIME", "INCOMPATIBLE_BITSTREAM"})
"""What no reset can mend."""
IDLE_WITHIN = 30.0
"""Seconds that a repeated proof waits for a moment without requests."""
STEADY = 60.0
"""Seconds in the slot after which a loss is a new one, not the same again."""
QUICK_LOSSES = 3
"""Losses in a row that are mended at once; after that the back-off applies to them too."""
Tell = Callable[[str, dict[str, object]], None]
Load = Callable[[], Awaitable[None]]


async def _quiet(phase: Phase) -> None:
    log.info("recovery_phase", phase=phase.value)


class Recovery:
    """One task (`run`) that wins the slot back whenever the committed model ought to be in it and is not."""

    def __init__(
        self,
        config: Config,
        arbiter: Arbiter,
        installer: Installer,
        residents: Residents,
        dataplane: Dataplane,
        tell: Tell,
    ) -> None:
        self.config = config
        self.arbiter = arbiter
        self.installer = installer
        self.residents = residents
        self.dataplane = dataplane
        self.tell = tell
        self.load_committed: Load | None = None
        """Loads the committed model on the CPU, where a start could not."""
        self.attempts = 0
        self.next_try: float | None = None
        self._losses = 0
        self._won = 0.0
        self._wanted = asyncio.Event()
        self._now = asyncio.Event()
        self._interval = asyncio.Event()

    def reconfigure(self, config: Config) -> None:
        """Another configuration is in force. Another back-off begins with a try; another interval, now."""
        old, self.config = self.config.slot, config
        new = config.slot
        if (new.retry_first, new.retry_max) != (old.retry_first, old.retry_max):
            self._now.set()
        if new.proof_interval != old.proof_interval:
            self._interval.set()

    def wake(self, *, now: bool = True) -> None:
        """Look whether there is something to do; `now`: without waiting for the back-off."""
        self._wanted.set()
        if now:
            self._now.set()

    def needed(self) -> bool:
        """Whether the committed model is not trusted in the slot and no deployment is at it."""
        arbiter = self.arbiter
        if arbiter.committed is None or arbiter.stopping or arbiter.swapping:
            return False
        slot = arbiter.slot
        return slot is None or slot.digest != arbiter.committed or not slot.trusted

    def doubt(self, trouble: Trouble) -> None:
        """The slot hangs: outside a deployment that is ours to mend."""
        if trouble.kind != "slot" or self.arbiter.swapping:
            return
        if self.arbiter.slot_doubted(trouble.key, trouble.error):
            self.tell("slot_suspect", {"reason": trouble.error.as_dict()})
            self.wake()

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self.needed():
                self._now.clear()
                await self._pause(self._after_losses())
                try:
                    await self._attempt()
                    failures = 0
                except SlotdError as error:
                    failures += 1
                    delay = self._delay(failures)
                    if failures == 1 or failures % 10 == 0:
                        self.tell("slot_lost", {"reason": error.as_dict(), "attempts": failures, "retry_in_s": delay})
                    log.error("slot_recovery_failed", error=str(error), code=error.code, retry_in=delay)
                    await self._pause(delay)

    def _delay(self, failures: int) -> float:
        slot = self.config.slot
        return min(slot.retry_max, slot.retry_first * 2.0 ** min(failures - 1, 30))

    def _after_losses(self) -> float:
        """How long to wait before a slot that keeps being lost is won back once more."""
        lately = asyncio.get_running_loop().time() - self._won < STEADY
        self._losses = self._losses + 1 if lately and self._won else 0
        return self._delay(self._losses - QUICK_LOSSES) if self._losses > QUICK_LOSSES else 0.0

    async def _pause(self, delay: float) -> None:
        """`delay` seconds, or until somebody wants it now."""
        if not delay:
            return
        self.next_try = asyncio.get_running_loop().time() + delay
        try:
            async with asyncio.timeout(delay):
                await self._now.wait()
        except TimeoutError:
            pass
        finally:
            self.next_try = None

    async def _attempt(self) -> None:
        if (self.arbiter.committed or "") not in self.residents.models and self.load_committed is not None:
            await self.load_committed()  # it may have to be fetched again: nobody waits for the slot meanwhile
        async with self.installer.lock:
            if not self.needed():
                return
            resident = self.residents.models.get(self.arbiter.committed or "")
            if resident is None:
                raise SlotError("the committed model cannot be loaded", hint="deploy it again")
            await self.bring_back(resident)
            self._won = asyncio.get_running_loop().time()

    async def self_test(self) -> None:
        """Proves the slot again every `slot.proof_interval`, in a moment without requests; until cancelled."""
        seed = 0
        while True:
            try:
                async with asyncio.timeout(self.config.slot.proof_interval or None):
                    await self._interval.wait()
                self._interval.clear()
            except TimeoutError:
                seed += 1
                await self._prove_again(seed)

    async def _prove_again(self, seed: int) -> None:
        async with self.installer.lock:
            slot, seat = self.arbiter.slot, self.installer.seat
            resident = self.residents.models.get(self.arbiter.committed or "")
            if slot is None or seat is None or not slot.trusted or resident is None or seat.key != slot.key:
                return
            if self.arbiter.swapping or slot.digest != self.arbiter.committed:
                return  # the slot's turn came while this one waited
            loop = asyncio.get_running_loop()
            until = loop.time() + IDLE_WITHIN
            while self.dataplane.busy(seat.key) and loop.time() < until:  # noqa: ASYNC110  # idleness has no event
                await asyncio.sleep(0.01)
            try:
                await self.installer.prove(resident, seed=seed)
            except SlotdError as error:
                log.error("self_test_failed", error=str(error), code=error.code)
                if self.arbiter.slot_doubted(seat.key, error):
                    self.tell("slot_suspect", {"reason": error.as_dict()})
                    self.wake()

    async def bring_back(self, resident: Resident) -> None:
        """The ladder, once; the caller holds the installer's lock. The slot is trusted afterwards.

        Raises the SlotdError of the last rung.
        """
        installer = self.installer
        rungs: tuple[tuple[str | None, bool], ...] = ((None, False), ("port", False), (None, True), ("function", True))
        last: SlotdError | None = None
        for reset, force in rungs:
            self.attempts += 1
            try:
                if reset is not None:
                    await installer.release()
                    await installer.reset(reset)
                proven = await self._prove_or_install(resident, force=force, fresh=last is not None)
                installer.trust(resident, proven)
                log.info("slot_recovered", model=resident.model.name, digest=resident.model.digest)
                self.tell("slot_recovered", {"model": resident.model.name, "digest": resident.model.digest})
                return
            except SlotdError as error:
                last = error
                self.arbiter.trouble = error
                log.warning("recovery_rung_failed", reset=reset, reprogram=force, code=error.code, error=str(error))
                await self._let_go()
                if error.code in HOPELESS:
                    break
        assert last is not None
        raise last

    async def _prove_or_install(self, resident: Resident, *, force: bool, fresh: bool) -> ProofReport:
        seat = self.installer.seat
        untouched = seat is not None and seat.model.digest == resident.model.digest and seat.worker.alive
        doubted = self.arbiter.slot is not None and not self.arbiter.slot.trusted
        if untouched and not doubted and not fresh:
            return await self.installer.prove(resident)
        return (await self.installer.install(resident, _quiet, force=force)).report

    async def _let_go(self) -> None:
        """An executor that failed its proof must not stay on the device."""
        try:
            await self.installer.release()
        except SlotdError as error:
            log.error("slot_executor_stuck", error=str(error))
