"""One slotd for one state folder."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

import structlog

from agent.errors import Conflict, StorageError

log = structlog.get_logger(__name__)

_TRIES, _PAUSE = 25, 0.02


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
            except OSError as error:  # a pid that has ended is in nobody's way
                log.debug("the pid stays in the lock file", error=str(error))
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
    pid: int | None = None
    for _ in range(_TRIES):
        fd = _open(path)
        held = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, fd):  # else it was removed before we had it: another daemon would lock another file
                _write_pid(fd)
                held = True
                return Lock(path, fd)
        except BlockingIOError:
            pid = _holder(fd)
            if pid is not None and Path(f"/proc/{pid}").exists():
                break
            # It is about to write its pid, or has just ended and a child of its own has yet to let go.
        except OSError as error:
            raise StorageError(f"cannot be locked: {error.strerror}", field=str(path), hint="check the disk") from error
        finally:
            if not held:
                os.close(fd)
        time.sleep(_PAUSE)
    raise Conflict(
        f"another slotd (pid {pid or 'unknown'}) holds {path.parent}",
        field=str(path),
        hint="stop it first, or give this one its own state_dir",
    )


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
    except OSError as error:  # a courtesy: on a full, read-only or broken disk the lock holds without it
        log.warning("the pid cannot be written into the lock file", error=str(error))


def _holder(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None
