"""The disk's caretaker: says what is wrong with what lies on it, and puts right what can be put right.

Nothing here is needed to serve. Each look is short; whatever cannot be done now is tried again at the next one.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from agent.errors import NotFound, SlotdError, StorageError
from agent.health.issues import Issues
from agent.images.source import ImageSource
from agent.journal.boot import BootRecord, ModelRef, confirm_boot, read_boot, rehearse_boot
from agent.journal.database import Journal
from agent.journal.reserve import Reserve
from agent.slot.arbiter import Arbiter
from agent.slot.books import BOOT, Books
from agent.slot.deployment import Deployments
from agent.slot.recovery import Recovery
from agent.slot.residents import Residents

log = structlog.get_logger(__name__)

EVERY = 5.0
"""Seconds between two looks."""
REHEARSE_EVERY = 300.0
"""Seconds between two small writes that show whether a disk of which nothing bad is known still takes them."""
SCRUB_EVERY = 86400.0
"""Seconds after which all files of the committed and the previous model are read again."""
BAD_BITSTREAM = "INCOMPATIBLE_BITSTREAM"


class BootRecords:
    """boot.json, its backup, and the journal's copy of it: what the host boots into, and what is said of them."""

    def __init__(self, state_dir: Path, issues: Issues) -> None:
        self.state_dir = state_dir
        self.issues = issues
        self.unread = False
        """Neither file could be used."""
        self.doubt: str | None = None

    async def read(self) -> BootRecord:
        """What boot.json says, or its backup; if neither can be used an empty record, for now."""
        try:
            record = await asyncio.to_thread(read_boot, self.state_dir)
        except StorageError as error:
            self.unread = True
            self.issues.raise_("boot-record", "critical", str(error), error.hint)
            return BootRecord(0, None, None)
        self.unread = False
        if record.repaired:
            self.issues.raise_(
                "boot-record",
                "warning",
                f"{record.repaired}; its copy is used and it is written anew",
                "check the disk",
            )
        if record.generation:
            self.doubt = await self._confirm(record)
        return record

    async def compare(self, record: BootRecord, journal: Journal) -> BootRecord:
        """The record in force, once the journal's copy has been heard; it counts only if both files are lost."""
        try:
            copy = _record(await journal.get(BOOT))
        except StorageError as error:
            log.warning("no_copy_of_the_boot_record", error=str(error))
            return record
        if not record.generation and copy is not None and copy.generation:
            what = "boot.json and boot.json.bak " + ("cannot be used" if self.unread else "are gone")
            self.issues.raise_(
                "boot-record",
                "critical",
                f"{what}: the host goes by the journal, which knows of generation {copy.generation}",
                "see that the committed model is the one you want; check the disk",
            )
            log.error("boot_record_from_journal", generation=copy.generation)
            self.unread = False
            self.doubt = await self._confirm(copy)
            return copy
        # One behind is what a crash right after a commit leaves.
        if record.generation and (journal.fresh or record.generation > (copy.generation if copy else 0) + 1):
            self._history_lost(record, copy, journal)
        elif copy is not None and copy.generation > record.generation:
            self.issues.raise_(
                "boot-record",
                "warning",
                f"boot.json is of generation {record.generation}, the journal knows of {copy.generation}",
                "somebody has put an older boot.json in place; deploy what should be in force",
            )
        return record

    def _history_lost(self, record: BootRecord, copy: BootRecord | None, journal: Journal) -> None:
        if journal.put_aside is None and not journal.in_memory:
            known = f"ends at generation {copy.generation}" if copy else "is empty"
            self.issues.raise_(
                "journal-lost",
                "warning",
                f"{self.state_dir / 'journal.db'}: the history {known}, the host is at {record.generation}",
                "boot.json decides what the host boots into; check the disk",
            )

    async def _confirm(self, record: BootRecord) -> str | None:
        try:
            return await asyncio.to_thread(confirm_boot, self.state_dir, record)
        except StorageError as error:
            log.error("boot_record_not_confirmed", error=str(error))
            return str(error)


