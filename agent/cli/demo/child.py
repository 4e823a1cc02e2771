"""Programs that the demo starts and that tell what they do, a JSON document a line, until they end."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent.errors import SlotdError

LINE = 1 << 20
_STOP = 5.0


class Child:
    """One of them. Its standard input is ours: that it ends tells it to end."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    async def documents(self) -> AsyncIterator[Any]:
        """What it says, until it has ended. Raises SlotdError if it did not end well."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            yield json.loads(line)
        await self._process.wait()
        if self._process.returncode:
            words = tail(self._log, 1)
            raise SlotdError(f"{self.name} ended with {self._process.returncode}{': ' + words if words else ''}")

    def ask_to_end(self) -> None:
        """Closes its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    async def stop(self) -> None:
        """Ends it, whatever it does."""
        if self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(_STOP):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def child(name: str, arguments: Sequence[str], folder: Path) -> AsyncIterator[Child]:
    """`python ARGUMENTS`, which is over at the end of the block. Its standard error goes to a file in `folder`."""
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as words:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=words,
            limit=LINE,
            start_new_session=True,  # Ctrl-C on the terminal is ours to pass on
        )
    started = Child(name, process, log)
    try:
        yield started
    finally:
        await started.stop()


def tail(log: Path, count: int) -> str:
    """The last lines of a log; empty if there is none."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-count:])
