"""What the link says: status and reported as they are, health from time to time, events and answers as they come."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Coroutine, Mapping
from itertools import takewhile
from typing import Any

import structlog
from aiomqtt import MqttError
from paho.mqtt.reasoncodes import ReasonCode

from agent import __version__
from agent.commands.host import Host
from agent.config import Config
from agent.errors import SlotdError, StorageError
from agent.health.document import health_document, timestamp
from agent.health.issues import Issues
from agent.health.samplers import Samplers
from agent.journal.outbox import Outbox
from agent.link.connection import Connection, Delivery, refuses
from agent.link.intake import Answer
from agent.link.native import Topics, decode, encode, reported_document, settled, status_document
from agent.link.wishes import Wishes

PROGRESS = 5.0
"""Seconds between two `reported` that differ only in progress."""
REFUSED_AGAIN = 60.0
"""Seconds until what the broker refused to take is tried again."""
DISK_AGAIN = 5.0
_BATCH = 16
_ANSWERS = 256
_log = structlog.get_logger("link")


class Outgoing:
    """Everything that goes to the broker. `begin` once a connection stands, then all of `parts` as long as it lasts."""

    def __init__(
        self,
        config: Config,
        topics: Topics,
        host: Host,
        wishes: Wishes,
        outbox: Outbox,
        issues: Issues,
        samplers: Samplers,
        boot_id: str,
    ) -> None:
        self._config = config
        self._topics = topics
        self._host = host
        self._wishes = wishes
        self._outbox = outbox
        self._issues = issues
        self._samplers = samplers
        self._boot_id = boot_id
        self._revision = _revision(config)
        self._status: Mapping[str, Any] | None = None
        self._status_wrong = asyncio.Event()
        self._to_report = asyncio.Event()
        self._answers: deque[Answer] = deque(maxlen=_ANSWERS)
        self._answered = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._ended = False

    # --- what the link asks for ---------------------------------------------------------------------------------------

    def reconfigure(self, config: Config) -> None:
        """Another configuration is in force, which `reported` names."""
        self._config = config
        self._revision = _revision(config)
        self.report()

    def report(self) -> None:
        """What `reported` says may have changed."""
        self._to_report.set()

    def answer(self, answer: Answer) -> None:
        """Sends it, now or on the next connection; of too many the oldest is dropped."""
        if len(self._answers) == _ANSWERS:
            _log.warning("too many answers wait for the broker; the oldest is dropped", topic=self._answers[0].topic)
        self._answers.append(answer)
        self._all_sent.clear()
        self._answered.set()

    async def begin(self, connection: Connection) -> Mapping[str, Any]:
        """The newest state, retained: `status`, then `reported`, which is returned. Raises MqttError."""
        await self._send_status(connection, "online")
        return await self._send_reported(connection)

    def parts(self, connection: Connection, reported: Mapping[str, Any]) -> dict[str, Coroutine[Any, Any, None]]:
        """What runs while the connection lasts, by name; none of it ends but by MqttError or cancellation."""
        return {
            "link-status": self._put_right(connection),
            "link-reported": self._send_reports(connection, reported),
            "link-answers": self._send_answers(connection),
            "link-events": self._send_events(connection),
            "link-health": self._send_health(connection),
        }

    async def end(self, connection: Connection) -> None:
        """What is still to be answered, then offline, for good. Raises MqttError; the caller bounds it."""
        if self._status is not None:  # else nobody sends the answers
            await self._all_sent.wait()
        self._ended = True
        await self._send_status(connection, "offline", "stop")

    def gone(self) -> None:
        """The connection is over; what comes as `status` until the next says nothing."""
        self._status = None

    def see_status(self, delivery: Delivery) -> bool:
        """Our own `status` as the broker has it. A late Will, or somebody else, may have written it; then it is put
        right. True if another host spoke under our name."""
        if self._status is None or delivery.payload == encode(self._status):
            return False
        self._status_wrong.set()
        try:
            seen = decode(delivery.payload, "status") if delivery.payload else {}
        except SlotdError:
            return False
        return seen.get("state") == "online" and seen.get("boot_id") != self._boot_id

    def check(self, topic: str, refused: str | None) -> None:
        """Keeps the issue about topics that the broker denies us."""
        issue = f"link-denied:{topic}"
        if refused is None:
            self._issues.clear(issue)
            return
        _log.error("the broker denies a topic", topic=topic, reason=refused)
        self._issues.raise_(issue, "error", f"the broker denies {topic}: {refused}", "look at the broker's ACL")

    # --- the parts ----------------------------------------------------------------------------------------------------

    async def _publish(self, connection: Connection, topic: str, document: Mapping[str, Any], *, retain: bool) -> bool:
        """Whether the broker took it. Raises MqttError."""
        refused = await connection.send(topic, encode(document), retain=retain)
        self.check(topic, str(refused) if refused else None)
        return refused is None

    async def _send_status(self, connection: Connection, state: str, reason: str | None = None) -> None:
        if self._ended and state == "online":
            raise MqttError("stopped")
        document = status_document(state, boot_id=self._boot_id, version=__version__, reason=reason)
        self._status = document
        await self._publish(connection, self._topics.status, document, retain=True)

    async def _put_right(self, connection: Connection) -> None:
        while True:
            await self._status_wrong.wait()
            self._status_wrong.clear()
            _log.warning("`status` on the broker was not ours; put right")
            await self._send_status(connection, "online")
            await asyncio.sleep(1.0)  # two that correct each other must not fill the line

    async def _send_reported(self, connection: Connection) -> Mapping[str, Any]:
        document = self._reported()
        await self._publish(connection, self._topics.reported, {**document, "ts": timestamp()}, retain=True)
        return document

    def _reported(self) -> dict[str, Any]:
        status = self._host.status()
        return reported_document(status, self._wishes.section(status), self._revision)

    async def _send_reports(self, connection: Connection, sent: Mapping[str, Any]) -> None:
        """`reported` whenever it changes from what was `sent`; at most one in five seconds where that is only
        progress."""
        at = time.monotonic()
        while True:
            self._to_report.clear()
            document = self._reported()
            due = None
            if document != sent:
                due = at + PROGRESS - time.monotonic()
                if due <= 0 or settled(document) != settled(sent):
                    sent, at = await self._send_reported(connection), time.monotonic()
                    continue
            try:
                async with asyncio.timeout(due):
                    await self._to_report.wait()
            except TimeoutError:
                pass

    async def _send_health(self, connection: Connection) -> None:
        interval = self._config.link.health_interval
        while interval:
            document = health_document(self._host.status(), await self._samplers.read())
            await self._publish(connection, self._topics.health, document, retain=False)
            await asyncio.sleep(interval)
        await asyncio.Event().wait()

    async def _send_answers(self, connection: Connection) -> None:
        while True:
            while self._answers:
                answer = self._answers[0]
                payload = encode({"v": 1, "ts": timestamp(), **answer.document})
                refused = await connection.send(answer.topic, payload, correlation=answer.correlation)
                if refused is not None:
                    _log.warning("the broker refuses an answer", topic=answer.topic, reason=str(refused))
                if self._answers and self._answers[0] is answer:
                    self._answers.popleft()
            self._all_sent.set()
            self._answered.clear()
            await self._answered.wait()

    async def _send_events(self, connection: Connection) -> None:
        """The outbox, in order; never faster than the backlog's rate, so that what piled up doesn't press out what is
        new. What the broker has is taken out of it, also when the connection breaks in between."""
        gap = 1.0 / self._config.link.backlog_rate
        after, free_at = 0, time.monotonic()
        while True:
            posted: list[tuple[int, asyncio.Future[ReasonCode]]] = []
            refused: ReasonCode | None = None
            try:
                batch = await self._outbox.pending(after, _BATCH)
                try:
                    for sequence, epoch, document in batch:
                        await asyncio.sleep(max(0.0, free_at - time.monotonic()))
                        free_at = max(free_at, time.monotonic() - gap) + gap
                        event = encode({"v": 1, "ts": timestamp(), **document, "epoch": epoch, "seq": sequence})
                        posted.append((sequence, connection.post(self._topics.event, event)))
                    for _, receipt in posted:
                        refused = refused or await connection.taken(receipt)
                finally:
                    known = takewhile(lambda one: one[1].done() and not refuses(one[1].result()), posted)
                    if (last := max((sequence for sequence, _ in known), default=None)) is not None:
                        await self._outbox.acknowledge(last)
                        after = last
            except StorageError as error:
                _log.warning("events cannot be read", error=str(error))
                await asyncio.sleep(DISK_AGAIN)
                continue
            if batch:
                self.check(self._topics.event, str(refused) if refused else None)
            else:
                await self._outbox.wait(after)
            if refused:
                free_at = time.monotonic() + REFUSED_AGAIN


def _revision(config: Config) -> str:
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]
