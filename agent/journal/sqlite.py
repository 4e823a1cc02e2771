"""The database file beneath the journal: one thread, one connection, and what happens when the disk fails.

* Unreadable, or written by a newer slotd: put aside (see files.py), and a fresh one made. The newer slotd takes back
  what it finds put aside.
* Of an older slotd: copied, then migrated.
* Cannot be opened for writing: a copy of it in memory, so that the host serves; on the disk again when that works.
* A write fails: StorageError, nothing of it is kept, the next call tries again. On a full disk the reserve goes first.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog

from agent.errors import StorageError
from agent.journal import files
from agent.journal.boot import sync_folder
from agent.journal.files import NAME, Reason
from agent.journal.history import take_back
from agent.journal.reserve import Reserve, is_full
from agent.journal.schema import APPLICATION, MIGRATIONS, TABLES

T = TypeVar("T")
Work = Callable[[sqlite3.Connection, float], T]

log = structlog.get_logger(__name__)

RETRY_DISK = 60.0
"""Seconds between two attempts to move from memory to the disk, or to take the reserve back; a probe does not wait."""
MEMORY = Path("/dev/shm")  # noqa: S108  # where a journal is copied that cannot be opened where it lies
CLOCK_STEP = 60.0
"""Seconds by which the wall clock must jump for the ages of what is kept to be put right."""
BUSY = 5.0
"""Seconds to wait for another process (somebody's sqlite3) that has the database locked."""

_CHANGED = (TypeError, ValueError, KeyError, AttributeError)
"""What comes of a value that slotd never wrote: changed on the disk where SQLite does not see it."""
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_DISK = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOLFS,
}


