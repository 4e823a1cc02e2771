"""What goes into the slot with fakes for children and driver: what a failing disk, driver or bridge may cost."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent.config import Config
from agent.errors import ExecutorDied, ExecutorError, ProofFailed, Refused, SlotError, StorageError
from agent.model.signature import Signature
from agent.model.wish import Wish
from agent.serving.dataplane import Dataplane
from agent.slot import installer as module
from agent.slot import preflight as preflight_module
from agent.slot.admission import Admission
from agent.slot.arbiter import Arbiter, On, Phase, Turn
from agent.slot.installer import Installer
from agent.slot.recovery import Recovery
from drivers.base import SlotHealth, SlotState
from support.fake_executor import SIGNATURE, FakeWorker, fake_seat

DIGEST = "sha256:old"


class Driver:
    name = "fake"
    simulated = True
    numerics: Any = None

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.asked = 0
        self.error: Exception | None = None

    def _ask(self) -> None:
        self.asked += 1
        self.gate.wait(10)
        if self.error is not None:
            raise self.error

    def probe(self) -> SlotState:
        self._ask()
        return SlotState(present=True, accelerator="a")

    def health(self) -> SlotHealth:
        self._ask()
        return SlotHealth(temperature_c=40.0)


class Journal:
    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.error: StorageError | None = None

    async def put(self, key: str, value: Any) -> None:
        if self.error is not None:
            raise self.error
        self.kept[key] = value

    async def get(self, key: str) -> Any:
        if self.error is not None:
            raise self.error
        return self.kept.get(key)


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "b.bin").write_bytes(b"bits")
        self.config = Config.model_validate({"embedded": True, "slot": {"prove_timeout": 2.0, "stop_timeout": 0.1}})
        self.arbiter = Arbiter(committed=DIGEST)
        self.plane = Dataplane(self.arbiter, Admission(max_queue=10, max_wait=1.0), self.config.serving)
        self.journal = Journal()
        self.driver = Driver()
        self.installer = Installer(
            self.config,
            self.driver,
            self.arbiter,
            self.plane,
            self.journal,
            "boot-1",  # type: ignore[arg-type]
        )
        self.verbs: list[str] = []
        self.proved: list[Any] = []
        self.proof: Exception | None = None
        section = SimpleNamespace(interface="i", accelerator="a", bitstream="b.bin")
        spec = SimpleNamespace(slot=section, image=None, has_bridge=True, version="1", signature=None)
        self.model: Any = SimpleNamespace(digest=DIGEST, name="toy", version=1, folder=folder, spec=spec, hashes={})
        bridge = fake_seat(FakeWorker(), "bridge", self.model)
        self.resident: Any = SimpleNamespace(
            model=self.model, bridge=bridge, maps=(), decoders=bridge.decoders, signature=object()
        )

    async def programmer(self, name: str, options: Any, verb: str, **_: Any) -> SlotState:
        self.verbs.append(verb)
        return SlotState(present=True, accelerator="a")

    async def prove_seat(self, subject: Any, reference: Any, *_: Any, seed: int) -> Any:
        self.proved.append(reference)
        await asyncio.sleep(0.01)
        if self.proof is not None:
            raise self.proof
        return SimpleNamespace(service=0.001, cases=1)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with capture_logs():
        yield


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)

    async def start(launch: Any, *, timeout: float) -> FakeWorker:
        return FakeWorker()

    monkeypatch.setattr(module, "run_programmer", bench.programmer)
    monkeypatch.setattr(module, "prove_seat", bench.prove_seat)
    monkeypatch.setattr(module, "launch_model", lambda *_, **__: None)
    monkeypatch.setattr(module, "Worker", SimpleNamespace(start=start))
    yield bench
    bench.driver.gate.set()
    await bench.installer.close()


async def quietly(_: Phase) -> None:
    return None


async def test_programming_is_skipped_only_if_this_boots_record_says_so(bench: Bench) -> None:
    for _ in range(2):
        await bench.installer.install(bench.resident, quietly)
    assert bench.verbs == ["program"]
    assert bench.journal.kept["slot"]["bitstream"] == hashlib.sha256(b"bits").hexdigest()
    await bench.installer.install(bench.resident, quietly, force=True)
    assert bench.verbs == ["program"] * 2
    bench.installer.boot_id = "boot-2"
    await bench.installer.install(bench.resident, quietly)
    assert bench.verbs == ["program"] * 3


async def test_a_journal_that_fails_does_not_cost_the_slot(bench: Bench) -> None:
    """The committed model could not be brought back while the disk was full."""
    await bench.installer.program(bench.model)
    bench.journal.error = StorageError("the disk is full")
    await bench.installer.program(bench.model)
    assert bench.verbs == ["program"] * 2
    await bench.installer.reset("port")
    bench.journal.error = None
    await bench.installer.program(bench.model)
    assert bench.verbs == ["program", "program", "reset-port", "program"], "the old record is not believed"
    await bench.installer.program(bench.model)
    assert len(bench.verbs) == 4


async def test_a_bitstream_that_cannot_be_read_is_an_error_of_ours(bench: Bench) -> None:
    """An OSError ended the recovery, and with it slotd, at every start."""
    (bench.folder / "b.bin").unlink()
    with pytest.raises(StorageError):
        await bench.installer.program(bench.model)


@pytest.mark.parametrize("what", ["probe", "read_health"])
async def test_a_driver_that_hangs_takes_one_thread(bench: Bench, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look took another, until nothing could be written to the disk any more."""
    monkeypatch.setattr(module, "DRIVER_ANSWERS", 0.02)
    bench.driver.gate.clear()
    for _ in range(20):
        found = await getattr(bench.installer, what)()
        assert not found.present if what == "probe" else found.errors
    assert bench.driver.asked == 1
    bench.driver.gate.set()
    monkeypatch.setattr(module, "DRIVER_ANSWERS", 5.0)
    await asyncio.sleep(0.05)
    found = await getattr(bench.installer, what)()
    assert found.present if what == "probe" else found.temperature_c == 40.0
    bench.driver.error = RuntimeError("its bug")
    found = await getattr(bench.installer, what)()
    assert "its bug" in (found.detail if what == "probe" else found.errors[0])


