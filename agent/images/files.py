"""Writing so that a power cut leaves the old or the new, and what an operating system error means here."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from agent.errors import StorageError


def sync_folder(path: Path) -> None:
    """Make renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create `path` and its parents, each durable in its own parent."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=0o755)
    sync_folder(path.parent)


def write_file(path: Path, data: bytes, *, mode: int | None = None, owner: tuple[int, int] | None = None) -> None:
    """Replace `path` at once: write beside it, fsync, rename, fsync the folder.

    `owner`: uid and gid, -1 for our own. Without it and `mode` nothing is asked that a sandbox forbids.
    """
    beside = path.with_name(path.name + ".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    if mode is not None:  # nobody may have opened it before it is closed to them
        beside.unlink(missing_ok=True)
        flags |= os.O_EXCL
    descriptor = os.open(beside, flags, 0o644 if mode is None else 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if owner is not None:
            os.fchown(descriptor, *owner)
        if mode is not None:
            os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_folder(path.parent)


def storage_error(error: OSError, doing: str) -> StorageError:
    """An operating system error in words, with what to do."""
    hints = {
        errno.ENOSPC: "free disk space, or remove models with `slotd gc`",
        errno.EDQUOT: "raise the disk quota, or remove models with `slotd gc`",
        errno.EROFS: "the disk is read-only; look into the kernel's log for the reason",
        errno.EIO: "the disk has faults; look into the kernel's log",
        errno.EACCES: "the folder must belong to slotd's user",
        errno.EPERM: "the folder must belong to slotd's user",
        errno.EFBIG: "raise images.max_image if the image is meant to be that large",
    }
    where = str(error.filename) if isinstance(error.filename, str) else None
    return StorageError(f"{doing}: {error.strerror or error}", field=where, hint=hints.get(error.errno or 0))


def check_space(path: Path, needed: int, keep_free: int) -> None:
    """Raises StorageError unless `needed` bytes fit and leave `keep_free`."""
    free = free_bytes(path)
    if free - needed < keep_free:
        raise StorageError(
            f"{needed} bytes are needed, {free} are free, and {keep_free} must stay free",
            field=str(path),
            hint="free disk space, remove models with `slotd gc`, or lower images.keep_free",
        )


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
