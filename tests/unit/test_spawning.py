"""Children are started as they should be, and nobody waits for that."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from agent import spawning
from agent.spawning import PASSED, spawn, start
from support.processes import gone

LOOK = """
import json, os, sys
def target(name):
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:  # that of the folder itself
        return None
fds = {int(name): target(name) for name in os.listdir("/proc/self/fd")}
blocked = [line.split()[1] for line in open("/proc/self/status") if line.startswith("SigBlk")]
json.dump({
    "cwd": os.getcwd(), "sid": os.getsid(0) == os.getpid(), "env": dict(os.environ), "argv": sys.argv[1:],
    "fds": {number: where for number, where in fds.items() if where}, "blocked": int(blocked[0], 16),
}, sys.stdout)
"""


def look(*arguments: str, **files: int) -> dict[str, object]:
    """What a child finds."""
    read, write = os.pipe()
    child = spawn(
        [sys.executable, "-I", "-c", LOOK, *arguments], env={"A": "ä", "LC_ALL": "C.UTF-8"}, stdout=write, **files
    )
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    assert child.wait() == 0
    return json.loads(text)


def test_what_a_child_finds() -> None:
    stray = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(stray, True)  # as a library may leave it
    passed = os.memfd_create("passed")
    try:
        found = look("one", "two words", passed=passed)
    finally:
        os.close(stray)
        os.close(passed)
    assert (found["cwd"], found["sid"], found["argv"], found["blocked"]) == ("/", True, ["one", "two words"], 0)
    assert found["env"] == {"A": "ä", "LC_ALL": "C.UTF-8"}
    fds = found["fds"]
    assert isinstance(fds, dict)
    assert sorted(fds) == ["0", "1", "2", str(PASSED)]
    assert fds["0"] == "/dev/null" and fds["1"].startswith("pipe:") and "passed" in fds[str(PASSED)]


def test_signals_have_their_effect() -> None:
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN, "as Python has it"
    read, write = os.pipe()
    child = spawn(["/bin/sh", "-c", "grep SigIgn /proc/self/status"], env={"PATH": os.defpath}, stdout=write)
    os.close(write)
    with os.fdopen(read) as file:
        ignored = int(file.read().split()[1], 16)
    assert child.wait() == 0
    assert not ignored & 1 << (signal.SIGPIPE - 1)


def test_how_it_ended() -> None:
    assert spawn(["/bin/sh", "-c", "exit 7"], env={}).wait() == 7
    child = spawn(["/bin/sleep", "60"], env={})
    assert child.poll() is None
    child.kill()
    assert child.wait() == -signal.SIGKILL == child.poll()
    child.kill()  # nobody


@pytest.mark.parametrize(
    ("argv", "error"), [(["/no/such"], FileNotFoundError), (["/etc/hostname"], OSError), (["/etc"], PermissionError)]
)
def test_what_cannot_be_started(argv: list[str], error: type[OSError]) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(error, match=argv[0]):
        spawn(argv, env={})
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(ValueError, match="NUL"):
        spawn(["/bin/true", "a\0b"], env={})


def test_nobody_waits_for_the_child_to_begin(tmp_path: Path) -> None:
    """A child that does not come to its program holds up the thread that starts it, and no other."""
    slow = tmp_path / "slow"
    os.mkfifo(slow)  # opening it takes until somebody writes
    script = textwrap.dedent(f"""
        import os, threading, time
        from agent import spawning
        spawning._NULL = {os.fsencode(slow)!r}
        codes = []
        thread = threading.Thread(target=lambda: codes.append(spawning.spawn(["/bin/true"], env={{}}, stdout=2).wait()))
        thread.start()
        for _ in range(50):
            time.sleep(0.01)
            assert thread.is_alive()
        os.close(os.open({str(slow)!r}, os.O_WRONLY))
        thread.join(20)
        print(codes)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[0]\n"


async def test_one_that_is_cancelled_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Noted(spawning.Child):
        def __init__(self, pid: int) -> None:
            super().__init__(pid)
            made.append(pid)

    monkeypatch.setattr(spawning, "Child", Noted)
    starting = asyncio.create_task(start(["/bin/sleep", "60"], env={}))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert len(made) == 1
    async with asyncio.timeout(10):
        while not gone(set(made)):
            await asyncio.sleep(0.01)


async def test_the_loop_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    os.mkfifo(slow)
    monkeypatch.setattr(spawning, "_NULL", os.fsencode(slow))
    starting = asyncio.create_task(start(["/bin/true"], env={}, stdout=2))
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert not starting.done()
    await asyncio.to_thread(lambda: os.close(os.open(slow, os.O_WRONLY)))
    child = await starting
    assert await asyncio.to_thread(child.wait) == 0
