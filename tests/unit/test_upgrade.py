"""What the agent says of an upgrade that was taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.health.issues import Issues
from agent.journal.database import Journal
from agent.upgrade import TakenBack, read_taken_back, report

RECORD = {"version": "2", "to": "1", "at": 1e9, "failures": ["exit-code 1 before READY"] * 3, "started": False}


def write(folder: Path, record: object) -> Path:
    (folder / "taken-back.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return folder / "1"


def test_the_record_is_for_the_version_that_was_gone_back_to(tmp_path: Path) -> None:
    found = read_taken_back(write(tmp_path, RECORD))
    assert found == TakenBack("2", "1", 1e9, ("exit-code 1 before READY",) * 3)
    assert found.text == "slotd 2 was taken back after 3 failed starts, the last: exit-code 1 before READY"
    assert read_taken_back(tmp_path / "2") is None


@pytest.mark.parametrize("record", ["", "{", "[]", "null", "{}", '{"to": "1"}', json.dumps({**RECORD, "at": None})])
def test_a_record_that_cannot_be_read_stops_nothing(tmp_path: Path, record: str) -> None:
    assert read_taken_back(write(tmp_path, record)) is None


def test_a_slotd_that_is_not_installed_as_a_package_has_none() -> None:
    assert read_taken_back() is None


async def test_the_issue_stands_and_the_event_is_told_once(tmp_path: Path) -> None:
    found = TakenBack("2", "1", 1e9, ("watchdog after READY",))
    told: list[tuple[str, dict[str, Any]]] = []
    for _ in range(3):
        journal = await Journal.open(tmp_path, "boot")
        issues = Issues()
        await report(found, issues, journal, lambda kind, document: told.append((kind, document)))
        assert [issue["id"] for issue in issues.list()] == ["upgrade-taken-back"]
        await journal.close()
    assert told == [
        (
            "upgrade_taken_back",
            {"version": "2", "to": "1", "at": "2001-09-09T01:46:40.000Z", "failures": ["watchdog after READY"]},
        )
    ]
