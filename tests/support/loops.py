"""An event loop in a thread, for tests whose own side is not asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any


class Loop:
    """An event loop in a thread; ended with the block."""

    def __enter__(self) -> Loop:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(TimeoutError):
            self.run(self._cancel())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    def run(self, work: Awaitable[Any] | Callable[[], Awaitable[Any]]) -> Any:
        """Runs it in the loop and waits for its end."""

        async def go() -> Any:
            return await (work() if callable(work) else work)

        coroutine: Coroutine[Any, Any, Any] = go()
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    async def _cancel(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
