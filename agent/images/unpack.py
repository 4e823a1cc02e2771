"""Unpacking /models from the layers of an image in the store, durably, refusing whatever could do harm.

Runs in the puller child. Nothing is visible under its final name before every byte, folder and hash is on the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent.errors import InvalidImage, InvalidModel, NotFound, StorageError
from agent.images.archive import Archive, Entry, LayerStream
from agent.images.blobs import DAMAGED, StoreLayout, open_regular
from agent.images.files import check_space, make_folder, sync_folder
from agent.images.hashes import NAME, HashList, verify_hashes
from agent.images.manifest import Descriptor, Index, Manifest, compression, parse_diff_ids, parse_manifest
from agent.images.tree import Parts, Tree, check_name, split

ENTRIES_FACTOR = 20  # an ordinary base image has files by the ten thousand outside /models
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


@dataclass(frozen=True)
class Limits:
    """`size` in bytes, unpacked, of all layers; `files` under /models; `keep_free` in bytes."""

    size: int
    files: int
    keep_free: int


def stored_manifest(store: StoreLayout, digest: str) -> Manifest:
    """A manifest that is in the store. Raises NotFound, InvalidImage."""
    found = parse_manifest(store.document(digest), _listed_type(store, digest), digest)
    if isinstance(found, Index):
        raise InvalidImage("is an index, not the manifest of one image", field=digest, hint="resolve it first")
    return found


def _listed_type(store: StoreLayout, digest: str) -> str | None:
    # An OCI manifest need not name its own type; then only the index does.
    return next((entry.media_type for entry in store.entries() if entry.digest == digest), None)


def unpack(
    store: StoreLayout,
    models: Path,
    digest: str,
    reference: str,
    limits: Limits,
    progress: Callable[[int, int], None],
) -> Path:
    """`models`/<hex>, complete and durable; at once if it is there and intact.

    `progress(bytes, total)` counts compressed bytes. Raises NotFound, InvalidImage, InvalidModel, StorageError.
    """
    hex_ = digest.removeprefix("sha256:")
    final, partial = models / hex_, models / f"{hex_}.partial"
    make_folder(models)
    if _intact(final):
        return final
    manifest = stored_manifest(store, digest)
    where = manifest.config.digest
    diff_ids = parse_diff_ids(store.document(manifest.config.digest), len(manifest.layers), where)
    remove_folder(partial)
    # What comes out is not known before; it is at least about what goes in, and is watched while it is written.
    check_space(models, sum(layer.size for layer in manifest.layers), limits.keep_free)
    partial.mkdir(mode=0o755)
    try:
        _fill(partial, store, manifest, diff_ids, reference, limits, progress)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell; a start clears what is left
            remove_folder(partial)
        raise
    damaged = models / f"{hex_}.damaged.partial"
    if final.exists():  # it stays until there is a better one
        remove_folder(damaged)
        final.rename(damaged)
    partial.rename(final)
    sync_folder(models)
    remove_folder(damaged)
    return final


def _intact(folder: Path) -> bool:
    try:
        verify_hashes(folder)
    except (NotFound, StorageError):
        return False
    return True


def remove_folder(folder: Path) -> None:
    """Remove a model's folder so that a kill in the middle leaves nothing that looks whole."""
    if not folder.is_dir() or folder.is_symlink():
        folder.unlink(missing_ok=True)
        return
    if not folder.name.endswith(".partial"):
        doomed = folder.with_name(folder.name + ".partial")
        if doomed.exists():
            shutil.rmtree(doomed)
        folder.rename(doomed)
        sync_folder(folder.parent)
        folder = doomed
    shutil.rmtree(folder)
    sync_folder(folder.parent)