class Storage:
    """Looks after the state folder while slotd runs. Issues: disk, journal, journal-lost, boot-record, store, model."""

    def __init__(
        self,
        state_dir: Path,
        keep_free: int,
        issues: Issues,
        boots: BootRecords,
        journal: Journal,
        images: ImageSource,
    ) -> None:
        self.state_dir = state_dir
        self.keep_free = keep_free
        self.issues = issues
        self.boots = boots
        self.journal = journal
        self.images = images
        self._rehearsed = asyncio.get_running_loop().time()
        self._scrubbed: float | None = None
        self._store_open = False

    async def open_store(self) -> None:
        """What is unpacked can be served without it."""
        try:
            await self.images.open()
        except SlotdError as error:
            self.issues.raise_(
                "store", "critical", str(error), error.hint or "deployments fail until the disk is mended"
            )
            return
        self._store_open = True
        repaired = self.images.store.repaired
        if repaired:
            self.issues.raise_("store", "warning", repaired, "check the disk; images are fetched again when wanted")
        else:
            self.issues.clear("store")

    async def run(self, deployments: Deployments, arbiter: Arbiter, residents: Residents, recovery: Recovery) -> None:
        """Until cancelled."""
        while True:
            for look in (
                self._look_at_disk,
                self._look_at_journal,
                partial(self._look_at_boot, deployments, arbiter, recovery),
                self._look_at_store,
                partial(self._scrub, deployments, arbiter, residents, recovery),
            ):
                try:
                    await look()
                except SlotdError as error:
                    log.warning("storage_not_put_right", error=str(error))
                except Exception as fault:  # our own mistake must not end the care for good
                    log.exception("storage_fault")
                    self.issues.fault("storage", fault)
            await asyncio.sleep(EVERY)

    async def _look_at_disk(self) -> None:
        now = asyncio.get_running_loop().time()
        try:
            await asyncio.to_thread(self._measure)
            if "disk" in self.issues or self.journal.degraded or now - self._rehearsed >= REHEARSE_EVERY:
                self._rehearsed = now
                await asyncio.to_thread(rehearse_boot, self.state_dir)
        except StorageError as error:
            self.issues.raise_("disk", "critical", str(error), error.hint)
        else:
            self.issues.clear("disk")
            await asyncio.to_thread(Reserve(self.state_dir).hold)  # a start or a commit may have used it up

    def _measure(self) -> None:
        """Raises StorageError if the disk is full or read-only."""
        try:
            disk = os.statvfs(self.state_dir)
        except OSError as error:
            raise StorageError(
                f"cannot be looked at: {error.strerror}", field=str(self.state_dir), hint="check the disk"
            ) from None
        if disk.f_flag & os.ST_RDONLY:
            raise StorageError(
                "is mounted read-only: the host serves, nothing can be deployed",
                field=str(self.state_dir),
                hint="look into the kernel's log for the reason, then mount it for writing",
            )
        free = disk.f_bavail * disk.f_frsize
        if free < self.keep_free:
            raise StorageError(
                f"is full: {free >> 20} MiB are free, {self.keep_free >> 20} must stay free; no image can be pulled",
                field=str(self.state_dir),
                hint="free disk space, or lower images.keep_free",
            )

    async def _look_at_journal(self) -> None:
        if self.journal.degraded:
            try:
                await self.journal.probe()
            except StorageError as error:
                log.debug("journal_still_degraded", error=str(error))
        if self.journal.degraded:
            self.issues.raise_(
                "journal", "error", self.journal.degraded, "mend the disk; the host serves, deployments fail"
            )
        else:
            self.issues.clear("journal")
        if (aside := self.journal.put_aside) is not None:
            hint = "history before this start is in that file"
            if aside.reason == "newer":
                hint = "the host goes by boot.json; the newer slotd takes that file back by itself"
            self.issues.raise_("journal-lost", "warning", str(aside), hint)

    async def _look_at_boot(self, deployments: Deployments, arbiter: Arbiter, recovery: Recovery) -> None:
        books = deployments.books
        if self.boots.unread and not deployments.boot.generation and deployments.running is None:
            found = await self.boots.compare(await self.boots.read(), self.journal)
            if found.generation and deployments.running is None and not deployments.boot.generation:
                deployments.boot, books.doubt = found, self.boots.doubt
                arbiter.committed = found.committed.digest if found.committed else None
                self.issues.clear("boot-record")
                log.info("boot_record_read_at_last", generation=found.generation)
                recovery.wake()
        if self.boots.unread and deployments.boot.generation:  # what could not be read has been replaced
            self.boots.unread = False
            self.issues.clear("boot-record")
        doubted = books.doubt is not None
        await deployments.settle()
        if books.doubt is not None:
            self.issues.raise_("boot-record", "critical", books.doubt, "mend the disk; slotd writes it again by itself")
        elif doubted:
            self.issues.clear("boot-record")
            await books.remember(deployments.boot)

    async def _look_at_store(self) -> None:
        if not self._store_open:
            await self.open_store()

    async def _scrub(
        self, deployments: Deployments, arbiter: Arbiter, residents: Residents, recovery: Recovery
    ) -> None:
        """Reads what the host may have to load: damage is found, and mended, before it is needed."""
        now = asyncio.get_running_loop().time()
        doubt = getattr(arbiter.trouble, "code", "") == BAD_BITSTREAM  # it is not what it was when it was verified
        due = self._scrubbed is None or now - self._scrubbed >= SCRUB_EVERY
        if not (due or doubt or "model" in self.issues) or deployments.running is not None:
            return
        boot = deployments.boot
        # A committed model that is not loaded is the recovery's.
        refs = [ref for ref in (boot.committed, boot.previous) if ref is not None]
        refs = [ref for ref in refs if ref is not boot.committed or ref.digest in residents.models]
        for ref in refs:
            if not await self._whole(ref):
                return
            if doubt and ref is boot.committed:
                recovery.wake()
        self._scrubbed = now
        self.issues.clear("model")

    async def _whole(self, ref: ModelRef) -> bool:
        try:
            await self.images.model(ref.digest, ref.reference)
        except (StorageError, NotFound) as error:
            damage = error
        else:
            return True
        try:
            await self.images.mend(ref.reference, ref.digest)
        except SlotdError as error:
            self.issues.raise_(
                "model",
                "error",
                f"{ref.name}: {damage}; it cannot be made whole: {error}",
                damage.hint or "deploy the model again",
            )
            return False
        log.warning("damaged_model_mended", name=ref.name, damage=str(damage))
        return True


