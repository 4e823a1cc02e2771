"""One slotd for one state folder."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from agent.errors import Conflict, StorageError


class Lock:
    """A held lock. The kernel lets go of it when the process ends, however it ends; the file stays."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd: int | None = fd

    def release(self) -> None:
        """Let go; idempotent. The file is not removed: somebody may have it open and be waiting to lock it."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            try:
                os.ftruncate(fd, 0)
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EINVAL, errno.EBADF):
                    raise
            finally:
                os.close(fd)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def take_lock(path: Path) -> Lock:
    """Lock `path` (made if missing) and write our pid into it; blocking, but never for long.

    Raises Conflict naming the pid of the slotd that holds it, StorageError if the file cannot be made.
    """
    for _ in range(10):
        fd = _open(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(path, fd):  # removed between open and flock: another daemon would lock another file
                os.close(fd)
                continue
            _write_pid(fd)
        except BlockingIOError:
            pid = _holder(fd)
            os.close(fd)
            raise Conflict(
                f"another slotd (pid {pid or 'unknown'}) holds {path.parent}",
                field=str(path),
                hint="stop it first, or give this one its own state_dir",
            ) from None
        except OSError as error:
            os.close(fd)
            raise StorageError(f"cannot be locked: {error.strerror}", field=str(path), hint="check the disk") from error
        except BaseException:
            os.close(fd)
            raise
        return Lock(path, fd)
    raise StorageError("is removed again and again", field=str(path), hint="nothing but slotd may write there")


def _open(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            return os.open(path, os.O_RDONLY | flags)  # flock needs no right to write; a read-only host still serves
    except OSError as error:
        raise StorageError(
            f"cannot be opened: {error.strerror}", field=str(path), hint="state_dir must exist and be slotd's own"
        ) from error


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _write_pid(fd: int) -> None:
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        # The pid is a courtesy; on a full or read-only disk the lock holds without it.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EBADF, errno.EINVAL):
            raise


def _holder(fd: int) -> int | None:
    for _ in range(20):  # it may have the lock and be about to write
        text = os.pread(fd, 32, 0).strip()
        if text.isdigit():
            return int(text)
        time.sleep(0.01)
    return None