def steady() -> float:
    """Seconds that go on through a suspend and never jump."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Clock:
    """Where the journal takes its time from."""

    wall: Callable[[], float] = time.time
    steady: Callable[[], float] = steady


@dataclass(frozen=True)
class PutAside:
    """A database that could not be used."""

    name: str
    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{NAME} {self.detail}; it was put aside as {self.name}"


class _Unusable(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


class Database:
    """`run` gives work to the one thread that has the connection; each piece of work is one transaction."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.path = folder / NAME
        self.clock = clock
        self.degraded: str | None = None
        """Why the disk is not what it should be; None when all is well."""
        self.in_memory = False
        self.fresh = False
        """It was made anew, because there was none or none that could be used."""
        self.put_aside: PutAside | None = None
        self._connection: sqlite3.Connection | None = None
        self._seeded = True
        self._reserve = Reserve(folder)
        self._reserve_used = False
        self._tried = clock.steady()
        self._times = (clock.wall(), clock.steady())
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slotd-journal")

    async def open(self) -> None:
        """Never fails for the sake of the disk."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    async def run(self, work: Work[T]) -> T:
        """The result of `work(connection, wall time)`, committed and on the disk. Raises StorageError, then nothing is.

        A caller that is cancelled does not know whether it was done.
        """
        if self._closed:
            raise StorageError("the journal is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    async def probe(self) -> None:
        """Shows that it can be written; what waits for the disk to work again is tried now. Raises StorageError."""

        def work(connection: sqlite3.Connection, wall: float) -> None:
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('probed', ?)", (str(wall),))

        self._tried = -RETRY_DISK
        await self.run(work)

    async def close(self) -> None:
        """After all that was asked for; idempotent."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._thread, self._drop)
            self._thread.shutdown(wait=False)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._connection = self._on_disk()
            self._reserve.hold()
        except (sqlite3.Error, OSError) as error:
            self.in_memory = True
            self.degraded = f"{self.path} cannot be written ({error}): the journal is kept in memory"
            log.error("the journal is kept in memory", path=str(self.path), error=str(error))
            self._connection = self._copy()

    def _run(self, work: Work[T]) -> T:
        try:
            return self._try(work)
        except _CHANGED as error:
            log.error("the journal holds what slotd never wrote", exc_info=error)
            return self._again(work, error)
        except sqlite3.Error as error:
            code = _code(error)
            if code in _BROKEN:
                return self._again(work, error)
            if code == sqlite3.SQLITE_FULL and self._give_up_reserve():
                return self._again(work, error)
            if code in _DISK:
                raise self._failed(error) from error
            raise  # our own mistake
        except OSError as error:
            raise self._failed(error) from error

    def _again(self, work: Work[T], first: Exception) -> T:
        try:
            if isinstance(first, _CHANGED) or (isinstance(first, sqlite3.Error) and _code(first) in _BROKEN):
                self._drop()
                self._put_aside(_Unusable("broken", f"is damaged ({first})"))
            return self._try(work)
        except (sqlite3.Error, OSError) as error:
            raise self._failed(error) from error

    def _failed(self, error: sqlite3.Error | OSError) -> StorageError:
        full = isinstance(error, sqlite3.Error) and _code(error) == sqlite3.SQLITE_FULL
        if not full and not self.in_memory:
            self._drop()  # opened anew by the next call, with nothing left of what went wrong
        self.degraded = f"{self.path}: the journal cannot be written: {error}"
        log.error("the journal cannot be written", error=str(error))
        hint = "free some space" if full else "check the disk and its mount"
        return StorageError(f"the journal cannot be written: {error}", field=str(self.path), hint=hint)

    def _try(self, work: Work[T]) -> T:
        connection = self._ready()
        wall, steadily = self.clock.wall(), self.clock.steady()
        step = (wall - self._times[0]) - (steadily - self._times[1])
        connection.execute("BEGIN IMMEDIATE")
        try:
            if abs(step) > CLOCK_STEP:  # the clock was set: what is kept is no older than it was before
                connection.execute("UPDATE commands SET received = received + ?", (step,))
                connection.execute("UPDATE outbox SET created = created + ?", (step,))
            result = work(connection, wall)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._times = (wall, steadily)
        if not self.in_memory:
            self._recover()
        return result

    def _give_up_reserve(self) -> bool:
        if not self._reserve.release():
            return False
        self._reserve_used = True
        self.degraded = f"{self.path}: the disk is full: the journal uses its reserve"
        return True

    def _recover(self) -> None:
        """After a success: takes the reserve back when there is room, and ends `degraded`."""
        if self.clock.steady() - self._tried >= RETRY_DISK:
            self._tried = self.clock.steady()
            if self._reserve.hold():
                self._reserve_used = False
        if self.degraded and not self._reserve_used:
            log.info("the journal can be written again")
            self.degraded = None

    def _ready(self) -> sqlite3.Connection:
        """The connection, made anew if it was given up, on the disk again if it was in memory."""
        if self._connection is None:
            self._connection, self.in_memory = self._on_disk(), False
        elif self.in_memory and self.clock.steady() - self._tried >= RETRY_DISK:
            self._tried = self.clock.steady()
            try:
                disk = self._on_disk()
            except (sqlite3.Error, OSError) as error:
                log.debug("the journal stays in memory", error=str(error))
            else:
                if not self._seeded:  # what lies there could not be read before
                    take_back(self._connection, disk)
                self._connection.backup(disk)  # one transaction: all of it or nothing
                self._drop()
                self._connection, self.in_memory, self.degraded = disk, False, None
                self._reserve.hold()
                log.info("the journal is on the disk again", path=str(self.path))
        return self._connection

    def _on_disk(self) -> sqlite3.Connection:
        """A connection to the file, made or put aside as needed. Raises sqlite3.Error, OSError."""
        for _ in range(4):  # a full disk, then one put aside, then the fresh one; and once more
            try:
                return self._connect()
            except _Unusable as fault:
                self._put_aside(fault)
            except sqlite3.Error as error:
                code = _code(error)
                if code in _BROKEN:
                    self._put_aside(_Unusable("broken", f"is damaged ({error})"))
                elif code != sqlite3.SQLITE_FULL or not self._give_up_reserve():
                    raise
            except OSError as error:
                if not is_full(error) or not self._give_up_reserve():
                    raise
        raise OSError(f"{self.path} cannot be made usable")

    def _connect(self) -> sqlite3.Connection:
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            raise _Unusable("broken", "is not a plain file")
        files.finish(self.path.parent)
        fresh = not self.path.exists()
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        connection = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None)
        try:
            # Alone with it, SQLite maps no file into memory; on a disk with faults a mapping ends the process.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA mmap_size = 0")
            connection.text_factory = _text
            version = _check(connection)
            if 0 < version < len(MIGRATIONS):
                files.copy_before_migration(connection, self.path.parent, version)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA journal_size_limit = {4 << 20}")
            _migrate(connection)
        except BaseException:
            connection.close()
            raise
        if fresh:
            sync_folder(self.path.parent)
        self.fresh = self.fresh or version == 0
        for aside in reversed(files.newer(self.path.parent)):
            self._take_back(connection, aside)
        return connection

    def _take_back(self, connection: sqlite3.Connection, aside: Path) -> None:
        """What an older slotd had left aside, if it is not too new for us as well."""
        try:
            older = sqlite3.connect(aside, timeout=BUSY, isolation_level=None)
            try:
                older.execute("PRAGMA locking_mode = EXCLUSIVE")
                _check(older)
                older.text_factory = _text
                _migrate(older)
                came = take_back(connection, older)
            finally:
                older.close()
            files.remove(aside.parent, aside.name)
            log.info("the history that an older slotd had left aside is back", name=aside.name, deployments=came)
        except _Unusable as fault:
            log.warning("a journal stays aside", name=aside.name, reason=str(fault))
        except (sqlite3.Error, OSError) as error:
            log.error("a journal that was left aside cannot be read", name=aside.name, error=str(error))

    def _copy(self) -> sqlite3.Connection:
        """The database in memory, with all that can be read of the one on the disk."""
        memory = _in_memory()
        if self.path.is_file():
            try:
                # On a read-only disk SQLite cannot read a WAL database where it lies.
                place = MEMORY if os.access(MEMORY, os.W_OK) else None
                with tempfile.TemporaryDirectory(prefix="slotd-journal-", dir=place) as folder:
                    for name in (NAME, f"{NAME}-wal"):
                        if (self.path.parent / name).exists():
                            shutil.copy(self.path.parent / name, folder)
                    source = sqlite3.connect(Path(folder, NAME), isolation_level=None)
                    try:
                        _check(source)
                        source.backup(memory)
                    finally:
                        source.close()
            except (sqlite3.Error, OSError, _Unusable) as error:
                log.error("the journal could not be read into memory", error=str(error))
                self._seeded = False
                memory.close()
                memory = _in_memory()
        _migrate(memory)
        return memory

    def _put_aside(self, fault: _Unusable) -> None:
        name = files.put_aside(self.path.parent, fault.reason)
        self.put_aside = PutAside(name, fault.reason, str(fault))
        log.error("the journal was put aside", name=name, reason=fault.reason, detail=str(fault))

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error as error:
                log.warning("the journal was not closed cleanly", error=str(error))


def _in_memory() -> sqlite3.Connection:
    memory = sqlite3.connect(":memory:", isolation_level=None)
    memory.text_factory = _text
    return memory


def _text(raw: bytes) -> str:
    """Text that a bad disk has changed may be none; who reads it as JSON finds out."""
    return raw.decode(errors="replace")


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 if the error did not come from SQLite itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _check(connection: sqlite3.Connection) -> int:
    """The schema of one that is ours, sound, and not from the future. Raises _Unusable, sqlite3.Error."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version > len(MIGRATIONS):
        raise _Unusable("newer", f"is of schema {version}, this slotd knows {len(MIGRATIONS)}")
    if names and (application != APPLICATION or not names.issuperset(TABLES)):
        raise _Unusable("broken", "is not a journal of slotd")
    verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if verdict != "ok":
        raise _Unusable("broken", f"is damaged ({verdict})")
    return version


def _migrate(connection: sqlite3.Connection) -> None:
    """Brings the schema up to date, and shows that the database can be written."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        for migration in MIGRATIONS[version:]:
            for statement in migration:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("INSERT OR IGNORE INTO meta VALUES ('epoch', lower(hex(randomblob(8))))")
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('opened', ?)", (str(time.time()),))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
