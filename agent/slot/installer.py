"""Puts a model into the slot: release, program, load, prove. The one place that does."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import structlog

from agent.config import Config
from agent.errors import ExecutorDied, ProofFailed, Refused, SlotdError, SlotError, StorageError
from agent.executor.client import Worker, launch_model
from agent.executor.programmer import run_programmer
from agent.executor.seat import Seat
from agent.images.hashes import PIECE, hasher
from agent.journal.database import Journal
from agent.model.golden import read_golden
from agent.model.spec import Model
from agent.serving.dataplane import Dataplane
from agent.slot.arbiter import Arbiter, On, Phase
from agent.slot.proof import ProofReport, prove
from agent.slot.residents import Resident
from drivers.base import Driver, SlotHealth, SlotState, Wanted

log = structlog.get_logger(__name__)

T = TypeVar("T")
Enter = Callable[[Phase], Awaitable[None]]
DeathListener = Callable[[Seat, SlotdError], None]
SLOT_RECORD = "slot"
"""Journal key of what this boot has programmed: boot id, bitstream hash, accelerator id."""
BRIDGE_BACK = 10.0
"""Seconds that a proof waits for a bridge that is being restarted; then the golden cases alone must do."""
DRIVER_ANSWERS = 5.0
"""Seconds after which a driver that was asked for state or sensors is taken to hang."""
UNFIT = ("INCOMPATIBLE_BITSTREAM", "WRONG_ACCELERATOR")
"""What a driver's check says of a bitstream that this slot can never take."""


@dataclass(frozen=True)
class Proven:
    """A model that answers rightly from the slot."""

    seat: Seat
    report: ProofReport


