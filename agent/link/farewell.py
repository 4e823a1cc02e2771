"""What a host that leaves for good takes away from the broker: its retained messages and its session."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import aiomqtt
import paho.mqtt.client as paho
import structlog
from aiomqtt import MqttError
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.config import Config
from agent.errors import Forbidden, Unavailable
from agent.link.mqtt import read_password
from agent.link.native import Topics

QUIET = 0.5
"""Seconds without a retained message after which there is none."""
MOST = 5.0
"""Seconds that retained messages are waited for."""
_log = structlog.get_logger("link")


@dataclass
class Cleared:
    """Topics by what became of them."""

    gone: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


async def clear_broker(config: Config, *, timeout: float = 10.0) -> Cleared:
    """Empties every retained message beneath the device's topic and ends its session; looks again what is left.

    The daemon must be stopped: this takes its name. Messages that the broker does not let us see are emptied if they
    are ours (status, reported, desired), and then it has the last word. Raises Unavailable if the broker is away or
    breaks off, Forbidden if it refuses us, InvalidConfig for a password that cannot be read.
    """
    topics = Topics(config.device)
    own = [topics.status, topics.reported, topics.desired]
    where = f"{config.link.host}:{config.link.port}"
    client = await _client(config, timeout)
    try:
        async with asyncio.timeout(4 * timeout), client:
            found = await _retained(client, [topics.root + "#", *own])
            for topic in dict.fromkeys([*found, *own]):
                await client.publish(topic, b"", qos=1, retain=True)
            left = await _retained(client, [topics.root + "#", *own])
    except aiomqtt.exceptions.MqttConnectError as error:
        raise Forbidden(f"{where} refuses: {error}", field="link", hint="look at the user and the password") from None
    except (MqttError, OSError, TimeoutError) as error:
        raise Unavailable(f"{where} cannot be told: {error or 'no answer'}", field="link") from None
    return Cleared(sorted(found - left), sorted(left))


async def _client(config: Config, timeout: float) -> aiomqtt.Client:
    link = config.link
    v5 = link.protocol == "5"
    properties = None
    if v5:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho has no types here
        properties.SessionExpiryInterval = 0
    password = await asyncio.to_thread(read_password, link.password_file) if link.password_file else None
    return aiomqtt.Client(
        link.host,
        link.port,
        username=link.username,
        password=password,
        identifier=f"slotd-{config.device}",
        protocol=aiomqtt.ProtocolVersion.V5 if v5 else aiomqtt.ProtocolVersion.V311,
        clean_session=None if v5 else True,
        clean_start=True if v5 else paho.MQTT_CLEAN_START_FIRST_ONLY,
        properties=properties,
        timeout=timeout,
    )


async def _retained(client: aiomqtt.Client, filters: list[str]) -> set[str]:
    """The topics with a retained message that we may see."""
    for topic in filters:
        try:
            await client.unsubscribe(topic)
            await client.subscribe(topic, qos=1)
        except MqttError as error:  # one that we may not follow
            _log.debug("not subscribed", topic=topic, error=str(error))
    found: set[str] = set()
    until = time.monotonic() + MOST
    messages = aiter(client.messages)
    while (left := until - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(min(QUIET, left)):
                message = await anext(messages)
        except TimeoutError:
            break
        if message.retain and message.payload:
            found.add(str(message.topic))
    return found
