"""A folder with model.yaml becomes an image in an OCI layout folder; the same folder always becomes the same image."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from agent.errors import InvalidInput, InvalidModel
from agent.forge.weights import LARGE, split_weights
from agent.images.blobs import REF_NAME, StoreLayout
from agent.images.files import storage_error, sync_folder, write_file
from agent.images.hashes import NAME as RESERVED
from agent.images.manifest import OCI_MANIFEST, digest_of
from agent.model.golden import read_golden
from agent.model.spec import Model, ModelSpec, read_spec

_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/@-]{0,255}")
_EPOCH = "1970-01-01T00:00:00Z"
_LOCK_WAIT = 60.0
_CHUNK = 1 << 20
_LEVEL = 6


def pack(
    folder: Path,
    layout: Path,
    tag: str,
    *,
    labels: Mapping[str, str] | None = None,
    platform: str = "linux/amd64",
    external_data: bool = True,
) -> str:
    """Put the model in `folder` into the OCI layout `layout` under the name `tag`; the manifest's digest.

    All of the folder goes to /models in one layer, without times and owners. `labels` are added to those of model.yaml.
    With `external_data`, weights over 1 MiB go to a file beside their graph, which executors share in memory. An image
    that had the name loses it; its blobs stay. Raises InvalidModel, InvalidInput, StorageError, Conflict.
    """
    if not _TAG.fullmatch(tag):
        raise InvalidInput(f"{tag!r} is not a tag", field="tag", hint="write name:version in lower case")
    os_, _, architecture = platform.partition("/")
    if not os_ or not architecture:
        raise InvalidInput(f"{platform!r} is not a platform", field="platform", hint="write linux/amd64")
    if layout.resolve().is_relative_to(folder.resolve()):
        raise InvalidInput("lies in the folder that is packed", field=str(layout), hint="give a folder outside it")
    spec = read_spec(folder)
    files = _files(folder)
    _check_golden(folder, spec)
    notes = {
        "org.opencontainers.image.title": spec.name,
        "org.opencontainers.image.version": spec.version,
        **spec.labels,
        **(labels or {}),
    }
    store = StoreLayout(layout)
    try:
        with store.lock(_LOCK_WAIT), tempfile.TemporaryDirectory(prefix=".pack-", dir=layout) as staging:
            store.create()
            if external_data:
                files |= _split(spec, files, Path(staging))
            layer, diff_id = _write_layer(store, files, Path(staging) / "layer")
            config = {
                "created": _EPOCH,
                "architecture": architecture,
                "os": os_,
                "config": {"Labels": notes},
                "rootfs": {"type": "layers", "diff_ids": [diff_id]},
                "history": [{"created": _EPOCH, "created_by": "slotd pack"}],
            }
            manifest = {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": _write_document(store, config, _CONFIG),
                "layers": [layer],
                "annotations": notes,
            }
            entry = _write_document(store, manifest, OCI_MANIFEST)
            _list(store, entry, tag)
    except OSError as error:
        raise storage_error(error, "the image cannot be written") from None
    return str(entry["digest"])


def _files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by its path. Raises InvalidModel for what is neither file nor folder."""
    found: dict[str, Path] = {}
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            mode = path.lstat().st_mode
            shown = path.relative_to(folder).as_posix()
            if stat.S_ISREG(mode):
                found[shown] = path
            elif not stat.S_ISDIR(mode):
                raise InvalidModel("is neither a file nor a folder", field=shown, hint="pack plain files only")
            if shown == RESERVED:
                raise InvalidModel("is a name that slotd keeps for itself", field=shown)
            if not shown.isprintable():
                raise InvalidModel("is a name with characters that cannot be printed", field=repr(shown))
    return found


def _check_golden(folder: Path, spec: ModelSpec) -> None:
    """A golden case that cannot be read is found now, not on the host. How large a tolerance may be, the host says."""
    if spec.signature is not None:
        read_golden(Model("", "", folder, spec), spec.signature, max_tolerance=math.inf)


def _split(spec: ModelSpec, files: Mapping[str, Path], staging: Path) -> dict[str, Path]:
    """Graphs with large weights, written anew with those beside them."""
    made: dict[str, Path] = {}
    graphs = {stage.file for stage in spec.graphs} | {stage.cpu_file for stage in spec.graphs} - {None}
    for number, name in enumerate(sorted(filter(None, graphs))):
        if files[name].stat().st_size < LARGE:
            continue
        data = f"{name}.data"
        graph_to, data_to = staging / f"{number}.onnx", staging / f"{number}.data"
        if split_weights(files[name], graph_to, data_to, location=data.rpartition("/")[2]):
            if data in files:
                raise InvalidModel(f"is the name for the weights of {name}", field=data, hint="call it otherwise")
            made |= {name: graph_to, data: data_to}
    return made


class _Sink(Protocol):
    def write(self, data: bytes, /) -> int: ...
    def flush(self) -> None: ...


class _Hashed:
    """A file that is only written, and its hash."""

    def __init__(self, file: _Sink) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        self._file.write(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


def _write_layer(store: StoreLayout, files: Mapping[str, Path], partial: Path) -> tuple[dict[str, Any], str]:
    """The layer as a blob: its descriptor and its diff id."""
    with partial.open("wb") as file:
        packed = _Hashed(file)
        with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=packed, mtime=0) as compressed:
            plain = _Hashed(compressed)
            with tarfile.open(mode="w|", fileobj=plain, format=tarfile.PAX_FORMAT, bufsize=_CHUNK) as archive:  # type: ignore[call-overload]
                for name in sorted(_folders(files)):
                    archive.addfile(_entry(name, folder=True))
                for name, path in sorted(files.items()):
                    with path.open("rb") as content:
                        entry = _entry(f"models/{name}")
                        entry.size = os.fstat(content.fileno()).st_size
                        archive.addfile(entry, content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(store.blob(packed.digest))
    sync_folder(store.blobs)
    return {"mediaType": _LAYER, "digest": packed.digest, "size": packed.size}, plain.digest


def _folders(files: Mapping[str, Path]) -> set[str]:
    found = {"models"}
    for name in files:
        parts = ("models", *name.split("/")[:-1])
        found |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    return found


def _entry(name: str, *, folder: bool = False) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = (tarfile.DIRTYPE, 0o755) if folder else (tarfile.REGTYPE, 0o644)
    return entry


def _write_document(store: StoreLayout, document: Mapping[str, Any], media_type: str) -> dict[str, Any]:
    """A JSON document as a blob: its descriptor."""
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    digest = digest_of(data)
    write_file(store.blob(digest), data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _list(store: StoreLayout, entry: Mapping[str, Any], tag: str) -> None:
    """Name the image in index.json; what else is there stays as it is, whoever wrote it."""
    store.entries()
    path = store.path / "index.json"
    index = json.loads(path.read_bytes())
    others = [other for other in index["manifests"] if (other.get("annotations") or {}).get(REF_NAME) != tag]
    index["manifests"] = [*others, {**entry, "annotations": {REF_NAME: tag}}]
    write_file(path, json.dumps(index, indent=1).encode())
