"""A link with everything around it but a slot: a host that only notes what it is asked, and a client outside."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from pydantic import BaseModel, ConfigDict

from agent.commands.table import Actor, Command, Table
from agent.config import Config
from agent.errors import InvalidInput, NotFound
from agent.health.document import timestamp
from agent.health.issues import Issues
from agent.journal.database import Journal
from agent.journal.outbox import Outbox
from agent.link.mqtt import Link

ROOT = "slotd/box1/"
NODELAY = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]


class Nothing(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Deploy(BaseModel):
    model_config = ConfigDict(extra="forbid")

    image: str
    digest: str | None = None
    accept_dark: bool = False
    allow_signature_change: bool | None = None
    probation: float | None = None


class FakeHost:
    """Says what it is told to say; deployments end when the test says so, or at once if `at_once`."""

    def __init__(self) -> None:
        self.device = "box1"
        self.committed: dict[str, Any] | None = None
        self.running: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.asked: list[tuple[str, str | None, str]] = []
        self.at_once = True
        self.changed: Callable[[], None] = lambda: None
        self.all: dict[str, dict[str, Any]] = {}
        self.temperature = 40.0

    def status(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "version": "0.1.0",
            "boot_id": "boot",
            "uptime_s": time.monotonic(),
            "host": "slot" if self.committed else "empty",
            "reason": None,
            "embedded": True,
            "slot": {"driver": "simulated", "present": True, "temperature_c": self.temperature, "power_w": 1.0},
            "committed": self.committed,
            "previous": None,
            "deployment": self.running,
            "waiting": None,
            "last": self.last,
            "serving": {"listen": [], "requests": time.monotonic()},
            "link": {},
            "issues": [],
        }

    def ask(self, image: str | None, actor: Actor) -> dict[str, Any]:
        self.asked.append((actor.kind, image, actor.name))
        id = f"t{len(self.asked)}-{actor.kind}"
        document = {
            "id": id,
            "reference": image,
            "digest": f"sha256:{image}" if image else None,
            "actor": str(actor),
            "phase": "pull",
            "phases": [],
            "progress": {},
            "outcome": None,
            "error": None,
            "started": timestamp(),
            "seconds": 0.0,
        }
        self.running = self.all[id] = document
        self.changed()
        if self.at_once:
            self.finish()
        return {"task": id}

    def finish(self, outcome: str = "committed", error: dict[str, Any] | None = None) -> None:
        assert self.running is not None
        document = self.all[self.running["id"]] = self.running | {"outcome": outcome, "error": error}
        self.running, self.last = None, document
        if outcome == "committed":
            digest = document["digest"]
            self.committed = {"digest": digest, "reference": document["reference"]} if digest else None
        self.changed()

    async def task(self, task: str) -> dict[str, Any]:
        if task not in self.all:
            raise NotFound(f"no task {task}")
        return self.all[task]


@dataclass
class Parts:
    """What a test drives."""

    link: Link
    host: FakeHost
    journal: Journal
    outbox: Outbox
    issues: Issues
    ran: list[str]
    gate: asyncio.Event
    task: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """As the daemon does it."""
        await self.link.close(3.0)
        assert self.task is not None
        await asyncio.wait_for(self.task, 5)


def make_table(host: FakeHost, ran: list[str], gate: asyncio.Event) -> Table:
    """The commands that the tests use; `ran` notes each run of one that changes something."""
    table = Table()

    async def ping(_: Nothing, actor: Actor) -> dict[str, Any]:
        return {"pong": True, "actor": str(actor)}

    async def status(_: Nothing, __: Actor) -> dict[str, Any]:
        return host.status()

    async def deploy(arguments: Deploy, actor: Actor) -> dict[str, Any]:
        ran.append(arguments.image)
        if arguments.image == "bad":
            raise InvalidInput("no such image", field="image", hint="choose another")
        return host.ask(arguments.image, actor)

    async def undeploy(_: Nothing, actor: Actor) -> dict[str, Any]:
        ran.append("undeploy")
        return host.ask(None, actor)

    async def slow(_: Nothing, __: Actor) -> dict[str, Any]:
        ran.append("slow")
        await gate.wait()
        return {"slow": True}

    async def broken(_: Nothing, __: Actor) -> dict[str, Any]:
        raise RuntimeError("a secret detail")

    for name, arguments, changes, run in (
        ("ping", Nothing, False, ping),
        ("status", Nothing, False, status),
        ("deploy", Deploy, True, deploy),
        ("undeploy", Nothing, True, undeploy),
        ("slow", Nothing, True, slow),
        ("broken", Nothing, False, broken),
    ):
        table.add(Command(name=name, help=name, arguments=arguments, changes=changes, run=run))
    return table


def make_config(folder: Path, port: int, protocol: str = "5", *, device: str = "box1", **link: Any) -> Config:
    """Quick to come back, otherwise as in the field."""
    settings = {"backoff_first": 0.05, "backoff_max": 0.3, "health_interval": 3600, "port": port, "protocol": protocol}
    return Config.model_validate(
        {"device": device, "state_dir": folder, "run_dir": folder, "embedded": True, "link": settings | link}
    )


@asynccontextmanager
async def linked(config: Config, *, host: FakeHost | None = None, online: bool = True) -> AsyncIterator[Parts]:
    """A running link; stopped in order at the end unless the test has done it."""
    host = host or FakeHost()
    host.device = config.device
    config.state_dir.mkdir(exist_ok=True)
    journal = await Journal.open(config.state_dir, "boot")
    outbox = Outbox(journal, max_events=config.link.outbox_events)
    issues = Issues()
    ran: list[str] = []
    gate = asyncio.Event()
    link = Link(config, make_table(host, ran, gate), host, journal, outbox, issues, "boot")
    host.changed = link.changed
    parts = Parts(link, host, journal, outbox, issues, ran, gate)
    parts.task = asyncio.create_task(link.run(), name="link")
    try:
        if online:
            await until(lambda: link.connected)
        yield parts
    finally:
        if not parts.task.done():
            gate.set()
            await parts.stop()
        await journal.close()


async def until(holds: Callable[[], Any], timeout: float = 20.0) -> None:
    """Waits until it holds."""
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, "did not come true in time"
        await asyncio.sleep(0.01)


@dataclass
class Message:
    """What the client outside has got."""

    topic: str
    payload: bytes
    retain: bool
    correlation: bytes | None

    @property
    def document(self) -> Any:
        return json.loads(self.payload)


@dataclass
class Outside:
    """Somebody else at the broker, who hears everything under slotd/."""

    client: aiomqtt.Client
    v5: bool
    heard: list[Message] = field(default_factory=list)

    async def publish(
        self,
        name: str,
        body: Any = b"",
        *,
        retain: bool = False,
        qos: int = 1,
        response: str | None = None,
        correlation: bytes | None = None,
    ) -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        properties = None
        if response is not None or correlation is not None:
            properties = Properties(PacketTypes.PUBLISH)
            if response is not None:
                properties.ResponseTopic = response
            if correlation is not None:
                properties.CorrelationData = correlation
        await self.client.publish(ROOT + name, payload, qos, retain, properties)

    def on(self, name: str) -> list[Message]:
        """What has come on one topic so far."""
        return [message for message in self.heard if message.topic == ROOT + name]

    async def next(
        self, name: str, match: Callable[[Any], bool] = lambda _: True, *, after: int = 0, timeout: float = 20.0
    ) -> Any:
        """The first document on the topic that matches, waited for; `after` skips so many that have come."""
        end = time.monotonic() + timeout
        while True:
            for message in self.on(name)[after:]:
                try:
                    document = message.document
                except (ValueError, RecursionError):
                    continue  # some tests send such things
                if isinstance(document, dict) and match(document):
                    return document
            assert time.monotonic() < end, f"nothing fitting on {name}: {[m.payload[:200] for m in self.on(name)[-3:]]}"
            await asyncio.sleep(0.01)

    def newest(self, name: str) -> Any:
        """The newest document on the topic that is one."""
        for message in reversed(self.on(name)):
            try:
                return message.document
            except (ValueError, RecursionError):
                continue
        return {}

    async def call(self, command: str, body: Any = None, **more: Any) -> Any:
        """Sends a command and waits for the next answer on its default topic."""
        seen = len(self.on(f"res/{command}"))
        await self.publish(f"cmd/{command}", {} if body is None else body, **more)
        return await self.next(f"res/{command}", after=seen)

    async def retained(self, name: str) -> bytes:
        """The retained message of a topic as a newcomer gets it; empty if there is none."""
        async with aiomqtt.Client("127.0.0.1", self.client._port, protocol=self.client_protocol) as newcomer:
            await newcomer.subscribe(ROOT + name, 1)
            await newcomer.subscribe(ROOT + "fence", 1)
            await self.client.publish(ROOT + "fence", b"x", 1)
            async for message in newcomer.messages:
                if message.topic.value == ROOT + name and message.retain:
                    return bytes(message.payload)
                if message.topic.value == ROOT + "fence":
                    return b""
        raise AssertionError

    @property
    def client_protocol(self) -> aiomqtt.ProtocolVersion:
        return aiomqtt.ProtocolVersion.V5 if self.v5 else aiomqtt.ProtocolVersion.V311


@asynccontextmanager
async def outside(port: int, protocol: str = "5", **more: Any) -> AsyncIterator[Outside]:
    """A client that hears all of slotd/#."""
    v5 = protocol == "5"
    version = aiomqtt.ProtocolVersion.V5 if v5 else aiomqtt.ProtocolVersion.V311
    async with aiomqtt.Client("127.0.0.1", port, protocol=version, socket_options=NODELAY, **more) as client:
        await client.subscribe("slotd/#", 1)
        other = Outside(client, v5)

        async def hear() -> None:
            async for message in client.messages:
                correlation = getattr(message.properties, "CorrelationData", None)
                other.heard.append(Message(message.topic.value, bytes(message.payload), message.retain, correlation))

        ear = asyncio.create_task(hear(), name="outside")
        try:
            yield other
        finally:
            ear.cancel()
            await asyncio.gather(ear, return_exceptions=True)


def soon(seconds: float = 60.0) -> str:
    """An expiry."""
    return timestamp(time.time() + seconds)
