"""The link as it is configured now: with another configuration it is ended in order, and another one begins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from agent.config import Config
from agent.errors import SlotdError
from agent.health.issues import Issues
from agent.link.mqtt import Link

CLOSE = 3.0
"""Seconds that a link gets to send what is ready and to say goodbye."""
AGAIN = 30.0
"""Seconds until a link is tried again that could not begin."""
_OWN = ("link-", "duplicate-identity")
_log = structlog.get_logger("link")


class LinkKeeper:
    """One `Link` at a time, or none. `run` it as a task, `close` it at the end."""

    def __init__(self, config: Config, make: Callable[[Config], Link], issues: Issues) -> None:
        self._config = config
        self._make = make
        self._issues = issues
        self._link = make(config) if config.link.enabled else None
        self._other = asyncio.Event()
        self._closing = False

    def describe(self) -> dict[str, Any]:
        """The link as `status` has it."""
        return self._link.describe() if self._link is not None else {"enabled": False, "connected": False}

    def changed(self) -> None:
        """`Host.status()` may have changed."""
        if self._link is not None:
            self._link.changed()

    def reconfigure(self, config: Config) -> None:
        """Another configuration is in force. With another `link` the connection is made anew."""
        old, self._config = self._config.link, config
        # How much the outbox holds is nothing to the broker.
        if old != config.link.model_copy(update={"outbox_events": old.outbox_events}):
            self._other.set()
        elif self._link is not None and not self._other.is_set():
            self._link.reconfigure(config)

    async def run(self) -> None:
        """Until `close` or a cancellation. Raises what the first link raises if it cannot begin (see `Link.run`)."""
        first = True
        while not self._closing:
            if not first:
                self._renew()
            try:
                await self._live()
            except SlotdError as error:
                if first:
                    raise
                _log.error("the link cannot begin", error=str(error))
                self._issues.raise_("link-refused", "error", str(error), error.hint)
                await self._pause()
            first = False

    def _renew(self) -> None:
        self._other.clear()
        for issue in self._issues.list():
            if issue["id"].startswith(_OWN):
                self._issues.clear(issue["id"])
        self._link = self._make(self._config) if self._config.link.enabled else None

    async def _live(self) -> None:
        """The link that is, until it ends or another one is wanted."""
        if self._link is None:
            await self._other.wait()
            return
        link = asyncio.create_task(self._link.run(), name="link")
        other = asyncio.create_task(self._other.wait(), name="link-other")
        try:
            await asyncio.wait((link, other), return_when=asyncio.FIRST_COMPLETED)
            if not link.done():
                _log.info("the link begins anew, with another configuration")
                await self._link.close(CLOSE)
        finally:
            other.cancel()
            link.cancel()
            await asyncio.wait((link,))
        if not link.cancelled():
            link.result()

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(AGAIN):
                await self._other.wait()
        except TimeoutError:
            pass

    async def close(self, timeout: float) -> None:
        """As `Link.close`."""
        self._closing = True
        self._other.set()
        if self._link is not None:
            await self._link.close(timeout)
