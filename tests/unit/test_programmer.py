"""The programmer: a child that always ends, whose word always arrives, and that leaves nothing behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from agent.errors import SlotError
from agent.executor import programmer
from agent.executor.programmer import run_programmer
from drivers.base import SlotState, Wanted
from drivers.simulated import DEFAULT_SHELL, Card, inject, write_bitstream

ONE = "1" * 32


@pytest.fixture
def card(tmp_path: Path) -> Path:
    return tmp_path / "card"


@pytest.fixture
def bits(tmp_path: Path) -> Path:
    path = tmp_path / "one.bit"
    write_bitstream(path, DEFAULT_SHELL, ONE, b"payload" * 1000)
    return path


@pytest.fixture(autouse=True)
def nothing_left() -> Any:
    """Every test ends with the descriptors and children it began with; dead children count."""
    uvloop.new_event_loop().close()  # the first one keeps two descriptors for the whole process
    this = psutil.Process()
    fds, children = this.num_fds(), set(this.children())
    yield
    assert not programmer._stuck
    assert set(this.children()) <= children
    assert this.num_fds() <= fds


def wanted(bits: Path) -> Wanted:
    return Wanted(DEFAULT_SHELL, ONE, hashlib.sha256(bits.read_bytes()).hexdigest())


async def program(card: Path, bits: Path, want: Wanted | None = None, timeout: float = 30, **options: Any) -> SlotState:
    options = {"device": card, **options}
    return await run_programmer(
        "simulated", options, "program", bitstream=bits, wanted=want or wanted(bits), timeout=timeout
    )


async def reset(card: Path, verb: str = "reset-port", **kw: Any) -> SlotState:
    return await run_programmer(
        "simulated", {"device": str(card)}, verb, bitstream=None, wanted=Wanted(), **{"timeout": 30, **kw}
    )


def script(text: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-c", textwrap.dedent(text))


async def refused(work: Any) -> SlotError:
    with pytest.raises(SlotError) as caught:
        await work
    return caught.value


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_program_check_reset(loop: Callable[[], asyncio.AbstractEventLoop], card: Path, bits: Path) -> None:
    async def work() -> None:
        checked = await run_programmer(
            "simulated", {"device": str(card)}, "check", bitstream=bits, wanted=wanted(bits), timeout=30
        )
        assert checked == SlotState(True, DEFAULT_SHELL, None, "simulated")
        assert (await program(card, bits)).accelerator == ONE
        assert (await reset(card)).accelerator == ONE
        assert (await reset(card, "reset-function")).accelerator is None
        assert (await refused(program(card, bits, timeout=1.0, program_time=60))).code == "PROGRAM_TIMEOUT"

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(work())


async def test_what_the_driver_says_arrives(card: Path, bits: Path) -> None:
    inject(card, {"at": "program", "kind": "error"}, {"at": "program", "kind": "wrong_id", "skip": 1})
    assert (await refused(program(card, bits))).code == "PROGRAM_FAILED"
    assert (await refused(program(card, bits))).code == "WRONG_ACCELERATOR"
    error = await refused(program(card, bits, present=False))
    assert error.code == "DEVICE_ABSENT" and error.hint
    error = await refused(program(card, bits, colour="red"))
    assert error.code == "PROGRAM_FAILED" and "colour" in error.message
    assert (await program(card, bits)).accelerator == ONE


async def test_bitstream_is_verified_before_any_child(card: Path, bits: Path, tmp_path: Path) -> None:
    want = wanted(bits)
    link, pipe = tmp_path / "link.bit", tmp_path / "pipe.bit"
    link.symlink_to(bits)
    os.mkfifo(pipe)
    changed = tmp_path / "changed.bit"
    changed.write_bytes(bits.read_bytes() + b"\0")
    for path in (link, pipe, changed, tmp_path, tmp_path / "none.bit"):
        error = await refused(program(card, path, want))
        assert error.code == "INCOMPATIBLE_BITSTREAM" and path.name in error.message
    assert not card.exists()


async def test_child_that_dies_is_reported(card: Path, bits: Path) -> None:
    inject(card, {"at": "program", "kind": "death"})
    error = await refused(program(card, bits))
    assert error.code == "PROGRAM_FAILED" and "SIGABRT" in error.message
    error = await refused(reset(card, argv=script("raise SystemExit(7)")))
    assert error.code == "PROGRAM_FAILED" and "status 7" in error.message
    error = await refused(reset(card, argv=("/nonexistent/python",)))
    assert error.code == "PROGRAM_FAILED" and "started" in error.message


async def test_time_out_leaves_an_empty_slot_and_a_free_card(card: Path, bits: Path) -> None:
    await program(card, bits)
    inject(card, {"at": "program", "kind": "hang"})
    error = await refused(program(card, bits, timeout=3))
    assert error.code == "PROGRAM_TIMEOUT" and error.hint
    assert Card(card).programmed().accelerator is None
    assert (await program(card, bits)).accelerator == ONE


async def test_child_that_ignores_sigterm_is_killed(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programmer, "GRACE", 0.2)
    deaf = script("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    error = await refused(reset(card, argv=deaf, timeout=0.5))
    assert error.code == "PROGRAM_TIMEOUT"


async def test_child_that_cannot_be_killed_is_stuck_and_reaped_later(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programmer, "GRACE", 0.05)
    monkeypatch.setattr(programmer, "KILL_WAIT", 0.1)
    real, sent = signal.pidfd_send_signal, []
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda _, number: sent.append(number))
    error = await refused(reset(card, argv=script("import time; time.sleep(60)"), timeout=0.1))
    assert error.code == "DEVICE_STUCK" and error.hint
    assert sent == [signal.SIGTERM, signal.SIGKILL]
    (stuck,) = programmer._stuck
    real(stuck._pidfd, signal.SIGKILL)
    await stuck.ended
    assert not programmer._stuck


async def test_cancellation_kills_and_reaps(card: Path, bits: Path) -> None:
    task = asyncio.create_task(program(card, bits, program_time=60), name="programming")
    async with asyncio.timeout(20):
        while Card(card).counters().programmings == 0:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # impatience must not leave a child behind
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await program(card, bits)).accelerator == ONE


async def test_cancellation_while_hashing(card: Path, bits: Path) -> None:
    task = asyncio.create_task(program(card, bits), name="programming")
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.2)  # the thread's descriptor is closed when it ends
    assert not card.exists()


async def test_child_has_only_what_it_needs(card: Path, bits: Path) -> None:
    """Three standard descriptors and the bitstream, read-only; no new privileges; no heavy import."""
    spy = script(
        """
        import json, os, socket
        channel = socket.socket(fileno=0)
        request = json.loads(channel.recv(65536))
        fds = sorted(int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}"))
        flags = open(f"/proc/self/fdinfo/{request['bitstream']}").read().split()[3]
        import agent.executor.programmer_child as child, sys
        child.sandbox.enter(child.sandbox.Limits(1 << 30), child.sandbox.Grants())
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        heavy = sorted({"onnxruntime", "grpc", "aiomqtt", "PIL", "asyncio"} & set(sys.modules))
        mode, privileges = int(flags, 8) & os.O_ACCMODE, int(status["NoNewPrivs"])
        detail = [fds, mode, privileges, heavy, os.getcwd(), request["bitstream"]]
        channel.send(json.dumps({"state": {"present": True, "detail": json.dumps(detail)}}).encode())
        """
    )
    secret = os.open("/dev/null", os.O_RDWR)
    os.set_inheritable(secret, True)
    try:
        state = await run_programmer(
            "simulated", {}, "check", bitstream=bits, wanted=wanted(bits), timeout=30, argv=spy
        )
    finally:
        os.close(secret)
    fds, mode, privs, heavy, cwd, fd = json.loads(state.detail)
    assert (fds, mode, privs, heavy, cwd) == ([0, 1, 2, fd], os.O_RDONLY, 1, [], "/")


def test_parent_module_is_light() -> None:
    code = "import sys, agent.executor.programmer; print(sorted({'onnxruntime', 'grpc'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-I", "-c", code], text=True).strip() == "[]"


def test_child_ends_with_its_agent(card: Path, bits: Path) -> None:
    parent = subprocess.Popen(
        script(
            f"""
            import asyncio
            from pathlib import Path
            from agent.executor.programmer import run_programmer
            from drivers.base import Wanted
            asyncio.run(run_programmer("simulated", {{"device": {str(card)!r}, "program_time": 60}}, "program",
                                       bitstream=Path({str(bits)!r}), wanted=Wanted(), timeout=60))
            """
        )
    )
    end = time.monotonic() + 20
    while Card(card).counters().programmings == 0:
        assert time.monotonic() < end and parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    while True:  # the device is free as soon as the orphan has noticed
        try:
            os.close(Card(card).open())
            break
        except Exception:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.parametrize("verb", ["flash", "program", "reset-port"])
async def test_wrong_calls(verb: str, card: Path, bits: Path) -> None:
    with pytest.raises(ValueError, match=verb):
        await run_programmer(
            "simulated", {}, verb, bitstream=None if verb == "program" else bits, wanted=Wanted(), timeout=1
        )
