"""Where the deployment procedure gets models from: registries, layout folders and the store, as one thing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from agent.config import Config
from agent.errors import PullerDied
from agent.images.layout import Store
from agent.images.pull import pull, resolve, unpack
from agent.model.spec import Model

log = structlog.get_logger(__name__)


class ImageSource:
    """Implements `agent.slot.deployment.Images`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.store = Store(config.state_dir, config.images)

    async def open(self) -> None:
        """Makes the store ready. Raises StorageError."""
        await self.store.open()

    async def resolve(self, reference: str, digest: str | None) -> str:
        """The digest of this platform's manifest; needs no registry if it is pinned and here already."""
        return await resolve(reference, self.config.images, digest=digest, store=self.store)

    async def fetch(self, reference: str, digest: str, progress: Callable[[dict[str, Any]], None]) -> None:
        """All blobs into the store. A puller that was killed goes on where it stopped, once."""
        try:
            await pull(reference, digest, self.store, self.config.images, progress)
        except PullerDied as error:
            log.warning("puller_died", reference=reference, error=str(error))
            await pull(reference, digest, self.store, self.config.images, progress)

    async def unpack(self, reference: str, digest: str) -> None:
        """The model's files onto the disk."""
        await unpack(digest, self.store, self.config.images, lambda _: None, reference=reference)

    async def has(self, digest: str) -> bool:
        """Whether it is unpacked."""
        return await asyncio.to_thread(self.store.has, digest)

    async def model(self, digest: str, reference: str) -> Model:
        """The unpacked model, its hash list checked."""
        return await asyncio.to_thread(self.store.model, digest, reference)

    async def collect(self, keep: set[str]) -> int:
        """Removes what is not in `keep`; bytes freed."""
        return await self.store.collect(keep)
