"""What deployments leave on the disk: whether it would take a commit, and what is still to be written down."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

import structlog

from agent.errors import SlotdError, StorageError
from agent.journal.boot import BootRecord, confirm_boot, rehearse_boot
from agent.journal.database import Journal

log = structlog.get_logger(__name__)

BOOT = "boot"
"""Journal key: a copy of what is in boot.json, for a host that loses both of its files."""
PACE = "pace"
"""Journal key: how fast the committed model's bridge is, so that nobody waits for that to be measured at a start."""
MAX_OWED = 1000
Entry = Callable[[], Awaitable[object]]


class Books:
    """The journal's lines that a bad disk must not lose, and how sure it is what boot.json says."""

    def __init__(self, state_dir: Path, journal: Journal) -> None:
        self.state_dir = state_dir
        self.journal = journal
        self.writing = asyncio.Lock()
        """Held by whoever writes boot.json."""
        self.doubt: str | None = None
        """Why the next start may find another record in boot.json than the one in force; None if it cannot."""
        self._owed: deque[Entry] = deque(maxlen=MAX_OWED)

    async def ready(self) -> None:
        """Raises StorageError unless a deployment could be committed now: then nothing is begun."""
        if self.journal.in_memory:
            raise StorageError(
                f"nothing can be deployed: {self.journal.degraded}",
                field=str(self.state_dir),
                hint="mend the disk: slotd goes on by itself; the model in force serves meanwhile",
            )
        await asyncio.to_thread(rehearse_boot, self.state_dir)

    async def write(self, entry: Entry) -> None:
        """Now, or as soon as the disk takes it: what is being done does not wait for its history."""
        if self._owed:  # in order
            self._owed.append(entry)
            return
        await self._write(entry)

    async def generation(self) -> int:
        """That of the last commit that the journal knows of; 0 for none. Raises StorageError."""
        known = await self.journal.get(BOOT)
        found = known.get("generation") if isinstance(known, dict) else None
        return found if isinstance(found, int) else 0

    async def remember(self, record: BootRecord) -> None:
        """The journal's copy of the record in force."""
        fields = asdict(record)
        del fields["repaired"]
        await self.write(lambda: self.journal.put(BOOT, fields))

    async def keep_pace(self, digest: str, threads: int, service: float) -> None:
        """How fast the committed model's bridge was found to be: seconds for one request on so many threads."""
        pace = {"digest": digest, "threads": threads, "service": service}
        await self.write(lambda: self.journal.put(PACE, pace))

    async def pace(self, digest: str, threads: int) -> float | None:
        """What `keep_pace` kept, if it was of this model and of as many threads."""
        try:
            kept = await self.journal.get(PACE)
        except StorageError as error:
            log.warning("pace_unknown", error=str(error))
            return None
        if not isinstance(kept, dict) or (kept.get("digest"), kept.get("threads")) != (digest, threads):
            return None
        service = kept.get("service")
        return service if isinstance(service, float) and service > 0 else None

    async def settle(self, in_force: Callable[[], BootRecord]) -> None:
        """Writes what is owed, and boot.json if it is in doubt; each time the disk may have been mended."""
        while self._owed and self.journal.degraded is None:
            await self._write(self._owed.popleft())
        if self.doubt is None:
            return
        async with self.writing:
            try:
                self.doubt = await asyncio.to_thread(confirm_boot, self.state_dir, in_force())
            except StorageError as error:
                self.doubt = str(error)
            else:
                log.info("the boot record is confirmed", doubt=self.doubt)

    async def _write(self, entry: Entry) -> None:
        try:
            await entry()
        except SlotdError as error:
            log.error("not_journaled", error=str(error), owed=self.journal.degraded is not None)
            if (
                self.journal.degraded is not None
            ):  # the disk's doing; else the journal was put aside, with its beginning
                self._owed.appendleft(entry)
        except Exception:
            log.exception("not_journaled")
