"""Landlock by raw system calls: a child sees the files that it was granted, and no others (landlock(7)).

ABI 1 is files, 2 moves between folders, 3 truncation, 4 TCP ports, 5 ioctl on devices, 6 signals and abstract Unix
sockets, 7 the audit log. Each is used where it is there. It binds the calling thread and those that it starts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from agent.executor.sandbox import kernel
from agent.executor.sandbox.grants import Grants

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE = 1 << 4, 1 << 5
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << bit for bit in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

READ = READ_FILE | READ_DIR
WRITE = READ | WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_FIFO | MAKE_SYM | REFER
DEVICE = READ | WRITE_FILE | TRUNCATE | IOCTL_DEV
_FOR_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
_SINCE = ((1, (1 << 13) - 1), (2, REFER), (3, TRUNCATE), (5, IOCTL_DEV))
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPES = 1 | 2  # abstract Unix sockets, signals
_BENEATH = 1

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
HOST = (
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
)
RESOLVER = ("/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/gai.conf", "/etc/nsswitch.conf")
NETWORK = (
    *RESOLVER,
    "/etc/services",
    "/etc/protocols",
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/usr/share/pki",
    "/run/systemd/resolve",
    "/run/NetworkManager/resolv.conf",
)
_pins: list[int] = []


def restrict(grants: Grants) -> tuple[int, bool]:
    """Enter; (the ABI, whether files are restricted). No new privileges must be set. Raises OSError.

    ABI 1 forbids every move between folders, so that a child which writes would not work: its files stay open.
    """
    abi = kernel.landlock_abi()
    files = abi > (1 if grants.write else 0)
    if not files:
        return abi, False
    handled = 0
    for since, rights in _SINCE:
        handled |= rights if abi >= since else 0
    ports = 0 if abi < 4 else _BIND_TCP if grants.network else _BIND_TCP | _CONNECT_TCP
    attributes = struct.pack("=QQQ", handled, ports, _SCOPES)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = kernel.syscall(kernel.LANDLOCK_CREATE_RULESET, ctypes.c_char_p(attributes), len(attributes), 0)
    try:
        for path, rights in _rules(grants):
            _allow(ruleset, path, rights & handled)
        kernel.syscall(kernel.LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return abi, True


def withdrawn(paths: Sequence[str] = RESOLVER) -> str | None:
    """A file that was granted and may not be read any more, because another one has taken its name meanwhile.

    A grant is for the file, not for its name. A child that needs the new one must be started anew.
    """
    for path in paths:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except PermissionError:
            return path
        except OSError:
            continue  # it is not there
    return None


def _rules(grants: Grants) -> Iterator[tuple[str, int]]:
    # What a granted program needs of the libraries includes the loader, which the kernel starts for it.
    libraries = READ | (EXECUTE if grants.execute else 0)
    for path in (*LIBRARIES, *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))):
        yield path, libraries
    for path in _python():
        yield path, READ
    for path in (*HOST, *(NETWORK if grants.network else ())):
        yield path, READ
    for path in ("/dev/null", "/dev/zero"):
        yield path, READ_FILE | WRITE_FILE | TRUNCATE
    for path in ("/dev/urandom", "/dev/random"):
        yield path, READ_FILE
    for given, rights in (
        (grants.read, READ),
        (grants.write, WRITE),
        (grants.devices, DEVICE),
        (grants.execute, READ | EXECUTE),
    ):
        for path in given:
            yield path, rights


def _python() -> Iterator[str]:
    """Where modules are imported from: for those that are only imported when they are needed."""
    roots = {os.path.join(prefix, "") for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    yield os.path.dirname(os.__file__)
    for root in roots:
        yield os.path.join(root, "lib")
    for entry in sys.path:  # not a checkout's own folder, in which there may be anything
        own = any(entry.startswith(root) and entry != root.rstrip("/") for root in roots)
        if own or os.path.basename(entry) in ("site-packages", "dist-packages"):
            yield entry
    for package in ("agent", "drivers"):
        found = find_spec(package)
        if found is not None:
            yield from found.submodule_search_locations or ()


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there, or may not be seen anyway, cannot be granted
    kept = False
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FOR_FILES
        beneath = struct.pack("=Qi", rights, fd)
        kernel.syscall(kernel.LANDLOCK_ADD_RULE, ruleset, _BENEATH, ctypes.c_char_p(beneath), 0)
        if path == "/proc/self":  # its entry in the kernel's cache may go, and the rule with it, unless it is held
            _pins.append(fd)
            kept = True
    except OSError as error:
        if error.errno not in (errno.EBADFD, errno.EBADF):  # no file of a file system: nothing to grant
            raise
    finally:
        if not kept:
            os.close(fd)
