"""The models that are loaded on the CPU: each with its bridge and its decoders, kept alive until dismissed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import structlog

from agent.config import Config
from agent.errors import SlotdError, Unavailable
from agent.executor.client import DecodedMemory, Worker, launch_decoder, launch_model
from agent.executor.seat import Decoders, Seat
from agent.model.signature import Signature
from agent.model.spec import Model
from agent.serving.dataplane import Dataplane
from agent.slot.arbiter import Arbiter, On
from agent.slot.measure import RUNS, measure

log = structlog.get_logger(__name__)

RESTART_FIRST = 0.2
RESTART_MAX = 30.0
HOPELESS = 3
"""Starts in a row that fail before requests are refused instead of waiting."""
HEALTHY = 60.0
"""Seconds that an executor must live for its restart back-off to start anew."""


@dataclass(eq=False)
class Resident:
    """One model on the CPU. `bridge` is None while it is being restarted, or if the model has no CPU twin."""

    model: Model
    decoders: Decoders = field(default_factory=Decoders)
    memories: list[DecodedMemory] = field(default_factory=list)
    bridge: Seat | None = None
    signature: Signature | None = None
    """As clients see it; None if neither model.yaml nor a bridge has told it."""
    service: float = 0.05
    """Seconds that one request takes on the bridge, as measured when it was first loaded."""
    measured: bool = False
    idle: bool = False
    keepers: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def maps(self) -> tuple[int, ...]:
        """Descriptors of the decoders' memory, for an executor to map."""
        return tuple(memory.fd for memory in self.memories)


