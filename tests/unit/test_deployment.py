"""The deployment procedure with fakes around it: each phase fails, and somebody interferes at every moment."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.config import Config
from agent.errors import CommandRefused, InvalidInput, Refused, SlotdError, SlotError, StorageError, Unavailable
from agent.journal.boot import BootRecord, ModelRef, read_boot, write_boot
from agent.journal.database import Journal
from agent.model.wish import Wish
from agent.slot import deployment as procedure
from agent.slot.arbiter import Arbiter, HostState, Outcome, Phase
from agent.slot.attempt import Deployment
from agent.slot.deployment import Deployments

OLD, NEW, THIRD = ("sha256:" + letter * 64 for letter in "abc")
DIGESTS = {"old:1": OLD, "new:1": NEW, "third:1": THIRD}
BEFORE = [phase for phase in Phase if not phase.touches_slot]
WORST = RuntimeError("nobody foresaw this")


class Stand:
    """What the fakes do when they are asked: fail with `faults[name]`, or wait for `holds[name]`."""

    def __init__(self) -> None:
        self.faults: dict[str, BaseException] = {}
        self.holds: dict[str, asyncio.Event] = {}
        self.reached: dict[str, asyncio.Event] = {}
        self.done: list[str] = []

    async def step(self, name: str) -> None:
        self.done.append(name)
        self.reached.setdefault(name, asyncio.Event()).set()
        if name in self.holds:
            await self.holds[name].wait()
        await asyncio.sleep(0)
        if name in self.faults:
            raise self.faults[name]

    def hold(self, name: str) -> asyncio.Event:
        self.holds[name] = asyncio.Event()
        return self.holds[name]

    async def until(self, name: str) -> None:
        await asyncio.wait_for(self.reached.setdefault(name, asyncio.Event()).wait(), 10)


def model(digest: str) -> Any:
    name = next(reference for reference, known in DIGESTS.items() if known == digest)
    return SimpleNamespace(
        digest=digest,
        reference=name,
        name=name.partition(":")[0],
        version=1,
        spec=SimpleNamespace(version="1", slot=None, has_bridge=True),
    )


class Images:
    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.here: set[str] = {OLD}
        self.damaged: set[str] = set()
        self.kept: set[str] | None = None

    async def resolve(self, reference: str, digest: str | None) -> str:
        await self.stand.step("resolve")
        return digest or DIGESTS[reference]

    async def fetch(self, reference: str, digest: str, progress: Callable[[dict[str, Any]], None]) -> None:
        progress({"bytes": 1, "total": 2})
        await self.stand.step("fetch")

    async def unpack(self, reference: str, digest: str) -> None:
        await self.stand.step("unpack")
        self.here.add(digest)
        self.damaged.discard(digest)

    async def has(self, digest: str) -> bool:
        return digest in self.here

    async def model(self, digest: str, reference: str) -> Any:
        await self.stand.step("model")
        if digest in self.damaged:
            raise StorageError("a file is not what it was")
        return model(digest)

    async def collect(self, keep: set[str]) -> int:
        await self.stand.step("collect")
        self.kept = keep
        return 0


class Residents:
    def __init__(self, stand: Stand, arbiter: Arbiter) -> None:
        self.stand = stand
        self.arbiter = arbiter
        self.models: dict[str, Any] = {}

    def add(self, digest: str) -> Any:
        self.models[digest] = SimpleNamespace(
            model=model(digest), bridge=object(), signature=object(), measured=True, service=0.01
        )
        self.arbiter.bridge_ready(digest, hash(digest))
        return self.models[digest]

    def lift(self, resident: Any) -> None:
        pass

    async def dismiss(self, digest: str) -> None:
        if self.models.pop(digest, None) is not None:
            self.arbiter.bridge_gone(digest)
            await self.stand.step("dismiss")


class Installer:
    def __init__(self, stand: Stand, arbiter: Arbiter) -> None:
        self.stand = stand
        self.arbiter = arbiter
        self.lock = asyncio.Lock()
        self.driver: Any = None
        self.seat: Any = None
        self.key = 100

    async def probe(self) -> Any:
        return None

    async def check(self, model: Any) -> None:
        await self.stand.step("check")

    async def release(self) -> None:
        await self.stand.step("release")
        if self.seat is not None:
            self.arbiter.slot_gone(self.seat.key)
            self.seat = None

    async def install(self, resident: Any, enter: Callable[[Phase], Awaitable[None]], *, force: bool = False) -> Any:
        assert self.lock.locked()
        await enter(Phase.RELEASE)
        await self.release()
        await enter(Phase.PROGRAM)
        await self.stand.step("program")
        await enter(Phase.LOAD)
        await self.stand.step("load")
        self.key += 1
        self.seat = SimpleNamespace(key=self.key, model=resident.model, worker=SimpleNamespace(alive=True))
        self.arbiter.slot_loaded(resident.model.digest, self.key)
        await enter(Phase.PROVE)
        await self.stand.step("prove")
        return SimpleNamespace(seat=self.seat, report=SimpleNamespace(as_dict=lambda: {"cases": 1}))

    def trust(self, resident: Any, report: Any) -> None:
        self.arbiter.slot_trusted(self.seat.key)


class Recovery:
    def __init__(self, stand: Stand, installer: Installer) -> None:
        self.stand = stand
        self.installer = installer
        self.woken = 0

    async def bring_back(self, resident: Any) -> None:
        await self.stand.step("bring_back")

        async def quiet(_: Phase) -> None:
            return None

        proven = await self.installer.install(resident, quiet)
        self.installer.trust(resident, proven.report)

    def wake(self, *, now: bool = True) -> None:
        self.woken += 1


class Host:
    """A host whose committed model answers from the slot, or an empty one."""

    def __init__(self, folder: Path, journal: Journal, *, committed: str | None = OLD) -> None:
        self.folder, self.journal = folder, journal
        self.stand = Stand()
        self.arbiter = Arbiter(committed=committed)
        self.images = Images(self.stand)
        self.residents = Residents(self.stand, self.arbiter)
        self.installer = Installer(self.stand, self.arbiter)
        self.recovery = Recovery(self.stand, self.installer)
        self.told: list[str] = []
        boot = BootRecord(1, ref(committed), None) if committed else BootRecord(0, None, None)
        write_boot(folder, boot)
        if committed:
            resident = self.residents.add(committed)
            self.installer.seat = SimpleNamespace(key=100, model=resident.model, worker=SimpleNamespace(alive=True))
            self.arbiter.slot_loaded(committed, 100)
            self.arbiter.slot_trusted(100)
        self.deployments = self.again(boot)

    def again(self, boot: BootRecord) -> Deployments:
        dataplane = SimpleNamespace(changed=lambda: None, busy=lambda key: 0)
        config = Config(embedded=True, state_dir=self.folder)
        parts: list[Any] = [self.arbiter, dataplane, self.residents, self.installer, self.recovery, None, self.images]
        return Deployments(
            config, self.folder, boot, *parts, self.journal, lambda kind, _: self.told.append(kind), "boot-1"
        )

    async def deploy(self, reference: str = "new:1", **wish: Any) -> Deployment:
        return await self.deployments.deploy(Wish(reference, **wish), "test")

    async def ended(self, deployment: Deployment) -> Deployment:
        await asyncio.wait_for(deployment.done.wait(), 10)
        await asyncio.sleep(0.01)
        return deployment

    async def idle(self) -> None:
        """Nothing is left of a deployment: the next one can run, and does."""
        async with asyncio.timeout(10):
            while self.arbiter.running is not None:
                await asyncio.sleep(0.001)
        assert not self.installer.lock.locked()


def ref(digest: str) -> ModelRef:
    return ModelRef(digest, model(digest).reference, model(digest).name, "1")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Traces of faults that nobody foresaw take seconds to draw."""
    with capture_logs():
        yield


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    journal = await Journal.open(tmp_path, "boot-1")
    yield journal
    await journal.close()


