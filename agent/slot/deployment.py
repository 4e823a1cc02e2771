"""The deployment procedure: from a wish to a committed model, or back to the last one that worked."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Protocol

import structlog

from agent.config import Config
from agent.errors import (
    Cancelled,
    CommandRefused,
    Interrupted,
    NotFound,
    Refused,
    SlotdError,
    StorageError,
    revive,
)
from agent.executor.seat import Seat
from agent.journal.boot import BootRecord, ModelRef, write_boot
from agent.journal.database import Journal
from agent.model.spec import Model
from agent.model.wish import Wish
from agent.scope import scope
from agent.serving.dataplane import Dataplane
from agent.serving.trials import Trials
from agent.slot.arbiter import Arbiter, AtBoundary, Ended, Interrupt, Joined, Outcome, Phase, Queued, Start, Turn
from agent.slot.attempt import Deployment
from agent.slot.books import Books
from agent.slot.installer import Installer
from agent.slot.preflight import check_signature, check_slot, preflight
from agent.slot.probation import Probation
from agent.slot.recovery import Recovery
from agent.slot.residents import Resident, Residents

log = structlog.get_logger(__name__)

Tell = Callable[[str, dict[str, Any]], None]
KEEP_ENDED = 50
RETRIES = 1
"""How often an attempt that was cut off at or after drain is made again by itself."""
UNDEPLOY = "undeploy"
"""What stands for the digest where attempts to empty the slot are counted."""
ROLL_BACK = "roll_back"
_TOUCHING = {phase.value for phase in Phase if phase.touches_slot}


class Images(Protocol):
    """Where models come from."""

    async def resolve(self, reference: str, digest: str | None) -> str:
        """The manifest digest of a reference, pinned by `digest`. Raises RegistryError, NotFound, InvalidInput."""

    async def fetch(self, reference: str, digest: str, progress: Callable[[dict[str, Any]], None]) -> None:
        """All blobs into the store, each verified. Raises RegistryError, InvalidImage, StorageError."""

    async def unpack(self, reference: str, digest: str) -> None:
        """The model's files onto the disk. Raises InvalidImage, StorageError."""

    async def has(self, digest: str) -> bool:
        """Whether the model is unpacked already."""

    async def model(self, digest: str, reference: str) -> Model:
        """The unpacked model, its hash list checked. Raises InvalidModel, StorageError."""

    async def collect(self, keep: set[str]) -> int:
        """Removes what is not in `keep`; bytes freed."""


