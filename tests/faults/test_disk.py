"""A real disk that is full, too small or read-only: a tmpfs in a mount namespace of the test's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_PRELUDE = """
import asyncio, os, subprocess, sys
from pathlib import Path
from agent.errors import Conflict, StorageError
from agent.journal.boot import BootRecord, ModelRef, read_boot, write_boot
from agent.journal.database import Journal
from agent.journal.lock import take_lock
from agent.journal.outbox import Outbox
from agent.journal.reserve import Reserve
from agent.journal.sqlite import Clock
import time

disk = Path(sys.argv[1])
ahead = 0.0
clock = Clock(wall=lambda: time.time() + ahead, steady=lambda: time.monotonic() + ahead)

def mount(*options):
    subprocess.run(["mount", *options, str(disk)], check=True)

def fill(left=0):
    with open(disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    size = os.stat(disk / "ballast").st_size
    os.truncate(disk / "ballast", size - left)

def refused(work):
    try:
        work()
    except StorageError as error:
        assert error.hint, error
        return True
    return False

async def arefused(work):
    try:
        await work
    except StorageError as error:
        assert error.hint, error
        return True
    return False

A = ModelRef("sha256:" + "a" * 64, "r:1", "m", "1")
"""


def can_mount() -> bool:
    done = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace of its own")
class TestDisk:
    def run(self, folder: Path, script: str) -> None:
        program = folder / "script.py"
        program.write_text(_PRELUDE + script)
        disk = folder / "disk"
        disk.mkdir()
        done = subprocess.run(
            ["unshare", "-rm", sys.executable, str(program), str(disk)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert done.stdout.endswith("end\n"), done.stdout[-3000:]

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """The reserve pays for the last words; then all is refused, the old truth in force; then all works again."""
        self.run(
            tmp_path,
            """
async def main():
    global ahead
    mount("-t", "tmpfs", "-o", "size=32m", "none")
    lock = take_lock(disk / "slotd.lock")
    write_boot(disk, BootRecord(1, None, None))
    journal = await Journal.open(disk, "b", clock=clock)
    assert journal.degraded is None and Reserve(disk).path.exists()
    outbox = Outbox(journal)
    await journal.begin({"id": "d", "wish": None})
    fill()
    while not journal.degraded:  # the reserve pays
        await outbox.append("test", {"x": "x" * 50_000})
    assert not Reserve(disk).path.exists()
    await journal.phase("d", "drain")
    write_boot(disk, BootRecord(2, A, None))
    fill()
    while not await arefused(outbox.append("test", {"x": "x" * 50_000})):
        pass
    assert "full" in journal.degraded, journal.degraded
    seen = [event[0] for event in await outbox.pending(0, 1000)]  # reading goes on
    assert seen == list(range(1, len(seen) + 1))
    assert refused(lambda: write_boot(disk, BootRecord(3, None, A)))
    assert read_boot(disk) == BootRecord(2, A, None)
    assert not list(disk.glob("*.new"))
    os.unlink(disk / "ballast")
    ahead += 100
    await journal.phase("d", "program")
    assert journal.degraded is None and Reserve(disk).path.exists()
    assert await outbox.append("test", {}) == seen[-1] + 1
    write_boot(disk, BootRecord(3, None, A))
    await journal.close()
    journal = await Journal.open(disk, "b")
    assert journal.put_aside is None
    assert [p["phase"] for p in (await journal.unfinished())[0]["phases"]] == ["drain", "program"]
    await journal.close()
    print("end")
asyncio.run(main())
""",
        )

    def test_full_at_the_start(self, tmp_path: Path) -> None:
        """Nothing can be made at all: in memory, and on the disk as soon as there is room."""
        self.run(
            tmp_path,
            """
async def main():
    global ahead
    mount("-t", "tmpfs", "-o", "size=8m", "none")
    fill()
    lock = take_lock(disk / "slotd.lock")  # an empty file needs no room
    try:
        take_lock(disk / "slotd.lock")
    except Conflict as error:
        assert "unknown" in str(error), error
    assert read_boot(disk) == BootRecord(0, None, None)
    assert refused(lambda: write_boot(disk, BootRecord(1, A, None)))
    assert read_boot(disk) == BootRecord(0, None, None)
    journal = await Journal.open(disk, "b", clock=clock)
    assert "memory" in journal.degraded, journal.degraded
    outbox = Outbox(journal)
    assert await journal.receive("c", "ping", b"", "a") is None
    assert await outbox.append("test", {}) == 1
    os.unlink(disk / "ballast")
    ahead += 100
    assert await outbox.append("test", {}) == 2
    assert journal.degraded is None
    await journal.close()
    journal = await Journal.open(disk, "b")
    assert (await journal.known("c"))["state"] == "interrupted"
    assert Outbox(journal).depth() == 2
    await journal.close()
    print("end")
asyncio.run(main())
""",
        )

    def test_read_only_under_way(self, tmp_path: Path) -> None:
        """As a disk with errors is remounted: refused, the old truth in force; working again when it is put right."""
        self.run(
            tmp_path,
            """
async def main():
    mount("-t", "tmpfs", "-o", "size=32m", "none")
    write_boot(disk, BootRecord(1, A, None))
    journal = await Journal.open(disk, "b", clock=clock)
    await journal.put("x", 1)
    await journal.close()
    # A file system that is open for writing cannot be made read-only; a bind mount over it can.
    mount("--bind", str(disk))
    mount("-o", "remount,bind,ro")
    os.chdir("/")
    assert refused(lambda: write_boot(disk, BootRecord(2, None, A)))
    assert read_boot(disk) == BootRecord(1, A, None)
    journal = await Journal.open(disk, "b", clock=clock)
    assert "memory" in journal.degraded, journal.degraded
    assert await journal.get("x") == 1
    await journal.put("x", 2)
    mount("-o", "remount,bind,rw")
    global ahead
    ahead += 100
    await journal.put("y", 3)
    assert journal.degraded is None, journal.degraded
    await journal.close()
    journal = await Journal.open(disk, "b")
    assert [await journal.get(key) for key in "xy"] == [2, 3]
    await journal.close()
    print("end")
asyncio.run(main())
""",
        )

    def test_read_only_from_the_start_after_a_kill(self, tmp_path: Path) -> None:
        """SQLite cannot open a WAL database there; its content is known nevertheless, the log included."""
        self.run(
            tmp_path,
            """
CHILD = '''
import asyncio, os, sys
from pathlib import Path
from agent.journal.database import Journal
async def main():
    journal = await Journal.open(Path(sys.argv[1]), "b")
    await journal.receive("c", "deploy", b"", "a")
    await journal.begin({"id": "d", "wish": None})
    await journal.phase("d", "program")
    os.kill(os.getpid(), 9)
asyncio.run(main())
'''

async def main():
    mount("-t", "tmpfs", "-o", "size=32m", "none")
    take_lock(disk / "slotd.lock").release()
    write_boot(disk, BootRecord(1, A, None))
    assert subprocess.run([sys.executable, "-c", CHILD, str(disk)]).returncode == -9
    mount("-o", "remount,ro")
    lock = take_lock(disk / "slotd.lock")
    try:
        take_lock(disk / "slotd.lock")
        raise AssertionError
    except Conflict:
        pass
    lock.release()
    assert read_boot(disk) == BootRecord(1, A, None)
    journal = await Journal.open(disk, "b", clock=clock)
    assert "memory" in journal.degraded, journal.degraded
    assert [row["phase"] for row in await journal.unfinished()] == ["program"]
    assert (await journal.known("c"))["state"] == "interrupted"
    await journal.end("d", "failed", None, None)
    await journal.close()
    print("end")
asyncio.run(main())
""",
        )
