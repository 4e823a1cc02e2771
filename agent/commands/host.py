"""What commands need of the host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from agent.commands.table import Actor
from agent.model.wish import Wish


class Host(Protocol):
    """The daemon, as commands and the link see it. All raise SlotdError; nothing here waits for a deployment to end."""

    def status(self) -> dict[str, Any]:
        """The status document; cheap."""

    def doctor(self) -> dict[str, Any]:
        """What slotd finds at its host: `ok`, `checks`; cheap."""

    async def deploy(self, wish: Wish, actor: Actor) -> dict[str, Any]:
        """Starts a deployment: `task` (its id) and `outcome` (None, or one that was plain at once)."""

    async def undeploy(self, actor: Actor) -> dict[str, Any]:
        """Makes `empty` the committed state: `task`."""

    async def rollback(self, actor: Actor) -> dict[str, Any]:
        """Calls off the deployment in hand, or deploys the previous model: `task`."""

    async def reload(self, actor: Actor) -> dict[str, Any]:
        """Reads the configuration again: `changed`, `pending`. Raises InvalidConfig with every fault."""

    async def cancel(self, task: str | None, actor: Actor) -> dict[str, Any]:
        """Calls off a deployment, None for the one that waits, else the one that runs: `task`."""

    async def task(self, task: str) -> dict[str, Any]:
        """The document of a deployment. Raises NotFound."""

    def watch(self, task: str | None = None) -> AsyncIterator[dict[str, Any]]:
        """Documents of deployments as they change, the present one first. With `task` it ends with that one's outcome,
        or raises NotFound; without, never. Closing the iterator ends it."""
