"""The journal across versions of slotd, and what lies beside it."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.errors import StorageError
from agent.journal import schema, sqlite
from agent.journal.database import Journal
from agent.journal.outbox import Outbox
from agent.journal.sqlite import RETRY_DISK, Database
from support.clocks import Hands

NEXT = (
    "CREATE TABLE birds (name TEXT)",
    "INSERT INTO birds VALUES ('tit'), ('owl')",
    "ALTER TABLE deployments ADD COLUMN song TEXT",
)


@asynccontextmanager
async def opened(folder: Path, hands: Hands | None = None) -> AsyncIterator[Journal]:
    journal = await Journal.open(folder, "b", clock=hands.clock() if hands else None)
    try:
        yield journal
    finally:
        await journal.close()


@contextmanager
def version(*added: tuple[str, ...], without: int = 0) -> Iterator[None]:
    """A slotd that knows more schemas, or fewer."""
    known = schema.MIGRATIONS
    sqlite.MIGRATIONS = (known[: len(known) - without]) + added  # type: ignore[attr-defined]
    try:
        yield
    finally:
        sqlite.MIGRATIONS = known  # type: ignore[attr-defined]


def rows(path: Path, query: str) -> list[Any]:
    db = sqlite3.connect(path)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


async def deployed(journal: Journal, name: str, outcome: str | None = "committed") -> None:
    await journal.begin({"id": name, "reference": "a:1", "wish": None})
    await journal.phase(name, "pull")
    if outcome:
        await journal.end(name, outcome, None, None)


async def names(journal: Journal) -> list[str]:
    return [row["id"] for row in await journal.last(100)]


# --- forward ----------------------------------------------------------------------------------------------------------


async def test_it_is_copied_before_it_is_migrated(tmp_path: Path) -> None:
    with version(without=1):
        async with opened(tmp_path) as journal:
            await journal.put("x", 1)
            await journal.database.run(lambda db, _: db.execute("INSERT INTO attempts VALUES ('k', 1, 0)").rowcount)
    async with opened(tmp_path) as journal:
        assert journal.put_aside is None and journal.degraded is None and not journal.fresh
        assert await journal.get("x") == 1
    copy = tmp_path / "journal.db.v1"
    assert rows(copy, "PRAGMA user_version") == [(1,)]
    assert rows(copy, "SELECT value FROM state WHERE key = 'x'") == [("1",)]
    before = copy.stat().st_ino
    async with opened(tmp_path) as journal:
        pass
    assert copy.stat().st_ino == before  # once
    for extra in range(1, 4):
        with version(*[(f"CREATE TABLE t{number} (x)",) for number in range(extra)]):
            async with opened(tmp_path) as journal:
                assert await journal.get("x") == 1
    assert sorted(path.name for path in tmp_path.glob("journal.db.v*")) == ["journal.db.v3", "journal.db.v4"]


_MIGRATE = """
import asyncio, os, signal, sqlite3, sys
from pathlib import Path
from agent.journal import files, sqlite
from agent.journal.database import Journal
sqlite.MIGRATIONS += ({added!r},)
last = int(sys.argv[2])
count = 0
def step(_):
    global count
    count += 1
    if count > last:
        os.kill(os.getpid(), signal.SIGKILL)
connect = sqlite3.connect
def traced(*arguments, **more):
    connection = connect(*arguments, **more)
    connection.set_trace_callback(step)
    return connection
sqlite3.connect = traced
rename = os.rename
async def main():
    journal = await Journal.open(Path(sys.argv[1]), "b")
    assert journal.put_aside is None and journal.degraded is None, journal.degraded
    await journal.close()
