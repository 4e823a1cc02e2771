"""The puller: the child process that resolves, fetches and unpacks images (`python -I -m agent.images.puller`).

It reads one JSON line from standard input (see `Job`), answers JSON lines on standard output: any number of
`{"progress": {"bytes", "total"}}`, then one `{"result": …}` or `{"error": …}`. It ends when its standard input does,
and may be killed at any instant: what it has written is used by the next one.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.errors import InvalidImage, InvalidInput, NotFound, PullerDied, RegistryError, SlotdError, StorageError
from agent.executor import sandbox
from agent.executor.sandbox.grants import DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
from agent.images.blobs import CHUNK, REF_NAME, Incoming, Layout, StoreLayout, open_regular
from agent.images.files import check_space, free_bytes, make_folder, storage_error
from agent.images.manifest import Descriptor, Index, Manifest, parse_diff_ids, parse_manifest
from agent.images.reference import Reference, parse_digest, parse_reference
from agent.images.unpack import Limits, unpack

if TYPE_CHECKING:
    from agent.images.registry import Registry

REPORT_EVERY = 0.2
LOCK_WAIT = 30.0  # a puller of an agent that was just killed may still be ending
MEMORY = 512 << 20
FILES = 256
AGAIN = "the image is damaged or was not made for slotd: pack it again, and copy or push it anew"
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "armv7l": 314}
_IOPRIO_LOWEST = 2 << 13 | 7  # best effort, last: "idle" could starve for ever beside a busy process


@dataclass(frozen=True)
class Job:
    """What the puller is asked for. `digest` empty: what the reference says."""

    verb: str
    reference: Reference
    digest: str
    state_dir: Path | None
    layouts: tuple[Path, ...]
    insecure: frozenset[str]
    credentials: Path | None
    platform: str
    limits: Limits
    timeout: float
    retries: int

    @classmethod
    def parse(cls, line: bytes) -> Job:
        document = json.loads(line)
        images = document["images"]
        return cls(
            verb=document["verb"],
            reference=parse_reference(document["reference"]) if document["reference"] else Reference(""),
            digest=parse_digest(document["digest"]) if document["digest"] else "",
            state_dir=Path(document["state_dir"]) if document["state_dir"] else None,
            layouts=tuple(Path(path) for path in images["layouts"]),
            insecure=frozenset(images["insecure_registries"]),
            credentials=Path(images["credentials"]) if images["credentials"] else None,
            platform=images["platform"],
            limits=Limits(images["max_image"], images["max_files"], images["keep_free"]),
            timeout=images["timeout"],
            retries=images["retries"],
        )


class Meter:
    """Counts bytes and tells about it, at most every 0.2 s."""

    def __init__(self, total: int, tell: Callable[[dict[str, Any]], None]) -> None:
        self.total = total
        self._tell = tell
        self._told = -REPORT_EVERY

    def at(self, count: int) -> None:
        now = time.monotonic()
        if now - self._told >= REPORT_EVERY or count >= self.total:
            self._told = now
            self._tell({"progress": {"bytes": count, "total": self.total}})


class Work:
    """One job and the places it may take bytes from: the store, layout folders, then the registry."""

    def __init__(self, job: Job, tell: Callable[[dict[str, Any]], None]) -> None:
        self._job = job
        self._tell = tell
        self._stores = [StoreLayout(job.state_dir / "store")] if job.state_dir else []
        reference = job.reference
        self._layouts = [Layout(path) for path in ([reference.layout] if reference.layout else job.layouts)]
        self._connection: Registry | None = None
        self._opened = ExitStack()

    def run(self) -> str:
        """The result: a digest (resolve, pull) or a folder (unpack)."""
        with self._opened:
            if self._job.verb == "resolve":
                return self._resolve()
            with self._store.lock(LOCK_WAIT):
                if self._job.verb == "pull":
                    return self._pull()
                return self._unpack()

    @property
    def _store(self) -> StoreLayout:
        if not self._stores:
            raise InvalidInput("the job needs a state_dir")
        return self._stores[0]

    @property
    def _registry(self) -> Registry:
        if self._connection is None:
            reference, job = self._job.reference, self._job
            if reference.host is None:
                raise NotFound(
                    f"{reference} is in none of the layouts ({', '.join(str(item.path) for item in self._layouts)})",
                    field="image",
                    hint="check the tag"
                    if reference.layout
                    else "add the registry's host and port, or see images.layouts",
                )
            from agent.images.registry import open_registry  # httpx is slow to import, and layouts don't need it

            self._connection = self._opened.enter_context(
                open_registry(
                    reference,
                    plain=reference.host in job.insecure,
                    credentials=job.credentials,
                    timeout=job.timeout,
                    retries=job.retries,
                )
            )
        return self._connection

    # --- resolve -----------------------------------------------------------------------------------------------------

    def _resolve(self) -> str:
        reference = self._job.reference
        pinned = self._job.digest or reference.digest
        if pinned:
            digest, found = pinned, self._find(pinned)
        else:
            digest, found = self._by_title()
        if isinstance(found, Manifest):
            return digest
        return found.choose(self._job.platform, str(reference)).digest

    def _by_title(self) -> tuple[str, Manifest | Index]:
        reference = self._job.reference
        for layout in self._layouts:
            entry = layout.find(reference.titles) if reference.title else _only(layout)
            if entry is not None:
                data = layout.document(entry.digest)
                return entry.digest, parse_manifest(data, entry.media_type, f"{layout.path}: {entry.digest}")
        assert reference.tag is not None or reference.layout is not None
        data, media_type, digest = self._registry.manifest(reference.tag or "")
        return digest, parse_manifest(data, media_type, str(reference))

    def _find(self, digest: str) -> Manifest | Index:
        data, media_type = self._document(digest)
        return parse_manifest(data, media_type, digest)

    def _document(self, digest: str) -> tuple[bytes, str | None]:
        """A manifest or index by its digest, from the nearest place."""
        for layout in (*self._stores, *self._layouts):
            if layout.has(digest):
                try:
                    data = layout.document(digest)
                except StorageError:
                    continue  # our own copy is damaged: fetch it again
                listed = [entry.media_type for entry in layout.entries() if entry.digest == digest]
                return data, listed[0] if listed else _own_type(data)
        if self._job.verb == "resolve":
            self._require_same(digest)
        data, media_type, _ = self._registry.manifest(digest)
        return data, media_type

    def _require_same(self, digest: str) -> None:
        """Raises InvalidImage if a layout has the image that was named, but not with the digest that it must have."""
        reference = self._job.reference
        if reference.host is not None:
            return
        for layout in self._layouts:
            entry = layout.find(reference.titles) if reference.title else None
            if entry is not None and entry.digest != digest:
                raise InvalidImage(
                    f"{reference} is {entry.digest}, not {digest}",
                    field="digest",
                    hint="the tag names another image by now: pin the digest that is meant, or none",
                )

    # --- pull --------------------------------------------------------------------------------------------------------

    def _pull(self) -> str:
        job, store = self._job, self._store
        store.create()
        data, media_type = self._document(job.digest)
        manifest = parse_manifest(data, media_type, job.digest)
        if isinstance(manifest, Index):
            raise InvalidImage("is an index, not the manifest of one image", field=job.digest, hint="resolve it first")
        if manifest.size > job.limits.size:
            raise InvalidImage(
                f"the image has {manifest.size} bytes, more than the {job.limits.size} that are allowed",
                field=str(job.reference),
                hint="raise images.max_image if the image is meant to be that large",
            )
        missing = self._missing(manifest)
        meter = Meter(manifest.size, self._tell)
        done = manifest.size - sum(blob.size for blob in missing)
        if not store.intact(manifest.descriptor):
            with self._incoming(manifest.descriptor) as incoming:
                incoming.restart()
                incoming.write(data)
                incoming.commit()
        checked = False
        for blob in missing:  # the config is first
            self._fetch(blob, meter, done)
            done += blob.size
            if not checked:
                self._check_config(manifest)
                checked = True
        self._check_config(manifest)
        store.add(manifest.descriptor, job.reference.title)
        meter.at(manifest.size)
        return job.digest

    def _check_config(self, manifest: Manifest) -> None:
        """Before any layer is fetched: does the config fit?"""
        if self._store.has(manifest.config.digest):
            data = self._store.document(manifest.config.digest)
            parse_diff_ids(data, len(manifest.layers), manifest.config.digest)

    def _missing(self, manifest: Manifest) -> list[Descriptor]:
        store = self._store
        missing = []
        for blob in manifest.blobs:
            if not store.intact(blob):
                if store.has(blob.digest):
                    store.discard(blob.digest)
                missing.append(blob)
        partial = {blob.hex: store.partials / f"{blob.hex}.partial" for blob in missing}
        begun = sum(path.stat().st_size for path in partial.values() if path.exists())
        needed = max(0, sum(blob.size for blob in missing) - begun)
        if free_bytes(store.path) - needed < self._job.limits.keep_free:
            for path in store.partials.iterdir():  # others' half-done blobs make room for what is wanted now
                if path.name.removesuffix(".partial") not in partial:
                    path.unlink()
        check_space(store.path, needed, self._job.limits.keep_free)
        return missing

    def _incoming(self, blob: Descriptor) -> Incoming:
        return Incoming(self._store, blob, self._job.limits.keep_free)

    def _fetch(self, blob: Descriptor, meter: Meter, done: int) -> None:
        with self._incoming(blob) as incoming:
            for layout in self._layouts:
                if layout.has(blob.digest):
                    self._copy(layout, incoming, lambda: meter.at(done + incoming.length))
                    return
            self._registry.blob(incoming, lambda: meter.at(done + incoming.length))

    def _copy(self, layout: Layout, incoming: Incoming, progress: Callable[[], None]) -> None:
        path = layout.blob(incoming.blob.digest)
        resumed = incoming.length > 0
        with open_regular(path) as file:
            file.seek(incoming.length)
            while chunk := file.read(CHUNK):
                incoming.write(chunk)
                progress()
        if not incoming.right and resumed:
            incoming.restart()
            self._copy(layout, incoming, progress)
            return
        if not incoming.right:
            size = incoming.length
            incoming.restart()
            if size != incoming.blob.size:
                raise InvalidImage(f"has {size} bytes instead of {incoming.blob.size}", field=str(path))
            raise InvalidImage("its content is not what its digest says", field=str(path))
        incoming.commit()

    # --- unpack ------------------------------------------------------------------------------------------------------

    def _unpack(self) -> str:
        job = self._job
        meter = Meter(0, self._tell)

        def progress(count: int, total: int) -> None:
            meter.total = total
            meter.at(count)

        entries = [entry for entry in self._store.entries() if entry.digest == job.digest]
        titles = [entry.annotations[REF_NAME] for entry in entries if REF_NAME in entry.annotations]
        reference = str(job.reference) or next(iter(titles), "")
        models = self._store.path.parent / "models"
        return str(unpack(self._store, models, job.digest, reference, job.limits, progress))


def _only(layout: Layout) -> Descriptor | None:
    entries = layout.entries()
    if len({entry.digest for entry in entries}) > 1:
        raise InvalidInput(
            f"the layout {layout.path} has {len(entries)} images", field="image", hint="write oci:/folder:tag"
        )
    return entries[0] if entries else None


def _own_type(data: bytes) -> str | None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    kind = document.get("mediaType") if isinstance(document, dict) else None
    return kind if isinstance(kind, str) else None


def grants_of(job: Job) -> sandbox.Grants:
    """What a job needs: the store, the layouts, and the network if its image comes from a registry."""
    read = [*map(str, filter(None, (job.credentials, *_certificates())))]
    for layout in (job.reference.layout,) if job.reference.layout else job.layouts:
        # Each by itself, for they may be links to somewhere else.
        read += [str(layout / name) for name in ("", "index.json", "oci-layout", "blobs", "blobs/sha256")]
    write = []
    if job.state_dir is not None:
        write = [str(job.state_dir / name) for name in ("store", "models")]
        if job.verb == "resolve":
            read, write = read + write, []
    return sandbox.Grants(
        read=tuple(read),
        write=tuple(write),
        network=job.verb != "unpack" and job.reference.host is not None,
        capabilities=(DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER),
    )


def _certificates() -> list[str]:
    return [value for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if (value := os.environ.get(name))]


def restrain(job: Job) -> None:
    """Take away what this process does not need before it reads a byte from outside."""
    os.closerange(3, 1 << 16)
    os.nice(max(0, 10 - os.nice(0)))
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        # A courtesy; a kernel without it changes nothing else.
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_LOWEST)
    if job.state_dir is not None and job.verb != "resolve":
        for name in ("store", "models"):
            make_folder(job.state_dir / name)
    grants = grants_of(job)
    if grants.network:
        import agent.images.registry  # noqa: F401  # while what it imports can be compiled
    sandbox.enter(sandbox.Limits(MEMORY, FILES, job.limits.size), grants, umask=0o022)


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(75)


def _read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            os._exit(75)
        line += part
    return line


def _tell(document: dict[str, Any]) -> None:
    data = json.dumps(document).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def main() -> int:
    """Do one job. 0 if it was done or refused in so many words."""
    line = _read_line()
    try:
        job = Job.parse(line)
        restrain(job)
        threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
        _tell({"result": Work(job, _tell).run()})
    except SlotdError as error:
        if isinstance(error, InvalidImage):
            error.hint = error.hint or AGAIN
        elif isinstance(error, RegistryError) and (file := sandbox.withdrawn()) is not None:
            error = PullerDied(f"{file} was replaced while the registry was asked: {error.message}", hint="try again")
        _tell({"error": error.as_dict()})
    except MemoryError:
        _tell({"error": InvalidImage(f"unpacking needs more than {MEMORY >> 20} MiB of memory", hint=AGAIN).as_dict()})
    except OSError as error:
        _tell({"error": storage_error(error, "the store cannot be written").as_dict()})
    except Exception as error:
        traceback.print_exc()
        _tell({"error": PullerDied(f"the puller failed: {type(error).__name__}").as_dict()})
        return 70
    return 0


if __name__ == "__main__":
    sys.exit(main())
