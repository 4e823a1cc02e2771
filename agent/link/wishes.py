"""Carries out desired state: settles after a connect, starts the newest wish, and hears how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import structlog

from agent.commands.host import Host
from agent.commands.table import Actor, Table
from agent.errors import NotFound, SlotdError, StorageError, Unavailable
from agent.journal.database import Journal
from agent.link.connection import Delivery
from agent.link.native import decode, error_document
from agent.link.state import (
    Arrival,
    Malformed,
    Memory,
    Withdrawn,
    desired_section,
    ended,
    fold,
    observe,
    over,
    parse_desired,
    started,
)

SETTLE = 2.0
"""Seconds after a connect in which the retained copy is waited for."""
AGAIN = 30.0
"""Seconds until a wish is tried again that the host could not take just then."""
_START = 5.0
"""Seconds after a start that a wish of the last run leaves the broker to send a newer one."""
_ROOM = 100
_KEY = "link.desired"
_log = structlog.get_logger("link")

Tell = Callable[[str, Mapping[str, Any]], Awaitable[None]]


class Wishes:
    """The wish in force. `changed` is called when what `reported` says of it has changed; `tell` takes events,
    `refused` documents that are none, `fault` what nobody foresaw."""

    def __init__(
        self,
        table: Table,
        host: Host,
        journal: Journal,
        *,
        min_interval: float,
        changed: Callable[[], None],
        tell: Tell,
        refused: Callable[[str, SlotdError], None],
        fault: Callable[[str, BaseException], None],
    ) -> None:
        self._table = table
        self._host = host
        self._journal = journal
        self._min_interval = min_interval
        self._changed = changed
        self._tell = tell
        self._refused = refused
        self._fault = fault
        self._inbox: list[tuple[Arrival, Delivery]] = []
        self._wake = asyncio.Event()
        self._memory = Memory()
        self._settle_until = 0.0
        self._not_before = 0.0

    def reconfigure(self, min_interval: float) -> None:
        """Another interval is in force, from the next start on."""
        self._min_interval = min_interval

    async def open(self) -> None:
        """Remembers the wish of the last run."""
        try:
            self._memory = Memory.from_dict(await self._journal.get(_KEY))
        except StorageError as error:
            _log.warning("the last wish cannot be read", error=str(error))
        if self._memory.state == "applying" and self._memory.task is None:
            # Cut off between the decision and the deployment: asking twice is harmless, the host joins the two.
            self._memory = replace(self._memory, state="waiting")
        self._settle_until = time.monotonic() + _START

    def section(self, status: Mapping[str, Any]) -> dict[str, Any]:
        """The wish as `reported` has it."""
        return desired_section(self._memory, status)

    # --- what wakes it ------------------------------------------------------------------------------------------------

    def connected(self) -> None:
        """The retained copy has been asked for; nothing is started until it is here, or two seconds have passed."""
        self._settle_until = time.monotonic() + SETTLE
        self._wake.set()

    def arrived(self, delivery: Delivery) -> None:
        """A desired document has come in. It is acknowledged once it has been judged."""
        arrival: Arrival
        if not delivery.payload:
            arrival = Withdrawn()
        else:
            try:
                arrival = parse_desired(decode(delivery.payload, "desired"))
            except SlotdError as error:
                self._refused(delivery.topic, error)
                arrival = Malformed(error_document(error))
        self._inbox.append((arrival, delivery))
        if len(self._inbox) > _ROOM:  # only the newest counts
            self._inbox.pop(0)[1].acknowledge()
        if delivery.retain:
            self._settle_until = 0.0
        self._wake.set()

    def status_changed(self) -> None:
        """The host's status is another one."""
        self._wake.set()

    # --- what it does -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                pause = await self._step()
            except Exception as fault:  # our own mistake must not end desired state for good
                _log.exception("desired state could not be carried out")
                self._fault("link-desired", fault)
                pause = AGAIN
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _step(self) -> float | None:
        """Does what can be done now; how many seconds until there may be more, None for not before a wake."""
        now = time.monotonic()
        if now < self._settle_until:
            return self._settle_until - now
        if self._inbox:
            await self._judge()
        await self._observe()
        if self._memory.state != "waiting":
            return None
        if now < self._not_before:
            return self._not_before - now
        self._not_before = now + self._min_interval
        await self._start()
        return self._not_before - time.monotonic() if self._memory.state == "waiting" else None

    async def _judge(self) -> None:
        inbox, self._inbox = self._inbox, []
        before = self._memory
        last = (self._host.status().get("last") or {}).get("id")
        after, passed = fold(before, (arrival for arrival, _ in inbox), last=last)
        await self._keep(after)
        for _, delivery in inbox:
            delivery.acknowledge()
        for wish in passed:
            await self._tell("desired_superseded", wish)
        if after.refused and after.refused != before.refused:
            # What could not even be read has been told, in bounds, when it came in.
            if after.refused["hash"] is not None:
                await self._tell("desired_refused", after.refused)
            _log.warning("a desired document is refused", **after.refused["error"])

    async def _observe(self) -> None:
        status = self._host.status()
        after = observe(self._memory, status)
        if after.state == "applying" and after.task is not None and not _shown(after.task, status):
            after = await self._look_up(after, after.task)
        if after == self._memory:
            return
        if after.override and after.override != self._memory.override:
            await self._tell("desired_overridden", after.override)
        await self._keep(after)

    async def _look_up(self, memory: Memory, task: str) -> Memory:
        """The end of a deployment that the status shows no more."""
        try:
            found = await self._host.task(task)
        except NotFound:
            return replace(memory, state="waiting", task=None)
        except StorageError as error:
            _log.warning("a deployment cannot be looked up", task=task, error=str(error))
            return memory
        if found.get("outcome") is None:
            return memory
        return over(memory, found, self._host.status())

    async def _start(self) -> None:
        section = dict(self._memory.section or {})
        status = self._host.status()
        if section.get("image") is None and not (status.get("committed") or status.get("deployment")):
            await self._keep(ended(self._memory, "unchanged"))
            return
        await self._keep(started(self._memory, None))
        revision = self._memory.revision
        actor = Actor("desired", f"revision {revision}" if revision is not None else str(self._memory.hash)[:12])
        try:
            if section.get("image") is None:
                answer = await self._table.run("undeploy", {}, actor)
            else:
                answer = await self._table.run("deploy", section, actor)
        except (Unavailable, StorageError) as error:  # it is for the disk, or a stop, to pass
            _log.warning("the wish cannot be carried out now", error=str(error))
            self._not_before = time.monotonic() + AGAIN
            await self._keep(replace(self._memory, state="waiting", error=error_document(error)))
            return
        except SlotdError as error:
            _log.warning("the wish is refused", error=str(error))
            await self._keep(ended(self._memory, "refused", error=error_document(error)))
            return
        task = answer.get("task")
        await self._keep(started(self._memory, str(task) if task is not None else None))
        await self._observe()

    async def _keep(self, memory: Memory) -> None:
        """Remembers it, over a restart if the disk can."""
        if memory == self._memory:
            return
        self._memory = memory
        try:
            await self._journal.put(_KEY, memory.as_dict())
        except StorageError as error:
            _log.warning("the wish cannot be kept over a restart", error=str(error))
        self._changed()


def _shown(task: str, status: Mapping[str, Any]) -> bool:
    return any((status.get(key) or {}).get("id") == task for key in ("waiting", "deployment", "last"))