async def test_the_proof_waits_for_a_bridge_that_is_being_restarted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was made without the CPU to compare with, and nobody was told."""
    bridge, bench.resident.bridge = bench.resident.bridge, None
    asyncio.get_running_loop().call_later(0.1, setattr, bench.resident, "bridge", bridge)
    await bench.installer.install(bench.resident, quietly)
    assert bench.proved == [bridge]
    bench.resident.bridge = None
    monkeypatch.setattr(module, "BRIDGE_BACK", 0.05)
    await bench.installer.prove(bench.resident)
    assert bench.proved == [bridge, None], "better than a slot that is given up"


async def test_a_death_during_the_proof(bench: Bench) -> None:
    installing = asyncio.create_task(bench.installer.install(bench.resident, quietly))
    while bench.installer.seat is None:
        await asyncio.sleep(0.001)
    bench.installer.seat.worker.die()  # type: ignore[attr-defined]
    with pytest.raises(ExecutorDied):
        await installing
    assert bench.installer.seat is None
    assert bench.arbiter.slot is None


async def test_release_of_one_that_does_not_end(bench: Bench) -> None:
    await bench.installer.install(bench.resident, quietly)
    seat = bench.installer.seat
    assert seat is not None
    worker: Any = seat.worker
    worker.stuck = SlotError("it does not end", code="DEVICE_STUCK")
    with pytest.raises(SlotError):
        await bench.installer.release()
    assert bench.arbiter.slot is None
    assert bench.installer.seat is seat, "nothing else may be loaded beside it"
    worker.stuck = None
    await bench.installer.release()
    assert bench.installer.seat is None


# --- the recovery and the preflight, which use it ---------------------------------------------------------------------


def recovery(bench: Bench) -> Recovery:
    residents: Any = SimpleNamespace(models={DIGEST: bench.resident})
    return Recovery(bench.config, bench.arbiter, bench.installer, residents, bench.plane, lambda *_: None)


async def trusted(bench: Bench) -> None:
    proven = await bench.installer.install(bench.resident, quietly)
    bench.installer.trust(bench.resident, proven.report)
    bench.proved.clear()


async def test_a_repeated_proof_leaves_a_swap_alone(bench: Bench) -> None:
    """It waited for the lock, and then proved the new model by the old one's golden cases before the roll-back."""
    await trusted(bench)
    turn = Turn("d", "wish", digest="sha256:new")
    bench.arbiter.ask(turn)
    bench.arbiter.enter(turn, Phase.PROBATION)
    await recovery(bench)._prove_again(1)
    assert bench.proved == []
    bench.arbiter.end(turn)
    await recovery(bench)._prove_again(1)
    assert len(bench.proved) == 1


