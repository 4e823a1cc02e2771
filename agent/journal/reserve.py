"""A few bytes of disk that are given up when the disk is full, so that the last word can still be written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

NAME = "reserve"
SIZE = 4 << 20


class Reserve:
    """The file `reserve` in the state folder. Blocking; may be used from any thread."""

    def __init__(self, folder: Path, size: int = SIZE) -> None:
        self.path = folder / NAME
        self.size = size

    def hold(self) -> bool:
        """Take the space, unless it is held already or the disk has not four times as much free. True if it is held."""
        try:
            if self._held():
                return True
            self.path.unlink(missing_ok=True)
            disk = os.statvfs(self.path.parent)
            if disk.f_bavail * disk.f_frsize < 4 * self.size:
                return False
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self.size)
            except OSError:
                self.path.unlink()
                raise
            finally:
                os.close(fd)
        except OSError as error:  # without a reserve the host works as well, it only has no last word on a full disk
            log.warning("no reserve on the disk", path=str(self.path), error=str(error))
            return False
        return True

    def _held(self) -> bool:
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size >= self.size

    def release(self) -> bool:
        """Give the space up. True if there was some to give."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            log.warning("the reserve cannot be given up", path=str(self.path), error=str(error))
            return False
        log.warning("the disk is full: the reserve was given up", path=str(self.path))
        return True


def is_full(error: OSError) -> bool:
    """Whether an error says that there is no space left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
