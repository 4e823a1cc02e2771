"""The host as commands, the link and the status page see it: one facade over the parts that the daemon put together."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from typing import Any, Protocol

from agent import __version__
from agent.commands.table import Actor
from agent.config import Config
from agent.errors import Unavailable
from agent.executor.client import Worker
from agent.health.confinement import Confinement, examine
from agent.journal.boot import ModelRef
from agent.model.wish import Wish
from agent.reload.reloader import Reloader
from agent.serving.dataplane import Dataplane
from agent.slot.arbiter import Arbiter, HostState
from agent.slot.deployment import Deployments
from agent.slot.installer import Installer
from agent.slot.recovery import Recovery
from drivers.base import SlotHealth


class LinkState(Protocol):
    """What the status says of the link."""

    def describe(self) -> dict[str, Any]:
        """enabled, connected, broker, outbox."""


class SlotHost:
    """Implements `agent.commands.host.Host`."""

    def __init__(
        self,
        config: Config,
        boot_id: str,
        arbiter: Arbiter,
        dataplane: Dataplane,
        installer: Installer,
        recovery: Recovery,
        deployments: Deployments,
        issues: Callable[[], list[dict[str, Any]]],
    ) -> None:
        self.config = config
        self.boot_id = boot_id
        self.arbiter = arbiter
        self.dataplane = dataplane
        self.installer = installer
        self.recovery = recovery
        self.deployments = deployments
        self.issues = issues
        self.link: LinkState | None = None
        self.reloader: Reloader | None = None
        self.listen: list[str] = []
        self.health = SlotHealth()
        self.restart_gap: float | None = None
        self._started = time.monotonic()
        self._confinement = Confinement(installer.driver)

    def status(self) -> dict[str, Any]:
        """The whole state, as `slotd status --json` prints it."""
        arbiter, boot = self.arbiter, self.deployments.boot
        running, waiting = self.deployments.running, self.deployments.waiting
        trouble = arbiter.trouble if arbiter.host in (HostState.BRIDGE, HostState.DARK) and not running else None
        return {
            "device": self.config.device,
            "version": __version__,
            "boot_id": self.boot_id,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 1),
            "restart_gap_s": self.restart_gap,
            "host": arbiter.host.value,
            "reason": trouble.as_dict() if trouble else None,
            "embedded": self.config.embedded,
            "config": self.reloader.describe() if self.reloader else None,
            "slot": self._slot(),
            "committed": _ref(boot.committed),
            "previous": _ref(boot.previous),
            "deployment": running.as_dict() if running else None,
            "waiting": waiting.as_dict() if waiting else None,
            "last": self.deployments.last,
            "serving": self._serving(),
            "link": self.link.describe() if self.link else {"enabled": False, "connected": False},
            "sandbox": self.sandbox(),
            "issues": self.issues(),
        }

    def sandbox(self) -> dict[str, Any]:
        """How far the children are confined."""
        return self._confinement.describe(self._workers())

    def doctor(self) -> dict[str, Any]:
        return examine(self.sandbox())

    def line(self) -> str:
        """The state in one line, as `systemctl status` shows it."""
        ref, state, running = self.deployments.boot.committed, self.arbiter.host, self.deployments.running
        if ref is None:
            text = "no model is deployed"
        else:
            text = f"{ref.name} {ref.version} {_HOW[state]}"
            if self.arbiter.trouble is not None and state in (HostState.BRIDGE, HostState.DARK) and running is None:
                text += f" ({self.arbiter.trouble})"
        if running is not None:
            text += f"; {_DOING.get(running.kind, running.kind)}"
            if running.name:
                text += f" {running.name} {running.version}"
            elif running.wish is not None:
                text += f" {running.wish.reference}"
            text += f": {running.phase or 'waiting'}"
        return text

    async def deploy(self, wish: Wish, actor: Actor) -> dict[str, Any]:
        deployment = await self.deployments.deploy(wish, str(actor), fresh=actor.kind == "desired")
        return {"task": deployment.id, "outcome": deployment.outcome.value if deployment.outcome else None}

    async def undeploy(self, actor: Actor) -> dict[str, Any]:
        return {"task": (await self.deployments.undeploy(str(actor))).id}

    async def rollback(self, actor: Actor) -> dict[str, Any]:
        return {"task": (await self.deployments.rollback(str(actor))).id}

    async def reload(self, actor: Actor) -> dict[str, Any]:
        if self.reloader is None:
            raise Unavailable("slotd is starting", retry_after=1.0)
        return await self.reloader.reload(actor)

    async def cancel(self, task: str | None, actor: Actor) -> dict[str, Any]:
        return {"task": (await self.deployments.cancel(task, str(actor))).id}

    async def task(self, task: str) -> dict[str, Any]:
        return await self.deployments.document(task)

    def watch(self, task: str | None = None) -> AsyncIterator[dict[str, Any]]:
        """Deployment documents as they change."""
        return self.deployments.watch(task)

    def _workers(self) -> Iterator[Worker]:
        if self.installer.seat is not None:
            yield self.installer.seat.worker
        for resident in self.deployments.residents.models.values():
            if resident.bridge is not None:
                yield resident.bridge.worker
            yield from resident.decoders.workers

    def _slot(self) -> dict[str, Any]:
        state, seat = self.installer.state, self.installer.seat
        proof = self.installer.last_proof
        return {
            "driver": self.installer.driver.name,
            "simulated": self.installer.driver.simulated,
            "present": state.present,
            "shell": state.shell,
            "accelerator": state.accelerator,
            "proven": _rfc3339(self.installer.proven_at) if self.arbiter.slot and self.arbiter.slot.trusted else None,
            "proof": proof.as_dict() if proof else None,
            "temperature_c": self.health.temperature_c,
            "power_w": self.health.power_w,
            "executor": {"pid": seat.worker.pid, "model": seat.model.name} if seat else None,
            "recovery_attempts": self.recovery.attempts,
        }

    def _serving(self) -> dict[str, Any]:
        counters, place = self.dataplane.counters, None
        answer = self.arbiter.answerer()
        key = getattr(answer, "key", None)
        if key is not None:
            place = self.dataplane.admission.places.get(key)
        p50, p99 = self.dataplane.latencies.quantile(0.5), self.dataplane.latencies.quantile(0.99)
        return {
            "listen": self.listen,
            "requests": counters.requests,
            "failed": counters.failed,
            "refused": counters.refused,
            "invalid": counters.invalid,
            "cancelled": counters.cancelled,
            "by_slot": counters.by_slot,
            "by_bridge": counters.by_bridge,
            "hedged": counters.hedged,
            "retried": counters.retried,
            "in_flight": self.dataplane.admission.in_flight,
            "queued": len(self.dataplane.admission.queue),
            "p50_ms": None if p50 is None else round(p50 * 1000, 3),
            "p99_ms": None if p99 is None else round(p99 * 1000, 3),
            "capacity_per_s": round(place.capacity, 1) if place else None,
        }


_DOING = {"deploy": "deploying", "undeploy": "undeploying", "rollback": "rolling back to"}
_HOW = {
    HostState.SLOT: "answers from the slot",
    HostState.BRIDGE: "answers from the CPU",
    HostState.DARK: "does not answer",
    HostState.EMPTY: "does not answer",
}


def _rfc3339(moment: datetime | None) -> str | None:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z") if moment else None


def _ref(ref: ModelRef | None) -> dict[str, str] | None:
    if ref is None:
        return None
    return {"digest": ref.digest, "reference": ref.reference, "name": ref.name, "version": ref.version}