asyncio.run(main())
"""


async def test_killed_at_every_statement_of_a_migration(tmp_path: Path) -> None:
    """Old or new, never between; the copy is whole or not there; the next start goes on."""
    first = tmp_path / "first"
    first.mkdir()
    async with opened(first) as journal:
        await journal.put("x", 1)
    old, seen = len(schema.MIGRATIONS), set()
    script = _MIGRATE.format(added=NEXT)
    for last in range(0, 60, 2):
        folder = tmp_path / f"{last}"
        shutil.copytree(first, folder)
        done = subprocess.run([sys.executable, "-c", script, str(folder), str(last)], capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        probe = tmp_path / f"probe-{last}"
        shutil.copytree(folder, probe)
        ((found,),) = rows(probe / "journal.db", "PRAGMA user_version")
        tables = {row[0] for row in rows(probe / "journal.db", "SELECT name FROM sqlite_master")}
        assert ("birds" in tables) == (found == old + 1), last
        copy = probe / f"journal.db.v{old}"
        if found == old + 1:
            assert rows(copy, "PRAGMA user_version") == [(old,)]
        if copy.exists():
            assert rows(copy, "PRAGMA integrity_check") == [("ok",)]
            assert rows(copy, "SELECT value FROM state WHERE key = 'x'") == [("1",)]
        seen.add(found)
        with version(NEXT):
            async with opened(folder) as journal:
                assert await journal.get("x") == 1
                assert journal.put_aside is None
        assert rows(folder / "journal.db", "SELECT name FROM birds") == [("tit",), ("owl",)]
        assert not list(folder.glob("*.new*"))
        if done.returncode == 0:
            break
    else:
        raise AssertionError("it never came to its end")
    assert seen == {old, old + 1}


async def test_no_room_for_the_copy_is_no_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as journal:
        await journal.put("x", 1)
    content = (tmp_path / "journal.db").read_bytes()
    hands = Hands()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sqlite.files, "copy_before_migration", full)
    with version(NEXT):
        async with opened(tmp_path, hands) as journal:
            assert journal.degraded is not None and "No space left" in journal.degraded
            assert await journal.get("x") == 1  # it serves
            assert journal.in_memory
            assert rows(tmp_path / "journal.db", "PRAGMA user_version") == [(len(schema.MIGRATIONS),)]
            assert (tmp_path / "journal.db").read_bytes() == content
            monkeypatch.undo()
            await journal.probe()
            assert journal.degraded is None and not journal.in_memory
            assert await journal.get("x") == 1
    assert (tmp_path / f"journal.db.v{len(schema.MIGRATIONS)}").exists()


# --- back, and forward again ------------------------------------------------------------------------------------------


async def test_an_older_slotd_leaves_it_aside_and_a_newer_one_takes_it_back(tmp_path: Path) -> None:
    with version(NEXT):
        async with opened(tmp_path) as journal:
            await deployed(journal, "new-1")
            await deployed(journal, "new-2", outcome=None)
            await journal.put("wish", "of the newer")
            await journal.put("only", "in the newer")
            await journal.receive("c-1", "deploy", b"", "a")
            await journal.answer("c-1", {"task": "new-1"})
            epoch = await Outbox(journal).epoch()
    untouched = (tmp_path / "journal.db").read_bytes()
    async with opened(tmp_path) as journal:
        aside = journal.put_aside
        assert aside is not None and (aside.name, aside.reason) == ("journal.db.newer-1", "newer")
        assert (tmp_path / aside.name).read_bytes() == untouched
        assert journal.degraded is None and journal.fresh
        assert await names(journal) == []
        await deployed(journal, "old-1")
        await deployed(journal, "old-2")
        await journal.put("wish", "of the older")
        await journal.receive("c-2", "ping", b"", "a")
        await journal.answer("c-2", {})
    async with opened(tmp_path) as journal:  # it restarts: nothing is taken back by one that cannot read it
        assert journal.put_aside is None
        assert await names(journal) == ["old-2", "old-1"]
    assert (tmp_path / "journal.db.newer-1").read_bytes() == untouched
    with version(NEXT):
        async with opened(tmp_path) as journal:
            assert await names(journal) == ["old-2", "old-1", "new-2", "new-1"]
            assert [row["id"] for row in await journal.unfinished()] == ["new-2"]
            assert [p["phase"] for p in (await journal.unfinished())[0]["phases"]] == ["pull"]
            assert await journal.get("wish") == "of the older"
            assert await journal.get("only") == "in the newer"
            for command in ("c-1", "c-2"):  # none of them runs twice
                known = await journal.known(command)
                assert known is not None and known["state"] == "done"
            assert await Outbox(journal).epoch() != epoch
            await deployed(journal, "newest")
            assert (await names(journal))[0] == "newest"
    assert not list(tmp_path.glob("journal.db.newer-*"))


async def test_back_and_forth_many_times(tmp_path: Path) -> None:
    expected: list[str] = []
    for turn in range(4):
        with version(NEXT):
            async with opened(tmp_path) as journal:
                await deployed(journal, f"new-{turn}")
                expected = [f"new-{turn}", *expected]
                assert await names(journal) == expected
        async with opened(tmp_path) as journal:
            await deployed(journal, f"old-{turn}")
            expected = [f"old-{turn}", *expected]
    with version(NEXT):
        async with opened(tmp_path) as journal:
            assert await names(journal) == expected


async def test_what_is_left_aside_may_be_damaged(tmp_path: Path) -> None:
    (tmp_path / "journal.db.newer-1").write_bytes(b"no database" * 500)
    async with opened(tmp_path) as journal:
        assert journal.put_aside is None and journal.degraded is None
        await journal.put("x", 1)


async def test_newer_ones_and_broken_ones_do_not_push_each_other_out(tmp_path: Path) -> None:
    with version(NEXT):
        async with opened(tmp_path) as journal:
            await deployed(journal, "new")
    async with opened(tmp_path) as journal:
        pass
    for _ in range(5):
        (tmp_path / "journal.db").write_bytes(b"broken" * 100)
        async with opened(tmp_path) as journal:
            pass
    assert len(list(tmp_path.glob("journal.db.broken-*"))) == 3
    with version(NEXT):
        async with opened(tmp_path) as journal:
            assert await names(journal) == ["new"]


async def test_a_putting_aside_that_was_cut_off(tmp_path: Path) -> None:
    """The log had its new name, the database not yet: both are the aside's."""
    with version(NEXT):
        journal = await Journal.open(tmp_path, "b")
        await deployed(journal, "new")
        for part in ("", "-wal"):
            shutil.copy(tmp_path / f"journal.db{part}", tmp_path / f"kept{part}")
        await journal.close()
    for part in ("", "-wal"):
        (tmp_path / f"kept{part}").rename(tmp_path / f"journal.db{part}")
    (tmp_path / "journal.db-wal").rename(tmp_path / "journal.db.newer-1-wal")
    async with opened(tmp_path) as journal:
        assert await names(journal) == []
        await deployed(journal, "old")
    with version(NEXT):
        async with opened(tmp_path) as journal:
            assert await names(journal) == ["old", "new"]


