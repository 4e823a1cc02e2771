"""Addresses to listen on: loopback only, one owner each, and who that is if it is not us."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from agent.errors import Conflict, InvalidConfig, StorageError
from agent.groups import CLIENTS, give

_SOCKET_MODE = 0o660
_LONGEST_PATH = 107
_LISTENING = "0A"


def address(listen: str, where: str, *, anywhere: bool = False) -> tuple[str, int]:
    """host:port as an address and a port; blocks on the resolver.

    Raises InvalidConfig unless it is loopback, or `anywhere` will do.
    """
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%]+)\]|([^:\[\]]*)):(\d{1,5})", listen)
    if not match or int(match[3]) > 65535:
        raise InvalidConfig(f"{listen!r} is not host:port", field=where, hint="write 127.0.0.1:50051 or [::1]:50051")
    host, port = match[1] or match[2], int(match[3])
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)  # noqa: S104  # refused below
    except OSError as error:
        raise InvalidConfig(f"{host!r} is no address: {error.strerror}", field=where) from None
    addresses = [str(entry[4][0]) for entry in found]
    for one in addresses:
        if not anywhere and not ipaddress.ip_address(one.partition("%")[0]).is_loopback:
            raise InvalidConfig(
                f"{listen!r} is reached from other hosts, without TLS and keys",
                field=where,
                hint="set serving.tls, and serving.keys or serving.tls.client_ca; or listen on 127.0.0.1",
            )
    return addresses[0], port


def taken(host: str, port: int, where: str = "serving.grpc.listen") -> Conflict:
    """The error for a TCP port that is in use; names the process if /proc tells. Blocks."""
    pid = _pid_of_port(port)
    return Conflict(
        f"{host}:{port} is in use" + (f" by process {pid} ({_name(pid)})" if pid else ""),
        field=where,
        hint="stop that process, or choose another port",
    )


@dataclass(frozen=True)
class UnixSocket:
    """A place for a socket: bound at `draft`, where nobody else can reach it, then `publish`ed at `path`."""

    path: Path
    draft: Path

    @classmethod
    def prepare(cls, path: Path) -> UnixSocket:
        """Raises Conflict if somebody listens at `path`, InvalidConfig if it can be no socket. Blocks."""
        _check_free(path)
        draft = path.parent / f".bind-{os.getpid()}" / "s"
        if max(len(os.fsencode(path)), len(os.fsencode(draft))) > _LONGEST_PATH:
            raise InvalidConfig(
                f"{path} is too long for a Unix socket (at most {_LONGEST_PATH} bytes, with {draft.parent.name})",
                field="serving.grpc.socket",
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(".bind-*"):
                if left == draft.parent or not Path("/proc", left.name.removeprefix(".bind-")).exists():
                    shutil.rmtree(left, ignore_errors=True)
            draft.parent.mkdir(mode=0o700)
        except OSError as error:
            raise StorageError(f"cannot be made: {error.strerror}", field=str(draft.parent)) from error
        return cls(path, draft)

    def publish(self) -> tuple[int, int]:
        """Let clients reach it, in place of a stale one; returns what `withdraw` needs. Blocks."""
        try:
            give(self.draft, CLIENTS)
            self.draft.chmod(_SOCKET_MODE)
            mark = self.draft.stat()
            self.draft.rename(self.path)
            self.draft.parent.rmdir()
        except OSError as error:
            raise StorageError(f"cannot be put in place: {error.strerror}", field=str(self.path)) from error
        return mark.st_dev, mark.st_ino

    def withdraw(self, mark: tuple[int, int] | None) -> None:
        """Remove it if it is still ours. Blocks."""
        shutil.rmtree(self.draft.parent, ignore_errors=True)
        try:
            found = self.path.stat()
            if mark == (found.st_dev, found.st_ino):
                self.path.unlink()
        except FileNotFoundError:
            pass


def _check_free(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}", field="serving.grpc.socket") from None
    if not stat.S_ISSOCK(mode):
        raise InvalidConfig(f"{path} exists and is not a socket", field="serving.grpc.socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return  # nobody is behind it
        except OSError:
            pid = 0  # somebody is, but busy or not for us
        else:
            pid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    raise Conflict(
        f"{path} is in use" + (f" by process {pid} ({_name(pid)})" if pid else ""),
        field="serving.grpc.socket",
        hint="stop that process, or choose another path",
    )


def _pid_of_port(port: int) -> int | None:
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if columns[3] == _LISTENING and int(columns[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{columns[9]}]")
    for entry in Path("/proc").glob("[0-9]*/fd/*") if sockets else ():
        try:
            if os.readlink(entry) in sockets:
                return int(entry.parts[2])
        except OSError:
            continue  # it ended, or is not ours to look into
    return None


def _name(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "comm").read_text().strip()
    except OSError:
        return "?"
