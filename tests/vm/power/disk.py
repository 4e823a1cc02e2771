"""A disk with a volatile write cache, served to QEMU over NBD, whose power can be cut.

A write is only safe once a flush that came after it was answered. At the cut, of all blocks written since the last
flush, some are on the disk and some are not, in any combination, as a drive that reorders its cache may leave them. One
block of 4 KiB is written whole or not at all: what drives with 4 KiB sectors promise and file systems rely on.
"""

from __future__ import annotations

import mmap
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vm.power.image import copy_sparse

BLOCK = 4096
_MAGIC, _OPTION, _REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_HAS_FLAGS, _SEND_FLUSH = 1, 4
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _UNSUPPORTED, _INFORMATION = 1, 0x80000001, 3
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_REQUEST, _RESPONSE = 0x25609513, 0x67446698
_INVALID = 22


@dataclass
class Loss:
    """What a cut left of what was not flushed, in bytes."""

    unflushed: int
    lost: int
    rule: str


class PowerDisk:
    """`image` is what is safe, `cache` what had been written but not flushed. QEMU finds it at the socket `path`."""

    def __init__(self, image: Path, path: Path, cache: Sequence[tuple[int, bytes]] = ()) -> None:
        self.image = image
        self.size = image.stat().st_size
        self.writes = 0
        """Writes and flushes answered since the power came on."""
        self.written = 0
        """Bytes."""
        self._file = image.open("r+b")
        self._safe = mmap.mmap(self._file.fileno(), self.size)
        self._seen = mmap.mmap(-1, self.size)  # what the guest reads back
        self._cache: list[tuple[int, bytes]] = []
        self._lock = threading.Lock()
        self._on = False
        self._cut_at: int | None = None
        self._at_cut: Callable[[], None] = lambda: None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="power disk", daemon=True)
        self.power_on()
        for offset, data in cache:
            self._seen[offset : offset + len(data)] = data
        self._cache += cache
        self._thread.start()

    # --- the power ----------------------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """The guest sees what is safe."""
        with self._lock:
            self._cache.clear()
            self._copy()
            self.writes = self.written = 0
            self._cut_at, self._on = None, True

    def _copy(self) -> None:
        # Only what is not empty, so that an image with holes stays small in memory.
        self._seen.close()
        self._seen = mmap.mmap(-1, self.size)
        start = 0
        while True:
            try:
                start = os.lseek(self._file.fileno(), start, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(self._file.fileno(), start, os.SEEK_HOLE)
            self._seen[start:end] = self._safe[start:end]
            start = end

    def keep(self, image: Path) -> list[tuple[int, bytes]]:
        """Copies what is safe to `image`; what is not flushed."""
        with self._lock:
            self._safe.flush()
            copy_sparse(self.image, image)
            return list(self._cache)

    def cut_after(self, count: int, then: Callable[[], None]) -> None:
        """Freeze when so many more writes and flushes have come; the last of them is not answered any more."""
        with self._lock:
            self._cut_at, self._at_cut = self.writes + count, then

    def freeze(self) -> None:
        """From now on nothing is answered. Call it before the guest is killed."""
        with self._lock:
            self._on = False

    def cut(self, chance: random.Random) -> Loss:
        """The cache is lost, but for what `chance` says had been written already."""
        with self._lock:
            self._on = False
            rule = chance.choice(("all", "most", "half", "few", "none", "tail"))
            share = {"all": 1.0, "most": 0.9, "half": 0.5, "few": 0.1, "none": 0.0, "tail": 0.0}[rule]
            blocks = [
                (offset + start, data[start : start + BLOCK])
                for offset, data in self._cache
                for start in _steps(offset, len(data))
            ]
            blocks = [(offset, data[: BLOCK - offset % BLOCK]) for offset, data in blocks]
            kept = chance.randrange(len(blocks) + 1) if rule == "tail" else 0
            lost = 0
            for number, (offset, data) in enumerate(blocks):
                if chance.random() < share or (rule == "tail" and number >= kept):
                    lost += len(data)
                else:
                    self._safe[offset : offset + len(data)] = data
            self._cache.clear()
            return Loss(sum(len(data) for _, data in blocks), lost, rule)

    def close(self) -> None:
        self.freeze()
        self._listener.shutdown(socket.SHUT_RDWR)
        if self._connection is not None:
            with suppress(OSError):  # it has gone already
                self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        self._safe.flush()
        self._file.close()

    # --- the protocol -------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connection = connection
            with connection:
                try:
                    if self._greet(connection):
                        self._answer(connection)
                except (OSError, EOFError):
                    continue  # the guest was killed

    def _greet(self, connection: socket.socket) -> bool:
        connection.sendall(struct.pack(">QQH", _MAGIC, _OPTION, _FIXED_NEWSTYLE | _NO_ZEROES))
        flags = struct.unpack(">I", _take(connection, 4))[0]
        about = struct.pack(">QH", self.size, _HAS_FLAGS | _SEND_FLUSH)
        while True:
            _, option, length = struct.unpack(">QII", _take(connection, 16))
            _take(connection, length)
            if option == _EXPORT_NAME:
                connection.sendall(about + (b"" if flags & _NO_ZEROES else bytes(124)))
                return True
            if option in (_GO, _INFO):
                self._option(connection, option, _INFORMATION, struct.pack(">H", 0) + about)
                self._option(connection, option, _ACK)
                if option == _GO:
                    return True
            elif option == _ABORT:
                self._option(connection, option, _ACK)
                return False
            else:
                self._option(connection, option, _UNSUPPORTED)

    @staticmethod
    def _option(connection: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
        connection.sendall(struct.pack(">QIII", _REPLY, option, kind, len(data)) + data)

    def _answer(self, connection: socket.socket) -> None:
        while True:
            magic, _, kind, handle, offset, length = struct.unpack(">IHHQQI", _take(connection, 28))
            assert magic == _REQUEST
            if kind == _DISCONNECT:
                return
            data = _take(connection, length) if kind == _WRITE else b""
            reply = self._do(kind, offset, length, data)
            if reply is None:
                _take(connection, 1 << 20)  # until the guest is gone
                return
            error, body = reply
            connection.sendall(struct.pack(">IIQ", _RESPONSE, error, handle) + body)

    def _do(self, kind: int, offset: int, length: int, data: bytes) -> tuple[int, bytes] | None:
        """Error number and data; None once the power is gone."""
        with self._lock:
            if not self._on:
                return None
            if offset + length > self.size or kind not in (_READ, _WRITE, _FLUSH):
                return _INVALID, b""
            if kind == _READ:
                return 0, self._seen[offset : offset + length]
            self.writes += 1
            last = self._cut_at is not None and self.writes >= self._cut_at
            if kind == _WRITE:
                self.written += length
                self._seen[offset : offset + length] = data
                self._cache.append((offset, data))
            elif not last:
                for place, part in self._cache:
                    self._safe[place : place + len(part)] = part
                self._cache.clear()
            if last:
                self._on = False
        if last:
            self._at_cut()
            return None
        return 0, b""


def _steps(offset: int, length: int) -> list[int]:
    """Where in a write each block of the disk begins."""
    first = -offset % BLOCK
    return sorted({0, *range(first, length, BLOCK)}) if length else []


def _take(connection: socket.socket, count: int) -> bytes:
    parts = bytearray(count)
    view = memoryview(parts)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return bytes(parts)
