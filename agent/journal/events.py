"""Events in the journal, which the outbox hands out. Work for the database's thread."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from agent.journal.values import pack, rfc3339, unpack

GAP = "gap"
_GAP_BYTES = 160


@dataclass(frozen=True)
class Bounds:
    """What waits at most: events, bytes, seconds."""

    events: int
    size: int
    age: float


@dataclass(frozen=True)
class Summary:
    """What waits: how many, the highest seq (0: none), the age of the oldest in seconds (None: none)."""

    depth: int
    last: int
    oldest: float | None


Event = tuple[int, str, dict[str, Any]]


def summary(db: sqlite3.Connection, wall: float) -> Summary:
    count, oldest = db.execute("SELECT count(*), min(created) FROM outbox INDEXED BY outbox_by_age").fetchone()
    last = db.execute("SELECT max(seq) FROM outbox").fetchone()[0]
    return Summary(count, last or 0, None if oldest is None else max(0.0, wall - oldest))


def epoch(db: sqlite3.Connection) -> str:
    return str(db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])


def append(db: sqlite3.Connection, wall: float, text: str, above: int, bounds: Bounds) -> int:
    """The seq of the new event: higher than any before, and than `above`."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
    seq = max(row[0] if row else 0, above) + 1
    db.execute("INSERT INTO outbox VALUES (?, NULL, ?, ?, ?)", (seq, text, wall, len(text)))
    trim(db, wall, bounds)
    return seq


def pending(db: sqlite3.Connection, after: int, limit: int) -> list[Event]:
    name = epoch(db)
    rows = db.execute("SELECT seq, document FROM outbox WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit))
    return [(seq, name, unpack(text)) for seq, text in rows]


def acknowledge(db: sqlite3.Connection, wall: float, seq: int) -> None:
    db.execute("DELETE FROM outbox WHERE seq <= ?", (seq,))
    row = db.execute("SELECT seq, first, created FROM outbox ORDER BY seq LIMIT 1").fetchone()
    if row is not None and row[1] is not None and row[1] <= seq:  # a gap had grown over events that were on their way
        _gap(db, seq + 1, row[0], row[2])


def trim(db: sqlite3.Connection, wall: float, bounds: Bounds) -> None:
    """Drops from the old end what is too much or too old, and leaves one gap in its place."""
    count, size, oldest = db.execute(
        "SELECT count(*), coalesce(sum(size), 0), min(created) FROM outbox INDEXED BY outbox_by_age"
    ).fetchone()
    too_old = wall - bounds.age
    if count <= bounds.events and size <= bounds.size and (oldest is None or oldest >= too_old):
        return
    events, room = bounds.events, bounds.size
    dropped: list[tuple[int, int | None, float]] = []
    for seq, first, created, taken in db.execute("SELECT seq, first, created, size FROM outbox ORDER BY seq"):
        if count <= events and size <= room and created >= too_old:
            break
        if not dropped:  # the gap will take a place itself
            events, room = events - 1, room - _GAP_BYTES
        dropped.append((seq, first, created))
        count, size = count - 1, size - taken
    if not dropped or (len(dropped) == 1 and dropped[0][1] is not None):
        return  # a gap that has grown old stays
    seq, first, _ = dropped[0]
    last, _, created = dropped[-1]
    db.execute("DELETE FROM outbox WHERE seq <= ?", (last,))
    _gap(db, seq if first is None else first, last, created)


def _gap(db: sqlite3.Connection, first: int, last: int, created: float) -> None:
    text = pack({"ts": rfc3339(created), "kind": GAP, "from": first, "to": last}, "event")
    db.execute("INSERT OR REPLACE INTO outbox VALUES (?, ?, ?, ?, ?)", (last, first, text, created, len(text)))
