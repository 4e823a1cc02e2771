"""Where the deployment procedure gets models from: registries, layout folders and the store, as one thing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from agent.config import Config
from agent.errors import InvalidImage, NotFound, PullerDied, StorageError
from agent.images import early
from agent.images.layout import Store
from agent.images.pull import pull, resolve, unpack
from agent.model.spec import Model

log = structlog.get_logger(__name__)

GOES_ON = "slotd goes on by itself when the deployment is over"


class ImageSource:
    """Implements `agent.slot.deployment.Images`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.store = Store(config.state_dir, config.images)
        self._writing = asyncio.Lock()
        self._mending: asyncio.Task[None] | None = None

    def reconfigure(self, config: Config) -> None:
        """Another configuration is in force, for pulls from now on."""
        self.config = config
        self.store.limits = config.images

    async def open(self) -> None:
        """Makes the store ready. Raises StorageError."""
        await self.store.open()

    async def resolve(self, reference: str, digest: str | None) -> str:
        """The digest of this platform's manifest; needs no registry if it is pinned and here already."""
        return await resolve(reference, self.config.images, digest=digest, store=self.store)

    async def fetch(self, reference: str, digest: str, progress: Callable[[dict[str, Any]], None]) -> None:
        """All blobs into the store. A puller that was killed goes on where it stopped, once."""
        await self._make_way()
        async with self._writing:
            await self._fetch(reference, digest, progress)

    async def _fetch(self, reference: str, digest: str, progress: Callable[[dict[str, Any]], None]) -> None:
        try:
            await pull(reference, digest, self.store, self.config.images, progress)
        except PullerDied as error:
            log.warning("puller_died", reference=reference, error=str(error))
            await pull(reference, digest, self.store, self.config.images, progress)

    async def unpack(self, reference: str, digest: str) -> None:
        """The model's files onto the disk."""
        await self._make_way()
        async with self._writing:
            await self._unpack(reference, digest)

    async def _unpack(self, reference: str, digest: str) -> None:
        await unpack(digest, self.store, self.config.images, lambda _: None, reference=reference)

    async def mend(self, reference: str, digest: str) -> None:
        """Makes an unpacked model whole again: from the store's blobs, or if those are no better from the registry.

        A deployment that wants the store comes first: then this is put off, StorageError. Raises what `fetch` does.
        """
        await self._make_way()
        mending = self._mending = asyncio.create_task(self._mend(reference, digest), name=f"mend-{digest[7:19]}")
        try:
            await asyncio.wait((mending,))
        finally:
            mending.cancel()
            await asyncio.wait((mending,))
        if mending.cancelled():
            raise StorageError("its repair is put off: a deployment needs the store", field=reference, hint=GOES_ON)
        mending.result()

    async def _mend(self, reference: str, digest: str) -> None:
        async with self._writing:
            try:
                await self._unpack(reference, digest)
            except (StorageError, NotFound, InvalidImage) as error:
                log.warning("model_not_mended_from_store", digest=digest, error=str(error))
                await self._fetch(reference, digest, lambda _: None)
                await self._unpack(reference, digest)
        log.info("model_mended", digest=digest, reference=reference)

    async def _make_way(self) -> None:
        if self._mending is not None and not self._mending.done():
            self._mending.cancel()
            await asyncio.wait((self._mending,))

    async def has(self, digest: str) -> bool:
        """Whether it is unpacked."""
        return await asyncio.to_thread(self.store.has, digest)

    async def model(self, digest: str, reference: str, *, unread: bool = False) -> Model:
        """The unpacked model, its hash list checked; `unread`: but for its files, which `verify` checks."""
        return await asyncio.to_thread(self.store.model, digest, reference, unread=unread)

    async def verify(self, digest: str) -> None:
        """Checks the files of an unpacked model."""
        if not await asyncio.to_thread(early.verified, digest):
            await asyncio.to_thread(self.store.verify, digest)

    async def collect(self, keep: set[str]) -> int:
        """Removes what is not in `keep`; bytes freed."""
        await self._make_way()
        async with self._writing:
            return await self.store.collect(keep)
