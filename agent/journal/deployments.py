"""Deployments in the journal: asked for, phases begun, ended. Work for the database's thread."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from agent.errors import InvalidInput, StorageError
from agent.journal.values import rfc3339, unpack
from agent.model.wish import Wish

MAX_DEPLOYMENTS = 1000
"""How many are remembered; those without an outcome always are."""
MAX_ATTEMPTS = 1000
"""How many keys have their attempts remembered."""

_COLUMNS = "number, id, asked, digest, created, ended, ended_steady, outcome, error, document, called_off"


def asked(deployment: Mapping[str, Any]) -> dict[str, Any]:
    """What `begin` stores. Raises InvalidInput."""
    document = dict(deployment)
    if not isinstance(document.get("id"), str) or not document["id"]:
        raise InvalidInput("must be a name", field="id")
    if isinstance(wish := document.get("wish"), Wish):
        document["wish"] = asdict(wish)
    return document


def begin(db: sqlite3.Connection, wall: float, document: dict[str, Any], text: str) -> None:
    digest = (document.get("wish") or {}).get("digest")
    db.execute(
        """INSERT INTO deployments (id, asked, digest, created) VALUES (?, ?, ?, ?)
        ON CONFLICT (id) DO UPDATE SET asked = excluded.asked""",
        (document["id"], text, digest, float(document.get("created") or wall)),
    )
    old = db.execute(
        "SELECT number FROM deployments WHERE outcome IS NOT NULL ORDER BY number DESC LIMIT -1 OFFSET ?",
        (MAX_DEPLOYMENTS,),
    ).fetchall()
    db.executemany("DELETE FROM deployments WHERE number = ?", old)
    db.executemany("DELETE FROM phases WHERE deployment = ?", old)


def phase(
    db: sqlite3.Connection, wall: float, steady: float, boot_id: str, deployment: str, name: str, digest: str | None
) -> None:
    number = _number(db, deployment)
    step = db.execute("SELECT coalesce(max(step), 0) + 1 FROM phases WHERE deployment = ?", (number,)).fetchone()[0]
    db.execute("INSERT INTO phases VALUES (?, ?, ?, ?, ?, ?)", (number, step, name, wall, steady, boot_id))
    if digest is not None:
        db.execute("UPDATE deployments SET digest = ? WHERE number = ?", (digest, number))


def end(
    db: sqlite3.Connection,
    wall: float,
    steady: float,
    deployment: str,
    outcome: str,
    error: str | None,
    digest: str | None,
    document: str | None,
) -> None:
    db.execute(
        """UPDATE deployments SET ended = ?, ended_steady = ?, outcome = ?, error = ?, document = ?,
        digest = coalesce(?, digest) WHERE number = ?""",
        (wall, steady, outcome, error, document, digest, _number(db, deployment)),
    )


def call_off(db: sqlite3.Connection, deployment: str, error: str) -> None:
    db.execute("UPDATE deployments SET called_off = ? WHERE number = ?", (error, _number(db, deployment)))


def unfinished(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """Oldest first."""
    rows = db.execute(f"SELECT {_COLUMNS} FROM deployments WHERE outcome IS NULL ORDER BY number").fetchall()  # noqa: S608
    return [_document(db, row) for row in rows]


def last(db: sqlite3.Connection, count: int) -> list[dict[str, Any]]:
    """Newest first."""
    rows = db.execute(f"SELECT {_COLUMNS} FROM deployments ORDER BY number DESC LIMIT ?", (count,)).fetchall()  # noqa: S608
    return [_document(db, row) for row in rows]


def get(db: sqlite3.Connection, deployment: str) -> dict[str, Any] | None:
    row = db.execute(f"SELECT {_COLUMNS} FROM deployments WHERE id = ?", (deployment,)).fetchone()  # noqa: S608
    return None if row is None else _document(db, row)


def attempts(db: sqlite3.Connection, key: str | None) -> int:
    row = db.execute("SELECT count FROM attempts WHERE key = ?", (key,)).fetchone()
    return row[0] if row else 0


def count_attempt(db: sqlite3.Connection, wall: float, key: str) -> int:
    db.execute(
        "INSERT INTO attempts VALUES (?, 1, ?) ON CONFLICT (key) DO UPDATE SET count = count + 1, counted = ?",
        (key, wall, wall),
    )
    db.execute(
        """DELETE FROM attempts WHERE key != ? AND key IN
        (SELECT key FROM attempts ORDER BY counted DESC LIMIT -1 OFFSET ?)""",
        (key, MAX_ATTEMPTS),
    )
    return attempts(db, key)


def clear_attempts(db: sqlite3.Connection, key: str) -> None:
    db.execute("DELETE FROM attempts WHERE key = ?", (key,))


def _number(db: sqlite3.Connection, deployment: str) -> int:
    row = db.execute("SELECT number FROM deployments WHERE id = ?", (deployment,)).fetchone()
    if row is None:  # it was put aside, or written over by somebody else
        raise StorageError(f"the journal has lost the deployment {deployment!r}", hint="deploy again")
    return int(row[0])


def _document(db: sqlite3.Connection, row: tuple[Any, ...]) -> dict[str, Any]:
    number, name, text, digest, created, ended, ended_steady, outcome, error, document, called_off = row
    if document is not None:
        stored: dict[str, Any] = unpack(document)
        return stored
    begun = db.execute(
        "SELECT phase, wall, steady, boot_id FROM phases WHERE deployment = ? ORDER BY step", (number,)
    ).fetchall()
    phases = []
    for index, (phase_name, wall, steady, boot_id) in enumerate(begun):
        if index + 1 < len(begun):
            until = begun[index + 1][2] if begun[index + 1][3] == boot_id else None
        else:
            until = ended_steady
        took = None if until is None or until < steady else round(until - steady, 3)
        phases.append({"phase": phase_name, "seconds": took, "began": rfc3339(wall)})
    return {
        "name": None,
        "version": None,
        "progress": {},
        "host": None,
        "attempts": attempts(db, digest),
        **unpack(text),
        "id": name,
        "digest": digest,
        "created": created,
        "started": rfc3339(created),
        "phase": phases[-1]["phase"] if phases else None,
        "phases": phases,
        "outcome": outcome,
        "error": unpack(error),
        "called_off": unpack(called_off),
        "seconds": None if ended is None else round(max(0.0, ended - created), 3),
    }
