"""One connection to a broker: aiomqtt, with paho's manual acknowledgement beneath it.

aiomqtt acknowledges a message when it arrives and drops it, with a log line, when its queue is full; it also keeps to
itself whether the session was there, why the broker hung up and what it said to a publish. So its callbacks are taken
over here: each message goes to `deliver` and is acknowledged by whoever has made it safe. Made anew for each attempt.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiomqtt
import paho.mqtt.client as paho
from aiomqtt import MqttError
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.link.native import MAX_PAYLOAD

TAKEN_OVER = 0x8E
_RECEIVE_MAXIMUM = 20
_MAX_PACKET = 1 << 20
"""Bytes that an MQTT 5 broker may send us at once; far above what is read, so that more gets an answer, too."""


@dataclass(frozen=True)
class Settings:
    """How to connect."""

    host: str
    port: int
    version: str
    """"5" or "3.1.1"."""
    client_id: str
    username: str | None
    password: str | None
    keep_alive: int
    session_expiry: int
    will_topic: str
    will: bytes
    will_delay: int
    timeout: float = 10.0
    """Seconds that the broker gets for each answer."""

    def __repr__(self) -> str:
        return f"Settings({self.host}:{self.port}, {self.version}, {self.client_id})"  # never the password


class Delivery:
    """A message from the broker, still unacknowledged."""

    def __init__(self, connection: Connection, message: paho.MQTTMessage, topic: str) -> None:
        properties = message.properties
        self.topic = topic
        self.payload = bytes(message.payload[: MAX_PAYLOAD + 1])  # enough to see that it is too much
        self.qos: int = message.qos
        self.retain: bool = bool(message.retain)
        self.response_topic: str | None = getattr(properties, "ResponseTopic", None)
        self.correlation: bytes | None = getattr(properties, "CorrelationData", None)
        self._connection = connection
        self._mid = message.mid
        self._acknowledged = False

    def acknowledge(self) -> None:
        """It is safe here now. Without effect once the connection is gone: the broker sends it again on the next."""
        if not self._acknowledged:
            self._acknowledged = True
            self._connection.acknowledge(self._mid, self.qos)


class Connection(aiomqtt.Client):
    """One connection. Use `open`, then `send` and `follow`; end it with `goodbye` or `cut`."""

    session_present = False

    def __init__(self, settings: Settings, deliver: Callable[[Delivery], None]) -> None:
        v5 = settings.version == "5"
        properties = will_properties = None
        if v5:
            properties = _properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = min(settings.session_expiry, 0xFFFFFFFF)
            properties.ReceiveMaximum = _RECEIVE_MAXIMUM
            properties.MaximumPacketSize = _MAX_PACKET
            will_properties = _properties(PacketTypes.WILLMESSAGE)
            will_properties.WillDelayInterval = settings.will_delay
        super().__init__(
            settings.host,
            settings.port,
            username=settings.username,
            password=settings.password,
            identifier=settings.client_id,
            protocol=aiomqtt.ProtocolVersion.V5 if v5 else aiomqtt.ProtocolVersion.V311,
            clean_session=None if v5 else False,
            clean_start=False if v5 else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=properties,
            keepalive=settings.keep_alive,
            timeout=settings.timeout,
            will=aiomqtt.Will(settings.will_topic, settings.will, 1, True, will_properties),
            logger=logging.getLogger("mqtt"),
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        self.v5 = v5
        self.taken_over = False
        """The broker said that somebody else uses this name."""
        self.hung_up = False
        """The other end closed the connection without a word."""
        self._deliver = deliver
        self._receipts: dict[int, asyncio.Future[ReasonCode]] = {}
        self._client.manual_ack_set(True)
        self._client.connect_timeout = settings.timeout / 2  # of the thread that nobody can interrupt

    # --- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connects. Raises MqttError; nothing is left behind then, nor after a cancellation."""
        opening = asyncio.create_task(self.__aenter__(), name="link-connect")
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The socket is opened by a thread that cannot be interrupted; whatever comes of it is shut.
            opening.add_done_callback(self._abandon)
            raise
        except MqttError:
            self.cut()
            raise
        except (OSError, ValueError) as error:
            self.cut()
            raise MqttError(str(error)) from None

    async def goodbye(self, timeout: float) -> None:
        """Disconnects in order, so that the broker doesn't send the Will; cuts the connection if that takes longer."""
        if self.open_now and self._client.disconnect() == paho.MQTT_ERR_SUCCESS:
            await asyncio.wait([self._disconnected], timeout=timeout)
        self.cut()

    def cut(self) -> None:
        """Closes the socket as it is; the broker will send the Will."""
        self._client._sock_close()  # paho has no other way that sends no DISCONNECT
        if self._misc_task is not None:
            self._misc_task.cancel()
        if self._lock.locked():
            self._lock.release()
        if self._disconnected.done():
            self._disconnected.exception()  # has been seen; asyncio need not complain
        else:
            self._disconnected.set_result(None)

    def _abandon(self, opening: asyncio.Task[Any]) -> None:
        if not opening.cancelled():
            opening.exception()  # nobody waits for it any more
        self.cut()

    @property
    def open_now(self) -> bool:
        """Whether the broker can be spoken to."""
        return self._client.is_connected() and not self._disconnected.done()

    async def ended(self) -> str:
        """Waits for the end of the connection and tells why."""
        await asyncio.wait([self._disconnected])
        return str(self._disconnected.exception() or "closed")

    # --- messages -----------------------------------------------------------------------------------------------------

    def post(
        self, topic: str, payload: bytes, *, retain: bool = False, correlation: bytes | None = None
    ) -> asyncio.Future[ReasonCode]:
        """Publishes with QoS 1; what is posted later arrives later. The future is the broker's word that it has it, to
        be waited for with `taken`. Raises MqttError if the connection is gone."""
        properties = None
        if self.v5 and correlation is not None:
            properties = _properties(PacketTypes.PUBLISH)
            properties.CorrelationData = correlation
        if self._disconnected.done():
            raise MqttError("the connection is gone")
        info = self._client.publish(topic, payload, 1, retain, properties)
        if info.rc != paho.MQTT_ERR_SUCCESS:
            raise MqttError(paho.error_string(info.rc))
        receipt: asyncio.Future[ReasonCode] = self._loop.create_future()
        self._receipts[info.mid] = receipt
        return receipt

    async def taken(self, receipt: asyncio.Future[ReasonCode]) -> ReasonCode | None:
        """Waits until the broker has what was posted. Returns its reason code if it refused (MQTT 5 only; a 3.1.1
        broker takes and forgets, or hangs up). Raises MqttError if it does not answer in time."""
        waits: list[asyncio.Future[Any]] = [receipt, self._disconnected]
        await asyncio.wait(waits, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
        if not receipt.done():
            raise MqttError("the broker did not take a message in time")
        code = receipt.result()
        return code if refuses(code) else None

    async def send(
        self, topic: str, payload: bytes, *, retain: bool = False, correlation: bytes | None = None
    ) -> ReasonCode | None:
        """`post` and `taken`."""
        return await self.taken(self.post(topic, payload, retain=retain, correlation=correlation))

    async def follow(self, topic: str, *, as_published: bool = False, only_new: bool = False) -> str | None:
        """Subscribes with QoS 1. Returns what the broker said if it refused. MQTT 5: `as_published` keeps the retain
        flag of live messages; `only_new` asks for retained messages only if the subscription is new."""
        if self.v5:
            options = SubscribeOptions(
                qos=1,
                retainAsPublished=as_published,
                retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB
                if only_new
                else SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE,
            )
            subscribing = asyncio.create_task(self.subscribe(topic, options=options), name="link-subscribe")
        else:
            subscribing = asyncio.create_task(self.subscribe(topic, 1), name="link-subscribe")
        try:
            # aiomqtt would wait for the whole time-out when the connection has ended.
            waits: list[asyncio.Future[Any]] = [subscribing, self._disconnected]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not subscribing.done():
                raise MqttError("the connection is gone")
            answers: Any = subscribing.result()
        finally:
            subscribing.cancel()
        for answer in answers:
            value = answer.value if isinstance(answer, ReasonCode) else int(answer)
            if value >= 0x80:
                return str(answer) if isinstance(answer, ReasonCode) else "not authorized"
        return None

    def acknowledge(self, mid: int, qos: int) -> None:
        """Tells the broker that a message is safe here."""
        if qos and self.open_now:
            self._client.ack(mid, qos)

    # --- paho's callbacks, all in the loop's thread -------------------------------------------------------------------

    def _on_connect(
        self, client: Any, userdata: Any, flags: paho.ConnectFlags, reason_code: ReasonCode, properties: Any = None
    ) -> None:
        self.session_present = flags.session_present
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self, client: Any, userdata: Any, flags: paho.DisconnectFlags, reason_code: ReasonCode, properties: Any = None
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self.taken_over = reason_code.value == TAKEN_OVER
        else:
            self.hung_up = reason_code.getName() == "Unspecified error"  # how paho tells an end of file
        super()._on_disconnect(client, userdata, flags, reason_code, properties)

    def _on_message(self, client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # no broker may send this; it is nobody's
            self.acknowledge(message.mid, message.qos)
            return
        self._deliver(Delivery(self, message, topic))

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason_code: ReasonCode, properties: Any) -> None:
        receipt = self._receipts.pop(mid, None)
        if receipt is not None and not receipt.done():
            receipt.set_result(reason_code)


def refuses(code: ReasonCode) -> bool:
    """Whether a reason code is a refusal."""
    return bool(code.value >= 0x80)


def _properties(packet: int) -> Any:
    return Properties(packet)  # type: ignore[no-untyped-call]  # paho has no types here
