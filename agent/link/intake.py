"""Commands from the broker: received, journaled, acknowledged, run, answered; in that order.

A command is acknowledged once the journal has it, so it is not lost before and not run twice after. When all places are
taken nothing more is acknowledged, and the broker keeps the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from agent.commands.table import Actor, Table
from agent.errors import DeadlineExceeded, Interrupted, SlotdError, StorageError
from agent.journal.database import Journal
from agent.link.connection import Delivery
from agent.link.native import (
    Call,
    Reply,
    Topics,
    Unreadable,
    answer_document,
    check_expiry,
    encode,
    parse_call,
    retained_command,
)

PLACES = 8
"""Commands that run at the same time."""
ROOM = 256
"""Commands that wait for a place, unacknowledged. Mosquitto 2.0 keeps to no window when it sends what was queued."""
LIMIT = 60.0
"""Seconds that one command may run; what takes longer answers with a task."""
_log = structlog.get_logger("link")


@dataclass(frozen=True)
class Answer:
    """What goes back to the sender of a command."""

    topic: str
    correlation: bytes | None
    document: Mapping[str, Any]


class Intake:
    """Takes commands and runs them. `send` gets each answer; `refused` each message that was not run,
    `fault` what nobody foresaw."""

    def __init__(
        self,
        table: Table,
        journal: Journal,
        topics: Topics,
        allow: Iterable[str],
        *,
        send: Callable[[Answer], None],
        refused: Callable[[str, SlotdError], None],
        fault: Callable[[str, BaseException], None],
    ) -> None:
        self._table = table
        self._journal = journal
        self._topics = topics
        self._allow = tuple(allow)
        self._send = send
        self._refused = refused
        self._fault = fault
        self._waiting: deque[Delivery] = deque()
        self._arrived = asyncio.Event()
        self._places = asyncio.Semaphore(PLACES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[str, asyncio.Future[Mapping[str, Any]]] = {}
        self._closed = False
        self.idle = True
        """Whether nothing waits or is being taken."""

    def offer(self, delivery: Delivery) -> bool:
        """Takes a command that has just come in; False if there is no room. Nothing is acknowledged yet."""
        if self._closed or len(self._waiting) >= ROOM:
            return False
        self._waiting.append(delivery)
        self.idle = False
        self._arrived.set()
        return True

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting and not self._closed:
                await self._places.acquire()
                if self._closed:
                    return
                delivery = self._waiting.popleft()
                try:
                    work = await self._take(delivery)
                except Exception as fault:  # our own mistake must not stop the commands after this one
                    _log.exception("a command could not be taken", topic=delivery.topic)
                    self._fault("link-commands", fault)
                    delivery.acknowledge()
                    work = None
                if work is None:
                    self._places.release()
                else:
                    self._tasks.add(work)
                    work.add_done_callback(self._done)
            self.idle = True

    async def close(self, timeout: float) -> None:
        """Takes no more, lets those that run end, and cuts off what has not ended after `timeout` seconds: they are
        answered INTERRUPTED when they are asked for again."""
        self._closed = True
        self._arrived.set()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1.0)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._places.release()
        if not task.cancelled() and (fault := task.exception()):
            _log.error("a command failed in an unforeseen way", command=task.get_name(), exc_info=fault)
            self._fault("link-commands", fault)

    async def _take(self, delivery: Delivery) -> asyncio.Task[None] | None:
        """Checks, journals and acknowledges one; the task that runs it, or None if it is not run."""
        name = self._topics.command(delivery.topic) or ""
        try:
            call = self._read(name, delivery)
        except Unreadable as unreadable:
            delivery.acknowledge()
            self._refuse(delivery.topic, name, unreadable.reply, unreadable.error)
            return None
        if call is None:
            delivery.acknowledge()
            return None
        changes = name in self._table and self._table.get(name).changes
        actor = Actor("mqtt", call.reply.id or call.reply.topic)
        key = call.key or (call.fingerprint if changes else None)
        if key in self._running:  # the same again while it still runs: it gets that answer
            delivery.acknowledge()
            return asyncio.create_task(self._share(call, self._running[key]), name=f"command-{name}-again")
        try:
            known = await self._journal.known(key) if key is not None else None
            if known is None:
                check_expiry(call, changes=changes, now=time.time())
                self._table.get(name)
                if key is not None:
                    known = await self._journal.receive(key, name, delivery.payload, str(actor))
        except StorageError as error:
            if changes:
                delivery.acknowledge()
                self._refuse(delivery.topic, name, call.reply, error)
                return None
            key = known = None  # what changes nothing is answered also when the disk is full
        except SlotdError as error:
            delivery.acknowledge()
            self._refuse(delivery.topic, name, call.reply, error)
            return None
        delivery.acknowledge()
        if known is not None:
            await self._repeat(call, key, known)
            return None
        if key is not None:
            self._running[key] = asyncio.get_running_loop().create_future()
        return asyncio.create_task(self._run(call, key, actor), name=f"command-{name}")

    def _read(self, name: str, delivery: Delivery) -> Call | None:
        """The command; None for the empty message that takes a retained one away. Raises Unreadable."""
        if delivery.retain and not delivery.payload:
            return None
        call: Call | None = None
        reply = Reply(self._topics.answer(name), delivery.correlation)
        try:
            call = parse_call(
                name,
                delivery.payload,
                topics=self._topics,
                allow=self._allow,
                response_topic=delivery.response_topic,
                correlation=delivery.correlation,
            )
            reply = call.reply
        except Unreadable as unreadable:
            if not delivery.retain:
                raise
            reply = unreadable.reply
        if delivery.retain:
            raise retained_command(name, reply, delivery.topic)
        return call

    async def _run(self, call: Call, key: str | None, actor: Actor) -> None:
        shared = self._running.get(key) if key is not None else None
        try:
            try:
                async with asyncio.timeout(LIMIT):
                    result = await self._table.run(call.name, call.arguments, actor)
                document = answer_document(call.name, call.reply, result=result)
                encode(document)
            except SlotdError as error:
                document = answer_document(call.name, call.reply, error=error)
            except TimeoutError:
                late = DeadlineExceeded(f"did not end within {LIMIT:g} s", hint="`status` tells what the host does")
                document = answer_document(call.name, call.reply, error=late)
            except Exception as fault:
                _log.exception("a command failed in an unforeseen way", command=call.name)
                self._fault("link-commands", fault)
                bug = SlotdError(f"an unforeseen fault: {type(fault).__name__}", hint="the log of slotd has it")
                document = answer_document(call.name, call.reply, error=bug)
            if key is not None:
                try:
                    await self._journal.answer(key, document)
                except SlotdError as error:
                    _log.warning("an answer could not be kept", command=call.name, error=str(error))
            if shared is not None:
                shared.set_result(document)
        finally:
            if key is not None:
                self._running.pop(key, None)
            if shared is not None and not shared.done():
                shared.cancel()
        self._send(Answer(call.reply.topic, call.reply.correlation, document))

    async def _share(self, call: Call, running: asyncio.Future[Mapping[str, Any]]) -> None:
        document = await asyncio.shield(running)
        self._send(Answer(call.reply.topic, call.reply.correlation, {**document, "repeated": True}))

    async def _repeat(self, call: Call, key: str | None, known: Mapping[str, Any]) -> None:
        """A command that was received before: its first answer, or INTERRUPTED if it never came to one."""
        document = known.get("answer")
        if document is None:
            error = Interrupted(
                "the command was cut off by a crash or a stop; it is not run again",
                hint="look at `status`, then send it with a new id if it is still wanted",
            )
            document = answer_document(call.name, call.reply, error=error)
            if key is not None:
                try:
                    await self._journal.answer(key, document)
                except SlotdError as fault:
                    _log.warning("an answer could not be kept", command=call.name, error=str(fault))
        self._send(Answer(call.reply.topic, call.reply.correlation, {**document, "repeated": True}))

    def _refuse(self, topic: str, name: str, reply: Reply, error: SlotdError) -> None:
        self._refused(topic, error)
        self._send(Answer(reply.topic, reply.correlation, answer_document(name[:256], reply, error=error)))
