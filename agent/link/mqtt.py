"""The link: one connection to the broker, kept for ever, in dialect `native`.

What is so goes out first (`status`, `reported`), then what has happened, in order and at a bounded rate. A broker that
is away, refuses us or talks nonsense is tried again with back-off; nothing of it stops the host.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
from aiomqtt import MqttError
from aiomqtt.exceptions import MqttConnectError

from agent import __version__
from agent.commands.host import Host
from agent.commands.table import Table
from agent.config import Config
from agent.errors import InvalidConfig, Overloaded, SlotdError, StorageError
from agent.health.issues import Issues
from agent.health.samplers import Samplers
from agent.journal.database import Journal
from agent.journal.outbox import Outbox
from agent.link.backoff import Backoff, Takeovers
from agent.link.broker import EmbeddedBroker
from agent.link.connection import Connection, Delivery, Settings
from agent.link.intake import Intake
from agent.link.native import Topics, encode, status_document
from agent.link.outgoing import Outgoing
from agent.link.wishes import Wishes

AWAY = 60.0
"""Seconds without a connection after which that is an issue."""
QUIET = 10.0
"""Seconds between two events about refused messages."""
_NAME_KEY = "link.device"
_log = structlog.get_logger("link")


class Link:
    """The host's side of the broker. `run` it as a task, `close` it at the end; `changed` says that `Host.status()`
    has changed."""

    def __init__(
        self,
        config: Config,
        table: Table,
        host: Host,
        journal: Journal,
        outbox: Outbox,
        issues: Issues,
        boot_id: str,
        *,
        samplers: Samplers | None = None,
    ) -> None:
        """Raises InvalidConfig for a device name that cannot be part of a topic."""
        self._config = config
        self._journal = journal
        self._outbox = outbox
        self._issues = issues
        self._boot_id = boot_id
        self._topics = Topics(config.device)
        self._intake = Intake(
            table,
            journal,
            self._topics,
            config.link.reply_allow,
            send=lambda answer: self._outgoing.answer(answer),
            refused=self._message_refused,
            fault=issues.fault,
        )
        self._wishes = Wishes(
            table,
            host,
            journal,
            min_interval=config.swap.min_interval,
            changed=lambda: self._outgoing.report(),
            tell=self._tell,
            refused=self._message_refused,
            fault=issues.fault,
        )
        samplers = samplers or Samplers.usual(config.state_dir)
        self._outgoing = Outgoing(config, self._topics, host, self._wishes, outbox, issues, samplers, boot_id)
        self._broker: EmbeddedBroker | None = None
        self._connection: Connection | None = None
        self._online = False
        self._subscribed = False
        self._left_behind = False
        self._stopping = asyncio.Event()
        self._finished = asyncio.Event()
        self._finished.set()
        self._takeovers = Takeovers()
        self._foreign = False
        self._away_since = time.monotonic()
        self._refusals = 0
        self._quiet_until = 0.0
        self._tellings: set[asyncio.Task[None]] = set()

    # --- what others see ----------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether the broker has our state."""
        return self._online

    @property
    def broker(self) -> str:
        """Where the broker is, host:port; of the embedded one once it runs."""
        host, port = self._address()
        return f"{host}:{port}"

    def describe(self) -> dict[str, Any]:
        """The link as `status` has it."""
        return {
            "enabled": self._config.link.enabled,
            "connected": self._online,
            "broker": self.broker,
            "embedded": not self._config.link.host,
            "outbox": {"depth": self._outbox.depth(), "oldest_s": self._outbox.oldest_age()},
        }

    def changed(self) -> None:
        """`Host.status()` may have changed. Cheap, may be called as often as one likes."""
        self._wishes.status_changed()
        self._outgoing.report()

    def reconfigure(self, config: Config) -> None:
        """Another configuration is in force whose `link` is the same; with another one there is another Link."""
        self._config = config
        self._wishes.reconfigure(config.swap.min_interval)
        self._outgoing.reconfigure(config)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `close` or a cancellation. Raises InvalidConfig, Conflict if the embedded broker cannot be started;
        never for a broker that is away."""
        if self._stopping.is_set():
            return
        self._finished.clear()
        work: list[asyncio.Task[None]] = []
        try:
            if not self._config.link.host:
                self._broker = EmbeddedBroker(self._config.link.port)
                await self._broker.start()
            await self._wishes.open()
            work = [
                asyncio.create_task(self._keep_connected(), name="link-connection"),
                asyncio.create_task(self._intake.run(), name="link-commands"),
                asyncio.create_task(self._wishes.run(), name="link-desired"),
            ]
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:  # none but the first should end by itself
                task.result()
        except asyncio.CancelledError:
            await self._farewell(2.0)
            raise
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, *self._tellings, return_exceptions=True)
            if self._broker is not None:
                await self._broker.stop()
            self._finished.set()

    async def close(self, timeout: float) -> None:
        """Takes no more commands, sends what is ready, says offline and disconnects; at most `timeout` seconds."""
        end = time.monotonic() + timeout
        await self._farewell(timeout * 0.8)
        self._stopping.set()
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                await self._finished.wait()
        except TimeoutError:
            _log.warning("the link did not end in time")
            if self._connection is not None:
                self._connection.cut()

    async def _farewell(self, timeout: float) -> None:
        """The orderly end of a connection, once; the caller ends the rest."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        end = time.monotonic() + timeout
        await self._intake.close(timeout / 2)
        connection = self._connection
        if connection is None:
            return
        try:
            async with asyncio.timeout(max(0.1, end - time.monotonic())):
                await self._outgoing.end(connection)
        except (MqttError, TimeoutError) as error:
            _log.warning("the broker was not told of the stop", error=str(error))
        self._online = False
        await connection.goodbye(max(0.1, end - time.monotonic()))

    async def _keep_connected(self) -> None:
        backoff = Backoff(self._config.link.backoff_first, self._config.link.backoff_max)
        hung_up = False
        while not self._stopping.is_set():
            began = time.monotonic()
            connection: Connection | None = None
            pause: float | None = None
            self._foreign = False
            try:
                connection = await self._connect()
                # 3.1.1 has no word for a takeover, and mosquitto 2.0 says none on 5 either: the line is cut, by a
                # broker that is there again at once.
                if hung_up and self._takeovers.count(time.monotonic()):
                    pause = self._duplicate("three times in ten minutes the connection was closed for another one")
                else:
                    await self._serve(connection)
            except (MqttError, SlotdError) as error:
                if not self._stopping.is_set():
                    self._failed(error)
            except Exception as fault:  # our own mistake: the host goes on, and so does the link
                _log.exception("the link failed in an unforeseen way")
                self._issues.fault("link", fault)
            finally:
                self._online = False
                self._outgoing.gone()
                self._connection = None
                if connection is not None:
                    connection.cut()
            hung_up = connection is not None and connection.hung_up
            if connection is not None:
                self._away_since = time.monotonic()
                backoff.lasted(time.monotonic() - began)
                if connection.taken_over:
                    pause = self._duplicate("the broker closed the connection for another one with the same name")
                elif self._foreign and self._takeovers.count(time.monotonic()):
                    pause = self._duplicate("three times in ten minutes another host spoke under this name")
            if self._left_behind:
                self._left_behind, pause = False, 0.0  # only a new connection brings what was not acknowledged
            if pause is None:
                pause = backoff.next()
            self._outgoing.report()
            try:
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            except TimeoutError:
                pass

    def _duplicate(self, why: str) -> float:
        """Somebody else uses the name: make it known, and leave them alone for a while."""
        self._issues.raise_(
            "duplicate-identity",
            "error",
            f"another client is connected as {self._config.device!r}: {why}",
            "give each host its own `device`",
        )
        _log.error("another client uses this name", device=self._config.device, why=why)
        return Backoff(self._config.link.backoff_first, self._config.link.backoff_max).longest()

    def _failed(self, error: Exception) -> None:
        _log.warning("the broker cannot be used", broker=self.broker, error=str(error))
        if isinstance(error, MqttConnectError):
            self._issues.raise_("link-refused", "error", f"{self.broker} refuses: {error}", _refusal_hint(error))
        elif isinstance(error, SlotdError):
            self._issues.raise_("link-refused", "error", str(error), error.hint)
        if time.monotonic() - self._away_since >= AWAY:
            self._issues.raise_("link-down", "warning", f"{self.broker}: {error}", "slotd goes on trying")

    # --- one connection -----------------------------------------------------------------------------------------------

    async def _connect(self) -> Connection:
        settings = await self._settings()
        connection = Connection(settings, self._deliver)
        opening = asyncio.create_task(connection.open(), name="link-open")
        stop = asyncio.create_task(self._stopping.wait(), name="link-stop")
        try:
            await asyncio.wait({opening, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                raise MqttError("stopped while connecting")
            await opening
            if self._stopping.is_set():  # the farewell did not know of this connection
                await connection.goodbye(0.5)
                raise MqttError("stopped while connecting")
        finally:
            stop.cancel()
            opening.cancel()
        self._connection = connection
        return connection

    async def _settings(self) -> Settings:
        link = self._config.link
        host, port = self._address()
        password = None
        if link.password_file is not None:
            password = await asyncio.to_thread(read_password, link.password_file)
        return Settings(
            host=host,
            port=port,
            version=link.protocol if link.host else "3.1.1",
            client_id=f"slotd-{self._config.device}",
            username=link.username,
            password=password,
            keep_alive=max(1, min(int(link.keep_alive), 0xFFFF)),
            session_expiry=int(link.session_expiry),
            will_topic=self._topics.status,
            will=encode(status_document("offline", boot_id=self._boot_id, version=__version__, reason="lost")),
            will_delay=int(link.will_delay),
        )

    async def _serve(self, connection: Connection) -> None:
        """From the subscriptions to the end of the connection. Raises MqttError."""
        await self._subscribe(connection)
        reported = await self._outgoing.begin(connection)
        await self._clear_old_name(connection)
        self._outgoing.check(self._topics.status, await connection.follow(self._topics.status))
        self._wishes.connected()
        self._online = True
        for issue in ("link-down", "link-refused"):
            self._issues.clear(issue)
        _log.info("connected", broker=self.broker, session="kept" if connection.session_present else "new")
        parts = {"link-watch": self._watch(connection)} | self._outgoing.parts(connection, reported)
        work = [asyncio.create_task(part, name=name) for name, part in parts.items()]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _subscribe(self, connection: Connection) -> None:
        """Desired always, for its retained copy; commands only where the broker doesn't know of them yet, so that a
        retained one isn't refused at each reconnect."""
        topics = self._topics
        if not (connection.session_present and self._subscribed):
            self._subscribed = False
            refused = await connection.follow(topics.commands, as_published=True, only_new=True)
            self._outgoing.check(topics.commands, refused)
            self._subscribed = refused is None
        self._outgoing.check(topics.desired, await connection.follow(topics.desired))

    async def _watch(self, connection: Connection) -> None:
        """The end of the connection, for whatever reason. Raises MqttError unless it was ours. One that outlasts two
        of the longest back-offs shows that the name is ours alone."""
        ended = asyncio.create_task(connection.ended(), name="link-ended")
        alone = asyncio.get_running_loop().call_later(
            2 * self._config.link.backoff_max, self._issues.clear, "duplicate-identity"
        )
        try:
            while not ended.done():
                if self._left_behind and self._intake.idle:
                    return
                await asyncio.wait({ended}, timeout=0.1 if self._left_behind else 1.0)
            why = ended.result()
        finally:
            alone.cancel()
            ended.cancel()
        if not self._stopping.is_set():
            raise MqttError(f"the connection is lost: {why}")

    def _deliver(self, delivery: Delivery) -> None:
        """Each message, in the loop's thread."""
        if delivery.topic == self._topics.status:
            delivery.acknowledge()
            self._foreign = self._outgoing.see_status(delivery) or self._foreign
        elif delivery.topic == self._topics.desired:
            self._wishes.arrived(delivery)
        elif self._topics.command(delivery.topic) is None:
            delivery.acknowledge()  # a subscription of an earlier version, kept by the broker
        elif (self._left_behind and delivery.qos) or not self._intake.offer(delivery):
            self._leave(delivery)

    def _leave(self, delivery: Delivery) -> None:
        """No room, or no time. What was promised (QoS 1) stays unacknowledged, and all after it, so that the order is
        kept: the broker sends it again on the next connection. What was not is dropped."""
        if self._stopping.is_set():
            return
        if delivery.qos == 0:
            self._message_refused(delivery.topic, Overloaded("too many commands at once; this one is dropped"))
        elif not self._left_behind:
            self._left_behind = True
            _log.warning("too many commands at once; the rest stays with the broker for a while")

    async def _clear_old_name(self, connection: Connection) -> None:
        """A host that was given another name takes away what it said under the old one."""
        try:
            old = await self._journal.get(_NAME_KEY)
            if old == self._config.device:
                return
            if isinstance(old, str):
                topics = Topics(old)
                for topic in (topics.status, topics.reported):
                    await connection.send(topic, b"", retain=True)
                _log.info("the old name's state is cleared", old=old, device=self._config.device)
            await self._journal.put(_NAME_KEY, self._config.device)
        except (StorageError, InvalidConfig) as error:
            _log.warning("the old name cannot be looked up", error=str(error))

    # --- events of our own --------------------------------------------------------------------------------------------

    async def _tell(self, kind: str, document: Mapping[str, Any]) -> None:
        try:
            await self._outbox.append(kind, document)
        except SlotdError as error:
            _log.error("an event is lost", kind=kind, error=str(error))

    def _message_refused(self, topic: str, error: SlotdError) -> None:
        """A message was not acted on. Logged and told at most every ten seconds, with how many there were."""
        self._refusals += 1
        now = time.monotonic()
        if now < self._quiet_until:
            return
        self._quiet_until = now + QUIET
        count, self._refusals = self._refusals, 0
        _log.warning("a message is refused", topic=topic[:256], code=error.code, error=str(error)[:512], count=count)
        document = {"topic": topic[:256], "code": error.code, "message": error.message[:512], "count": count}
        task = asyncio.create_task(self._tell("message_refused", document), name="link-tell")
        self._tellings.add(task)
        task.add_done_callback(self._tellings.discard)

    def _address(self) -> tuple[str, int]:
        link = self._config.link
        if link.host:
            return link.host, link.port
        return "127.0.0.1", self._broker.port if self._broker is not None else link.port


def read_password(path: Path) -> str:
    """The first line. Raises InvalidConfig; never tells the content."""
    try:
        with path.open("rb") as file:
            text = file.read(65536).decode("utf-8")
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error.strerror}", field="link.password_file") from None
    except UnicodeDecodeError:
        raise InvalidConfig(f"{path} is not UTF-8", field="link.password_file") from None
    return text.splitlines()[0] if text else ""


def _refusal_hint(error: MqttConnectError) -> str:
    said = str(error).lower()
    if "protocol" in said:
        return "this broker may have no MQTT 5: set link.protocol to 3.1.1"
    if "identifier" in said:
        return "the broker does not take the client id; choose another `device`"
    return "look at link.username, link.password_file and the broker's rules; slotd goes on trying"