class Deployments:
    """Runs one deployment at a time, and lets at most one wait."""

    def __init__(
        self,
        config: Config,
        state_dir: Path,
        boot: BootRecord,
        arbiter: Arbiter,
        dataplane: Dataplane,
        residents: Residents,
        installer: Installer,
        recovery: Recovery,
        trials: Trials,
        images: Images,
        journal: Journal,
        tell: Tell,
        boot_id: str,
    ) -> None:
        self.config = config
        self.state_dir = state_dir
        self.boot = boot
        self.arbiter = arbiter
        self.dataplane = dataplane
        self.residents = residents
        self.installer = installer
        self.recovery = recovery
        self.trials = trials
        self.images = images
        self.journal = journal
        self.tell = tell
        self.boot_id = boot_id
        self.books = Books(state_dir, journal)
        self.last: dict[str, Any] | None = None
        self._all: dict[str, Deployment] = {}
        self._task: asyncio.Task[None] | None = None
        self._asks: set[asyncio.Task[None]] = set()
        self._begun = False
        """Something has been asked for in this run, and written down."""
        self._cut_off: list[dict[str, Any]] = []
        self._unheard = 0
        """Commits that boot.json knows of and the journal does not: one was cut off, or the journal's end is lost."""
        self._watchers: set[asyncio.Event] = set()

    def reconfigure(self, config: Config) -> None:
        """Another configuration is in force; the deployment in hand goes by it from its next phase on."""
        self.config = config

    # --- what commands ask --------------------------------------------------------------------------------------------

    async def deploy(self, wish: Wish, actor: str, *, fresh: bool = False) -> Deployment:
        """Starts it, queues it, or finds that it is being done. Raises Unavailable.

        `fresh`: attempts that were cut off before do not count (a new desired revision; so does `wish.force`).
        """
        deployment = Deployment(_new_id(), wish, actor, Turn("", wish), fresh=fresh or wish.force)
        return await self._ask(deployment)

    async def undeploy(self, actor: str, *, fresh: bool = True) -> Deployment:
        """Makes `empty` the committed state."""
        return await self._ask(Deployment(_new_id(), None, actor, Turn("", UNDEPLOY), kind=UNDEPLOY, fresh=fresh))

    async def rollback(self, actor: str) -> Deployment:
        """Calls off the deployment in hand; without one, deploys the previous model."""
        running = self.arbiter.running
        if running is not None and running.over:
            running = None  # what it was is settled: this is about the model before it
        committing = running is not None and running.phase is Phase.COMMIT
        if running is not None and running.wish != UNDEPLOY and not committing:
            return await self.cancel(running.id, actor, why=Cancelled(f"rolled back by {actor}"))
        previous = self.boot.committed if committing else self.boot.previous
        self.arbiter.rollback_target(previous.digest if previous else None)
        assert previous is not None
        # What was committed once was allowed once: a way back that asks for leave again is none.
        wish = Wish(previous.reference, digest=previous.digest, allow_signature_change=True, accept_dark=True)
        deployment = Deployment(_new_id(), wish, actor, Turn("", wish), kind="rollback")
        return await self._ask(deployment)

    async def cancel(self, task: str | None, actor: str, *, why: SlotdError | None = None) -> Deployment:
        """Before drain at once, later as a roll-back at the next phase boundary. Raises NotFound, CommandRefused."""
        over = self._all.get(task or "")
        if over is not None and over.outcome is not None:
            raise CommandRefused(f"{task} is over: it was {over.outcome.value}", code="TOO_LATE")
        decision = self.arbiter.cancel(task, why or Cancelled(f"cancelled by {actor}"))
        deployment = self._all[decision.turn.id]
        match decision:
            case Ended():
                await self._to_the_end(
                    self._finish(deployment, Outcome.CANCELLED, decision.turn.called_off), f"cancel-{deployment.id}"
                )
            case Interrupt():
                deployment.called_off.set()
                if self._task is not None:
                    self._task.cancel()
            case AtBoundary():
                deployment.called_off.set()
        if (error := decision.turn.called_off) is not None and not isinstance(decision, Ended):
            # Acknowledged is cancelled: a crash before it has ended must not bring it back.
            work = self.books.write(lambda: self.journal.call_off(deployment.id, error.as_dict()))
            await self._to_the_end(work, f"call-off-{deployment.id}")
        return deployment

    def get(self, task: str) -> Deployment | None:
        """A deployment of this run of the agent."""
        return self._all.get(task)

    async def document(self, task: str) -> dict[str, Any]:
        """A deployment, also of an earlier run. Raises NotFound."""
        deployment = self._all.get(task)
        if deployment is not None:
            return deployment.as_dict()
        stored: dict[str, Any] | None = await self.journal.get_deployment(task)
        if stored is None:
            raise NotFound(f"there is no task {task!r}", hint="tasks are kept for the last 1,000 deployments")
        return stored

    @property
    def running(self) -> Deployment | None:
        """The one in hand; None once its outcome is known, though its turn may not have ended."""
        one = self._in_hand
        return one if one is not None and one.outcome is None else None

    @property
    def _in_hand(self) -> Deployment | None:
        return self._all.get(self.arbiter.running.id) if self.arbiter.running else None

    @property
    def waiting(self) -> Deployment | None:
        return self._all.get(self.arbiter.waiting.id) if self.arbiter.waiting else None

    async def watch(self, task: str | None = None) -> AsyncIterator[dict[str, Any]]:
        """A deployment's document whenever it changes, until it has ended (no task: those that run, for ever)."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            while True:
                deployment = self._all.get(task) if task else self._in_hand
                if deployment is not None:
                    yield deployment.as_dict()
                    if task and deployment.done.is_set():
                        return
                elif task:
                    yield await self.document(task)
                    return
                await event.wait()
                event.clear()
        finally:
            self._watchers.discard(event)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """What the journal remembers: the last deployment, and what was cut off. Before anybody can ask for more."""
        try:
            for row in await self.journal.last(1):
                self.last = row
            # Before what was cut off: without it nobody knows whether that is still wanted.
            self._unheard = self.boot.generation - await self.books.generation()
            self._cut_off = await self.journal.unfinished()
        except StorageError as error:
            log.error("history_unreadable", error=str(error))
        if self.boot.generation:
            await self.books.remember(self.boot)

    async def resume(self) -> None:
        """After a start: what was cut off is resumed, tried once more, or given up, and the journal says so."""
        rows, self._cut_off = self._cut_off, []
        for row in rows:
            try:
                await self._take_up(row, newest=row is rows[-1])
            except StorageError as error:
                log.warning("resumed_later", deployment=row["id"], error=str(error))
                self._cut_off.append(row)
            except Exception as fault:
                log.error("not_resumed", deployment=row["id"], error=str(_known(fault, "what was cut off")))

    async def settle(self) -> None:
        """What a bad disk has left undone, now that it may be mended."""
        await self.books.settle(lambda: self.boot)
        if self._cut_off and self.journal.degraded is None and not self.arbiter.stopping:
            await self.resume()

    async def _take_up(self, row: dict[str, Any], *, newest: bool) -> None:
        reached, digest, called_off = _reached(row), row.get("digest"), row.get("called_off")
        undeploy = row.get("kind") == UNDEPLOY
        key = UNDEPLOY if undeploy else digest
        committed = self.boot.committed.digest if self.boot.committed else None
        in_force = committed == (None if undeploy else digest)
        if in_force and (reached == Phase.COMMIT.value or self._unheard > 0):
            # boot.json is the truth, and it has been written.
            self._unheard -= 1
            await self._noted(self.journal.clear_attempts(key or ""))
            await self._conclude(row, Outcome.COMMITTED, None)
        elif self._unheard > 0:
            # Without its end the journal does not know what was asked for last: only boot.json does.
            error = Interrupted(
                f"cut off at {reached}; the journal has lost what came after it, and more has been committed since",
                hint="see that the committed model is the one you want; check the disk",
            )
            await self._conclude(row, Outcome.FAILED, error)
        elif called_off is not None:
            await self._conclude(row, Outcome.CANCELLED, revive(called_off))
        elif not newest or self._begun:
            await self._conclude(row, Outcome.FAILED, Interrupted(f"cut off at {reached}; a newer one was asked for"))
        elif reached == ROLL_BACK:
            why = "cut off while the committed model was put back, which the start has done"
            await self._conclude(row, Outcome.FAILED, Interrupted(why, hint="see the log of slotd for why it failed"))
        elif reached in _TOUCHING and key and await self.journal.attempts(key) > RETRIES:
            error = Interrupted(
                f"cut off at {reached} on each of {RETRIES + 1} attempts; the host stays on the committed model",
                hint="find out why the host goes down there; then deploy again, with --force for the same image",
            )
            await self._conclude(row, Outcome.FAILED, error)
        else:
            actor = f"resume of {row['id']}"
            wish = _wish_of(row)
            if undeploy:
                deployment = await self.undeploy(actor, fresh=False)
            elif wish is not None:
                deployment = await self.deploy(replace(wish, digest=digest or wish.digest, force=False), actor)
            else:
                await self._conclude(row, Outcome.FAILED, Interrupted(f"cut off at {reached}"))
                return
            again = Interrupted(f"cut off at {reached}; tried again as {deployment.id}")
            await self._conclude(row, Outcome.FAILED, again)

    async def stop(self) -> None:
        """SIGTERM: cuts the running deployment short, without a roll-back; the next start takes it up."""
        self.arbiter.stop()
        if self._task is not None:
            self._task.cancel()
        tasks = [*self._asks, *([self._task] if self._task is not None else [])]
        if tasks:
            await asyncio.wait(tasks)

    # --- the procedure ------------------------------------------------------------------------------------------------

    async def _ask(self, deployment: Deployment) -> Deployment:
        deployment.turn.id = deployment.id
        decision = self.arbiter.ask(deployment.turn)
        if isinstance(decision, Joined):
            return self._all[decision.turn.id]
        self._all[deployment.id] = deployment
        await self._to_the_end(self._accept(deployment, decision), f"ask-{deployment.id}")
        return deployment

    async def _to_the_end(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """What was decided is done and written down, whether or not the one who asked is still there."""
        task = asyncio.create_task(work, name=name)
        self._asks.add(task)
        task.add_done_callback(self._asks.discard)
        await asyncio.shield(task)

    async def _accept(self, deployment: Deployment, decision: Start | Queued) -> None:
        """Journaled, then started. Raises StorageError: then it is over."""
        try:
            await self._begin(deployment)
        except SlotdError as error:
            self._settle(deployment, Outcome.FAILED, error)
            deployment.done.set()
            if isinstance(decision, Start):
                self._next(deployment)
            else:
                self.arbiter.withdraw(deployment.turn)
            raise
        finally:
            deployment.written.set()
            if isinstance(decision, Queued) and decision.replaced is not None:
                replaced = decision.replaced
                await self._finish(self._all[replaced.id], Outcome.SUPERSEDED, replaced.called_off)
        if isinstance(decision, Start) and not self.arbiter.stopping:  # if it stops, the next start takes it up
            self._start(deployment)
        self._changed()

    async def _begin(self, deployment: Deployment) -> None:
        wish = deployment.wish
        await self.books.ready()
        await self.journal.begin(
            {
                "id": deployment.id,
                "kind": deployment.kind,
                "reference": wish.reference if wish else None,
                "actor": deployment.actor,
                "wish": asdict(wish) if wish else None,
                "created": time.time(),
                "boot_id": self.boot_id,
            }
        )
        self._begun = True
        self.tell(
            "deployment_asked", {"id": deployment.id, "actor": deployment.actor, "reference": wish and wish.reference}
        )

    def _start(self, deployment: Deployment) -> None:
        self._task = asyncio.create_task(self._logged(deployment), name=f"deployment-{deployment.id}")

    async def _logged(self, deployment: Deployment) -> None:
        with scope(deployment=deployment.id):
            await self._run(deployment)

    async def _run(self, deployment: Deployment) -> None:
        """One deployment from its first phase to its end. Only a planned stop leaves it without an outcome."""
        turn = deployment.turn
        outcome: Outcome | None = None
        error: SlotdError | None = None
        try:
            try:
                await deployment.written.wait()  # its turn may have come at once
                if deployment.done.is_set():  # it could not even be written down
                    self._next(deployment)
                    return
                outcome = await self._way(deployment)
                turn.over = True
            except asyncio.CancelledError:
                if turn.called_off is None or self.arbiter.stopping:
                    raise
                error = turn.called_off
            except Exception as fault:
                error = _known(fault, str(deployment.phase))
            if error is not None:
                error.forget_frames()
                log.warning("deployment_failed", deployment=deployment.id, phase=deployment.phase, error=str(error))
                outcome = self.arbiter.failed(turn, error)
                if outcome is None:
                    outcome = await self._roll_back(deployment, error)
                else:
                    await self._forget(deployment)
            assert outcome is not None
            if outcome is not Outcome.UNCHANGED:
                await self._noted(self._tidy())
            await self._finish(deployment, outcome, error)
        except asyncio.CancelledError:
            if not self.arbiter.stopping:
                raise
            log.warning("deployment_cut_short", deployment=deployment.id, phase=deployment.phase)
            return
        self._next(deployment)

    def _next(self, deployment: Deployment) -> None:
        following = self.arbiter.end(deployment.turn)
        self.recovery.wake()
        if following is not None:
            self._start(self._all[following.id])

    async def _tidy(self) -> None:
        """Frees the disk of what is neither committed nor previous nor wanted."""
        if self.books.doubt is not None:  # a power cut may bring back a record that names others
            return
        keep = {ref.digest for ref in (self.boot.committed, self.boot.previous) if ref is not None}
        keep |= {one.digest for one in (self.running, self.waiting) if one is not None and one.digest is not None}
        keep |= set(self.residents.models)
        freed = await self.images.collect(keep)
        if freed:
            self.tell("images_collected", {"bytes": freed})

    async def _way(self, deployment: Deployment) -> Outcome:
        """The phases, in order. Raises SlotdError where one fails."""
        if deployment.wish is None:
            return await self._empty(deployment)
        model = await self._bring(deployment, deployment.wish)
        if model is None:
            return Outcome.UNCHANGED
        wish = deployment.wish
        await self._enter(deployment, Phase.PREFLIGHT)
        await self.installer.check(model)
        committed = self.residents.models.get(self.arbiter.committed or "")
        resident = await preflight(
            self.config, self.installer.driver, self.residents, self.dataplane, deployment, wish, model, committed
        )
        told = resident.signature
        async with self.installer.lock:
            await self.books.ready()
            await self._count_attempt(deployment, model.digest)
            await self._drain(deployment)
            proven = await self.installer.install(
                resident, lambda phase: self._enter(deployment, phase), force=wish.force
            )
            deployment.notes["proof"] = proven.report.as_dict()
            if committed is not None and told is None:  # nothing but the slot could tell it
                check_signature(self.config, wish, committed, proven.seat.signature)
            self.residents.lift(resident)
            self.installer.trust(resident, proven.report)
            await self._enter(deployment, Phase.SWITCH)
            self.dataplane.changed()
            await self._probation(deployment, wish, resident, proven.seat)
            await self._commit(deployment, model)
        return Outcome.COMMITTED

    async def _bring(self, deployment: Deployment, wish: Wish) -> Model | None:
        """Resolve, pull, verify, unpack, inspect. None: it is the model in force already."""
        await self._enter(deployment, Phase.RESOLVE)
        digest = await self.images.resolve(wish.reference, wish.digest)
        deployment.digest = deployment.turn.digest = digest
        committed = self.boot.committed
        in_force = committed is not None and committed.digest == digest and digest in self.residents.models
        if committed is not None and in_force and not wish.force:
            deployment.name, deployment.version = committed.name, committed.version
            return None
        model = await self._unpacked(wish, digest)
        if model is None:
            await self._enter(deployment, Phase.PULL)

            def progress(step: dict[str, Any]) -> None:
                deployment.progress = step
                self._changed()

            await self.images.fetch(wish.reference, digest, progress)
            await self._enter(deployment, Phase.VERIFY)
            await self._enter(deployment, Phase.UNPACK)
            await self.images.unpack(wish.reference, digest)
        await self._enter(deployment, Phase.INSPECT)
        if model is None:
            model = await self.images.model(digest, wish.reference)
        deployment.name, deployment.version = model.name, model.spec.version
        check_slot(self.config, wish, model, await self.installer.probe())
        return model

    async def _unpacked(self, wish: Wish, digest: str) -> Model | None:
        """The model as it lies on the disk; None if it is not there, or damaged: then it is fetched anew."""
        if not await self.images.has(digest):
            return None
        try:
            return await self.images.model(digest, wish.reference)
        except (StorageError, NotFound) as error:
            log.warning("model_damaged", digest=digest, error=str(error))
            return None

    async def _count_attempt(self, deployment: Deployment, key: str) -> None:
        """Journaled before the slot is touched. Raises Refused for what took the host down before."""
        if deployment.fresh:
            await self.journal.clear_attempts(key)
        if await self.journal.attempts(key) > RETRIES:
            raise Refused(
                f"{deployment.name or key} was cut off {RETRIES + 1} times while the slot was changed for it",
                code="INTERRUPTED",
                hint="find out why the host goes down there; then deploy with --force",
            )
        deployment.attempt = key
        deployment.notes["attempt"] = await self.journal.count_attempt(key)

    async def _drain(self, deployment: Deployment) -> None:
        """New requests go to the bridge; those in the slot get their time."""
        await self._enter(deployment, Phase.DRAIN)
        self.dataplane.changed()
        seat = self.installer.seat
        if seat is None:
            return
        until = time.monotonic() + self.config.slot.drain_timeout
        while self.dataplane.busy(seat.key) and time.monotonic() < until and seat.worker.alive:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        deployment.notes["left_at_drain"] = self.dataplane.busy(seat.key)

    async def _probation(self, deployment: Deployment, wish: Wish, resident: Resident, seat: Seat) -> None:
        """The new model serves; it goes on when enough time and requests have gone well."""
        await self._enter(deployment, Phase.PROBATION)
        rules = self.config.swap.probation
        watch = Probation(rules, self.arbiter, self.dataplane, self.installer, self.trials, resident)
        await watch.watch(deployment, rules.duration if wish.probation is None else wish.probation, seat)

    async def _commit(self, deployment: Deployment, model: Model | None) -> None:
        """boot.json names the new model: from here on it is what the host boots into."""
        await self._enter(deployment, Phase.COMMIT)
        old = self.boot.committed
        ref = ModelRef(model.digest, model.reference, model.name, model.spec.version) if model is not None else None
        if old is not None and ref is not None and old.digest == ref.digest:
            previous = self.boot.previous
        else:
            previous = old if old is not None else self.boot.previous
        record = BootRecord(self.boot.generation + 1, ref, previous)
        async with self.books.writing:
            try:
                self.books.doubt = await asyncio.to_thread(write_boot, self.state_dir, record)
            except StorageError as error:
                self.books.doubt = str(error)
                raise
            self.boot = record
        self.arbiter.commit(deployment.turn)
        deployment.turn.over = True
        await self.books.remember(record)
        resident = self.residents.models.get(model.digest) if model is not None else None
        if resident is not None and resident.measured:
            await self.books.keep_pace(resident.model.digest, self.config.threads, resident.service)
        if old is not None and (ref is None or old.digest != ref.digest):
            await self._noted(self.residents.dismiss(old.digest))

    async def _empty(self, deployment: Deployment) -> Outcome:
        if self.boot.committed is None:
            return Outcome.UNCHANGED
        async with self.installer.lock:
            await self.books.ready()
            await self._count_attempt(deployment, UNDEPLOY)
            await self._drain(deployment)
            await self._enter(deployment, Phase.RELEASE)
            await self.installer.release()
            await self._commit(deployment, None)
        return Outcome.COMMITTED

    async def _roll_back(self, deployment: Deployment, error: SlotdError) -> Outcome:
        """The committed model comes back into the slot and is proven again; if it can't, the bridge stays."""
        self.tell("rolling_back", {"id": deployment.id, "reason": error.as_dict()})
        self.dataplane.changed()
        await self._noted(self.journal.phase(deployment.id, ROLL_BACK))
        deployment.entered(ROLL_BACK)
        in_slot = False
        async with self.installer.lock:
            committed = self.residents.models.get(self.arbiter.committed or "")
            try:
                if committed is not None:
                    await self.recovery.bring_back(committed)
                    in_slot = True
                else:
                    await self.installer.release()
            except Exception as fault:  # whatever it is, the bridge answers, and the recovery goes on trying
                second = _known(fault, "the roll-back")
                self.arbiter.trouble = second
                deployment.notes["roll_back"] = second.as_dict()
                log.error("roll_back_failed", deployment=deployment.id, error=str(second))
        await self._forget(deployment)
        return self.arbiter.restored(deployment.turn, error, in_slot=in_slot)

    # --- around it ----------------------------------------------------------------------------------------------------

    async def _enter(self, deployment: Deployment, phase: Phase) -> None:
        """Journaled before it starts, then done."""
        if deployment.turn.called_off is not None:
            raise deployment.turn.called_off
        await self.journal.phase(deployment.id, phase.value, digest=deployment.digest)
        self.arbiter.enter(deployment.turn, phase)
        deployment.entered(phase.value)
        log.info("deployment_phase", deployment=deployment.id, phase=phase.value, model=deployment.name)
        self.tell(
            "deployment_phase",
            {"id": deployment.id, "phase": phase.value, "digest": deployment.digest, "name": deployment.name},
        )
        self._changed()

    def _settle(self, deployment: Deployment, outcome: Outcome, error: SlotdError | None) -> dict[str, Any]:
        """How it has ended, as everybody sees it from now on."""
        if deployment.phases:
            deployment.phases[-1] = (deployment.phases[-1][0], time.monotonic() - deployment._phase_began)
        deployment.outcome, deployment.error = outcome, error
        deployment.seconds = time.monotonic() - deployment.began
        deployment.host = self.arbiter.host.value
        self.last = deployment.as_dict()
        return self.last

    async def _finish(self, deployment: Deployment, outcome: Outcome, error: SlotdError | None) -> None:
        await deployment.written.wait()  # else the journal would have its end before its beginning
        document = self._settle(deployment, outcome, error)
        if (key := deployment.attempt) is not None:  # it ended in order, however it ended
            await self.books.write(lambda: self.journal.clear_attempts(key))
        reason = error.as_dict() if error else None
        await self.books.write(
            lambda: self.journal.end(deployment.id, outcome.value, reason, deployment.digest, document=document)
        )
        log.info("deployment_ended", deployment=deployment.id, outcome=outcome.value, seconds=deployment.seconds)
        self.tell("deployment_ended", document)
        deployment.done.set()
        self._changed()
        for old in [known for known, one in self._all.items() if one.done.is_set()][:-KEEP_ENDED]:
            del self._all[old]

    async def _noted(self, work: Awaitable[object]) -> None:
        """What must not keep a deployment from its end if it fails: history (the journal reports the disk), tidying."""
        try:
            await work
        except Exception as fault:
            log.error("deployment_aftermath_failed", error=str(_known(fault, "what follows a deployment")))

    async def _forget(self, deployment: Deployment) -> None:
        """The executors of a model that did not make it."""
        keep = self.boot.committed.digest if self.boot.committed else None
        if deployment.digest is not None and deployment.digest != keep:
            await self._noted(self.residents.dismiss(deployment.digest))

    async def _conclude(self, row: dict[str, Any], outcome: Outcome, error: SlotdError | None) -> None:
        """The end of a deployment of the last run, in the journal and for whoever asks."""
        reason = error.as_dict() if error else None
        document = {**row, "outcome": outcome.value, "error": reason, "phase": _reached(row)}
        document.pop("wish", None)
        await self.books.write(
            lambda: self.journal.end(row["id"], outcome.value, reason, row.get("digest"), document=document)
        )
        self.last = document
        self.tell("deployment_ended", document)
        log.warning("deployment_cut_off", deployment=row["id"], reached=_reached(row), outcome=outcome.value)

    def _changed(self) -> None:
        for event in self._watchers:
            event.set()
        if self.arbiter.on_change is not None:
            self.arbiter.on_change()


def _known(fault: Exception, where: str) -> SlotdError:
    """The error to tell; our own mistakes go to the log with their trace."""
    if isinstance(fault, SlotdError):
        return fault
    log.error("unforeseen_fault", where=where, exc_info=fault)
    return SlotdError(f"an unforeseen fault in {where}: {fault}", hint="see the log of slotd")


def _wish_of(row: dict[str, Any]) -> Wish | None:
    """The wish in the journal, perhaps of another version of slotd."""
    kept = row.get("wish") or {}
    known = {field.name: kept[field.name] for field in fields(Wish) if field.name in kept}
    return Wish(**known) if "reference" in known else None


def _reached(row: dict[str, Any]) -> str:
    return str(row.get("phase") or "the start")


def _new_id() -> str:
    return f"d-{secrets.token_hex(5)}"
