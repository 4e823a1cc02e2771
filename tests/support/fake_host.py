"""A host without a slot behind the real admin socket, in another thread's loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.commands.admin import AdminServer
from agent.commands.builtin import build_table
from agent.errors import NotFound
from agent.model.wish import Wish
from support.loops import Loop

MODEL = {
    "digest": "sha256:" + "ab12" * 16,
    "reference": "registry:5000/resnet50:3",
    "name": "resnet50",
    "version": "3",
}


def status_document(**changes: Any) -> dict[str, Any]:
    """A host that serves from the slot."""
    return {
        "device": "edge-1",
        "version": "0.1.0",
        "boot_id": "0f0e",
        "pid": 4321,
        "uptime_s": 11_530.2,
        "host": "slot",
        "reason": None,
        "embedded": True,
        "slot": {
            "driver": "simulated",
            "simulated": True,
            "present": True,
            "shell": "9926ab6d6c925a68aabca7d84c545738",
            "accelerator": "d8424dc4a4a3c413f89e433683f9040b",
            "proven": "2026-01-02T03:04:05Z",
            "temperature_c": 45.2,
            "power_w": 21.7,
            "executor": {"pid": 4400},
        },
        "committed": MODEL,
        "previous": {**MODEL, "version": "2"},
        "deployment": None,
        "waiting": None,
        "last": deployment_document("committed"),
        "serving": {
            "listen": ["127.0.0.1:50051", "unix:/run/slotd/grpc.sock"],
            "requests": 1_234_567,
            "failed": 2,
            "refused": 3,
            "by_slot": 1_234_000,
            "by_bridge": 562,
            "in_flight": 4,
            "queued": 0,
            "p50_ms": 4.12,
            "p99_ms": 9.87,
            "capacity_per_s": 240.5,
        },
        "link": {
            "enabled": True,
            "connected": False,
            "broker": "127.0.0.1:1883",
            "outbox": {"depth": 17, "oldest_s": 65.0},
        },
        "issues": [
            {
                "id": "clock",
                "severity": "warning",
                "since": "2026-01-02T03:04:05Z",
                "message": "the clock is not synchronised",
                "hint": "start a time service",
            }
        ],
        **changes,
    }


def deployment_document(outcome: str | None, **changes: Any) -> dict[str, Any]:
    """One that went through, or is at `probation`."""
    return {
        "id": "d-1",
        "kind": "deploy",
        "reference": MODEL["reference"],
        "digest": MODEL["digest"],
        "name": "resnet50",
        "version": "3",
        "actor": "local uid 1000 (me)",
        "phase": "probation",
        "phases": [
            {"phase": "resolve", "seconds": 0.04},
            {"phase": "pull", "seconds": 12.3},
            {"phase": "preflight", "seconds": 1.5},
            {"phase": "program", "seconds": 61.0},
            {"phase": "probation", "seconds": 0.5},
        ],
        "progress": {"bytes": 90_000_000, "total": 100_000_000},
        "outcome": outcome,
        "error": None,
        "host": "slot",
        "started": "2026-01-02T03:04:05.678Z",
        "seconds": 75.4,
        **changes,
    }


class FakeHost:
    """Remembers what it was asked; `watched` is what a watch tells, `hold` keeps it open afterwards."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.document = status_document()
        self.watched: list[dict[str, Any]] = [deployment_document(None), deployment_document("committed")]
        self.hold = False
        self.watching = threading.Event()
        self.fault: Exception | None = None

    def status(self) -> dict[str, Any]:
        self._ask("status", None)
        return self.document

    def doctor(self) -> dict[str, Any]:
        self._ask("doctor", None)
        return {
            "ok": False,
            "checks": [
                {"id": "seccomp", "ok": True, "message": "filtered", "hint": None},
                {"id": "landlock", "ok": False, "message": "the kernel has no Landlock", "hint": "boot another"},
            ],
            "sandbox": {"landlock": 0, "seccomp": True, "lacks": ["landlock"], "children": [], "granted": {}},
        }

    async def deploy(self, wish: Wish, actor: Any) -> dict[str, Any]:
        return self._ask("deploy", asdict(wish))

    async def undeploy(self, actor: Any) -> dict[str, Any]:
        return self._ask("undeploy", None)

    async def rollback(self, actor: Any) -> dict[str, Any]:
        return self._ask("rollback", None)

    async def cancel(self, task: str | None, actor: Any) -> dict[str, Any]:
        return self._ask("cancel", task)

    async def task(self, task: str) -> dict[str, Any]:
        self._ask("task", task)
        if task != "d-1":
            raise NotFound(f"there is no task {task!r}")
        return self.watched[-1]

    async def watch(self, task: str | None = None) -> AsyncIterator[dict[str, Any]]:
        if task not in (None, "d-1"):
            raise NotFound(f"there is no task {task!r}")
        for document in self.watched:
            yield document
        self.watching.set()
        if self.hold:
            await asyncio.Event().wait()

    def _ask(self, what: str, arguments: Any) -> dict[str, Any]:
        self.asked.append((what, arguments))
        if self.fault is not None:
            raise self.fault
        return {"task": "d-1", "outcome": None}


class Admin:
    """The real admin server over a FakeHost."""

    def __init__(self, loop: Loop, path: Path) -> None:
        self.host = FakeHost()
        self.path = path
        self._loop = loop
        self._server = AdminServer(path, build_table(self.host), self.host)

    def start(self) -> Admin:
        self._loop.run(self._server.start)
        return self

    def close(self) -> None:
        self._loop.run(self._server.close)
