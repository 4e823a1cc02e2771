"""Brings the committed model back into the slot: at boot, after a failed deployment, after a fault.

The ladder is climbed once each time: executor, port, reprogram, function reset. If the slot cannot be won back the
bridge answers, and the ladder is tried again with back-off, for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

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
Tell = Callable[[str, dict[str, object]], None]


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
        self.attempts = 0
        self.next_try: float | None = None
        self._wanted = asyncio.Event()
        self._now = asyncio.Event()

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
        if trouble.kind != "hang" or self.arbiter.swapping:
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
                try:
                    await self._attempt()
                    failures = 0
                except SlotdError as error:
                    failures += 1
                    delay = min(self.config.slot.retry_max, self.config.slot.retry_first * 2 ** (failures - 1))
                    if failures == 1 or failures % 10 == 0:
                        self.tell("slot_lost", {"reason": error.as_dict(), "attempts": failures, "retry_in_s": delay})
                    log.error("slot_recovery_failed", error=str(error), code=error.code, retry_in=delay)
                    self.next_try = asyncio.get_running_loop().time() + delay
                    try:
                        async with asyncio.timeout(delay):
                            await self._now.wait()
                    except TimeoutError:
                        pass
                    finally:
                        self.next_try = None

    async def _attempt(self) -> None:
        async with self.installer.lock:
            if not self.needed():
                return
            digest = self.arbiter.committed
            resident = self.residents.models.get(digest or "")
            if resident is None:
                raise SlotError("the committed model is not loaded on the CPU yet", code="DEVICE_ABSENT")
            await self.bring_back(resident)

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
