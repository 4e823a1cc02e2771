"""The clients, as the demo sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from agent.cli.demo.child import Child, child
from agent.cli.demo.judge import Answered
from agent.errors import DeadlineExceeded, SlotdError

_LAST = 30.0


class Load:
    """What has come in so far."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._stopping = False
        self.answers: list[Answered] = []
        self.failed = 0
        self._more = asyncio.Event()
        self.reading = asyncio.create_task(self._read(), name="clients")

    async def _read(self) -> None:
        """Until the clients have ended. Raises SlotdError if nobody asked them to."""
        async for batch in self._child.documents():
            answers = [Answered(*one) for one in batch]
            self.failed += sum(answer.error is not None for answer in answers)
            self.answers += answers
            self._more.set()
        if not self._stopping:
            raise SlotdError("the clients ended before their time")

    async def reach(self, count: int, timeout: float) -> None:
        """Until there were so many requests. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(timeout):
                while len(self.answers) < count:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"{len(self.answers)} requests in {timeout:.0f} s; {count} were wanted") from None

    async def end(self) -> None:
        """Each client gets its last answer, and no more are sent."""
        self._stopping = True
        self._child.ask_to_end()
        async with asyncio.timeout(_LAST):
            await self.reading

    def __str__(self) -> str:
        return f"{len(self.answers):,} requests, {self.failed} failed"


@asynccontextmanager
async def load(folder: Path, address: str, clients: int) -> AsyncIterator[Load]:
    """Clients that keep asking until the end of the block."""
    arguments = ("-m", "agent.cli.demo.clients", str(folder), address, str(clients))
    async with child("the clients", arguments, folder) as started:
        running = Load(started)
        try:
            yield running
        finally:
            running.reading.cancel()
            await asyncio.gather(running.reading, return_exceptions=True)
