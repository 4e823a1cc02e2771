"""The journal: what was asked for, how far it came, how it ended; which commands were run; a little state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.errors import StorageError
from agent.journal import deployments, events, received
from agent.journal.sqlite import Clock, Database, PutAside
from agent.journal.values import pack, unpack


class Journal:
    """History, and what must be remembered across a restart; committed with `synchronous=FULL` on return.

    Every method raises StorageError when the disk fails, and works again when the cause is gone; InvalidInput for what
    is no JSON or over 1 MiB. Wall times are unix seconds.
    """

    def __init__(self, database: Database, boot_id: str) -> None:
        self.database = database
        self.boot_id = boot_id
        self.waiting_at_open = events.Summary(0, 0, None)
        """What the outbox held when the journal was opened."""

    @classmethod
    async def open(cls, state_dir: Path, boot_id: str, *, clock: Clock | None = None) -> Journal:
        """The journal in `state_dir`; never fails for the sake of the disk: see `put_aside` and `degraded`.

        Commands that were running when the last process ended become "interrupted": take the lock first.
        """
        journal = cls(Database(state_dir, clock or Clock()), boot_id)
        await journal.database.open()
        try:
            await journal.database.run(received.interrupt)
            journal.waiting_at_open = await journal.database.run(events.summary)
        except StorageError as error:
            journal.database.degraded = str(error)
        return journal

    @property
    def put_aside(self) -> PutAside | None:
        """The database that could not be used (`reason` "broken", or "newer": written by a newer slotd), if any."""
        return self.database.put_aside

    @property
    def degraded(self) -> str | None:
        """Why the journal is in memory only or the disk cannot be written; None when all is well. May change."""
        return self.database.degraded

    @property
    def in_memory(self) -> bool:
        """Whether what is journaled now is lost with this process."""
        return self.database.in_memory

    @property
    def fresh(self) -> bool:
        """Whether it was made anew by this process, because there was none or none that could be used."""
        return self.database.fresh

    async def probe(self) -> None:
        """Shows that the disk takes it, and tries at once what waits for the disk to be mended. Raises StorageError."""
        await self.database.probe()

    async def close(self) -> None:
        """After everything that was asked for; idempotent."""
        await self.database.close()

    # --- deployments --------------------------------------------------------------------------------------------------

    async def begin(self, deployment: Mapping[str, Any]) -> None:
        """A deployment was asked for: `id`, `reference`, `actor`, `wish` (a Wish or its dict), `created`, and what else
        a reader wants back. An id that is known keeps its phases."""
        document = {"boot_id": self.boot_id, **deployments.asked(deployment)}
        text = pack(document, "deployment")
        await self.database.run(lambda db, wall: deployments.begin(db, wall, document, text))

    async def phase(self, deployment_id: str, phase: str, *, digest: str | None = None) -> None:
        """A phase is about to begin; it is on the disk when this returns. `digest` once it is known."""
        steady = self.database.clock.steady()
        await self.database.run(
            lambda db, wall: deployments.phase(db, wall, steady, self.boot_id, deployment_id, phase, digest)
        )

    async def end(
        self,
        deployment_id: str,
        outcome: str,
        error: Mapping[str, Any] | None,
        digest: str | None,
        *,
        document: Mapping[str, Any] | None = None,
    ) -> None:
        """It has ended. `document`, if given, is what `last` and `get_deployment` answer from now on."""
        steady = self.database.clock.steady()
        fault = None if error is None else pack(error, "error")
        full = None if document is None else pack(document, "document")
        await self.database.run(
            lambda db, wall: deployments.end(db, wall, steady, deployment_id, outcome, fault, digest, full)
        )

    async def call_off(self, deployment_id: str, error: Mapping[str, Any]) -> None:
        """Somebody has called it off; it has still to come to its end, now or after a restart."""
        text = pack(error, "error")
        await self.database.run(lambda db, _: deployments.call_off(db, deployment_id, text))

    async def unfinished(self) -> list[dict[str, Any]]:
        """Deployments without an outcome, oldest first: what `begin` was given, and `digest`, `phase` (the last that
        began), `phases`, `attempts` (of the digest), `called_off` (an error or None), `started`."""
        return await self.database.run(lambda db, _: deployments.unfinished(db))

    async def last(self, count: int = 1) -> list[dict[str, Any]]:
        """The newest deployments, newest first, as documents."""
        return await self.database.run(lambda db, _: deployments.last(db, count))

    async def get_deployment(self, deployment_id: str) -> dict[str, Any] | None:
        """One deployment as a document; None if it is not (any more) known."""
        return await self.database.run(lambda db, _: deployments.get(db, deployment_id))

    async def attempts(self, key: str) -> int:
        """How often an attempt with this key (a digest) was counted since it was last cleared."""
        return await self.database.run(lambda db, _: deployments.attempts(db, key))

    async def count_attempt(self, key: str) -> int:
        """Counts one more; the number, this one included."""
        return await self.database.run(lambda db, wall: deployments.count_attempt(db, wall, key))

    async def clear_attempts(self, key: str) -> None:
        """It went well, or somebody insists."""
        await self.database.run(lambda db, _: deployments.clear_attempts(db, key))

    # --- commands -----------------------------------------------------------------------------------------------------

    async def known(self, command_id: str) -> dict[str, Any] | None:
        """As `receive`, but an unknown id stays unknown."""
        return await self.database.run(lambda db, wall: received.known(db, wall, command_id))

    async def receive(self, command_id: str, name: str, body: bytes, actor: str) -> dict[str, Any] | None:
        """A command has come. None: it is new, run it and call `answer`. Else what is known of its id: `state`
        ("running", "done", or "interrupted" if it was cut off by the end of an earlier process), `answer` (dict or
        None), `name`, `body` (sha256 of the first one's body), `received`."""
        digest = hashlib.sha256(body).hexdigest()
        return await self.database.run(lambda db, wall: received.receive(db, wall, command_id, name, digest, actor))

    async def answer(self, command_id: str, answer: Mapping[str, Any]) -> None:
        """What a repetition of the id will get; a second answer changes nothing."""
        text = pack(answer, "answer")
        await self.database.run(lambda db, wall: received.answer(db, wall, command_id, text))

    # --- small state --------------------------------------------------------------------------------------------------

    async def put(self, key: str, value: Any) -> None:
        """Remember a JSON value; None forgets the key."""
        if value is None:
            await self.database.run(lambda db, _: db.execute("DELETE FROM state WHERE key = ?", (key,)).rowcount)
        else:
            text = pack(value, key)
            await self.database.run(
                lambda db, _: db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, text)).rowcount
            )

    async def get(self, key: str) -> Any:
        """The value, None if there is none."""

        def read(db: Any, _: float) -> Any:
            row = db.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
            return unpack(row[0]) if row else None

        return await self.database.run(read)