# --- disks that come back ---------------------------------------------------------------------------------------------


async def test_a_probe_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands()
    async with opened(tmp_path, hands) as journal:
        await journal.put("old", 1)

    def fail(self: Database) -> sqlite3.Connection:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Database, "_on_disk", fail)
    async with opened(tmp_path, hands) as journal:
        await journal.put("new", 2)
        await journal.probe()
        assert journal.degraded is not None and journal.in_memory
        monkeypatch.undo()
        await journal.probe()
        assert journal.degraded is None and not journal.in_memory
    async with opened(tmp_path, hands) as journal:
        assert [await journal.get(key) for key in ("old", "new")] == [1, 2]


async def test_what_could_not_be_read_is_joined_when_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands()
    async with opened(tmp_path, hands) as journal:
        await deployed(journal, "before")
        await journal.put("old", 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Database, "_on_disk", fail)
    monkeypatch.setattr(sqlite.shutil, "copy", fail)
    async with opened(tmp_path, hands) as journal:
        assert await journal.get("old") is None
        await deployed(journal, "since")
        monkeypatch.undo()
        hands.pass_(RETRY_DISK)
        await journal.put("new", 2)
        assert journal.degraded is None and not journal.in_memory
        assert await names(journal) == ["since", "before"]
        assert [await journal.get(key) for key in ("old", "new")] == [1, 2]
    async with opened(tmp_path, hands) as journal:
        assert await names(journal) == ["since", "before"]


async def test_a_journal_that_was_emptied_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        assert journal.fresh
    async with opened(tmp_path) as journal:
        assert not journal.fresh
    (tmp_path / "journal.db").write_bytes(b"")
    async with opened(tmp_path) as journal:
        assert journal.fresh and journal.put_aside is None


async def test_called_off_is_remembered(tmp_path: Path) -> None:
    error = {"code": "CANCELLED", "message": "cancelled by somebody"}
    async with opened(tmp_path) as journal:
        await deployed(journal, "d", outcome=None)
        assert (await journal.unfinished())[0]["called_off"] is None
        await journal.call_off("d", error)
        with pytest.raises(StorageError):
            await journal.call_off("none", error)
    async with opened(tmp_path) as journal:
        assert (await journal.unfinished())[0]["called_off"] == error


async def test_a_reserve_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "reserve").write_bytes(b"short")
    async with opened(tmp_path):
        assert (tmp_path / "reserve").stat().st_size == 4 << 20


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE deployments SET asked = '{\"id\": broken'",
        "UPDATE deployments SET asked = CAST(x'ff00fe' AS TEXT)",
        "UPDATE deployments SET asked = '[]'",
        "UPDATE deployments SET created = 'soon'",
        "UPDATE phases SET wall = 'then'",
        "UPDATE outbox SET created = 'x'",
    ],
)
async def test_values_that_slotd_never_wrote(tmp_path: Path, change: str) -> None:
    """A bit that flips within a value is nothing that SQLite would notice."""
    async with opened(tmp_path) as journal:
        await deployed(journal, "d", outcome=None)
        await Outbox(journal).append("test", {})
        await journal.put("x", 1)
    db = sqlite3.connect(tmp_path / "journal.db")
    with db:
        db.execute(change)
    db.close()
    async with opened(tmp_path) as journal:
        assert await journal.last() == []
        assert await journal.unfinished() == []
        assert journal.put_aside is not None and journal.put_aside.reason == "broken"
        await journal.put("x", 2)
    async with opened(tmp_path) as journal:
        assert await journal.get("x") == 2 and journal.put_aside is None
