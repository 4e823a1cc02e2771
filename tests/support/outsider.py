"""Somebody at the broker who gives commands and hears everything that a host says; without asyncio."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.health.document import timestamp

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Heard:
    """One message, and when it came (monotonic)."""

    at: float
    topic: str
    payload: bytes
    retain: bool
    correlation: bytes | None

    @property
    def document(self) -> dict[str, Any]:
        return dict(json.loads(self.payload))


class Outsider:
    """Use it as a context manager. Reconnects by itself when the broker is back."""

    def __init__(
        self, port: int, device: str, *, protocol: str = "5", username: str | None = None, password: str | None = None
    ) -> None:
        self.root = f"slotd/{device}/"
        self.v5 = protocol == "5"
        self.heard: list[Heard] = []
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"operator-{next(_numbers)}-{time.monotonic_ns()}",
            protocol=mqtt.MQTTv5 if self.v5 else mqtt.MQTTv311,
        )
        if username is not None:
            self._client.username_pw_set(username, password)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._connected
        self._client.on_message = self._message
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._ready = threading.Event()
        self._port = port

    def __enter__(self) -> Outsider:
        self._client.connect("127.0.0.1", self._port, keepalive=60)
        self._client.loop_start()
        assert self._ready.wait(10), "the broker does not answer"
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _connected(self, client: mqtt.Client, *_: object) -> None:
        client.subscribe(self.root + "#", 1)

    def _message(self, _client: object, _data: object, message: mqtt.MQTTMessage) -> None:
        correlation = getattr(message.properties, "CorrelationData", None)
        self.heard.append(
            Heard(time.monotonic(), message.topic, bytes(message.payload), bool(message.retain), correlation)
        )

    # --- what is heard ------------------------------------------------------------------------------------------------

    def on(self, name: str) -> list[Heard]:
        """What has come on one topic so far; the empty messages that clear a retained one left out."""
        return [message for message in tuple(self.heard) if message.topic == self.root + name and message.payload]

    def documents(self, name: str) -> list[dict[str, Any]]:
        return [message.document for message in self.on(name)]

    def newest(self, name: str) -> dict[str, Any]:
        """The last document on the topic; empty if there is none."""
        found = self.on(name)
        return found[-1].document if found else {}

    def until(
        self, name: str, match: Callable[[dict[str, Any]], Any], *, after: int = 0, timeout: float = 40.0
    ) -> dict[str, Any]:
        """The first document on the topic that matches; `after` skips so many that have come."""
        end = time.monotonic() + timeout
        while True:
            for document in self.documents(name)[after:]:
                if match(document):
                    return document
            assert time.monotonic() < end, f"nothing fitting on {name}: {self.documents(name)[-3:]}"
            time.sleep(0.01)

    def events(self, task: str | None = None) -> list[dict[str, Any]]:
        """All events, or those of one deployment, as they came."""
        return [event for event in self.documents("event") if task is None or event.get("id") == task]

    # --- what is said -------------------------------------------------------------------------------------------------

    def publish(
        self, name: str, body: Any, *, retain: bool = False, response: str | None = None, correlation: bytes = b""
    ) -> None:
        """A document, or bytes as they are; at the broker when this returns."""
        properties = None
        if response is not None:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ResponseTopic = response
            properties.CorrelationData = correlation
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._client.publish(self.root + name, payload, 1, retain, properties).wait_for_publish(20)

    def send(self, command: str, arguments: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """A command with an id and an expiry, and its answer: on MQTT 5 by response topic and correlation data, on
        3.1.1 by the id. `fields` replace those of the body; None leaves one out."""
        number = next(_numbers)
        body = {"id": f"c-{number}", "expires": timestamp(time.time() + 60), "arguments": arguments or {}} | fields
        body = {key: value for key, value in body.items() if value is not None}
        if self.v5:
            mark = f"m-{number}".encode()
            where = f"res/operator/{number}"
            self.publish(f"cmd/{command}", body, response=self.root + where, correlation=mark)
            answer = self.until(where, lambda _: True)
            assert self.on(where)[-1].correlation == mark
        else:
            where = f"res/{command}"
            known = len(self.on(where))
            self.publish(f"cmd/{command}", body)
            answer = self.until(where, lambda a: "id" not in body or a.get("id") == body["id"], after=known)
        assert answer["v"] == 1 and answer["command"] == command and answer["ts"], answer
        return answer

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The result of a command that must go well."""
        answer = self.send(command, arguments)
        assert answer["ok"], answer
        return dict(answer["result"])

    def refused(self, command: str, arguments: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """The error of a command that must not go well."""
        answer = self.send(command, arguments, **fields)
        assert not answer["ok"], answer
        error = dict(answer["error"])
        assert error["message"] and {"code", "message", "hint", "field"} <= set(error)
        return error

    def ended(self, task: str, *, timeout: float = 60.0) -> dict[str, Any]:
        """The event with which a deployment ended."""
        return self.until("event", lambda e: e["kind"] == "deployment_ended" and e["id"] == task, timeout=timeout)

    def deploy(self, image: str, **arguments: Any) -> dict[str, Any]:
        """Deploys by command, once the host is there; the deployment's document as its last event has it."""
        self.until("status", lambda status: status["state"] == "online")
        return self.ended(self.call("deploy", image=image, **arguments)["task"])