class Residents:
    """Starts, keeps and ends the executors on the CPU. A keeper that fails ends the daemon through `spawn`'s owner."""

    def __init__(
        self,
        config: Config,
        arbiter: Arbiter,
        dataplane: Dataplane,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
    ) -> None:
        self.config = config
        self.arbiter = arbiter
        self.dataplane = dataplane
        self._spawn = spawn
        self._loading = asyncio.Lock()
        self._lent: dict[int, DecodedMemory] = {}
        """What the decoders of disposable executors write to, by the executor's key."""
        self.models: dict[str, Resident] = {}

    def reconfigure(self, config: Config) -> None:
        """Another configuration is in force; for executors that start from now on."""
        self.config = config

    async def admit(
        self,
        model: Model,
        *,
        idle: bool = False,
        intact: Awaitable[None] | None = None,
        service: float | None = None,
    ) -> Resident:
        """Loads a model and keeps it loaded. `idle`: it runs only when nothing else wants the CPU.

        It answers nobody before `intact` has ended well, if that is given: its files are checked while it is loaded.
        `service`: seconds for one request, if that was measured before; then the first one to run is a client's.
        Raises ExecutorError (with what the child says of the model), what `intact` raises, and leaves nothing behind.
        """
        async with self._loading:  # a deployment and the recovery may want the same
            if model.digest not in self.models:
                resident = Resident(model, idle=idle, signature=model.spec.signature)
                if service is not None:
                    resident.service, resident.measured = service, True
                self.models[model.digest] = await self._load(resident, intact)
            return self.models[model.digest]

    async def _load(self, resident: Resident, intact: Awaitable[None] | None) -> Resident:
        model = resident.model
        try:
            if model.spec.image is not None:
                for number in range(self.config.decoder_count):
                    resident.memories.append(DecodedMemory(self.config.executor.arena))
                    resident.decoders.workers.append(await self._start_decoder(resident, number))
            if model.spec.has_bridge:
                self.arbiter.bridge_starting(model.digest)
                await self._start_bridge(resident, intact)
            elif intact is not None:
                await intact
        except BaseException:
            self.arbiter.bridge_gone(model.digest)
            await self._end(resident)
            raise
        resident.decoders.change(kept=True)
        for number in range(len(resident.decoders.workers)):
            resident.keepers.append(self._spawn(self._keep_decoder(resident, number), f"keep-decoder-{number}"))
        if resident.bridge is not None:
            resident.keepers.append(self._spawn(self._keep_bridge(resident), f"keep-bridge-{model.name}"))
        return resident

    def lift(self, resident: Resident) -> None:
        """From now on it matters to clients: normal priority."""
        resident.idle = False
        for worker in (*resident.decoders.workers, *([resident.bridge.worker] if resident.bridge else [])):
            worker.normal_priority()

    async def dismiss(self, digest: str) -> None:
        """Ends a model's executors after the requests in their hands."""
        resident = self.models.pop(digest, None)
        if resident is None:
            return
        self.arbiter.bridge_gone(digest)
        for keeper in resident.keepers:
            keeper.cancel()
        await asyncio.gather(*resident.keepers, return_exceptions=True)
        loop = asyncio.get_running_loop()
        until = loop.time() + self.config.slot.drain_timeout
        while (bridge := resident.bridge) is not None and bridge.worker.in_flight and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await self._end(resident)

    async def close(self) -> None:
        """Ends them all."""
        await asyncio.gather(*(self.dismiss(digest) for digest in tuple(self.models)))

    # --- disposable ones, for requests whose executor died ------------------------------------------------------------

    async def spawn_disposable(self, seat: Seat, own_decoder: bool) -> Seat:
        """A CPU executor for the model of `seat`, for one request at a time."""
        resident = self.models.get(seat.model.digest)
        if resident is None or not seat.model.spec.has_bridge:
            raise Unavailable(
                "the executor ended, and the request cannot be tried again: the model is not loaded on the CPU",
                retry_after=1.0,
            )
        if not (own_decoder and seat.model.spec.image is not None):
            return await self._start_disposable(seat.model, resident.decoders, resident.maps)
        memory, decoders = DecodedMemory(self.config.executor.arena), Decoders()
        try:
            launch = launch_decoder(self.config, seat.model, memory, role="disposable-decoder")
            decoders.workers.append(await Worker.start(launch, timeout=self.config.slot.load_timeout))
            disposable = await self._start_disposable(seat.model, decoders, (memory.fd,))
        except BaseException:
            await asyncio.shield(self._stop_decoders(decoders, [memory]))
            raise
        self._lent[disposable.key] = memory
        return disposable

    async def _start_disposable(self, model: Model, decoders: Decoders, maps: tuple[int, ...]) -> Seat:
        launch = launch_model(self.config, model, "cpu", role="disposable", maps=maps)
        worker = await Worker.start(launch, timeout=self.config.slot.load_timeout)
        return Seat.of(model, On.BRIDGE.value, worker, decoders)

    async def discard_disposable(self, seat: Seat) -> None:
        """Ends it."""
        memory = self._lent.pop(seat.key, None)
        try:
            await seat.worker.stop(grace=self.config.slot.stop_timeout)
        finally:
            if memory is not None:
                await self._stop_decoders(seat.decoders, [memory])

    # --- starting and keeping -----------------------------------------------------------------------------------------

    async def _start_decoder(self, resident: Resident, number: int) -> Worker:
        launch = launch_decoder(
            self.config, resident.model, resident.memories[number], role=f"decoder-{number}", idle=resident.idle
        )
        worker = await Worker.start(launch, timeout=self.config.slot.load_timeout)
        if launch.idle and not resident.idle:  # it was lifted meanwhile
            worker.normal_priority()
        return worker

    async def _start_bridge(self, resident: Resident, intact: Awaitable[None] | None = None) -> Seat:
        launch = launch_model(self.config, resident.model, "cpu", role="bridge", maps=resident.maps, idle=resident.idle)
        worker = await Worker.start(launch, timeout=self.config.slot.load_timeout)
        seat = Seat.of(resident.model, On.BRIDGE.value, worker, resident.decoders)
        try:
            # A candidate has time to be measured well; for any other, clients wait, and what an earlier start has
            # measured is not measured again.
            if intact is None or not resident.measured:
                runs = RUNS if launch.idle else 1
                service = await measure(seat, timeout=self.config.slot.load_timeout, runs=runs)
                if not resident.measured or launch.idle:
                    resident.service, resident.measured = service, True
            if intact is not None:
                await intact
        except BaseException:
            seat.retired = True
            await asyncio.shield(worker.stop(grace=self.config.slot.stop_timeout))
            raise
        resident.bridge, resident.signature = seat, seat.signature
        if launch.idle and not resident.idle:  # it was lifted meanwhile
            worker.normal_priority()
        self.dataplane.seat(seat, on=On.BRIDGE, service=resident.service)
        self.arbiter.bridge_ready(resident.model.digest, seat.key)
        return seat

    async def _keep_bridge(self, resident: Resident) -> None:
        loop = asyncio.get_running_loop()
        digest, name = resident.model.digest, resident.model.name
        delay, born, failures = 0.0, loop.time(), 0
        while True:
            bridge = resident.bridge
            if bridge is not None:
                end = await asyncio.shield(bridge.worker.died)
                log.error("bridge_died", model=name, exit=str(end))
                self._lost(resident, bridge)
                delay = 0.0 if loop.time() - born > HEALTHY else min(RESTART_MAX, max(RESTART_FIRST, delay * 2))
            if delay:
                await asyncio.sleep(delay)
            born = loop.time()
            self.arbiter.bridge_starting(digest)
            try:
                await self._start_bridge(resident)
                failures = 0
            except SlotdError as error:
                failures += 1
                log.error("bridge_restart_failed", model=name, error=str(error), failures=failures)
                delay = min(RESTART_MAX, max(RESTART_FIRST, delay * 2))
                if failures >= HOPELESS:  # until then requests wait for it; now they are told at once
                    self.arbiter.bridge_gone(digest)

    def _lost(self, resident: Resident, bridge: Seat) -> None:
        resident.bridge = None
        self.arbiter.bridge_starting(resident.model.digest)
        self.arbiter.bridge_gone(resident.model.digest, bridge.key)
        self.dataplane.unseat(bridge.key)

    async def _keep_decoder(self, resident: Resident, number: int) -> None:
        delay, failures = 0.0, 0
        loop = asyncio.get_running_loop()
        while True:
            born = loop.time()
            end = await asyncio.shield(resident.decoders.workers[number].died)
            log.error("decoder_died", model=resident.model.name, exit=str(end))
            delay = 0.0 if loop.time() - born > HEALTHY else min(RESTART_MAX, max(RESTART_FIRST, delay * 2))
            while True:
                await asyncio.sleep(delay)
                try:
                    resident.decoders.workers[number] = await self._start_decoder(resident, number)
                    break
                except SlotdError as error:
                    failures += 1
                    log.error("decoder_restart_failed", model=resident.model.name, error=str(error), failures=failures)
                    delay = min(RESTART_MAX, max(RESTART_FIRST, delay * 2))
                    resident.decoders.change(hopeless=failures >= HOPELESS)
            failures = 0
            resident.decoders.change()

    async def _end(self, resident: Resident) -> None:
        grace = self.config.slot.stop_timeout
        bridge, resident.bridge = resident.bridge, None
        try:
            if bridge is not None:
                bridge.retired = True
                self.dataplane.unseat(bridge.key)
                await bridge.worker.stop(grace=grace)
        finally:
            await self._stop_decoders(resident.decoders, resident.memories)

    async def _stop_decoders(self, decoders: Decoders, memories: list[DecodedMemory]) -> None:
        """Raises SlotError DEVICE_STUCK for one that does not end; its memory is let go of all the same."""
        decoders.change(kept=False)
        stops = [worker.stop(grace=self.config.slot.stop_timeout) for worker in decoders.workers]
        try:
            for error in await asyncio.gather(*stops, return_exceptions=True):
                if error is not None:
                    raise error
        finally:
            for memory in memories:
                memory.close()