def _fill(
    partial: Path,
    store: StoreLayout,
    manifest: Manifest,
    diff_ids: tuple[str, ...],
    reference: str,
    limits: Limits,
    progress: Callable[[int, int], None],
) -> None:
    total = sum(layer.size for layer in manifest.layers)
    tree = Tree(partial, max_files=limits.files, keep_free=limits.keep_free)
    done, left, entries = 0, limits.size, limits.files * ENTRIES_FACTOR
    try:
        for number, (layer, diff_id) in enumerate(zip(manifest.layers, diff_ids, strict=True)):
            applied = _Layer(tree, number, layer, store, left, entries)
            try:
                applied.apply(lambda packed, done=done: progress(done + packed, total))  # type: ignore[misc]
                applied.check(diff_id)
            except InvalidImage:
                if not store.intact(layer):
                    store.discard(layer.digest)
                    raise StorageError(
                        "the blob has changed on the disk",
                        field=str(store.blob(layer.digest)),
                        hint=DAMAGED,
                    ) from None
                raise
            done += layer.size
            left -= applied.out
            entries -= applied.entries
        if not tree.found:
            raise InvalidModel("the image has no /models folder", hint="pack the image with `slotd pack`")
        files = tree.finish()
    finally:
        tree.close()
    _write_list(partial, HashList(manifest.descriptor.digest, reference, files))


def _write_list(folder: Path, listed: HashList) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(folder / NAME, flags, 0o644), "wb") as file:
        file.write(listed.dump())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


class _Layer:
    """One layer on its way into the tree."""

    def __init__(
        self, tree: Tree, number: int, layer: Descriptor, store: StoreLayout, limit: int, max_entries: int
    ) -> None:
        self.entries = 0
        self.out = 0
        self._tree = tree
        self._number = number
        self._layer = layer
        self._store = store
        self._limit = limit
        self._max_entries = max_entries
        self._where = f"layer {number} ({layer.digest})"
        self._diff_id = ""

    def apply(self, progress: Callable[[int], None]) -> None:
        try:
            file = open_regular(self._store.blob(self._layer.digest))
        except FileNotFoundError:
            raise NotFound("is not in the store", field=self._where, hint="deploy the image again") from None
        with file:
            stream = LayerStream(file, compression(self._layer, self._where), self._limit, self._where, progress)
            archive = Archive(stream, self._where)
            for entry in archive:
                self.entries += 1
                if self.entries > self._max_entries:
                    raise InvalidImage("has too many entries", field=self._where, hint="see images.max_files")
                self._apply(entry, archive)
        self.out, self._diff_id = stream.out, stream.diff_id

    def check(self, diff_id: str) -> None:
        """Raises InvalidImage unless the layer was what the image's config says."""
        if self._diff_id != diff_id:
            raise InvalidImage(f"unpacks to {self._diff_id}, the image says {diff_id}", field=self._where)

    def _apply(self, entry: Entry, archive: Archive) -> None:
        parts = split(entry.name)
        if entry.kind == "sparse file":
            raise InvalidImage(f"the archive has a sparse file: {entry.name[:200]!a}", field=self._where)
        if not parts:
            return
        if parts[-1].startswith(_WHITEOUT):
            self._whiteout(parts)
        elif parts[0] == "models":
            self._inside(check_name(parts[1:]), entry, archive)

    def _whiteout(self, parts: Parts) -> None:
        folder, name = parts[:-1], parts[-1]
        if name == _OPAQUE:
            if not folder:
                self._tree.whiteout((), self._number)
            elif folder[0] == "models":
                self._tree.opaque(folder[1:], self._number)
        elif not name.startswith(".wh..wh."):  # other names like that are AUFS's own notes
            hidden = name.removeprefix(_WHITEOUT)
            if hidden in ("", ".", ".."):
                raise InvalidImage(f"the archive has a whiteout of nothing: {'/'.join(parts)!a}")
            if (*folder, hidden)[0] == "models":
                self._tree.whiteout((*folder, hidden)[1:], self._number)

    def _inside(self, parts: Parts, entry: Entry, archive: Archive) -> None:
        shown = "/" + "/".join(("models", *parts))
        if entry.kind == "folder":
            self._tree.add_folder(parts, self._number)
        elif entry.kind == "file":
            self._tree.add_file(parts, archive.content(), self._number)
        elif entry.kind == "symlink":
            self._tree.add_symlink(parts, entry.link, self._number)
        elif entry.kind == "hardlink":
            other = split(entry.link)
            if other[:1] != ("models",) or len(other) < 2:
                raise InvalidImage("is a hard link that leaves /models", field=shown, hint="pack plain files only")
            self._tree.add_hardlink(parts, other[1:], self._number)
        else:
            raise InvalidImage(f"is a {entry.kind}; only files and folders may be under /models", field=shown)
