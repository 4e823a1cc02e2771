"""The journal: what it keeps across restarts, and what becomes of it when the file or the disk is bad."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.errors import InvalidInput, StorageError
from agent.journal import deployments, received
from agent.journal.database import Journal
from agent.journal.sqlite import RETRY_DISK, Database
from agent.model.wish import Wish
from support.clocks import Hands

DIGEST = "sha256:" + "a" * 64


@asynccontextmanager
async def opened(folder: Path, boot_id: str = "boot-1", hands: Hands | None = None) -> AsyncIterator[Journal]:
    journal = await Journal.open(folder, boot_id, clock=hands.clock() if hands else None)
    try:
        yield journal
    finally:
        await journal.close()


def asked(name: str = "d-1", **more: Any) -> dict[str, Any]:
    wish = Wish("registry:5000/resnet50:3", force=True, probation=1.5)
    return {"id": name, "reference": wish.reference, "actor": "local: me", "wish": wish, "created": 1.0e9} | more


# --- deployments -----------------------------------------------------------------------------------------------------


async def test_a_deployment_that_was_cut_off(tmp_path: Path) -> None:
    hands = Hands()
    async with opened(tmp_path, "boot-1", hands) as journal:
        await journal.begin(asked(kind="deploy"))
        await journal.phase("d-1", "resolve")
        hands.pass_(2.5)
        await journal.phase("d-1", "pull", digest=DIGEST)
        assert await journal.count_attempt(DIGEST) == 1
    async with opened(tmp_path, "boot-2") as journal:
        (row,) = await journal.unfinished()
        assert row["id"] == "d-1"
        assert row["reference"] == "registry:5000/resnet50:3"
        assert row["digest"] == DIGEST
        assert Wish(**row["wish"]) == Wish("registry:5000/resnet50:3", force=True, probation=1.5)
        assert (row["kind"], row["actor"], row["boot_id"], row["created"]) == ("deploy", "local: me", "boot-1", 1.0e9)
        assert [(p["phase"], p["seconds"]) for p in row["phases"]] == [("resolve", 2.5), ("pull", None)]
        assert (row["phase"], row["attempts"], row["outcome"], row["error"]) == ("pull", 1, None, None)
        assert row["started"] == "2001-09-09T01:46:40.000Z"
        assert await journal.get_deployment("d-1") == row
        assert await journal.last() == [row]
        error = {"code": "INTERRUPTED", "message": "cut off at pull"}
        await journal.end("d-1", "failed", error, None)
        assert await journal.unfinished() == []
        ended = await journal.get_deployment("d-1")
        assert ended is not None
        assert (ended["outcome"], ended["error"], ended["digest"]) == ("failed", error, DIGEST)


async def test_what_end_was_given_is_what_is_answered(tmp_path: Path) -> None:
    document = {"id": "d-1", "outcome": "committed", "phases": [], "seconds": 1.5, "name": "größe"}
    async with opened(tmp_path) as journal:
        await journal.begin(asked())
        await journal.end("d-1", "committed", None, DIGEST, document=document)
    async with opened(tmp_path) as journal:
        assert await journal.get_deployment("d-1") == document
        assert await journal.get_deployment("d-2") is None


async def test_seconds_do_not_span_boots(tmp_path: Path) -> None:
    hands = Hands()
    async with opened(tmp_path, "boot-1", hands) as journal:
        await journal.begin(asked())
        await journal.phase("d-1", "pull")
    async with opened(tmp_path, "boot-2", hands) as journal:
        await journal.begin(asked())  # the same once more keeps what it has
        hands.pass_(10)
        await journal.phase("d-1", "drain")
        hands.pass_(1)
        await journal.end("d-1", "failed", None, None)
        row = await journal.get_deployment("d-1")
        assert row is not None
        assert [(p["phase"], p["seconds"]) for p in row["phases"]] == [("pull", None), ("drain", 1.0)]


async def test_history_is_bounded_but_not_what_is_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "MAX_DEPLOYMENTS", 5)
    async with opened(tmp_path) as journal:
        await journal.begin(asked("first"))
        for number in range(12):
            await journal.begin(asked(f"d-{number}"))
            await journal.phase(f"d-{number}", "pull")
            await journal.end(f"d-{number}", "committed", None, DIGEST)
        await journal.begin(asked("last"))
        assert [row["id"] for row in await journal.unfinished()] == ["first", "last"]
        names = [row["id"] for row in await journal.last(100)]
        assert names == ["last", "d-11", "d-10", "d-9", "d-8", "d-7", "first"]
        counted = await journal.database.run(lambda db, _: db.execute("SELECT count(*) FROM phases").fetchone())
        assert counted == (5,)


async def test_what_the_journal_does_not_know(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        with pytest.raises(StorageError, match="has lost the deployment 'd-9'"):
            await journal.phase("d-9", "pull")
        with pytest.raises(StorageError, match="has lost"):
            await journal.end("d-9", "failed", None, None)
        for wrong in ({}, {"id": ""}, {"id": 3}):
            with pytest.raises(InvalidInput):
                await journal.begin(wrong)
        with pytest.raises(InvalidInput):
            await journal.begin(asked(wish={"reference": object()}))
        with pytest.raises(InvalidInput):
            await journal.put("x", float("nan"))
        with pytest.raises(InvalidInput, match="too long"):
            await journal.put("x", "x" * (1 << 20))
        assert await journal.last() == []


async def test_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "MAX_ATTEMPTS", 3)
    hands = Hands()
    async with opened(tmp_path, hands=hands) as journal:
        assert await journal.attempts(DIGEST) == 0
        assert [await journal.count_attempt(DIGEST) for _ in range(3)] == [1, 2, 3]
        await journal.clear_attempts("other")
    async with opened(tmp_path, hands=hands) as journal:
        assert await journal.attempts(DIGEST) == 3
        for key in "abc":
            hands.pass_(1)
            await journal.count_attempt(key)
        assert [await journal.attempts(key) for key in (DIGEST, "a", "b", "c")] == [0, 1, 1, 1]
        await journal.clear_attempts("a")
        assert await journal.attempts("a") == 0


async def test_small_state(tmp_path: Path) -> None:
    value = {"epoch": "e", "revision": 7, "deep": [1, None, "ü\u2028"]}
    async with opened(tmp_path) as journal:
        assert await journal.get("desired") is None
        await journal.put("desired", 1)
        await journal.put("desired", value)
    async with opened(tmp_path) as journal:
        assert await journal.get("desired") == value
        await journal.put("desired", None)
        assert await journal.get("desired") is None


# --- commands --------------------------------------------------------------------------------------------------------


async def test_a_command_is_run_once_whatever_happens(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        assert await journal.known("c-1") is None
        assert await journal.receive("c-1", "deploy", b"{}", "mqtt: ops") is None
        again = await journal.receive("c-1", "deploy", b"{}", "mqtt: ops")
        assert again is not None
        assert (again["state"], again["answer"], again["name"]) == ("running", None, "deploy")
        assert await journal.receive("c-2", "deploy", b"{}", "mqtt: ops") is None
        await journal.answer("c-1", {"ok": True, "result": {"task": "d-1"}})
        await journal.answer("c-1", {"ok": False})  # the first stays
    async with opened(tmp_path) as journal:
        done = await journal.receive("c-1", "deploy", b"other", "mqtt: ops")
        assert done is not None
        assert (done["state"], done["answer"]) == ("done", {"ok": True, "result": {"task": "d-1"}})
        assert done == await journal.known("c-1")
        cut_off = await journal.receive("c-2", "deploy", b"{}", "mqtt: ops")
        assert cut_off is not None
        assert (cut_off["state"], cut_off["answer"]) == ("interrupted", None)
        await journal.answer("c-2", {"ok": False, "error": {"code": "INTERRUPTED"}})
        again = await journal.known("c-2")
        assert again is not None
        assert (again["state"], again["answer"]["error"]) == ("interrupted", {"code": "INTERRUPTED"})


async def test_an_id_is_kept_for_a_day(tmp_path: Path) -> None:
    hands = Hands()
    async with opened(tmp_path, hands=hands) as journal:
        await journal.receive("c", "ping", b"", "a")
        await journal.answer("c", {"n": 1})
        hands.pass_(received.KEEP - 1)
        assert await journal.receive("c", "ping", b"", "a") is not None
        hands.pass_(2)
        assert await journal.known("c") is None
        assert await journal.receive("c", "ping", b"", "a") is None
        known = await journal.known("c")
        assert known is not None and known["state"] == "running"


@pytest.mark.parametrize("jump", [56 * 365 * 86400.0, -5 * 365 * 86400.0])
async def test_a_clock_that_is_set_forgets_nothing(tmp_path: Path, jump: float) -> None:
    hands = Hands()
    async with opened(tmp_path, hands=hands) as journal:
        await journal.receive("c", "ping", b"", "a")
        hands.set(hands.wall + jump)
        assert await journal.receive("c", "ping", b"", "a") is not None
        hands.pass_(received.KEEP + 1)  # and it is not kept for ever either
        assert await journal.known("c") is None


async def test_commands_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "MAX_COMMANDS", 10)
    hands = Hands()
    async with opened(tmp_path, hands=hands) as journal:
        await journal.receive("running", "x", b"", "a")
        for number in range(30):
            hands.pass_(1)
            await journal.receive(f"c{number}", "x", b"", "a")
            await journal.answer(f"c{number}", {})
        kept = [number for number in range(30) if await journal.known(f"c{number}")]
        assert kept == list(range(21, 30))
        assert await journal.known("running")
        monkeypatch.setattr(received, "MAX_BYTES", 100_000)
        for number in range(30, 36):
            hands.pass_(1)
            await journal.receive(f"c{number}", "x", b"", "a")
            await journal.answer(f"c{number}", {"long": "x" * 40_000})
        kept = [number for number in range(36) if await journal.known(f"c{number}")]
        assert kept == [34, 35]
        await journal.answer("running", {"ok": True})
        known = await journal.known("running")
        assert known is None or known["answer"] == {"ok": True}


async def test_an_answer_to_an_id_that_was_forgotten(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.answer("c", {"ok": True})
        known = await journal.receive("c", "x", b"", "a")
        assert known is not None
        assert (known["state"], known["answer"]) == ("done", {"ok": True})


# --- many at once ----------------------------------------------------------------------------------------------------


async def test_many_at_once(tmp_path: Path) -> None:
    """Every write of many tasks is there, each id is new to exactly one, and a cancelled caller harms nobody."""
    async with opened(tmp_path) as journal:

        async def work(number: int) -> int:
            new = await journal.receive(f"same-{number % 10 + number // 1000 * 10}", "x", b"", "a") is None
            await journal.put(f"key-{number}", number)
            await journal.count_attempt("all")
            return int(new)

        tasks = [asyncio.create_task(work(number)) for number in range(100)]
        doomed = [asyncio.create_task(work(1000 + number)) for number in range(20)]
        await asyncio.sleep(0)
        for task in doomed:
            task.cancel()
        assert sum(await asyncio.gather(*tasks)) == 10
        await asyncio.gather(*doomed, return_exceptions=True)
        assert [await journal.get(f"key-{number}") for number in range(100)] == list(range(100))
        assert 100 <= await journal.attempts("all") <= 120
        assert all([await journal.known(f"same-{number}") for number in range(10)])


async def test_closed_is_closed(tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path, "b")
    pending = asyncio.create_task(journal.put("x", 1))
    await asyncio.sleep(0)
    await journal.close()
    await journal.close()
    await pending  # what was asked for before is done
    with pytest.raises(StorageError, match="closed"):
        await journal.get("x")
    async with opened(tmp_path) as journal:
        assert await journal.get("x") == 1


async def test_nothing_of_it_is_mapped_and_nobody_else_gets_in(tmp_path: Path) -> None:
    """A mapped file ends the process where the disk has faults; without one, SQLite must be alone with it."""
    async with opened(tmp_path) as journal:
        await journal.put("x", 1)
        assert "journal.db" not in Path("/proc/self/maps").read_text()
        assert (tmp_path / "journal.db").stat().st_mode & 0o777 == 0o600
        other = sqlite3.connect(tmp_path / "journal.db", timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("SELECT value FROM state")
        other.close()
        await journal.put("x", 2)


_WRITER = """
import asyncio, sys
from pathlib import Path
from agent.journal.database import Journal
async def main():
    journal = await Journal.open(Path(sys.argv[1]), "b")
    await journal.begin({"id": sys.argv[2], "reference": "r", "actor": "a", "wish": None, "created": 1.0})
    number = 0
    while True:
        number += 1
        await journal.phase(sys.argv[2], str(number))
        print(number, flush=True)
