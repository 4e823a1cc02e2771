"""Two journals become one: an older one, which had to be left aside for a while, and the one kept since."""

from __future__ import annotations

import sqlite3

_KNOWN_BETTER = ("state", "attempts", "commands")
"""What the later journal knows is so; what only the older one has is taken over."""


def take_back(db: sqlite3.Connection, older: sqlite3.Connection) -> int:
    """Puts the history of `older` beneath that of `db`, in one transaction; how many deployments came back.

    Both have today's schema. Events that waited in `older` do not come back: `db` has another epoch, which says so.
    Raises sqlite3.Error: then nothing has changed.
    """
    top = older.execute("SELECT coalesce(max(number), 0) FROM deployments").fetchone()[0]
    known = {row[0] for row in db.execute("SELECT id FROM deployments")}
    came = 0
    db.execute("BEGIN IMMEDIATE")
    try:
        # Above all of the older numbers; by way of negative ones, so that none meets another on its way.
        for table, column in (("deployments", "number"), ("phases", "deployment")):
            db.execute(f"UPDATE {table} SET {column} = -{column}")  # noqa: S608
            db.execute(f"UPDATE {table} SET {column} = ? - {column}", (top,))  # noqa: S608
        numbers = []
        for row in _rows(older, "deployments"):
            if row["id"] not in known:
                numbers.append(row["number"])
                _insert(db, "deployments", row)
        for row in _rows(older, "phases"):
            if row["deployment"] in numbers:
                _insert(db, "phases", row)
        came = len(numbers)
        for table in _KNOWN_BETTER:
            for row in _rows(older, table):
                _insert(db, table, row)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return came


def _rows(db: sqlite3.Connection, table: str) -> list[dict[str, object]]:
    cursor = db.execute(f"SELECT * FROM {table}")  # noqa: S608
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def _insert(db: sqlite3.Connection, table: str, row: dict[str, object]) -> None:
    names, places = ", ".join(row), ", ".join("?" * len(row))
    db.execute(f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({places})", tuple(row.values()))  # noqa: S608
