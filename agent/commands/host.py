"""What commands ask of the host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from agent.commands.table import Actor
from agent.model.wish import Wish


class Host(Protocol):
    """Implemented by the daemon. All of these raise SlotdError; deployments run on after the answer."""

    def status(self) -> dict[str, Any]:
        """The whole state."""

    async def deploy(self, wish: Wish, actor: Actor) -> dict[str, Any]:
        """`{"task": id, "outcome": None}` at once."""

    async def undeploy(self, actor: Actor) -> dict[str, Any]:
        """The same; nothing is served afterwards."""

    async def rollback(self, actor: Actor) -> dict[str, Any]:
        """The same; calls off the deployment in hand, or deploys the previous model."""

    async def cancel(self, task: str | None, actor: Actor) -> dict[str, Any]:
        """Calls a deployment off; None: the one that waits, else the one that runs."""

    async def task(self, task: str) -> dict[str, Any]:
        """A deployment's document."""

    def watch(self, task: str | None = None) -> AsyncIterator[dict[str, Any]]:
        """A deployment's document whenever it changes; ends with the deployment."""
