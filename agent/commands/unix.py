"""Unix sockets: one that appears whole and is never stolen, and who is at the other end."""

from __future__ import annotations

import os
import socket
import stat
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from agent.commands.path import check_path
from agent.errors import Conflict, StorageError
from agent.groups import give


@dataclass(frozen=True)
class Peer:
    """The process that made a connection, as the kernel knows it (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_of(fd: int) -> Peer:
    """Who is at the other end of a connected Unix socket. Raises OSError."""
    # A socket of our own on the same file: what event loops hand out need not have getsockopt.
    with socket.socket(fileno=os.dup(fd)) as connection:
        return _peer(connection)


def _peer(connection: socket.socket) -> Peer:
    return Peer(*struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


def listen(path: Path, *, mode: int = 0o660, group: str | None = None, backlog: int = 64) -> socket.socket:
    """A listening socket at `path`; blocking. It appears there with its rights and ready, or not at all.

    `group` gets it, if there is such a group. A left-over of a process that has ended is replaced. Raises Conflict if
    somebody listens there, InvalidConfig for a path that is too long, StorageError.
    """
    check_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _check_free(path)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as private:  # 0700
            folder = os.open(private, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                listener.bind(f"/proc/self/fd/{folder}/new")  # short, however long the folder's name
            finally:
                os.close(folder)
            new = Path(private, "new")
            if group is not None:
                give(new, group)
            new.chmod(mode)
            listener.listen(backlog)
            new.rename(path)
    except OSError as error:
        listener.close()
        raise StorageError(
            f"cannot listen there: {error.strerror or error}", field=str(path), hint="run_dir must be slotd's own"
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


def _check_free(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Conflict("is there already and is no socket", field=str(path), hint="remove it")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except (TimeoutError, BlockingIOError):  # somebody who is busy
            holder = "unknown"
        else:
            holder = str(_peer(probe).pid)
    raise Conflict(
        f"another slotd (pid {holder}) listens there",
        field=str(path),
        hint="stop it first, or give this one its own run_dir",
    )
