"""An OCI image layout folder: somebody's (read only, nothing in it is believed) or our store (written durably)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from agent.errors import Conflict, InvalidImage, NotFound, StorageError
from agent.images.files import check_space, make_folder, sync_folder, write_file
from agent.images.manifest import MAX_DOCUMENT, Descriptor, digest_of, parse_descriptor

CHUNK = 1 << 20
# A power cut in a long pull costs at most this much of it, or what came in this time: a bad link brings little.
SYNC_EVERY = 64 << 20
SYNC_SECONDS = 5.0
REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"
DAMAGED = "deploy the image again; if it happens again, the disk has faults"
_VERSION = {"imageLayoutVersion": "1.0.0"}


class Layout:
    """One OCI image layout."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def blobs(self) -> Path:
        return self.path / "blobs" / "sha256"

    def blob(self, digest: str) -> Path:
        return self.blobs / digest.removeprefix("sha256:")

    def has(self, digest: str) -> bool:
        """Whether a blob of this name is there (it may be damaged)."""
        return self.blob(digest).is_file()

    def entries(self) -> list[Descriptor]:
        """What index.json lists. Raises NotFound, InvalidImage."""
        where = str(self.path / "index.json")
        version = self._json("oci-layout").get("imageLayoutVersion")
        if version != "1.0.0":
            raise InvalidImage(f"has the layout version {version!r}, not 1.0.0", field=str(self.path / "oci-layout"))
        found = self._json("index.json").get("manifests")
        if not isinstance(found, list):
            raise InvalidImage("has no manifests", field=where)
        return [parse_descriptor(raw, f"{where}: manifests.{number}") for number, raw in enumerate(found)]

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            with open_regular(path) as file:
                document = json.loads(_read(file, MAX_DOCUMENT, str(path)))
        except FileNotFoundError:
            raise NotFound("is not there", field=str(path), hint="an OCI image layout has this file") from None
        except (ValueError, RecursionError):
            raise InvalidImage("is not JSON", field=str(path)) from None
        if not isinstance(document, dict):
            raise InvalidImage("is not a JSON object", field=str(path))
        return document

    def find(self, titles: frozenset[str]) -> Descriptor | None:
        """The newest entry that is called one of `titles`."""
        for entry in reversed(self.entries()):
            if titles & {entry.annotations.get(REF_NAME), entry.annotations.get(CONTAINERD_NAME)}:
                return entry
        return None

    def document(self, digest: str) -> bytes:
        """A manifest, index or config, whole. Raises NotFound, InvalidImage (it is not what its name says)."""
        path = self.blob(digest)
        try:
            with open_regular(path) as file:
                data = _read(file, MAX_DOCUMENT, str(path))
        except FileNotFoundError:
            raise NotFound("the blob is not in the layout", field=str(path)) from None
        if digest_of(data) != digest:
            raise InvalidImage("its content is not what its digest says", field=str(path))
        return data

    def intact(self, blob: Descriptor) -> bool:
        """Whether the blob is there and every bit of it is right. Raises InvalidImage if `blob.size` is a lie."""
        try:
            with open_regular(self.blob(blob.digest)) as file:
                size = os.fstat(file.fileno()).st_size
                if hashlib.file_digest(file, "sha256").hexdigest() != blob.hex:
                    return False
        except FileNotFoundError:
            return False
        if size != blob.size:
            raise InvalidImage(f"is said to have {blob.size} bytes but has {size}", field=blob.digest)
        return True


