"""A disk that fails on demand: a file system of the test's own (FUSE, spoken here) that hands all on to a folder.

As a program it mounts itself in a mount namespace of its own and serves until it is killed; nothing of it is left then.
`FaultyDisk` starts it, tells it which faults to make, and says how to start a process that sees it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("create", "write", "truncate", "fallocate", "mkdir", "symlink", "link")
PROFILES: dict[str, tuple[int, tuple[str, ...]]] = {
    "ENOSPC": (errno.ENOSPC, CHANGES),
    "EROFS": (errno.EROFS, (*CHANGES, "open-write", "unlink", "rmdir", "rename", "setattr")),
    "EIO": (errno.EIO, (*CHANGES, "fsync", "fsyncdir", "unlink", "rmdir", "rename", "setattr")),
    "EIO-read": (errno.EIO, ("read", "readdir")),
}


class FaultyDisk:
    """`backing` is where the files really are, to be looked at and damaged; `path` is where others see them."""

    def __init__(self, backing: Path, path: Path) -> None:
        self.backing = backing
        self.path = path
        self.control = backing.with_name(backing.name + ".faults")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> FaultyDisk:
        self.backing.mkdir(exist_ok=True)
        self.path.mkdir(exist_ok=True)
        self.control.write_text("[]")
        self._process = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", sys.executable, __file__, *map(str, self._folders)],
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"mounted\n"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    @property
    def _folders(self) -> tuple[Path, Path, Path]:
        return self.backing, self.path, self.control

    @property
    def enter(self) -> tuple[str, ...]:
        """What a command line begins with so that the process sees the disk."""
        assert self._process is not None
        return ("nsenter", "-t", str(self._process.pid), "-m", "--")

    def fail(self, profile: str, *, path: str = "", ops: tuple[str, ...] | None = None, after: int = 0) -> None:
        """From now on; for paths that match only, for some operations only, after the first `after` of them."""
        number, all_ops = PROFILES[profile]
        self._rule({"errno": number, "ops": ops or all_ops, "path": path, "after": after})

    def _rule(self, *rules: dict[str, Any]) -> None:
        beside = self.control.with_suffix(".new")
        beside.write_text(json.dumps(rules))
        beside.rename(self.control)

    def cure(self) -> None:
        """No more faults."""
        self._rule()


# --- the file system --------------------------------------------------------------------------------------------------

_HEADER = struct.Struct("<IIQQIIIHH")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_VALID = (0, 200_000_000)
"""How long the kernel may believe a name or a size: seconds, nanoseconds. The folder is changed behind its back."""


class Fault(OSError):
    """An injected one."""


class Node:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.lookups = 0

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.fd}"


class Server:
    def __init__(self, device: int, backing: str, control: str) -> None:
        self.device = device
        self.backing = backing
        self.control = control
        self.nodes = {1: Node(os.open(backing, os.O_PATH))}
        self.ids: dict[tuple[int, int], int] = {}
        self.next = 2
        self.rules: list[dict[str, Any]] = []
        self.stamp: tuple[int, int] = (0, 0)
        self.listed: dict[int, list[tuple[int, int, bytes]]] = {}

    def run(self) -> None:
        while True:
            try:
                request = os.read(self.device, (1 << 20) + 8192)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                return
            _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
            if opcode in (2, 36, 42):  # forget, interrupt, batch_forget: no answer
                self.forget(opcode, node, request[40:])
                continue
            handler = _HANDLERS.get(opcode)
            code, answer = 0, b""
            try:
                if handler is None:
                    code = errno.ENOSYS
                else:
                    answer = handler(self, node, request[40:]) or b""
            except OSError as error:
                code, answer = error.errno or errno.EIO, b""
            with contextlib.suppress(FileNotFoundError):  # whoever asked was killed
                os.write(self.device, struct.pack("<IiQ", 16 + len(answer), -code, unique) + answer)

    # --- faults -------------------------------------------------------------------------------------------------------

    def check(self, operation: str, where: Callable[[], str]) -> None:
        found = os.stat(self.control)
        if (found.st_mtime_ns, found.st_ino) != self.stamp:
            self.stamp = (found.st_mtime_ns, found.st_ino)
            self.rules = json.loads(Path(self.control).read_text())
        for rule in self.rules:
            if operation in rule["ops"] and re.search(rule["path"], where()):
                if rule["after"] > 0:
                    rule["after"] -= 1
                else:
                    raise Fault(rule["errno"], os.strerror(rule["errno"]))

    def place(self, fd: int, name: str = "") -> Callable[[], str]:
        return lambda: os.path.relpath(os.path.join(os.readlink(f"/proc/self/fd/{fd}"), name), self.backing)

    # --- names --------------------------------------------------------------------------------------------------------

    def entry(self, parent: int, name: str) -> bytes:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self.nodes[parent].fd)
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        number = self.ids.get(key)
        if number is None:
            number, self.next = self.next, self.next + 1
            self.ids[key] = number
            self.nodes[number] = Node(fd)
        else:
            os.close(fd)
        self.nodes[number].lookups += 1
        seconds, nanoseconds = _VALID
        return _ENTRY.pack(number, 0, seconds, seconds, nanoseconds, nanoseconds) + attributes(status)

    def forget(self, opcode: int, node: int, body: bytes) -> None:
        if opcode == 36:
            return
        if opcode == 2:
            pairs = [(node, struct.unpack_from("<Q", body)[0])]
        else:
            count = struct.unpack_from("<I", body)[0]
            pairs = [struct.unpack_from("<QQ", body, 8 + 16 * number) for number in range(count)]
        for number, times in pairs:
            known = self.nodes.get(number)
            if known is None or number == 1:
                continue
            known.lookups -= times
            if known.lookups <= 0:
                status = os.fstat(known.fd)
                self.ids.pop((status.st_dev, status.st_ino), None)
                os.close(known.fd)
                del self.nodes[number]

    def lookup(self, node: int, body: bytes) -> bytes:
        return self.entry(node, text(body))

    def getattr(self, node: int, body: bytes) -> bytes:
        return self.attr_out(os.fstat(self.nodes[node].fd))

    @staticmethod
    def attr_out(status: os.stat_result) -> bytes:
        return struct.pack("<QII", _VALID[0], _VALID[1], 0) + attributes(status)

    def setattr(self, node: int, body: bytes) -> bytes:
        valid, _, fh, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = struct.unpack_from(
            "<IIQQQQQQIIIIIIII", body
        )
        known = self.nodes[node]
        self.check("truncate" if valid & 8 and size else "setattr", self.place(known.fd))
        if valid & 8:
            os.truncate(fh if valid & 64 else known.path, size)
        if valid & 1:
            os.chmod(known.path, stat.S_IMODE(mode))
        if valid & 6:
            os.chown(known.path, uid if valid & 2 else -1, gid if valid & 4 else -1)
        if valid & (16 | 32 | 128 | 256):
            now = time.time_ns()
            old = os.fstat(known.fd)
            times = (
                now if valid & 128 else atime * 10**9 + atime_ns if valid & 16 else old.st_atime_ns,
                now if valid & 256 else mtime * 10**9 + mtime_ns if valid & 32 else old.st_mtime_ns,
            )
            os.utime(known.path, ns=times)
        return self.attr_out(os.fstat(known.fd))

    def readlink(self, node: int, body: bytes) -> bytes:
        return os.readlink("", dir_fd=self.nodes[node].fd).encode()

    def symlink(self, node: int, body: bytes) -> bytes:
        name, target = (part.decode() for part in body.split(b"\0")[:2])
        self.check("symlink", self.place(self.nodes[node].fd, name))
        os.symlink(target, name, dir_fd=self.nodes[node].fd)
        return self.entry(node, name)

    def mkdir(self, node: int, body: bytes) -> bytes:
        mode, _ = struct.unpack_from("<II", body)
        name = text(body[8:])
        self.check("mkdir", self.place(self.nodes[node].fd, name))
        os.mkdir(name, mode, dir_fd=self.nodes[node].fd)
        return self.entry(node, name)

    def unlink(self, node: int, body: bytes) -> None:
        self.check("unlink", self.place(self.nodes[node].fd, text(body)))
        os.unlink(text(body), dir_fd=self.nodes[node].fd)

    def rmdir(self, node: int, body: bytes) -> None:
        self.check("rmdir", self.place(self.nodes[node].fd, text(body)))
        os.rmdir(text(body), dir_fd=self.nodes[node].fd)

    def rename(self, node: int, body: bytes, skip: int = 8) -> None:
        target = struct.unpack_from("<Q", body)[0]
        old, new = (part.decode() for part in body[skip:].split(b"\0")[:2])
        self.check("rename", self.place(self.nodes[target].fd, new))
        os.rename(old, new, src_dir_fd=self.nodes[node].fd, dst_dir_fd=self.nodes[target].fd)

    def rename2(self, node: int, body: bytes) -> None:
        if struct.unpack_from("<I", body, 8)[0]:
            raise OSError(errno.EINVAL, "flags")
        self.rename(node, body, skip=16)

    def link(self, node: int, body: bytes) -> bytes:
        old, name = struct.unpack_from("<Q", body)[0], text(body[8:])
        self.check("link", self.place(self.nodes[node].fd, name))
        os.link(self.nodes[old].path, name, dst_dir_fd=self.nodes[node].fd, follow_symlinks=True)
        return self.entry(node, name)

    # --- files --------------------------------------------------------------------------------------------------------

    def open(self, node: int, body: bytes) -> bytes:
        flags = struct.unpack_from("<I", body)[0]
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self.check("open-write", self.place(self.nodes[node].fd))
        fd = os.open(self.nodes[node].path, flags & ~(os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL))
        return struct.pack("<QII", fd, 0, 0)

    def create(self, node: int, body: bytes) -> bytes:
        flags, mode, _, _ = struct.unpack_from("<IIII", body)
        name = text(body[16:])
        self.check("create", self.place(self.nodes[node].fd, name))
        fd = os.open(name, (flags | os.O_CREAT) & ~os.O_NOFOLLOW, mode, dir_fd=self.nodes[node].fd)
        return self.entry(node, name) + struct.pack("<QII", fd, 0, 0)

    def read(self, node: int, body: bytes) -> bytes:
        fh, offset, size = struct.unpack_from("<QQI", body)
        self.check("read", self.place(fh))
        return os.pread(fh, size, offset)

    def write(self, node: int, body: bytes) -> bytes:
        fh, offset, size = struct.unpack_from("<QQI", body)
        self.check("write", self.place(fh))
        return struct.pack("<II", os.pwrite(fh, body[40 : 40 + size], offset), 0)

    def fsync(self, node: int, body: bytes) -> None:
        self.check("fsync", self.place(struct.unpack_from("<Q", body)[0]))

    def fsyncdir(self, node: int, body: bytes) -> None:
        self.check("fsyncdir", self.place(struct.unpack_from("<Q", body)[0]))

    def fallocate(self, node: int, body: bytes) -> None:
        fh, offset, length, mode = struct.unpack_from("<QQQI", body)
        self.check("fallocate", self.place(fh))
        if mode:
            raise OSError(errno.EOPNOTSUPP, "mode")
        os.posix_fallocate(fh, offset, length)

    def release(self, node: int, body: bytes) -> None:
        os.close(struct.unpack_from("<Q", body)[0])

    def flush(self, node: int, body: bytes) -> None:
        pass

    # --- folders ------------------------------------------------------------------------------------------------------

    def opendir(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", os.open(self.nodes[node].path, os.O_RDONLY | os.O_DIRECTORY), 0, 0)

    def readdir(self, node: int, body: bytes) -> bytes:
        fh, offset, size = struct.unpack_from("<QQI", body)
        self.check("readdir", self.place(fh))
        if offset == 0:
            with os.scandir(fh) as entries:
                self.listed[fh] = [
                    (one.inode(), stat.S_IFMT(one.stat(follow_symlinks=False).st_mode) >> 12, os.fsencode(one.name))
                    for one in entries
                ]
        answer = b""
        for number, (inode, kind, name) in enumerate(self.listed.get(fh, [])[offset:], int(offset) + 1):
            entry = struct.pack("<QQII", inode, number, len(name), kind) + name
            entry += bytes(-len(entry) % 8)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        return answer

    def releasedir(self, node: int, body: bytes) -> None:
        fh = struct.unpack_from("<Q", body)[0]
        self.listed.pop(fh, None)
        os.close(fh)

    def statfs(self, node: int, body: bytes) -> bytes:
        disk = os.statvfs(self.backing)
        return struct.pack(
            "<QQQQQIIII24x",
            *(disk.f_blocks, disk.f_bfree, disk.f_bavail, disk.f_files, disk.f_ffree),
            *(disk.f_bsize, disk.f_namemax, disk.f_frsize, 0),
        )

    def init(self, node: int, body: bytes) -> bytes:
        major, minor, readahead = struct.unpack_from("<III", body)
        assert (major, minor) >= (7, 31), "a kernel of this decade"
        return struct.pack("<IIIIHHIIHHI28x", 7, 31, readahead, 0, 16, 12, 1 << 17, 1, 0, 0, 0)


_HANDLERS: dict[int, Callable[[Server, int, bytes], bytes | None]] = {
    1: Server.lookup,
    3: Server.getattr,
    4: Server.setattr,
    5: Server.readlink,
    6: Server.symlink,
    9: Server.mkdir,
    10: Server.unlink,
    11: Server.rmdir,
    12: Server.rename,
    13: Server.link,
    14: Server.open,
    15: Server.read,
    16: Server.write,
    17: Server.statfs,
    18: Server.release,
    20: Server.fsync,
    25: Server.flush,
    26: Server.init,
    27: Server.opendir,
    28: Server.readdir,
    29: Server.releasedir,
    30: Server.fsyncdir,
    35: Server.create,
    43: Server.fallocate,
    45: Server.rename2,
}


def text(body: bytes) -> str:
    return os.fsdecode(body.partition(b"\0")[0])


def attributes(status: os.stat_result) -> bytes:
    times = [status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns]
    return _ATTR.pack(
        *(status.st_ino, status.st_size, status.st_blocks),
        *(moment // 10**9 for moment in times),
        *(moment % 10**9 for moment in times),
        *(status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_rdev, status.st_blksize, 0),
    )


def main() -> None:
    backing, path, control = sys.argv[1:]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other,default_permissions"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"faulty", path.encode(), b"fuse.faulty", 6, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    print("mounted", flush=True)
    Server(device, backing, control).run()


def can_mount() -> bool:
    """Whether this machine lets us."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


if __name__ == "__main__":
    main()
