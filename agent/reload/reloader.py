"""Puts a changed configuration into force while requests are answered; one that is wrong changes nothing.

It is read again when the file changes, at SIGHUP and by the command `reload`. What needs a restart stays pending.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from agent.commands.table import Actor
from agent.config import Config, Effect, read_text
from agent.errors import InvalidConfig, SlotdError
from agent.health.document import timestamp
from agent.health.issues import Issues
from agent.reload.changes import Change, changes, in_force
from agent.reload.source import GOOD, Loaded, read, read_good, write_good
from agent.reload.watch import Watch
from agent.service import notify_ready, notify_reloading

log = structlog.get_logger(__name__)

MISSING = 2.0
"""Seconds that a file may be away before that is told: an editor may be at it."""
LISTED = 20
"""Faults and fields that the words of an issue name."""
Tell = Callable[[str, dict[str, Any]], None]


class Reloader:
    """Owns the configuration in force. `apply` puts one into force, at once; it is called with what needs a restart as
    it was at the start."""

    def __init__(
        self, loaded: Loaded, apply: Callable[[Config], None], issues: Issues, tell: Tell, hung_up: asyncio.Event
    ) -> None:
        """`hung_up` is set by SIGHUP, perhaps before all is up."""
        self.running = loaded.config
        self._loaded = loaded
        self._apply = apply
        self._issues = issues
        self._tell = tell
        self._pending: list[Change] = []
        self._since = time.time()
        self._fault = loaded.fault
        self._seen = str(loaded.fault) if loaded.fault else loaded.sha256
        self._turn = asyncio.Lock()
        self._touched = asyncio.Event()
        self._hung_up = hung_up
        if loaded.fault is not None:
            self._raise(loaded.fault)
            self._refused(loaded.fault, Actor("boot", "start"))

    # --- what others ask ----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The configuration as `status` has it. `source`: file, good (the last that came up) or defaults."""
        return {
            "source": self._loaded.source,
            "path": str(self._loaded.path),
            "loaded": timestamp(self._since),
            "sha256": self._loaded.sha256,
            "pending": [change.field for change in self._pending],
            "faults": _documents(self._fault),
        }

    async def reload(self, actor: Actor) -> dict[str, Any]:
        """Reads the file and puts it into force: `changed`, `pending`, `sha256`, `source`.

        Raises InvalidConfig with every fault; then nothing has changed.
        """
        async with self._turn:
            notify_reloading()
            try:
                return await self._reload(actor)
            finally:
                notify_ready()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """From the moment on in which everything is up, until cancelled."""
        async with self._turn:
            await self._came_up()
        watch = Watch(self._loaded.path, self._touched.set, self._watched)
        async with asyncio.TaskGroup() as group:
            group.create_task(watch.run(), name="config-watch")
            group.create_task(self._serve(self._touched, Actor("local", "the file has changed")), name="config-file")
            group.create_task(self._serve(self._hung_up, Actor("local", "SIGHUP")), name="config-sighup")

    async def _serve(self, asked: asyncio.Event, actor: Actor) -> None:
        while True:
            await asked.wait()
            asked.clear()
            try:
                if asked is self._hung_up or not await self._unchanged():
                    await self.reload(actor)
            except InvalidConfig:
                pass  # it has been told
            except Exception as fault:  # our own mistake must not end reloads for good
                log.exception("reload_failed")
                self._issues.fault("config-reload", fault)

    def _watched(self, trouble: str | None) -> None:
        if trouble is None:
            self._issues.clear("config-watch")
            return
        self._issues.raise_(
            "config-watch",
            "warning",
            f"{self._loaded.path} cannot be watched: {trouble}",
            "changes are seen some seconds later; `slotd reload` reads it at once",
        )

    async def _came_up(self) -> None:
        """The start went well: what it was started with is good. A change since the last start is told."""
        loaded = self._loaded
        if loaded.source != "file" or self._pending:
            return
        good = await asyncio.to_thread(read_good, self.running.state_dir, loaded.path, embedded=loaded.embedded)
        if good is not None and good.text == loaded.text:
            return
        if good is not None and (changed := changes(good.config, loaded.config)):
            self._tell_change(Actor("boot", "start"), changed)
        await self._keep()

    # --- one reload ---------------------------------------------------------------------------------------------------

    async def _unchanged(self) -> bool:
        """Whether the file is the one that was last read; one that is missing is given a moment to come back."""
        path = self._loaded.path
        seen = await asyncio.to_thread(_look, path)
        if seen != self._seen and not await asyncio.to_thread(path.exists):
            await asyncio.sleep(MISSING)
            seen = await asyncio.to_thread(_look, path)
        return seen == self._seen

    async def _reload(self, actor: Actor) -> dict[str, Any]:
        old = self._loaded
        self._seen = await asyncio.to_thread(_look, old.path)
        try:
            file = await asyncio.to_thread(read, old.path, embedded=old.embedded)
        except InvalidConfig as fault:
            if old.source == "defaults" and not await asyncio.to_thread(old.path.exists):
                return self._answer([])  # there was none, and there is none
            self._refused(fault, actor)
            self._raise(fault)
            raise
        changed = changes(old.config, file.config)
        self._put_into_force(in_force(self.running, file.config))
        self._loaded = Loaded(file.config, old.path, file.text, "file", old.embedded)
        self._seen, self._fault, self._since = file.sha256, None, time.time()
        self._pending = changes(self.running, file.config)
        self._issues.clear("config")
        self._note_pending()
        if changed:
            self._tell_change(actor, changed)
        if not self._pending:
            await self._keep()
        return self._answer(changed)

    def _put_into_force(self, config: Config) -> None:
        """All of it or, if one of our parts fails, nothing."""
        if config == self.running:
            return
        try:
            self._apply(config)
        except Exception:
            self._apply(self.running)
            raise
        self.running = config

    def _answer(self, changed: Sequence[Change]) -> dict[str, Any]:
        return {
            "changed": [one.as_dict() for one in changed if one.effect is not Effect.RESTART],
            "pending": [one.as_dict() for one in self._pending],
            **{key: value for key, value in self.describe().items() if key in ("source", "path", "sha256")},
        }

    async def _keep(self) -> None:
        loaded = self._loaded
        try:
            await asyncio.to_thread(write_good, self.running.state_dir, loaded.path, loaded.text)
        except SlotdError as error:
            log.error("good_config_not_kept", error=str(error))
            self._issues.raise_("config-good", "warning", str(error), error.hint or "mend the disk")
        else:
            self._issues.clear("config-good")

    # --- what is told -------------------------------------------------------------------------------------------------

    def _tell_change(self, actor: Actor, changed: Sequence[Change]) -> None:
        document = {
            "actor": str(actor),
            "sha256": self._loaded.sha256,
            "changed": [one.as_dict() for one in changed],
            "pending": [one.field for one in self._pending],
        }
        log.info("config_changed", **document)
        self._tell("config_changed", document)

    def _refused(self, fault: InvalidConfig, actor: Actor) -> None:
        """Told once for each thing that is wrong, however often it is looked at."""
        log.error("config_invalid", actor=str(actor), faults=_documents(fault))
        if self._fault is None or self._fault.faults != fault.faults or actor.kind == "boot":
            self._tell("config_refused", {"actor": str(actor), "faults": _documents(fault)})
        self._fault = fault
        fault.forget_frames()

    def _raise(self, fault: InvalidConfig) -> None:
        good = self._loaded.source == "good"
        so = f"slotd runs with the last good one ({GOOD})" if good else "nothing has changed"
        words = _listed([f"{field}: {message}" for field, message in fault.faults])
        self._issues.raise_("config", "error", f"{words}; {so}", "mend the file; `slotd check` shows every fault")

    def _note_pending(self) -> None:
        if not self._pending:
            self._issues.clear("restart-needed")
            return
        words = _listed([f"{one.field}: {one.before!r} → {one.after!r}" for one in self._pending])
        self._issues.raise_(
            "restart-needed", "warning", f"at the next start: {words}", "restart slotd, or take it back"
        )


def _look(path: Path) -> str:
    """Blocking. What is there: the hash of its text, or why there is none."""
    try:
        return hashlib.sha256(read_text(path).encode()).hexdigest()
    except InvalidConfig as error:
        return str(error)


def _documents(fault: InvalidConfig | None) -> list[dict[str, str]]:
    return [{"field": field, "message": message} for field, message in fault.faults] if fault else []


def _listed(words: Sequence[str]) -> str:
    more = f"; and {len(words) - LISTED} more" if len(words) > LISTED else ""
    return "; ".join(word[:200] for word in words[:LISTED]) + more
