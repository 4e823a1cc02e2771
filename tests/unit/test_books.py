"""What deployments leave on the disk: nothing is lost for a disk that fails for a while."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.errors import SlotdError, StorageError
from agent.journal.boot import BootRecord, ModelRef, read_boot, write_boot
from agent.slot import books as module
from agent.slot.books import BOOT, Books
from agent.slot.installer import wanted_of

OLD = BootRecord(1, ModelRef("sha256:" + "a" * 64, "a:1", "a", "1"), None)


class Journal:
    """Takes what it is given, while `degraded` is None."""

    def __init__(self) -> None:
        self.degraded: str | None = None
        self.in_memory = False
        self.entries: list[Any] = []

    async def put(self, key: str, value: Any) -> None:
        if self.degraded:
            raise StorageError(self.degraded)
        self.entries.append((key, value))


@pytest.fixture
def books(tmp_path: Path) -> Any:
    return Books(tmp_path, Journal())  # type: ignore[arg-type]


async def test_what_is_owed_is_written_in_order_when_the_disk_works(books: Any) -> None:
    await books.write(lambda: books.journal.put("a", 1))
    books.journal.degraded = "the disk is full"
    for number in (2, 3):
        await books.write(lambda number=number: books.journal.put("a", number))
    await books.settle(lambda: OLD)
    assert books.journal.entries == [("a", 1)]
    books.journal.degraded = None
    await books.write(lambda: books.journal.put("a", 4))
    await books.settle(lambda: OLD)
    assert books.journal.entries == [("a", number) for number in (1, 2, 3, 4)]


async def test_what_the_journal_will_never_take_is_not_owed(books: Any) -> None:
    async def lost() -> None:
        raise StorageError("the journal has lost the deployment")

    async def bug() -> None:
        raise RuntimeError("nobody foresaw this")

    for entry in (lost, bug):
        await books.write(entry)
        await books.write(lambda: books.journal.put("a", 1))
    assert len(books.journal.entries) == 2


async def test_boot_json_in_doubt_is_written_again(books: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_boot(books.state_dir, BootRecord(0, None, None))
    books.doubt = "the rename was not confirmed"

    def fail(*_: object) -> None:
        raise StorageError("cannot be written")

    monkeypatch.setattr(module, "confirm_boot", fail)
    await books.settle(lambda: OLD)
    assert books.doubt == "cannot be written"
    monkeypatch.undo()
    await books.settle(lambda: OLD)
    assert books.doubt is None and read_boot(books.state_dir) == OLD


async def test_nothing_is_begun_that_could_not_be_committed(books: Any) -> None:
    await books.ready()
    books.journal.in_memory, books.journal.degraded = True, "x: read-only"
    with pytest.raises(StorageError, match="read-only") as caught:
        await books.ready()
    assert caught.value.hint
    books.journal.in_memory = False
    books.state_dir = books.state_dir / "none"
    with pytest.raises(StorageError, match=r"boot\.json"):
        await books.ready()


async def test_the_journal_has_a_copy_of_the_record(books: Any) -> None:
    await books.remember(OLD)
    ((key, kept),) = books.journal.entries
    assert key == BOOT and kept["generation"] == 1 and "repaired" not in kept


def test_a_bitstream_is_the_one_that_was_verified(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"bits")
    section = SimpleNamespace(interface="i", accelerator="a", bitstream="b.bin")
    verified = hashlib.blake2b(b"bits", digest_size=32).hexdigest()
    model: Any = SimpleNamespace(spec=SimpleNamespace(slot=section), folder=tmp_path, hashes={"b.bin": verified})
    assert wanted_of(model).bitstream_sha256 == hashlib.sha256(b"bits").hexdigest()
    (tmp_path / "b.bin").write_bytes(b"changed since")
    with pytest.raises(SlotdError, match=r"b\.bin") as caught:
        wanted_of(model)
    assert caught.value.code == "INCOMPATIBLE_BITSTREAM"
