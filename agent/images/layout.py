"""The store as the agent sees it: an OCI image layout with every image's blobs, and the models unpacked from them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from agent.errors import InvalidImage, NotFound, SlotdError, StorageError
from agent.images.blobs import REF_NAME, StoreLayout
from agent.images.files import make_folder, storage_error, sync_folder
from agent.images.hashes import read_hashes, verify_hashes
from agent.images.manifest import OCI_MANIFEST, Descriptor
from agent.images.reference import DIGEST, parse_digest
from agent.images.unpack import remove_folder, stored_manifest
from agent.model.spec import Model, read_spec

if TYPE_CHECKING:
    from agent.config import ImagesConfig

_log = structlog.get_logger(__name__)

LOCK_WAIT = 10.0
PARTIAL_AGE = 7 * 86400.0  # a half-done blob that nobody went on with is kept this long


@dataclass(frozen=True)
class Stored:
    """One image in the store. `size`: compressed bytes of all its blobs; 0 if its manifest is damaged."""

    digest: str
    reference: str
    size: int
    unpacked: bool


class Store:
    """`state_dir`/store (an OCI image layout that any tool can read) and `state_dir`/models/<hex>/.

    `has` and `model` also work if `open` raised, so that a host with a read-only disk still serves.
    """

    def __init__(self, state_dir: Path, limits: ImagesConfig) -> None:
        self.state_dir = state_dir
        self.limits = limits
        self.layout = StoreLayout(state_dir / "store")
        self.models = state_dir / "models"
        self.repaired: str | None = None
        """What `open` found damaged and made anew, if anything."""

    async def open(self) -> None:
        """Make the folders, clear half-unpacked models, repair an unreadable index. Raises StorageError, Conflict."""
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        try:
            make_folder(self.models)
            with self.layout.lock(LOCK_WAIT):
                known = self.layout.blobs.is_dir()
                for stale in self.models.glob("*.partial"):
                    remove_folder(stale)
                try:
                    self.layout.entries()
                except (InvalidImage, NotFound) as error:
                    self._rebuild()
                    if known:
                        self.repaired = f"{error}; it was made anew from what is unpacked"
                self.layout.create()
        except OSError as error:
            raise storage_error(error, "the store cannot be opened") from None

    def _rebuild(self) -> None:
        """A new index of what is unpacked. The old files are kept beside, as evidence."""
        for name in ("index.json", "oci-layout"):
            path = self.layout.path / name
            if path.exists():
                path.rename(path.with_name(f"{name}.broken"))
        self.layout.create()
        for folder in sorted(self.models.iterdir()):
            try:
                listed = read_hashes(folder)
                data = self.layout.document(listed.digest)
            except SlotdError:
                continue  # not whole; it is fetched again when it is wanted
            kind = json.loads(data).get("mediaType") or OCI_MANIFEST
            self.layout.add(Descriptor(kind, listed.digest, len(data)), None)

    def folder(self, digest: str) -> Path:
        """Where the model of an image is unpacked. Raises InvalidInput."""
        return self.models / parse_digest(digest).removeprefix("sha256:")

    def has(self, digest: str) -> bool:
        """Whether the model is unpacked. `model` tells whether it is also intact."""
        return self.folder(digest).is_dir()

    def model(self, digest: str, reference: str = "", *, unread: bool = False) -> Model:
        """The unpacked model, every byte of it verified. Blocking: reads all of it.

        `unread`: its large files were not read; nobody may be answered from it before `verify` has. `reference`
        defaults to the one it was pulled by. Raises NotFound, InvalidModel, StorageError naming the file.
        """
        folder = self.folder(digest)
        try:
            listed = read_hashes(folder) if unread else verify_hashes(folder)
            spec = read_spec(folder)
        except OSError as error:
            raise storage_error(error, "the model cannot be read") from None
        hashes = {path: hash_ for path, (hash_, _) in listed.files.items()}
        return Model(digest, reference or listed.reference, folder, spec, hashes)

    def verify(self, digest: str) -> None:
        """Reads every byte of an unpacked model. Blocking. Raises NotFound, StorageError naming the file."""
        try:
            verify_hashes(self.folder(digest))
        except OSError as error:
            raise storage_error(error, "the model cannot be read") from None

    def manifests(self) -> list[Stored]:
        """The images in the store, oldest first. Blocking. Raises StorageError, NotFound, InvalidImage."""
        found: dict[str, Stored] = {}
        try:
            for entry in self.layout.entries():
                try:
                    size = stored_manifest(self.layout, entry.digest).size
                except SlotdError:
                    size = 0
                name = entry.annotations.get(REF_NAME) or (
                    found[entry.digest].reference if entry.digest in found else ""
                )
                found[entry.digest] = Stored(entry.digest, name, size, self.has(entry.digest))
        except OSError as error:
            raise storage_error(error, "the store cannot be read") from None
        return list(found.values())

    async def remove(self, digest: str) -> int:
        """Remove one image and its model; bytes freed. Raises StorageError, Conflict (a pull is running)."""
        listed = await asyncio.to_thread(self.layout.entries)
        unpacked = {f"sha256:{folder.name}" for folder in self.models.iterdir()}
        return await self.collect(({entry.digest for entry in listed} | unpacked) - {digest})

    async def collect(self, keep: Set[str]) -> int:
        """Remove all images and models whose manifest digest is not in `keep`; bytes freed.

        Half-done blobs of images in `keep`, and young ones, stay. Raises StorageError, Conflict (a pull is running).
        """
        return await asyncio.to_thread(self._collect, frozenset(keep))

    def _collect(self, keep: frozenset[str]) -> int:
        try:
            with self.layout.lock(LOCK_WAIT):
                return self._sweep(keep)
        except OSError as error:
            raise storage_error(error, "the store cannot be cleaned") from None

    def _sweep(self, keep: frozenset[str]) -> int:
        # Each step leaves a sound store if it is the last: first what is listed, then what nothing lists any more.
        entries = self.layout.entries()
        wanted, sure = self._reachable(keep)
        kept = [entry for entry in entries if entry.digest.removeprefix("sha256:") in wanted and entry.digest in keep]
        if kept != entries:
            self.layout.write_entries(kept)
        freed = 0
        for folder in self.models.iterdir():
            if f"sha256:{folder.name.removesuffix('.partial')}" not in keep:
                freed += _bytes(folder)
                remove_folder(folder)
        for blob in self.layout.blobs.iterdir():
            if sure and blob.name not in wanted:
                freed += blob.stat().st_size
                blob.unlink()
        for partial in self.layout.partials.iterdir():
            status = partial.stat()
            if partial.name.removesuffix(".partial") not in wanted and time.time() - status.st_mtime > PARTIAL_AGE:
                freed += status.st_size
                partial.unlink()
        sync_folder(self.layout.blobs)
        return freed

    def _reachable(self, keep: frozenset[str]) -> tuple[set[str], bool]:
        """The blobs of the images in `keep`, and whether that is all of them: a damaged manifest does not say."""
        wanted: set[str] = set()
        sure = True
        for digest in keep:
            if not DIGEST.fullmatch(digest) or not self.layout.has(digest):
                continue
            wanted.add(digest.removeprefix("sha256:"))
            try:
                wanted |= {blob.hex for blob in stored_manifest(self.layout, digest).blobs}
            except (StorageError, InvalidImage) as error:
                _log.warning("no blob is removed", reason=str(error))
                sure = False
        return wanted, sure


def _bytes(folder: Path) -> int:
    """Of a folder, or of a file that somebody has put there."""
    if not folder.is_dir():
        return folder.lstat().st_size
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
