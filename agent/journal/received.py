"""Commands in the journal: received once, answered once, remembered for a day. Work for the database's thread."""

from __future__ import annotations

import sqlite3
from typing import Any

from agent.journal.values import unpack

KEEP = 24 * 3600.0
"""Seconds for which a repeated id gets the first answer."""
MAX_COMMANDS = 10_000
MAX_BYTES = 32 << 20
"""What all answers together may take; beyond these two the oldest are forgotten early."""
_OVERHEAD = 200


def interrupt(db: sqlite3.Connection, wall: float) -> None:
    """What was running when the last process ended was cut off."""
    db.execute("UPDATE commands SET state = 'interrupted' WHERE state = 'running'")


def known(db: sqlite3.Connection, wall: float, command: str) -> dict[str, Any] | None:
    row = db.execute(
        "SELECT state, answer, name, body, received FROM commands WHERE id = ? AND received >= ?",
        (command, wall - KEEP),
    ).fetchone()
    if row is None:
        return None
    return {"state": row[0], "answer": unpack(row[1]), "name": row[2], "body": row[3], "received": row[4]}


def receive(
    db: sqlite3.Connection, wall: float, command: str, name: str, body: str, actor: str
) -> dict[str, Any] | None:
    first = known(db, wall, command)
    if first is not None:
        return first
    db.execute(
        "INSERT OR REPLACE INTO commands VALUES (?, ?, ?, ?, ?, 'running', NULL, ?)",
        (command, name, body, actor, wall, _OVERHEAD + len(command)),
    )
    _trim(db, wall)
    return None


def answer(db: sqlite3.Connection, wall: float, command: str, text: str) -> None:
    """The first answer stays. An id that was forgotten meanwhile is remembered again."""
    db.execute(
        """INSERT INTO commands VALUES (?, '', '', '', ?, 'done', ?, ?)
        ON CONFLICT (id) DO UPDATE SET answer = excluded.answer, size = excluded.size,
            state = CASE state WHEN 'running' THEN 'done' ELSE state END
        WHERE answer IS NULL""",
        (command, wall, text, _OVERHEAD + len(command) + len(text)),
    )
    _trim(db, wall)


def _trim(db: sqlite3.Connection, wall: float) -> None:
    db.execute("DELETE FROM commands WHERE received < ?", (wall - KEEP,))
    count, size = db.execute(
        "SELECT count(*), coalesce(sum(size), 0) FROM commands INDEXED BY commands_by_age"
    ).fetchone()
    if count <= MAX_COMMANDS and size <= MAX_BYTES:
        return
    # The oldest go, but none that is running: its answer is still to come.
    for key, taken in db.execute("SELECT id, size FROM commands WHERE state != 'running' ORDER BY received").fetchall():
        if count <= MAX_COMMANDS and size <= MAX_BYTES:
            break
        db.execute("DELETE FROM commands WHERE id = ?", (key,))
        count, size = count - 1, size - taken