asyncio.run(main())
"""


async def test_killed_while_it_writes(tmp_path: Path) -> None:
    """A phase whose call returned is there."""
    for attempt in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), f"d-{attempt}"], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(0.01 * attempt)
        writer.send_signal(signal.SIGKILL)
        acknowledged = int([first, *writer.stdout.read().splitlines()][-1])
        writer.stdout.close()
        writer.wait()
        async with opened(tmp_path) as journal:
            assert journal.put_aside is None and journal.degraded is None
            rows = await journal.unfinished()
            assert len(rows) == attempt + 1
            assert int(rows[-1]["phase"]) in (acknowledged, acknowledged + 1)


# --- bad files -------------------------------------------------------------------------------------------------------


async def filled(folder: Path) -> bytes:
    """A closed journal with something in it; its bytes."""
    async with opened(folder) as journal:
        await journal.begin(asked())
        for number in range(50):
            await journal.put(f"key-{number}", "x" * 500)
    return (folder / "journal.db").read_bytes()


@pytest.mark.parametrize("damage", ["garbage", "header", "middle", "cut", "foreign", "folder", "link", "lacking"])
async def test_an_unusable_journal_is_put_aside(tmp_path: Path, damage: str) -> None:
    content = await filled(tmp_path)
    path = tmp_path / "journal.db"
    match damage:
        case "garbage":
            path.write_bytes(b"not a database at all" * 500)
        case "header":
            path.write_bytes(b"\xff" * 100 + content[100:])
        case "middle":
            path.write_bytes(content[:8192] + b"\xa5" * 16384 + content[8192 + 16384 :])
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "foreign":
            path.unlink()
            with sqlite3.connect(path) as other:
                other.execute("CREATE TABLE birds (name)")
            other.close()
        case "folder":
            path.unlink()
            path.mkdir()
        case "link":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
        case "lacking":
            with sqlite3.connect(path) as other:
                other.execute("DROP TABLE commands")
            other.close()
    async with opened(tmp_path) as journal:
        assert journal.put_aside is not None
        assert (journal.put_aside.name, journal.put_aside.reason) == ("journal.db.broken-1", "broken")
        assert journal.degraded is None
        assert await journal.last() == []
        await journal.put("x", 1)
    assert (tmp_path / "journal.db.broken-1").exists()
    async with opened(tmp_path) as journal:
        assert journal.put_aside is None
        assert await journal.get("x") == 1


async def test_an_empty_file_is_a_fresh_journal(tmp_path: Path) -> None:
    (tmp_path / "journal.db").touch()
    async with opened(tmp_path) as journal:
        assert journal.put_aside is None
        await journal.put("x", 1)


async def test_a_journal_of_a_newer_slotd_is_put_aside(tmp_path: Path) -> None:
    await filled(tmp_path)
    with sqlite3.connect(tmp_path / "journal.db") as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    async with opened(tmp_path) as journal:
        assert journal.put_aside is not None
        assert journal.put_aside.reason == "newer"
        assert "schema 99" in str(journal.put_aside)
        await journal.put("x", 1)


async def test_only_the_last_three_are_kept(tmp_path: Path) -> None:
    for number in range(1, 7):
        (tmp_path / "journal.db").write_bytes(b"broken %d" % number * 100)
        async with opened(tmp_path) as journal:
            assert str(journal.put_aside).endswith(f"put aside as journal.db.broken-{number}")
    kept = sorted(path.name for path in tmp_path.glob("journal.db.broken-*"))
    assert kept == ["journal.db.broken-4", "journal.db.broken-5", "journal.db.broken-6"]


async def test_the_log_of_a_broken_one_is_not_played_into_the_fresh_one(tmp_path: Path) -> None:
    await filled(tmp_path)
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), "d-2"], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    writer.kill()
    writer.communicate()
    assert (tmp_path / "journal.db-wal").stat().st_size > 0
    (tmp_path / "journal.db").unlink()
    (tmp_path / "journal.db").mkdir()
    async with opened(tmp_path) as journal:
        assert journal.put_aside is not None
        assert await journal.unfinished() == []
    assert (tmp_path / "journal.db.broken-1-wal").exists()


async def test_damage_that_shows_while_it_runs(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.put("x", 1)

        def corrupt(db: sqlite3.Connection, _: float) -> None:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

        journal.database._thread.submit(lambda: corrupt(journal.database._connection, 0)).result()  # type: ignore
        path = tmp_path / "journal.db"
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xa5" * (path.stat().st_size - 4096))
        journal.database._thread.submit(journal.database._drop).result()  # its cache is gone
        await journal.put("y", 2)  # no error: a fresh one takes it
        assert journal.put_aside is not None and journal.put_aside.reason == "broken"
        assert await journal.get("y") == 2
        assert await journal.get("x") is None


# --- bad disks (real ones: tests/faults/test_disk.py) ----------------------------------------------------------------


async def test_a_write_that_fails_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await journal.put("x", 1)

        def fail(db: sqlite3.Connection, _: float) -> None:
            db.execute("INSERT OR REPLACE INTO state VALUES ('x', '2')")
            raise OSError(5, "Input/output error")

        with pytest.raises(StorageError) as caught:
            await journal.database.run(fail)
        assert caught.value.hint
        assert journal.degraded is not None and "Input/output error" in journal.degraded
        assert await journal.get("x") == 1
        assert journal.degraded is None


async def test_our_own_mistakes_are_not_the_disks(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            await journal.database.run(lambda db, _: db.execute("SELECT * FROM birds").fetchall())
        with pytest.raises(sqlite3.IntegrityError):
            await journal.database.run(lambda db, _: db.execute("INSERT INTO meta VALUES ('epoch', 'x')").rowcount)
        assert journal.degraded is None
        await journal.put("x", 1)


async def test_a_full_database_gives_up_the_reserve_first(tmp_path: Path) -> None:
    hands = Hands()
    async with opened(tmp_path, hands=hands) as journal:
        assert (tmp_path / "reserve").stat().st_size == 4 << 20

        def limit(db: sqlite3.Connection, _: float) -> None:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count = {pages}")

        await journal.database.run(limit)
        with pytest.raises(StorageError, match="full") as caught:
            await journal.put("x", "x" * 100_000)
        assert caught.value.hint == "free some space"
        assert not (tmp_path / "reserve").exists()
        assert journal.degraded is not None
        await journal.database.run(lambda db, _: db.execute("PRAGMA max_page_count = 100000").fetchone())
        await journal.put("x", "x" * 100_000)
        assert journal.degraded is not None  # until the reserve is there again
        hands.pass_(RETRY_DISK)
        await journal.put("x", "x")
        assert journal.degraded is None
        assert (tmp_path / "reserve").exists()


async def test_in_memory_until_the_disk_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands()
    async with opened(tmp_path, "b", hands) as journal:
        await journal.put("old", 1)
        await journal.receive("c", "x", b"", "a")

    def fail(self: Database) -> sqlite3.Connection:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Database, "_on_disk", fail)
    async with opened(tmp_path, "b", hands) as journal:
        assert journal.degraded is not None and "Read-only file system" in journal.degraded
        assert await journal.get("old") == 1  # what is on the disk is known
        known = await journal.receive("c", "x", b"", "a")
        assert known is not None and known["state"] == "interrupted"
        await journal.put("new", 2)
        hands.pass_(RETRY_DISK)
        await journal.put("newer", 3)
        assert journal.degraded is not None
        monkeypatch.undo()
        await journal.put("newest", 4)
        assert journal.degraded is not None  # it does not try each time
        hands.pass_(RETRY_DISK)
        await journal.put("at last", 5)
        assert journal.degraded is None
    async with opened(tmp_path, "b", hands) as journal:
        assert [await journal.get(key) for key in ("old", "new", "newer", "newest", "at last")] == [1, 2, 3, 4, 5]


async def test_a_fresh_host_whose_disk_fails(tmp_path: Path) -> None:
    hands = Hands()
    folder = tmp_path / "state"
    async with opened(folder, "b", hands) as journal:
        assert journal.degraded is not None
        await journal.begin(asked())
        folder.mkdir()
        hands.pass_(RETRY_DISK)
        await journal.phase("d-1", "pull")
        assert journal.degraded is None
    async with opened(folder, "b", hands) as journal:
        assert [row["phase"] for row in await journal.unfinished()] == ["pull"]