class Installer:
    """Owns the slot executor. Callers hold `lock` from release to prove."""

    def __init__(
        self, config: Config, driver: Driver, arbiter: Arbiter, dataplane: Dataplane, journal: Journal, boot_id: str
    ) -> None:
        self.config = config
        self.driver = driver
        self.arbiter = arbiter
        self.dataplane = dataplane
        self.journal = journal
        self.boot_id = boot_id
        self.lock = asyncio.Lock()
        self.seat: Seat | None = None
        self.state = SlotState(present=False)
        self.last_proof: ProofReport | None = None
        self.proven_at: datetime | None = None
        self.on_death: list[DeathListener] = []
        self._watch: asyncio.Task[None] | None = None
        self._record_holds = True
        self._asked: dict[str, asyncio.Future[Any]] = {}

    def reconfigure(self, config: Config) -> None:
        """Another configuration is in force; what runs keeps its timeouts."""
        self.config = config

    async def check(self, model: Model) -> None:
        """Whether the driver takes the model's bitstream; the slot is not touched. Raises Refused, SlotError."""
        section = model.spec.slot
        if section is None:
            return
        wanted = await asyncio.to_thread(wanted_of, model)
        try:
            await self._programmer("check", model.folder / section.bitstream, wanted)
        except SlotError as error:
            if error.code not in UNFIT:
                raise
            raise Refused(error.message, code=error.code, field="model.yaml: slot.bitstream", hint=error.hint) from None

    async def install(self, resident: Resident, enter: Enter, *, force: bool = False) -> Proven:
        """Release, program, load, prove; `enter` hears of each phase before it starts and may raise.

        The slot is proven but not trusted: the caller decides when it answers. Raises SlotError, ProofFailed,
        ExecutorError, or what `enter` raises.
        """
        await enter(Phase.RELEASE)
        await self.release()
        await enter(Phase.PROGRAM)
        await self.program(resident.model, force=force)
        await enter(Phase.LOAD)
        seat = await self.load(resident)
        await enter(Phase.PROVE)
        return Proven(seat, await self.prove(resident))

    async def release(self) -> None:
        """The slot executor lets go of the device. Raises SlotError DEVICE_STUCK if it will not die."""
        seat = self.seat
        if seat is None:
            return
        seat.retired = True
        self.arbiter.slot_gone(seat.key)
        self.dataplane.unseat(seat.key)
        await seat.worker.stop(grace=self.config.slot.stop_timeout)
        self.seat = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def program(self, model: Model, *, force: bool = False) -> None:
        """The model's bitstream, unless this boot put just that in and the slot confirms it. Raises SlotError."""
        section = model.spec.slot
        if section is None:
            return
        wanted = await asyncio.to_thread(wanted_of, model)
        self.state = await self.probe()
        if not self.state.present:
            raise SlotError(
                f"the {self.driver.name} slot is absent: {self.state.detail or 'nothing found'}", code="DEVICE_ABSENT"
            )
        record = {
            "boot_id": self.boot_id,
            "bitstream": wanted.bitstream_sha256,
            "accelerator": wanted.accelerator,
        }
        if not force and self.state.accelerator == wanted.accelerator and await self._recorded() == record:
            log.info("programming_skipped", accelerator=wanted.accelerator)
            return
        await self._record(None)
        bitstream = model.folder / section.bitstream
        self.state = await self._programmer("program", bitstream, wanted)
        if self.state.accelerator != wanted.accelerator:
            raise SlotError(
                f"the slot was programmed and says accelerator {self.state.accelerator}, "
                f"the image promises {wanted.accelerator}",
                code="WRONG_ACCELERATOR",
                hint="the bitstream in the image is not the one that model.yaml names",
            )
        await self._record(record)

    async def _recorded(self) -> object:
        """What was programmed last; None if that is not known."""
        try:
            return await self.journal.get(SLOT_RECORD) if self._record_holds else None
        except StorageError:
            return None

    async def _record(self, record: dict[str, Any] | None) -> None:
        """A disk that fails costs a programming that could have been skipped, not the slot."""
        self._record_holds = False
        try:
            await self.journal.put(SLOT_RECORD, record)
        except StorageError as error:
            log.error("slot_record_not_written", error=str(error))
        else:
            self._record_holds = True

    async def load(self, resident: Resident) -> Seat:
        """The slot executor of a model, loaded and unproven. Raises ExecutorError, SlotError."""
        launch = launch_model(self.config, resident.model, "slot", role="slot", maps=resident.maps)
        worker = await Worker.start(launch, timeout=self.config.slot.load_timeout)
        seat = Seat.of(resident.model, On.SLOT.value, worker, resident.decoders)
        if resident.signature is None:
            resident.signature = seat.signature
        self.seat = seat
        self.arbiter.slot_loaded(resident.model.digest, seat.key)
        self._watch = asyncio.create_task(self._watch_death(seat), name="slot-executor-watch")
        return seat

    async def prove(self, resident: Resident, *, seed: int = 0) -> ProofReport:
        """Golden cases and the differential test on the slot. Raises ProofFailed, or what a run fails with."""
        seat = self.seat
        if seat is None:
            raise ExecutorDied("the slot executor ended before the proof")
        timeout = self.config.slot.prove_timeout
        try:
            async with asyncio.timeout(timeout):
                reference = await self._reference(resident)
                self.last_proof = await prove_seat(seat, reference, self.driver, self.config, seed=seed)
        except TimeoutError:
            raise ProofFailed(
                f"the slot did not answer its proof within {timeout:g} s",
                code="DEVICE_HUNG",
                hint="slotd will reset it",
            ) from None
        report, self.proven_at = self.last_proof, datetime.now(UTC)
        if self.seat is not seat or not seat.worker.alive:
            raise ExecutorDied("the slot executor ended during the proof")
        return report

    async def _reference(self, resident: Resident) -> Seat | None:
        """The model's bridge, once it is back if it is being restarted: without it the proof is a lesser one."""
        until = asyncio.get_running_loop().time() + BRIDGE_BACK
        while resident.bridge is None and resident.model.spec.has_bridge:
            if asyncio.get_running_loop().time() > until:
                log.warning("proof_without_bridge", model=resident.model.name)
                break
            await asyncio.sleep(0.05)
        return resident.bridge

    def trust(self, resident: Resident, report: ProofReport) -> None:
        """The slot answers clients from now on, if the arbiter's turn says that its model does."""
        assert self.seat is not None
        service = max(1e-5, report.service)
        if self.seat.key not in self.dataplane.seats:
            self.dataplane.seat(self.seat, on=On.SLOT, service=service)
        self.arbiter.slot_trusted(self.seat.key)

    async def reset(self, level: str) -> None:
        """`port` or `function`; raises SlotError."""
        await self._record(None)
        await self._programmer(f"reset-{level}", None, Wanted())

    async def probe(self) -> SlotState:
        """What the slot says of itself; a driver that fails says that it is absent."""
        try:
            return await self._ask_driver("probe", self.driver.probe)
        except TimeoutError:
            return SlotState(present=False, detail="the driver does not answer")
        except Exception as error:  # a driver is third-party code; its bug is the slot's absence, and is reported
            log.exception("probe_failed")
            return SlotState(present=False, detail=str(error))

    async def read_health(self) -> SlotHealth:
        """The slot's sensors; a driver that fails says so in `errors`."""
        try:
            return await self._ask_driver("health", self.driver.health)
        except TimeoutError:
            return SlotHealth(errors=("the driver does not answer",))
        except Exception as error:  # third-party code, and a device that may be gone
            return SlotHealth(errors=(f"{type(error).__name__}: {error}",))

    async def _ask_driver(self, what: str, ask: Callable[[], T]) -> T:
        """In a thread; one that a hanging device has taken is waited for, and no second one given after it.

        Raises TimeoutError, or what the driver raises.
        """
        asked = self._asked.get(what)
        if asked is None or asked.done():
            asked = self._asked[what] = asyncio.get_running_loop().run_in_executor(None, ask)
            asked.add_done_callback(lambda done: done.cancelled() or done.exception())
        async with asyncio.timeout(DRIVER_ANSWERS):
            answer: T = await asyncio.shield(asked)
            return answer

    async def close(self) -> None:
        """Ends the slot executor."""
        await self.release()

    async def _programmer(self, verb: str, bitstream: Path | None, wanted: Wanted) -> SlotState:
        slot = self.config.slot
        return await run_programmer(
            slot.driver,
            self.config.driver_options,
            verb,
            bitstream=bitstream,
            wanted=wanted,
            timeout=slot.program_timeout,
        )

    async def _watch_death(self, seat: Seat) -> None:
        end = await asyncio.shield(seat.worker.died)
        if seat.retired:
            return
        error = ExecutorDied(f"the slot executor of {seat.model.name} ended: {end}")
        log.error("slot_executor_died", model=seat.model.name, exit=str(end))
        if self.seat is seat:
            self.seat = None
        self.arbiter.slot_gone(seat.key, error)
        self.dataplane.unseat(seat.key)
        for listener in tuple(self.on_death):
            listener(seat, error)


