"""The files beside journal.db: what was put aside, and the copy that is made before a migration.

* journal.db.broken-<n>: damaged; journal.db.newer-<n>: written by a newer slotd, untouched. Three of each are kept.
* journal.db.v<schema>: the journal as it was before it was migrated from that schema. Two are kept.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Literal

from agent.journal.boot import sync_folder

NAME = "journal.db"
Reason = Literal["broken", "newer"]
KEPT_ASIDE = 3
KEPT_COPIES = 2
_PARTS = ("-wal", "-shm", "")
"""The log goes first: beside a fresh database a left-over one would be played into it."""


def put_aside(folder: Path, reason: Reason, name: str = NAME) -> str:
    """Gives the database another name, which is returned; too old ones go. Raises OSError."""
    numbers = _numbers(folder, reason)
    aside = f"{NAME}.{reason}-{(numbers[-1] if numbers else 0) + 1}"
    for part in _PARTS:
        old = folder / f"{name}{part}"
        if old.exists() or old.is_symlink():
            old.rename(folder / f"{aside}{part}")
    for number in numbers[: max(0, len(numbers) + 1 - KEPT_ASIDE)]:
        remove(folder, f"{NAME}.{reason}-{number}")
    sync_folder(folder)
    return aside


def finish(folder: Path) -> None:
    """Completes a put_aside that was cut off when the log had its new name and the database had not. Raises OSError."""
    for log in folder.glob(f"{NAME}.*-*-wal"):
        aside = folder / log.name.removesuffix("-wal")
        if re.fullmatch(rf"{re.escape(NAME)}\.(broken|newer)-\d+", aside.name) and not aside.exists():
            if (folder / NAME).exists():
                (folder / NAME).rename(aside)
            else:
                log.unlink()
            sync_folder(folder)


def newer(folder: Path) -> list[Path]:
    """Databases of a newer slotd that were put aside, oldest first."""
    return [folder / f"{NAME}.newer-{number}" for number in _numbers(folder, "newer")]


def remove(folder: Path, name: str) -> None:
    """A database and what belongs to it. Raises OSError."""
    for part in _PARTS:
        path = folder / f"{name}{part}"
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def copy_before_migration(connection: sqlite3.Connection, folder: Path, version: int) -> None:
    """journal.db.v<version>, complete and durable. Raises OSError, sqlite3.Error."""
    copy = folder / f"{NAME}.v{version}"
    beside = folder / f"{copy.name}.new"
    for part in ("-journal", "-wal", ""):
        (folder / f"{beside.name}{part}").unlink(missing_ok=True)
    try:
        target = sqlite3.connect(beside, isolation_level=None)
        try:
            connection.backup(target)
        finally:
            target.close()
        fd = os.open(beside, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        beside.rename(copy)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    pattern = re.compile(rf"{re.escape(NAME)}\.v(\d+)")
    versions = sorted(int(match[1]) for name in os.listdir(folder) if (match := pattern.fullmatch(name)))
    for old in versions[:-KEPT_COPIES]:
        (folder / f"{NAME}.v{old}").unlink()


def _numbers(folder: Path, reason: Reason) -> list[int]:
    pattern = re.compile(rf"{re.escape(NAME)}\.{reason}-(\d+)")
    return sorted(int(match[1]) for name in os.listdir(folder) if (match := pattern.fullmatch(name)))
