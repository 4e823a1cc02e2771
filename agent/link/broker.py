"""A broker inside slotd, for hosts and demonstrations that have no other: amqtt, on loopback, in our own loop."""

from __future__ import annotations

import asyncio
import importlib
import logging
import socket
from types import ModuleType
from typing import Any

import structlog

from agent.errors import Conflict, InvalidConfig

_log = structlog.get_logger("link")
_ADDRESS = "127.0.0.1"
_STOP = 2.0


class EmbeddedBroker:
    """MQTT 3.1.1 for anonymous clients of this machine. Keeps nothing over a restart."""

    def __init__(self, port: int = 0) -> None:
        """`port` 0 takes a free one, which `port` then is."""
        self.port = port
        self._broker: Any = None

    async def start(self) -> None:
        """Listens on return. Raises InvalidConfig if amqtt is not installed, Conflict if the port is taken."""
        module = await asyncio.to_thread(_load)
        port = self.port or _free_port()
        plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
        listener = {"type": "tcp", "bind": f"{_ADDRESS}:{port}", "max_connections": 64}
        broker = module.Broker({"listeners": {"default": listener}, "plugins": plugins})
        try:
            await broker.start()
        except module.BrokerError as error:
            raise Conflict(
                f"the embedded broker cannot listen on {_ADDRESS}:{port}: {error.__cause__ or error}",
                field="link.port",
                hint="set link.port to 0 for a free port, or link.host to the broker that is there",
            ) from None
        self._broker, self.port = broker, port
        _log.info("embedded broker", address=f"{_ADDRESS}:{port}")

    async def stop(self) -> None:
        """Stops it, in at most two seconds."""
        broker, self._broker = self._broker, None
        if broker is None:
            return
        try:
            async with asyncio.timeout(_STOP):
                await broker.shutdown()
        except TimeoutError:
            _log.warning("the embedded broker did not stop in time")


def _load() -> ModuleType:
    for name in ("amqtt", "transitions"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they tell of each client that comes and goes
    try:
        return importlib.import_module("amqtt.broker")
    except ImportError:
        raise InvalidConfig(
            "the embedded broker needs amqtt, which is not installed",
            field="link.host",
            hint="pip install 'slotd[demo]', or set link.host to a broker",
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_ADDRESS, 0))
        return int(probe.getsockname()[1])
