"""The hash list of an unpacked model: what every file must be, kept beside them as `.hashes.json`."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from agent.errors import NotFound, StorageError
from agent.images.blobs import DAMAGED, open_regular

NAME = ".hashes.json"
MAX_BYTES = 64 << 20
PIECE = 2 << 20
"""Bytes of a file that are read and hashed at once."""


def hasher() -> hashlib.blake2b:
    """BLAKE2b-256 (RFC 7693): half the time of SHA-256 on a CPU without instructions for that. It is run at each start,
    before anybody is answered."""
    return hashlib.blake2b(digest_size=32)


@dataclass(frozen=True)
class HashList:
    """`files`: path inside the model to (its hash in hex, size in bytes); see `hasher`."""

    digest: str
    reference: str
    files: dict[str, tuple[str, int]]

    def dump(self) -> bytes:
        """As it is written; a checksum covers the list itself."""
        document = {
            "digest": self.digest,
            "reference": self.reference,
            "files": {path: {"blake2b": hash_, "size": size} for path, (hash_, size) in sorted(self.files.items())},
        }
        return json.dumps(document | {"checksum": _checksum(document)}, indent=1).encode()


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_hashes(folder: Path) -> HashList:
    """The list in `folder`, itself verified. Raises NotFound (no such model), StorageError (damaged)."""
    path = folder / NAME
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES)
    except FileNotFoundError:
        raise NotFound(f"no unpacked model at {folder}", hint="deploy the image") from None
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", field=str(path), hint=DAMAGED) from None
    try:
        document = json.loads(data)
        checksum = document.pop("checksum")
        files = {path: (str(item["blake2b"]), int(item["size"])) for path, item in document["files"].items()}
        found = HashList(str(document["digest"]), str(document["reference"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StorageError("is damaged", field=str(path), hint=DAMAGED) from None
    if checksum != _checksum(document):
        raise StorageError("is damaged: its checksum is wrong", field=str(path), hint=DAMAGED)
    return found


def verify_hashes(folder: Path) -> HashList:
    """Read every byte of the model in `folder`. Raises NotFound, StorageError naming the first file at fault."""
    listed = read_hashes(folder)
    for path in _walk(folder, ""):
        if path != NAME and path not in listed.files:
            raise StorageError("does not belong to the model", field=str(folder / path), hint=DAMAGED)
    for path, (hash_, size) in listed.files.items():
        where = folder / path
        try:
            with open_regular(where) as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise StorageError(f"has {found} bytes instead of {size}", field=str(where), hint=DAMAGED)
                if _hash(file, size) != hash_:
                    raise StorageError("its content has changed on the disk", field=str(where), hint=DAMAGED)
        except OSError as error:
            raise StorageError(f"cannot be read: {error.strerror}", field=str(where), hint=DAMAGED) from None
    return listed


def _hash(file: BufferedReader, size: int) -> str:
    """In pieces: after each, a thread waits for Python's lock, which is held by what the agent does meanwhile."""
    digest = hasher()
    # Mapped and not a bytearray, which would be zeroed while everybody else waits for that lock; small enough to be
    # given back (7 ms for 32 MiB) without anybody noticing.
    with mmap.mmap(-1, max(1, min(size, PIECE))) as buffer, memoryview(buffer) as view:
        while read := file.readinto(view):
            with view[:read] as piece:
                digest.update(piece)
    return digest.hexdigest()


def _walk(folder: Path, prefix: str) -> list[str]:
    """Every name below `folder` that is not a folder; links are names, never followed."""
    found: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found += _walk(folder / entry.name, f"{prefix}{entry.name}/")
            elif entry.is_symlink():
                raise StorageError("is a symlink, which slotd never makes", field=entry.path, hint=DAMAGED)
            else:
                found.append(prefix + entry.name)
    return found
