"""Events that wait for the broker: in order, at least once; where some are missing a `gap` says so."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agent.errors import InvalidInput
from agent.journal import events
from agent.journal.database import Journal
from agent.journal.events import Bounds, Event, Summary
from agent.journal.values import pack, rfc3339

MAX_BYTES = 8 << 20
MAX_AGE = 7 * 86400.0
MAX_EVENT = 128 << 10
"""The longest JSON of one event, in bytes."""


class Outbox:
    """A table of the journal. `seq` rises with each event, for ever within an `epoch` (the database's own id).

    Bounded in number, bytes and age: what is dropped at the old end is replaced by one event
    `{"kind": "gap", "from": seq, "to": seq}`, which stands at `to` and covers both ends. A gap grows; there is one.
    """

    def __init__(
        self, journal: Journal, *, max_events: int = 10_000, max_bytes: int = MAX_BYTES, max_age: float = MAX_AGE
    ) -> None:
        """`max_age` is in seconds; `max_events` counts a gap."""
        if max_events < 2:
            raise ValueError("an outbox has room for a gap and an event at least")
        self._database = journal.database
        self._bounds = Bounds(max_events, max_bytes, max_age)
        self._grown = asyncio.Event()
        self._highest = 0
        self._note(journal.waiting_at_open)

    def reconfigure(self, max_events: int) -> None:
        """How many may wait from now on; too many that do are dropped with the next one."""
        self._bounds = replace(self._bounds, events=max_events)

    async def append(self, kind: str, document: Mapping[str, Any]) -> int:
        """Stores an event; its seq. `kind`, and `ts` (now) if there is none, are added. Raises StorageError, and
        InvalidInput if it is no JSON or over 128 KiB."""
        text = pack({"ts": rfc3339(self._database.clock.wall()), **document, "kind": kind}, kind)
        if len(text) > MAX_EVENT:
            raise InvalidInput(f"is too long for an event ({len(text)} bytes, at most {MAX_EVENT})", field=kind)

        def work(db: sqlite3.Connection, wall: float) -> tuple[int, Summary]:
            # Above all of this process, also if the database was put aside meanwhile: readers count on it.
            seq = events.append(db, wall, text, self._highest, self._bounds)
            return seq, events.summary(db, wall)

        seq, summary = await self._database.run(work)
        self._highest = max(self._highest, seq)
        self._note(summary)
        return seq

    async def pending(self, after: int, limit: int) -> list[Event]:
        """Up to `limit` events with a seq above `after`, in order: (seq, epoch, document). Raises StorageError."""

        def work(db: sqlite3.Connection, wall: float) -> tuple[list[Event], Summary]:
            events.trim(db, wall, self._bounds)
            return events.pending(db, after, limit), events.summary(db, wall)

        found, summary = await self._database.run(work)
        self._note(summary)
        return found

    async def acknowledge(self, seq: int) -> None:
        """The broker has this event and all before it. Raises StorageError."""

        def work(db: sqlite3.Connection, wall: float) -> Summary:
            events.acknowledge(db, wall, seq)
            return events.summary(db, wall)

        self._note(await self._database.run(work))

    async def wait(self, after: int) -> None:
        """Until there is an event with a seq above `after`."""
        while self._summary.last <= after:
            self._grown.clear()
            await self._grown.wait()

    async def epoch(self) -> str:
        """The random id made with the database; another one means that what waited in the old one is lost."""
        return await self._database.run(lambda db, _: events.epoch(db))

    def depth(self) -> int:
        """How many events wait."""
        return self._summary.depth

    def oldest_age(self) -> float | None:
        """Seconds for which the oldest event has waited; None if there is none."""
        if self._summary.oldest is None:
            return None
        return round(self._summary.oldest + self._database.clock.steady() - self._noted, 3)

    def _note(self, summary: Summary) -> None:
        self._summary, self._noted = summary, self._database.clock.steady()
        self._highest = max(self._highest, summary.last)
        self._grown.set()
