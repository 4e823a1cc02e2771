"""HTTP's place: it listens when it can, and says so when it cannot; gRPC goes on without it."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from agent.errors import SlotdError
from agent.health.issues import Issues
from agent.serving import endpoint
from agent.serving.http.connection import Connection, Shared
from agent.serving.http.messages import Answer, Request, Response
from agent.serving.listen import BACKLOG, Places, bound, close_all, sealing

if TYPE_CHECKING:
    from agent.serving.tls import Tls

log = structlog.get_logger(__name__)

EVERY = 5.0
"""Seconds between two tries to listen on an address that is another's."""
ISSUE = "http-listen"


class HttpServer:
    """`open`, then `run` until it is cancelled, then `close`."""

    def __init__(
        self,
        listen: str,
        shared: Shared,
        issues: Issues,
        opened: Callable[[str], None],
        *,
        tls: Tls | None = None,
        anywhere: bool = False,
    ) -> None:
        """`opened` is told http://host:port once it listens; `anywhere`: on other addresses than loopback, too."""
        self._tls = tls
        self._anywhere = anywhere
        self._listen = listen
        self._shared = shared
        self._issues = issues
        self._opened = opened
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """It listens; why it does not is an issue."""
        try:
            host, port = await asyncio.to_thread(
                endpoint.address, self._listen, "serving.http.listen", anywhere=self._anywhere
            )
            literal = f"[{host}]" if ":" in host else host
            try:
                listener = bound(socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port))
            except OSError:
                raise await asyncio.to_thread(endpoint.taken, literal, port, "serving.http.listen") from None
        except SlotdError as error:
            self._issues.raise_(ISSUE, "error", f"HTTP is not served: {error}", error.hint)
            return
        self._issues.clear(ISSUE)
        shared, places = self._shared, Places()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(shared, places.take, places.give),
            sock=listener,
            backlog=BACKLOG,
            **sealing(self._tls, "http/1.1"),
        )
        address = f"http{'s' if self._tls else ''}://{literal}:{listener.getsockname()[1]}"
        log.info("http_listening", address=address)
        self._opened(address)

    async def run(self) -> None:
        """Ends what takes too long, and listens as soon as that is possible."""
        seconds = 0.0
        while True:
            await asyncio.sleep(1.0)
            seconds += 1.0
            try:
                self._shared.tick()
                if self._server is None and seconds >= EVERY:
                    seconds = 0.0
                    await self.open()
            except Exception as fault:  # our own mistake: connections are looked after all the same
                log.exception("http_fault")
                self._issues.fault("http", fault)

    async def close(self, grace: float) -> None:
        """Requests in hand get `grace` seconds, then they end with UNAVAILABLE."""
        shared = self._shared
        shared.draining = True
        if self._server is not None:
            self._server.close()
        await close_all(
            shared.connections, lambda: all(connection.answered for connection in shared.connections), grace
        )


class Counted:
    """Answers, and how many there were of each status."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.statuses: Counter[int] = Counter()

    async def __call__(self, request: Request) -> Response:
        try:
            response = await self._answer(request)
        except SlotdError as error:
            self.count(error.http)
            raise
        self.count(response.status)
        return response

    def count(self, status: int) -> None:
        """One more."""
        self.statuses[status] += 1
