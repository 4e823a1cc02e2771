"""Starting the test children."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

from agent.executor.client import DecodedMemory, Launch, Worker

HERE = Path(__file__).parent


def launch(script: str, hello: dict[str, Any] | None = None, *, arena: int = 16 << 20, **other: Any) -> Launch:
    """How to start `tests/support/<script>.py`."""
    return Launch(
        role=script.removesuffix("_child"),
        hello=hello or {},
        arena=arena,
        memory=2 << 30,
        argv=(sys.executable, "-I", str(HERE / f"{script}.py")),
        **other,
    )


async def start(script: str, hello: dict[str, Any] | None = None, **other: Any) -> Worker:
    """The same, ready."""
    return await Worker.start(launch(script, hello, **other), timeout=20)


def soon(seconds: float = 30.0) -> int:
    """A deadline."""
    return time.monotonic_ns() + int(seconds * 1e9)


def open_files() -> int:
    """How many descriptors this process has."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


__all__ = ["DecodedMemory", "launch", "open_files", "soon", "start"]