async def test_a_repeated_proof_that_fails_brings_the_slot_into_doubt(bench: Bench) -> None:
    await trusted(bench)
    winner = recovery(bench)
    bench.proof = ProofFailed("wrong")
    await winner._prove_again(1)
    assert winner.needed()
    bench.proof = None
    running = asyncio.create_task(winner.run())
    winner.wake()
    async with asyncio.timeout(5):
        while winner.needed():
            await asyncio.sleep(0.005)
    running.cancel()
    assert bench.arbiter.slot is not None
    assert bench.arbiter.slot.trusted


async def test_the_ladder(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.proof = ProofFailed("wrong")
    with pytest.raises(ProofFailed):
        await recovery(bench).bring_back(bench.resident)
    # The record of the first programming is good until a reset has made it doubtful.
    assert bench.verbs == ["program", "reset-port", "program", "program", "reset-function", "program"]
    assert bench.installer.seat is None, "what fails its proof does not stay on the device"
    assert bench.arbiter.trouble is bench.proof
    bench.proof = SlotError("no runtime", code="NO_RUNTIME")
    bench.verbs.clear()
    with pytest.raises(SlotError):
        await recovery(bench).bring_back(bench.resident)
    assert "reset-port" not in bench.verbs, "no reset mends that"


def resident(signature: Signature | None, *, bridge: Any = None, has_bridge: bool = True) -> Any:
    spec = SimpleNamespace(has_bridge=has_bridge, signature=signature)
    model = SimpleNamespace(digest="sha256:new", name="toy", spec=spec)
    return SimpleNamespace(model=model, bridge=bridge, signature=signature, service=0.01)


async def run_preflight(bench: Bench, new: Any, committed: Any, **wish: Any) -> Any:
    async def admit(model: Any, *, idle: bool) -> Any:
        return new

    residents: Any = SimpleNamespace(models={"sha256:new": new}, admit=admit)
    plane: Any = SimpleNamespace(load=lambda: 0.0)
    deployment: Any = SimpleNamespace(notes={})
    return await preflight_module.preflight(
        bench.config,
        bench.driver,
        residents,
        plane,
        deployment,
        Wish("new:1", **wish),
        new.model,
        committed,  # type: ignore[arg-type]
    )


async def test_signatures_are_compared_though_a_bridge_is_being_restarted(bench: Bench) -> None:
    """A model that breaks all clients went through if the committed one's bridge happened to be away."""
    renamed = Signature(SIGNATURE.inputs, {"w": SIGNATURE.outputs["y"]})
    new = resident(renamed, bridge=fake_seat(FakeWorker(), On.BRIDGE.value))
    with pytest.raises(Refused) as refused:
        await run_preflight(bench, new, resident(SIGNATURE))
    assert refused.value.code == "SIGNATURE_CHANGED"
    new.bridge.worker.ready = {**new.bridge.worker.ready, "rss_bytes": 0}
    assert await run_preflight(bench, new, resident(SIGNATURE), allow_signature_change=True) is new


async def test_the_preflight_waits_for_a_bridge_that_is_being_restarted(bench: Bench) -> None:
    """It took the model for one without a CPU twin, and let it through unseen."""
    new = resident(SIGNATURE)
    bridge = fake_seat(FakeWorker(), On.BRIDGE.value)
    asyncio.get_running_loop().call_later(0.1, setattr, new, "bridge", bridge)
    await run_preflight(bench, new, resident(SIGNATURE))
    assert new.bridge is bridge
    bench.config = Config.model_validate({"embedded": True, "slot": {"load_timeout": 0.05}})
    with pytest.raises(ExecutorError):
        await run_preflight(bench, resident(SIGNATURE), None)
    assert (await run_preflight(bench, resident(None, has_bridge=False), None)).bridge is None
