"""The disk of the power cuts: what is flushed is safe, what is not may be lost, block by block."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vm.power.disk import BLOCK, PowerDisk

SIZE = 64 * BLOCK
READ, WRITE, FLUSH = 0, 1, 3


class Client:
    """Speaks NBD as QEMU does."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self._take(18)
        self.socket.sendall(struct.pack(">I", 3))
        for option in (8, 7):  # structured replies, which the disk has not; then go
            data = struct.pack(">IH", 0, 0) if option == 7 else b""
            self.socket.sendall(struct.pack(">QII", 0x49484156454F5054, option, len(data)) + data)
            while True:
                _, _, kind, length = struct.unpack(">QIII", self._take(20))
                answer = self._take(length)
                if kind != 3:
                    break
                self.size, self.flags = struct.unpack(">QH", answer[2:])

    def _take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"") -> tuple[int, bytes]:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, offset, length or len(data)) + data)
        _, error, handle = struct.unpack(">IIQ", self._take(16))
        assert handle == 7
        return error, self._take(length) if kind == READ and not error else b""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[PowerDisk]:
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    made = PowerDisk(image, tmp_path / "nbd")
    yield made
    made.close()


@pytest.fixture
def client(disk: PowerDisk, tmp_path: Path) -> Iterator[Client]:
    made = Client(tmp_path / "nbd")
    yield made
    made.socket.close()


def losing(rule: str) -> random.Random:
    """A seed with that rule of loss."""
    rules = ("all", "most", "half", "few", "none", "tail")
    return next(random.Random(seed) for seed in range(1000) if random.Random(seed).choice(rules) == rule)


def test_what_is_written_is_read_back_and_what_is_flushed_stays(disk: PowerDisk, client: Client) -> None:
    assert client.size == SIZE and client.flags & 4, "it takes flushes"
    assert client.ask(WRITE, 0, data=b"a" * BLOCK) == (0, b"")
    assert client.ask(FLUSH) == (0, b"")
    assert client.ask(WRITE, BLOCK - 512, data=b"b" * 1024) == (0, b"")
    assert client.ask(READ, 0, 2 * BLOCK)[1] == b"a" * (BLOCK - 512) + b"b" * 1024 + bytes(BLOCK - 512)
    loss = disk.cut(losing("all"))
    assert (loss.unflushed, loss.lost) == (1024, 1024)
    assert disk.image.read_bytes()[: 2 * BLOCK] == b"a" * BLOCK + bytes(BLOCK)


def test_after_the_power_is_back_the_guest_sees_what_was_safe(disk: PowerDisk, tmp_path: Path) -> None:
    before = Client(tmp_path / "nbd")
    before.ask(WRITE, 0, data=b"a" * BLOCK)
    disk.freeze()
    before.socket.close()
    disk.cut(losing("all"))
    disk.power_on()
    after = Client(tmp_path / "nbd")
    assert after.ask(READ, 0, BLOCK) == (0, bytes(BLOCK))
    after.socket.close()


@pytest.mark.parametrize("rule", ["most", "half", "few", "none", "tail"])
def test_any_block_that_was_not_flushed_may_be_lost(disk: PowerDisk, client: Client, rule: str) -> None:
    for block in range(0, 64, 8):
        client.ask(WRITE, block * BLOCK, data=bytes([block + 1]) * 8 * BLOCK)
    loss = disk.cut(losing(rule))
    image = disk.image.read_bytes()
    kept = []
    for block in range(64):
        content = image[block * BLOCK : (block + 1) * BLOCK]
        assert content in (bytes(BLOCK), bytes([block // 8 * 8 + 1]) * BLOCK), "a block is whole or was not written"
        kept.append(content[0] != 0)
    assert loss.unflushed == SIZE and loss.lost == (64 - sum(kept)) * BLOCK
    assert (rule == "none") == all(kept)
    if rule == "half":
        assert sorted(kept) != kept and sorted(kept, reverse=True) != kept, "in any order"
    if rule == "tail":
        assert sorted(kept, reverse=True) == kept


def test_it_freezes_at_the_write_that_was_asked_for(disk: PowerDisk, client: Client) -> None:
    gone = threading.Event()
    disk.cut_after(3, gone.set)
    client.ask(WRITE, 0, data=b"a" * BLOCK)
    client.ask(FLUSH)
    client.socket.settimeout(0.3)
    assert not gone.is_set()
    with pytest.raises(TimeoutError):
        client.ask(WRITE, BLOCK, data=b"b" * BLOCK)
    assert gone.is_set()
    disk.cut(losing("none"))
    assert disk.image.read_bytes()[: 2 * BLOCK] == b"a" * BLOCK + b"b" * BLOCK


def test_a_flush_that_was_not_answered_promises_nothing(disk: PowerDisk, client: Client) -> None:
    disk.cut_after(2, lambda: None)
    client.ask(WRITE, 0, data=b"a" * BLOCK)
    client.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.ask(FLUSH)
    assert disk.cut(losing("all")).lost == BLOCK
    assert disk.image.read_bytes() == bytes(SIZE)


def test_a_copy_goes_on_with_what_was_not_flushed(disk: PowerDisk, client: Client, tmp_path: Path) -> None:
    client.ask(WRITE, 0, data=b"a" * BLOCK)
    client.ask(FLUSH)
    client.ask(WRITE, BLOCK, data=b"b" * BLOCK)
    cache = disk.keep(tmp_path / "copy")
    other = PowerDisk(tmp_path / "copy", tmp_path / "other", cache)
    reader = Client(tmp_path / "other")
    assert reader.ask(READ, 0, 2 * BLOCK)[1] == b"a" * BLOCK + b"b" * BLOCK
    reader.socket.close()
    assert other.cut(losing("all")).lost == BLOCK
    other.close()
    assert (tmp_path / "copy").read_bytes()[: 2 * BLOCK] == b"a" * BLOCK + bytes(BLOCK)


def test_what_lies_outside_is_refused(client: Client) -> None:
    assert client.ask(READ, SIZE, BLOCK)[0] != 0