async def load_committed(
    deployments: Deployments, images: ImageSource, residents: Residents, arbiter: Arbiter, issues: Issues, *, mend: bool
) -> None:
    """The committed model's bridge. A model that cannot be loaded leaves the host dark, not down.

    `mend`: damaged files are made whole again first, which may need the registry.
    """
    ref = deployments.boot.committed
    if ref is None or ref.digest in residents.models:
        return
    try:
        try:
            await _admit(ref, deployments.books, images, residents)
        except (StorageError, NotFound) as damage:
            if not mend:
                raise
            try:
                await images.mend(ref.reference, ref.digest)
            except SlotdError as error:
                raise StorageError(
                    f"{damage}; it cannot be made whole: {error}",
                    hint=error.hint or damage.hint or "deploy the model again",
                ) from error
            await _admit(ref, deployments.books, images, residents)
    except SlotdError as error:
        error.forget_frames()
        arbiter.trouble = error
        issues.raise_("committed-model", "critical", f"{ref.name}: {error}", error.hint or "deploy the model again")
        log.error("committed_model_unusable", digest=ref.digest, error=str(error))
    else:
        issues.clear("committed-model")


async def _admit(ref: ModelRef, books: Books, images: ImageSource, residents: Residents) -> None:
    """Loads it while its files are read; what is wrong with them comes before what an executor makes of that."""
    threads = residents.config.threads
    model = await images.model(ref.digest, ref.reference, unread=True)
    known = await books.pace(ref.digest, threads)
    intact = asyncio.create_task(images.verify(ref.digest), name="verify-committed")
    try:
        resident = await residents.admit(model, intact=intact, service=known)
        if known is None and resident.measured:
            await books.keep_pace(ref.digest, threads, resident.service)
    except SlotdError:
        await intact
        raise
    finally:
        intact.cancel()
        await asyncio.gather(intact, return_exceptions=True)


def _record(kept: Any) -> BootRecord | None:
    """What `Books.remember` has kept, perhaps by another version of slotd."""
    try:
        return BootRecord(int(kept["generation"]), _ref(kept["committed"]), _ref(kept["previous"]))
    except (KeyError, TypeError, ValueError):
        return None


def _ref(kept: Any) -> ModelRef | None:
    return None if kept is None else ModelRef(*(str(kept[key]) for key in ("digest", "reference", "name", "version")))
