"""Parts of the daemon that need no whole host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.daemon import STOPPED, _gap
from agent.errors import StorageError
from agent.journal.database import Journal


async def test_the_gap_is_that_of_this_boot_and_told_once(tmp_path: Path) -> None:
    journal = await Journal.open(tmp_path, "boot-1")
    assert await _gap(journal, 3.5) is None
    await journal.put(STOPPED, {"boot_id": "boot-0", "at": 1.0})
    assert await _gap(journal, 3.5) is None
    await journal.put(STOPPED, {"boot_id": "boot-1", "at": 1.0})
    assert await _gap(journal, 3.5) == 2.5
    assert await _gap(journal, 4.0) is None
    await journal.close()


async def test_a_full_disk_is_no_reason_not_to_start(tmp_path: Path) -> None:
    """slotd ended at every start for the sake of a figure."""
    journal = await Journal.open(tmp_path, "boot-1")
    await journal.put(STOPPED, {"boot_id": "boot-1", "at": 1.0})

    async def full(*_: Any) -> None:
        raise StorageError("no space left")

    journal.put = full  # type: ignore[method-assign]
    assert await _gap(journal, 3.5) is None
    await journal.close()