async def prove_seat(
    subject: Seat, reference: Seat | None, driver: Driver, config: Config, *, seed: int
) -> ProofReport:
    """Runs the proof of one executor; the reference is the model's CPU executor (None: golden cases only)."""
    cases = await asyncio.to_thread(
        read_golden, subject.model, subject.signature, max_tolerance=config.swap.max_tolerance
    )
    loop = asyncio.get_running_loop()
    on_slot = subject.on == On.SLOT.value
    timeout = config.slot.prove_timeout

    def runner(seat: Seat) -> Callable[[Any], Awaitable[Any]]:
        return lambda inputs: seat.run(inputs, int((loop.time() + timeout) * 1e9))

    return await prove(
        runner(subject),
        runner(reference) if reference is not None else None,
        cases,
        subject.signature,
        model=subject.model,
        target="slot" if on_slot else "cpu",
        numerics=driver.numerics,
        seed=seed,
        timeout=timeout,
    )


def wanted_of(model: Model) -> Wanted:
    """What must be in the slot for a model, its bitstream as it was verified. Blocking.

    Raises StorageError, SlotError INCOMPATIBLE_BITSTREAM.
    """
    section = model.spec.slot
    if section is None:
        return Wanted()
    digest, checked = hashlib.sha256(), hasher()
    try:
        with (model.folder / section.bitstream).open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                checked.update(piece)
    except OSError as error:
        raise StorageError(
            f"the bitstream cannot be read: {error.strerror}",
            field=str(model.folder / section.bitstream),
            hint="check the disk; deploy the model again",
        ) from error
    if model.hashes.get(section.bitstream, checked.hexdigest()) != checked.hexdigest():
        raise SlotError(
            f"the bitstream {section.bitstream} is not what it was when it was verified",
            code="INCOMPATIBLE_BITSTREAM",
            hint="the unpacked model changed on disk; deploy it again",
        )
    return Wanted(section.interface, section.accelerator, digest.hexdigest())
