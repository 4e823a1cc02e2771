"""The far end of the broker: sends commands as an operator would, and watches what the host reports."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiomqtt

from agent.cli.live import ROLL_BACK
from agent.errors import DeadlineExceeded, SlotdError, Unavailable, revive

ANSWER = 15.0
"""Seconds that a command's answer may take."""
DEPLOYMENT = 120.0
"""Seconds that a deployment may take."""
_LASTS = 60.0

Document = Mapping[str, Any]


class Operator:
    """One MQTT client for one host."""

    def __init__(self, client: aiomqtt.Client, device: str) -> None:
        self._client = client
        self._root = f"slotd/{device}/"
        self._answers: dict[str, asyncio.Future[Document]] = {}
        self._reported: Document = {}
        self._news = asyncio.Condition()
        self._lost: str | None = None

    async def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Its result. Raises what the host answers, Unavailable, DeadlineExceeded."""
        number = uuid.uuid4().hex[:12]
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        body = {"id": number, "expires": time.time() + _LASTS, "arguments": arguments}
        try:
            async with asyncio.timeout(ANSWER):
                await self._client.publish(f"{self._root}cmd/{name}", json.dumps(body), qos=1)
                document = await answer
        except TimeoutError:
            raise DeadlineExceeded(f"no answer to the command {name!r} in {ANSWER:.0f} s") from None
        except aiomqtt.MqttError as error:
            raise Unavailable(f"the broker is lost: {error}") from None
        finally:
            del self._answers[number]
        if not document["ok"]:
            raise revive(document["error"])
        return dict(document["result"])

    async def deploy(self, image: str, changed: Callable[[Document], None]) -> dict[str, Any]:
        """From the command to the end of the deployment; `changed` gets its document whenever the host reports it.

        Returns the last one. Raises SlotdError if the image was not committed.
        """
        task = (await self.command("deploy", image=image))["task"]
        try:
            async with asyncio.timeout(DEPLOYMENT):
                async for document in self._deployment(task):
                    changed(document)
        except TimeoutError:
            raise DeadlineExceeded(f"the deployment of {image} took more than {DEPLOYMENT:.0f} s") from None
        if document["outcome"] != "committed":
            told = document.get("error") or {}
            phases = [phase["phase"] for phase in document["phases"] if phase["phase"] != ROLL_BACK]
            at = phases[-1] if phases else "the start"
            why = f"{told['code']}: {told['message']}" if told else "no reason given"
            raise SlotdError(
                f"the deployment of {image} ended {document['outcome']} at {at}: {why}",
                hint=told.get("hint"),
            )
        return dict(document)

    async def _deployment(self, task: str) -> AsyncIterator[Document]:
        """What is reported of one deployment, until it has ended."""
        seen: Document | None = None
        while seen is None or seen.get("outcome") is None:
            async with self._news:
                found = None
                while found is None or found == seen:
                    if self._lost is not None:
                        raise Unavailable(f"the broker is lost: {self._lost}")
                    parts = (self._reported.get(key) or {} for key in ("last", "deployment"))
                    found = next((part for part in parts if part.get("id") == task), None)
                    if found is None or found == seen:
                        await self._news.wait()
            seen = found
            yield found

    async def _read(self) -> None:
        """Takes in what comes, until the connection ends."""
        lost = "the connection was closed"
        try:
            async for message in self._client.messages:
                document = json.loads(bytes(message.payload))
                if message.topic.matches(f"{self._root}res/#"):
                    answer = self._answers.get(document.get("id", ""))
                    if answer is not None and not answer.done():
                        answer.set_result(document)
                else:
                    async with self._news:
                        self._reported = document
                        self._news.notify_all()
        except aiomqtt.MqttError as error:
            lost = str(error)
        async with self._news:
            self._lost = lost
            self._news.notify_all()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(Unavailable(f"the broker is lost: {lost}"))


@asynccontextmanager
async def operator(broker: str, device: str) -> AsyncIterator[Operator]:
    """Connected to the broker at host:port as long as the block lasts. Raises Unavailable."""
    host, _, port = broker.rpartition(":")
    client = aiomqtt.Client(host, int(port), identifier=f"operator-{uuid.uuid4().hex[:8]}")
    try:
        await client.__aenter__()
        for topic in ("res/#", "reported"):
            await client.subscribe(f"slotd/{device}/{topic}", qos=1)
    except aiomqtt.MqttError as error:
        raise Unavailable(f"no broker at {broker}: {error}") from None
    found = Operator(client, device)
    reading = asyncio.create_task(found._read(), name="operator")
    try:
        yield found
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        with suppress(aiomqtt.MqttError):
            await client.__aexit__(None, None, None)