class StoreLayout(Layout):
    """The layout that slotd owns. All writing is done under `lock`, by the puller or by garbage collection."""

    @property
    def partials(self) -> Path:
        # Not under blobs/: other tools take every name there for a digest.
        return self.path / "partial"

    def create(self) -> None:
        """Make what is missing."""
        for folder in (self.blobs, self.partials):
            make_folder(folder)
        if not (self.path / "oci-layout").exists():
            write_file(self.path / "oci-layout", json.dumps(_VERSION).encode())
        if not (self.path / "index.json").exists():
            self.write_entries([])

    def document(self, digest: str) -> bytes:
        """As in any layout, but damage is the disk's doing: StorageError."""
        try:
            return super().document(digest)
        except InvalidImage as error:
            raise StorageError(error.message, field=error.field, hint=DAMAGED) from None

    @contextmanager
    def lock(self, timeout: float) -> Iterator[None]:
        """Only one writer at a time, whatever process it is in. Raises Conflict after `timeout` seconds."""
        make_folder(self.path)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise Conflict(
                            "another process is writing to the store", field=str(self.path), hint="try again later"
                        ) from None
                time.sleep(0.05)
            yield
        finally:
            os.close(descriptor)

    def write_entries(self, entries: list[Descriptor]) -> None:
        """Replace index.json."""
        manifests = [
            {"mediaType": entry.media_type, "digest": entry.digest, "size": entry.size}
            | ({"annotations": dict(entry.annotations)} if entry.annotations else {})
            for entry in entries
        ]
        document = {"schemaVersion": 2, "manifests": manifests}
        write_file(self.path / "index.json", json.dumps(document, indent=1).encode())

    def add(self, manifest: Descriptor, title: str | None) -> None:
        """List an image whose blobs are all there. A title moves from the image that had it, as a tag does."""
        entries = []
        for entry in self.entries():
            if entry.digest == manifest.digest and title in (None, entry.annotations.get(REF_NAME)):
                return
            if title is not None and entry.annotations.get(REF_NAME) == title:
                entry = Descriptor(entry.media_type, entry.digest, entry.size)
            entries.append(entry)
        named = [entry for entry in entries if entry.digest != manifest.digest or entry.annotations]
        notes = {REF_NAME: title, CONTAINERD_NAME: title} if title else {}
        named.append(Descriptor(manifest.media_type, manifest.digest, manifest.size, notes))
        self.write_entries(named)

    def discard(self, digest: str) -> None:
        """Remove a damaged blob, so that it is fetched again."""
        self.blob(digest).unlink(missing_ok=True)
        sync_folder(self.blobs)


class Incoming:
    """A blob on its way into the store. What has arrived outlives a kill: it is hashed again and gone on with."""

    def __init__(self, store: StoreLayout, blob: Descriptor, keep_free: int) -> None:
        self.blob = blob
        self._store = store
        self._keep_free = keep_free
        self._path = store.partials / f"{blob.hex}.partial"
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._hash = hashlib.sha256()
        self.length = 0
        self._unsynced = 0
        self._synced = time.monotonic()
        self._named = False  # whether a power cut leaves the file its name
        try:
            self._recall()
        except BaseException:
            self._file.close()
            raise

    def _recall(self) -> None:
        if os.fstat(self._file.fileno()).st_size > self.blob.size:
            self.restart()
        while chunk := self._file.read(CHUNK):
            self._hash.update(chunk)
            self.length += len(chunk)

    def write(self, chunk: bytes | memoryview) -> None:
        """Append. Raises InvalidImage if more comes than the manifest says, StorageError if the disk fills up."""
        if self.length + len(chunk) > self.blob.size:
            raise InvalidImage(f"is larger than the {self.blob.size} bytes it is said to have", field=self.blob.digest)
        view = memoryview(chunk)
        self._hash.update(view)
        while view:
            view = view[self._file.write(view) :]
        self.length += len(chunk)
        self._unsynced += len(chunk)
        if self._unsynced >= SYNC_EVERY or time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fdatasync(self._file.fileno())
            if not self._named:
                sync_folder(self._path.parent)
                self._named = True
            check_space(self._path.parent, 0, self._keep_free)
            self._unsynced, self._synced = 0, time.monotonic()

    def restart(self) -> None:
        """Forget what has arrived."""
        self._file.seek(0)
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.length = 0

    @property
    def complete(self) -> bool:
        return self.length == self.blob.size

    @property
    def right(self) -> bool:
        """Whether what has arrived is what the digest says."""
        return self.complete and self._hash.hexdigest() == self.blob.hex

    def commit(self) -> None:
        """Make it a blob of the store; it must be `right`."""
        assert self.right
        os.fsync(self._file.fileno())
        self._path.rename(self._store.blob(self.blob.digest))
        sync_folder(self._store.blobs)
        sync_folder(self._path.parent)

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def open_regular(path: Path) -> BufferedReader:
    """Open for reading; a device or a pipe is refused, and never waited for. Raises FileNotFoundError, StorageError."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise StorageError("is not a plain file", field=str(path))
    return file


def _read(file: BinaryIO, limit: int, where: str) -> bytes:
    data = file.read(limit + 1)
    if len(data) > limit:
        raise InvalidImage(f"is larger than {limit} bytes", field=where)
    return data