@pytest.fixture
async def host(tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    host = Host(tmp_path, journal)
    await host.deployments.open()
    monkeypatch.setattr(procedure, "check_slot", lambda *_: None)

    async def preflight(*arguments: Any) -> Any:
        await current.stand.step("preflight")
        return current.residents.models.get(arguments[6].digest) or current.residents.add(arguments[6].digest)

    class Probation:
        def __init__(self, *_: Any) -> None:
            pass

        async def watch(self, deployment: Deployment, *_: Any) -> None:
            await current.stand.step("probation")
            if deployment.turn.called_off is not None:
                raise deployment.turn.called_off

    current = host
    monkeypatch.setattr(procedure, "preflight", preflight)
    monkeypatch.setattr(procedure, "Probation", Probation)
    yield host
    await host.deployments.stop()


async def unfinished(journal: Journal) -> list[str]:
    return [row["id"] for row in await journal.unfinished()]


def fail_at(host: Host, phase: Phase, fault: BaseException) -> None:
    """The journal fails when this phase is to begin: the one thing that all phases have in common."""
    write = host.journal.phase

    async def and_fail(deployment_id: str, name: str, **more: Any) -> None:
        if name == phase.value:
            raise fault
        await write(deployment_id, name, **more)

    host.journal.phase = and_fail  # type: ignore[method-assign]


async def test_every_phase_is_journaled_before_it_begins(host: Host) -> None:
    seen: list[tuple[str, str | None]] = []
    write = host.journal.phase

    async def and_look(deployment_id: str, name: str, **more: Any) -> None:
        now = host.arbiter.running.phase.value if host.arbiter.running and host.arbiter.running.phase else None
        seen.append((name, now))
        await write(deployment_id, name, **more)

    host.journal.phase = and_look  # type: ignore[method-assign]
    done = await host.ended(await host.deploy())
    assert done.outcome is Outcome.COMMITTED
    names = [phase.value for phase in Phase]
    assert seen == list(zip(names, [None, *names], strict=False))
    assert read_boot(host.folder).committed == ref(NEW)
    assert read_boot(host.folder).previous == ref(OLD)
    assert set(host.residents.models) == {NEW}
    assert await unfinished(host.journal) == []
    assert host.images.kept == {OLD, NEW}
    assert await host.journal.attempts(NEW) == 0


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("fault", [StorageError("the disk"), WORST], ids=["storage", "unforeseen"])
async def test_each_phase_fails(host: Host, phase: Phase, fault: BaseException) -> None:
    fail_at(host, phase, fault)
    done = await host.ended(await host.deploy())
    untouched = phase in BEFORE or phase is Phase.DRAIN  # it could not even begin
    assert done.outcome is (Outcome.FAILED if untouched else Outcome.ROLLED_BACK)
    assert done.error is not None
    await host.idle()
    assert read_boot(host.folder).committed == ref(OLD)
    assert host.arbiter.host is HostState.SLOT
    assert set(host.residents.models) == {OLD}
    assert await host.journal.attempts(NEW) == 0
    assert host.recovery.woken


STEPS = [
    "resolve",
    "fetch",
    "unpack",
    "model",
    "check",
    "preflight",
    "release",
    "program",
    "load",
    "prove",
    "probation",
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", [SlotError("it breaks"), WORST], ids=["known", "unforeseen"])
async def test_each_step_fails(host: Host, step: str, fault: Exception) -> None:
    host.stand.faults[step] = fault
    if STEPS.index(step) >= STEPS.index("release"):  # the roll-back goes the same way

        async def back(resident: Any) -> None:
            host.stand.faults.clear()
            await host.recovery.__class__.bring_back(host.recovery, resident)

        host.recovery.bring_back = back  # type: ignore[method-assign]
    done = await host.ended(await host.deploy())
    assert done.outcome in (Outcome.FAILED, Outcome.ROLLED_BACK)
    await host.idle()
    assert host.arbiter.host is HostState.SLOT
    assert set(host.residents.models) == {OLD}


@pytest.mark.parametrize("fault", [SlotError("nor that", code="PROGRAM_FAILED"), WORST], ids=["known", "unforeseen"])
async def test_a_roll_back_that_fails_leaves_the_bridge(host: Host, fault: Exception) -> None:
    host.stand.faults["program"] = SlotError("no", code="PROGRAM_FAILED")
    host.stand.faults["bring_back"] = fault
    done = await host.ended(await host.deploy())
    assert done.outcome is Outcome.FAILED
    assert done.notes["roll_back"]["message"]
    await host.idle()
    assert host.arbiter.host is HostState.BRIDGE
    assert host.arbiter.trouble is not None
    assert host.recovery.woken, "the recovery goes on trying"


@pytest.mark.parametrize("fault", [SlotError("stuck", code="DEVICE_STUCK"), WORST], ids=["known", "unforeseen"])
@pytest.mark.parametrize("at", ["preflight", "program"])
async def test_executors_that_do_not_end_keep_no_deployment_from_its_end(host: Host, at: str, fault: Exception) -> None:
    host.stand.faults |= {at: SlotError("no"), "dismiss": fault, "collect": fault}
    host.recovery.bring_back = lambda resident: asyncio.sleep(0)  # type: ignore[method-assign,assignment,return-value]

    host.residents.add(NEW)
    done = await host.ended(await host.deploy())
    assert done.outcome in (Outcome.FAILED, Outcome.ROLLED_BACK)
    await host.idle()
    host.stand.faults.clear()
    assert (await host.ended(await host.deploy("third:1"))).outcome is Outcome.COMMITTED


@pytest.mark.parametrize("fault", [SlotError("stuck", code="DEVICE_STUCK"), WORST], ids=["known", "unforeseen"])
async def test_what_fails_after_the_commit_is_no_roll_back(host: Host, fault: Exception) -> None:
    host.stand.faults["dismiss"] = fault
    done = await host.ended(await host.deploy())
    assert done.outcome is Outcome.COMMITTED
    assert done.error is None
    await host.idle()
    assert host.arbiter.committed == NEW == read_boot(host.folder).committed.digest  # type: ignore[union-attr]
    assert "bring_back" not in host.stand.done


async def test_boot_json_that_cannot_be_written_rolls_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(procedure, "write_boot", full)
    done = await host.ended(await host.deploy())
    assert (done.outcome, done.error and done.error.code) == (Outcome.ROLLED_BACK, "STORAGE")
    assert host.arbiter.committed == OLD
    assert host.deployments.boot.committed == ref(OLD)
    assert host.arbiter.host is HostState.SLOT


@pytest.mark.parametrize("failing", ["end", "clear_attempts"])
async def test_a_journal_that_fails_at_the_end(host: Host, failing: str) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise InvalidInput("over 1 MiB") if failing == "end" else StorageError("the disk")

    setattr(host.journal, failing, refuse)
    done = await host.ended(await host.deploy())
    assert done.outcome is Outcome.COMMITTED
    await host.idle()


# --- cancel -----------------------------------------------------------------------------------------------------------

HELD = {
    "resolve": Phase.RESOLVE,
    "fetch": Phase.PULL,
    "unpack": Phase.UNPACK,
    "preflight": Phase.PREFLIGHT,
    "release": Phase.RELEASE,
    "program": Phase.PROGRAM,
    "load": Phase.LOAD,
    "prove": Phase.PROVE,
    "probation": Phase.PROBATION,
}


@pytest.mark.parametrize("step", HELD)
async def test_cancel(host: Host, step: str) -> None:
    gate = host.stand.hold(step)
    deployment = await host.deploy()
    await host.stand.until(step)
    assert (await host.deployments.cancel(None, "test")) is deployment
    if HELD[step].touches_slot:
        await asyncio.sleep(0.01)
        assert deployment.outcome is None, "at the next boundary"
        gate.set()
    await host.ended(deployment)
    assert deployment.outcome is Outcome.CANCELLED
    await host.idle()
    assert host.arbiter.host is HostState.SLOT
    assert await host.journal.attempts(NEW) == 0


@pytest.mark.parametrize("ending", ["failed", "unchanged", "cancelled"])
async def test_cancel_of_a_deployment_that_is_ending(host: Host, ending: str) -> None:
    """It was cut short in the middle of its last words, and held its turn for ever."""
    writing, go_on = asyncio.Event(), asyncio.Event()
    write = host.journal.end

    async def slowly(*arguments: Any, **more: Any) -> None:
        writing.set()
        await go_on.wait()
        await write(*arguments, **more)

    host.journal.end = slowly  # type: ignore[method-assign]
    if ending == "failed":
        host.stand.faults["fetch"] = SlotdError("no")
    held = host.stand.hold("resolve") if ending == "cancelled" else None
    deployment = await host.deploy("old:1" if ending == "unchanged" else "new:1")
    if held is not None:
        await host.stand.until("resolve")
        await host.deployments.cancel(None, "test")
    await asyncio.wait_for(writing.wait(), 10)
    with pytest.raises(CommandRefused) as refused:
        await host.deployments.cancel(None, "again")
    assert refused.value.code == "TOO_LATE"
    with pytest.raises(Refused) as none:
        await host.deployments.rollback("again")
    assert none.value.code == "NO_PREVIOUS"
    assert (await host.deploy("third:1")).id != deployment.id
    host.stand.faults.clear()
    host.stand.holds.clear()
    go_on.set()
    await host.ended(deployment)
    assert deployment.outcome is Outcome(ending)
    await host.idle()
    assert host.arbiter.committed == THIRD


@pytest.mark.parametrize("moment", ["while boot.json is written", "while the end is journaled"])
async def test_rollback_of_what_has_just_been_committed(
    host: Host, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Who sees `committed` and wants back at once is not told that it is too late."""
    gate = host.stand.hold("collect")
    if moment == "while boot.json is written":
        gate = asyncio.Event()
        write, reached = procedure.write_boot, asyncio.Event()
        loop, held = asyncio.get_running_loop(), threading.Event()

        def slowly(*arguments: Any) -> Any:
            loop.call_soon_threadsafe(reached.set)
            held.wait(10)
            return write(*arguments)

        monkeypatch.setattr(procedure, "write_boot", slowly)
    first = await host.deploy()
    if moment == "while boot.json is written":
        await asyncio.wait_for(reached.wait(), 10)
        back = await host.deployments.rollback("test")
        held.set()
    else:
        await host.stand.until("collect")
        back = await host.deployments.rollback("test")
    host.stand.holds.clear()
    gate.set()
    assert (await host.ended(first)).outcome is Outcome.COMMITTED
    assert (await host.ended(back)).outcome is Outcome.COMMITTED
    assert host.arbiter.committed == OLD
    assert host.deployments.boot.previous is not None and host.deployments.boot.previous.digest == NEW


async def test_nobody_joins_what_is_ending(host: Host) -> None:
    gate = host.stand.hold("collect")
    host.stand.faults["fetch"] = SlotdError("no")
    first = await host.deploy()
    await host.stand.until("collect")
    host.stand.faults.clear()
    second = await host.deploy()
    assert second is not first
    gate.set()
    assert (await host.ended(second)).outcome is Outcome.COMMITTED
    assert first.outcome is Outcome.FAILED


async def test_the_newest_waits_and_the_replaced_is_superseded(host: Host) -> None:
    gate = host.stand.hold("fetch")
    first = await host.deploy()
    await host.stand.until("fetch")
    second = await host.deploy("old:1", force=True)
    third = await host.deploy("third:1")
    assert second.outcome is Outcome.SUPERSEDED
    assert second.done.is_set()
    gate.set()
    await host.ended(first)
    assert (await host.ended(third)).outcome is Outcome.COMMITTED
    assert await unfinished(host.journal) == []


async def test_one_that_waits_starts_while_it_is_being_journaled(host: Host) -> None:
    """Its turn came while the one that it replaced was still being written down."""
    gate = host.stand.hold("fetch")
    first = await host.deploy()
    await host.stand.until("fetch")
    await host.deploy("old:1", force=True)
    write = host.journal.end

    async def slowly(deployment_id: str, outcome: str, *arguments: Any, **more: Any) -> None:
        if outcome == "superseded":
            gate.set()
            await host.ended(first)
            await asyncio.sleep(0.02)
        await write(deployment_id, outcome, *arguments, **more)

    host.journal.end = slowly  # type: ignore[method-assign]
    third = await host.deploy("third:1")
    assert (await host.ended(third)).outcome is Outcome.COMMITTED


async def test_a_wish_that_cannot_be_journaled_is_not_carried_out(host: Host) -> None:
    gate = host.stand.hold("fetch")
    first = await host.deploy()
    await host.stand.until("fetch")
    begin = host.journal.begin

    async def refuse(_: Any) -> None:
        raise StorageError("the disk is full")

    host.journal.begin = refuse  # type: ignore[method-assign,assignment]
    for _ in range(100):
        with pytest.raises(StorageError):
            await host.deploy("third:1")
    assert host.arbiter.waiting is None
    gate.set()
    await host.ended(first)
    await host.idle()
    with pytest.raises(StorageError):
        await host.deploy("third:1")
    assert host.arbiter.running is None
    host.journal.begin = begin  # type: ignore[method-assign]
    assert (await host.ended(await host.deploy("third:1"))).outcome is Outcome.COMMITTED
    assert len(host.deployments._all) <= procedure.KEEP_ENDED + 1


@pytest.mark.parametrize("taken", [True, False])
async def test_a_turn_that_comes_before_its_wish_is_journaled(host: Host, taken: bool) -> None:
    gate = host.stand.hold("fetch")
    first = await host.deploy()
    await host.stand.until("fetch")
    begin, end_of_first = host.journal.begin, asyncio.Event()

    async def late(document: Any) -> None:
        gate.set()
        await end_of_first.wait()
        await asyncio.sleep(0.05)  # its own turn has come
        if not taken:
            raise StorageError("the disk is full")
        await begin(document)

    host.journal.begin = late  # type: ignore[method-assign,assignment]
    asked = asyncio.create_task(host.deploy("third:1"))
    await host.ended(first)
    end_of_first.set()
    if taken:
        assert (await host.ended(await asked)).outcome is Outcome.COMMITTED
    else:
        with pytest.raises(StorageError):
            await asked
        await host.idle()
        assert (host.arbiter.running, await unfinished(host.journal)) == (None, [])


async def test_a_caller_that_goes_away_changes_nothing(host: Host) -> None:
    """It was journaled and never run, to be taken up by surprise at the next start."""
    begin, go_on = host.journal.begin, asyncio.Event()

    async def slowly(document: Any) -> None:
        await begin(document)
        await go_on.wait()

    host.journal.begin = slowly  # type: ignore[method-assign]
    caller = asyncio.create_task(host.deploy())
    await asyncio.sleep(0.05)
    caller.cancel()
    await asyncio.wait((caller,))
    go_on.set()
    await host.idle()
    assert host.arbiter.committed == NEW
    assert await unfinished(host.journal) == []


async def test_unchanged_leaves_the_slot_alone(host: Host) -> None:
    done = await host.ended(await host.deploy("old:1"))
    assert done.outcome is Outcome.UNCHANGED
    assert host.stand.done == ["resolve"]


async def test_the_committed_model_can_be_mended_by_deploying_it_again(host: Host) -> None:
    """Its files were damaged: no start could load it, and no deployment either, for it was in force already."""
    host.residents.models.clear()
    host.arbiter.bridge_gone(OLD)
    host.arbiter.slot_gone(100)
    host.installer.seat = None
    host.images.damaged.add(OLD)
    done = await host.ended(await host.deploy("old:1"))
    assert done.outcome is Outcome.COMMITTED
    assert {"fetch", "unpack"} <= set(host.stand.done)
    assert host.arbiter.host is HostState.SLOT
    assert read_boot(host.folder).previous is None


async def test_undeploy_and_back(host: Host) -> None:
    assert (await host.ended(await host.deployments.undeploy("test"))).outcome is Outcome.COMMITTED
    assert host.arbiter.host is HostState.EMPTY
    assert read_boot(host.folder) == BootRecord(2, None, ref(OLD))
    assert host.residents.models == {}
    assert (await host.ended(await host.deployments.undeploy("test"))).outcome is Outcome.UNCHANGED
    assert (await host.ended(await host.deployments.rollback("test"))).outcome is Outcome.COMMITTED
    assert host.arbiter.committed == OLD


@pytest.mark.parametrize("phase", [Phase.DRAIN, Phase.RELEASE, Phase.COMMIT])
async def test_undeploy_that_fails(host: Host, phase: Phase) -> None:
    fail_at(host, phase, StorageError("the disk"))
    done = await host.ended(await host.deployments.undeploy("test"))
    assert done.outcome is (Outcome.FAILED if phase is Phase.DRAIN else Outcome.ROLLED_BACK)
    assert host.arbiter.host is HostState.SLOT


async def test_a_first_deployment_that_fails(tmp_path: Path, host: Host, journal: Journal) -> None:
    host.arbiter.committed = None
    host.deployments.boot = BootRecord(0, None, None)
    host.residents.models.clear()
    host.stand.faults["program"] = SlotError("no", code="PROGRAM_FAILED")
    done = await host.ended(await host.deploy())
    assert (done.outcome, done.host) == (Outcome.FAILED, "empty")
    await host.idle()
    assert host.installer.seat is None


# --- stop and start ---------------------------------------------------------------------------------------------------


async def restarted(host: Host) -> Deployments:
    """The next start of the agent, with what is on the disk."""
    boot = read_boot(host.folder)
    host.arbiter = Arbiter(committed=boot.committed.digest if boot.committed else None)
    host.stand = Stand()
    host.images.stand = host.stand
    host.residents = Residents(host.stand, host.arbiter)
    host.installer = Installer(host.stand, host.arbiter)
    host.recovery = Recovery(host.stand, host.installer)
    if boot.committed:
        host.residents.add(boot.committed.digest)
    host.deployments = host.again(boot)
    await host.deployments.open()
    return host.deployments


@pytest.mark.parametrize("step", [*HELD, "collect", "bring_back"])
async def test_stop_and_resume(host: Host, step: str) -> None:
    host.stand.hold(step)
    if step == "bring_back":
        host.stand.faults["program"] = SlotError("no", code="PROGRAM_FAILED")
    deployment = await host.deploy()
    await host.stand.until(step)
    await asyncio.wait_for(host.deployments.stop(), 10)
    assert deployment.outcome is None
    assert not host.installer.lock.locked()
    with pytest.raises(Unavailable):
        await host.deploy("third:1")
    deployments = await restarted(host)
    await deployments.resume()
    await host.idle()
    first = await deployments.document(deployment.id)
    assert await unfinished(host.journal) == []
    if step == "collect":  # boot.json had been written
        assert first["outcome"] == "committed"
        assert host.stand.done == []
    elif step == "bring_back":  # what failed is not made again
        assert (first["outcome"], first["error"]["code"]) == ("failed", "INTERRUPTED")
        assert host.arbiter.committed == OLD
        assert host.stand.done == []
    else:
        assert (first["outcome"], first["error"]["code"]) == ("failed", "INTERRUPTED")
        assert host.arbiter.committed == NEW
        assert deployments.last is not None
        assert deployments.last["actor"] == f"resume of {deployment.id}"


async def test_stop_while_a_wish_is_being_journaled(host: Host) -> None:
    begin, writing = host.journal.begin, asyncio.Event()

    async def slowly(document: Any) -> None:
        writing.set()
        await asyncio.sleep(0.05)
        await begin(document)

    host.journal.begin = slowly  # type: ignore[method-assign]
    asking = asyncio.create_task(host.deploy())
    await writing.wait()
    await host.deployments.stop()
    deployment = await asking
    await asyncio.sleep(0.02)
    assert await unfinished(host.journal) == [deployment.id]
    assert host.stand.done == [], "the next start takes it up"


async def test_cut_off_twice_is_given_up(host: Host) -> None:
    host.stand.hold("program")
    await host.deploy()
    await host.stand.until("program")
    await host.deployments.stop()
    deployments = await restarted(host)
    host.stand.hold("program")
    await deployments.resume()
    await host.stand.until("program")
    await deployments.stop()
    deployments = await restarted(host)
    await deployments.resume()
    assert host.arbiter.running is None
    assert deployments.last is not None
    assert deployments.last["error"]["code"] == "INTERRUPTED"
    assert "2 attempts" in deployments.last["error"]["message"]
    done = await host.ended(await host.deploy())
    assert (done.outcome, done.error and done.error.code) == (Outcome.REFUSED, "INTERRUPTED")
    assert isinstance(done.error, Refused)
    done = await host.ended(await host.deploy(force=True))
    assert done.outcome is Outcome.COMMITTED


@pytest.mark.parametrize("reached", ["fetch", "program", "commit"])
@pytest.mark.parametrize("digest", [NEW, THIRD])
async def test_a_journal_without_its_end_does_not_undo_what_was_committed_since(
    host: Host, journal: Journal, reached: str, digest: str
) -> None:
    """boot.json is two commits ahead of it: what it believes to be cut off is history."""
    await journal.begin({"id": "d-old", "wish": Wish("some:1"), "created": 1.0})
    await journal.phase("d-old", reached, digest=digest)
    write_boot(host.folder, BootRecord(3, ref(THIRD), ref(NEW)))
    deployments = await restarted(host)
    await deployments.resume()
    await host.idle()
    found = await deployments.document("d-old")
    assert host.arbiter.committed == THIRD
    assert host.stand.done == []
    assert found["outcome"] == ("committed" if digest == THIRD else "failed")
    if digest != THIRD:
        assert "lost" in found["error"]["message"]
    assert await unfinished(journal) == []
    deployments = await restarted(host)  # the journal has caught up
    await journal.begin({"id": "d-next", "wish": Wish("new:1"), "created": 2.0})
    await deployments.open()
    await deployments.resume()
    await host.idle()
    assert host.arbiter.committed == NEW


async def test_what_was_asked_for_during_a_commit_that_was_cut_off_is_taken_up(host: Host, journal: Journal) -> None:
    await journal.begin({"id": "d-1", "wish": Wish("new:1"), "created": 1.0})
    await journal.phase("d-1", "commit", digest=NEW)
    await journal.begin({"id": "d-2", "wish": Wish("third:1"), "created": 2.0})
    write_boot(host.folder, BootRecord(2, ref(NEW), ref(OLD)))
    deployments = await restarted(host)
    await deployments.resume()
    await host.idle()
    assert (await deployments.document("d-1"))["outcome"] == "committed"
    assert host.arbiter.committed == THIRD


async def test_undeploy_cut_off_is_done_again(host: Host) -> None:
    host.stand.hold("release")
    first = await host.deployments.undeploy("test")
    await host.stand.until("release")
    await host.deployments.stop()
    deployments = await restarted(host)
    await deployments.resume()
    await host.idle()
    assert read_boot(host.folder).committed is None
    assert (await deployments.document(first.id))["error"]["code"] == "INTERRUPTED"


async def test_resume_leaves_what_was_asked_for_since_alone(host: Host) -> None:
    """A command that came before `resume` was taken for one that was cut off."""
    host.stand.hold("fetch")
    old = await host.deploy()
    await host.stand.until("fetch")
    await host.deployments.stop()
    deployments = await restarted(host)
    gate = host.stand.hold("fetch")
    newer = await host.deploy("third:1")
    await deployments.resume()
    assert newer.outcome is None
    assert (await deployments.document(old.id))["outcome"] == "failed"
    gate.set()
    assert (await host.ended(newer)).outcome is Outcome.COMMITTED
    await host.idle()
    assert host.arbiter.committed == THIRD


async def test_resume_survives_a_journal_that_fails_and_wishes_of_other_versions(host: Host, journal: Journal) -> None:
    await journal.begin({"id": "d-1", "wish": {"reference": "new:1", "of_the_future": 1}, "created": 1.0})
    deployments = await restarted(host)

    async def refuse(*_: Any, **__: Any) -> None:
        raise StorageError("the disk is full")

    end, journal.end = journal.end, refuse  # type: ignore[method-assign,assignment]
    await deployments.resume()
    journal.end = end  # type: ignore[method-assign]
    await host.idle()
    assert host.arbiter.committed == NEW

    journal.unfinished = refuse  # type: ignore[method-assign,assignment]
    await deployments.open()
    await deployments.resume()
