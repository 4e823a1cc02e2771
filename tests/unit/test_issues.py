"""Issues are raised once, kept while they last, cleared once."""

from __future__ import annotations

import pytest

from agent.health.issues import Issues


@pytest.fixture
def told() -> list[tuple[str, dict]]:
    return []


@pytest.fixture
def issues(told: list[tuple[str, dict]]) -> Issues:
    return Issues(lambda change, issue: told.append((change, issue)))


def test_raised_and_cleared_once(issues: Issues, told: list[tuple[str, dict]]) -> None:
    for number in range(3):
        issues.raise_("disk-full", "error", f"try {number}", "make room")
    assert [(change, issue["id"]) for change, issue in told] == [("issue_raised", "disk-full")]
    (standing,) = issues.list()
    assert standing["message"] == "try 2"
    assert standing["hint"] == "make room"
    assert standing["since"].endswith("Z")
    issues.clear("disk-full")
    issues.clear("disk-full")
    assert [change for change, _ in told] == ["issue_raised", "issue_cleared"]
    assert issues.list() == []


def test_since_stays_while_it_lasts(issues: Issues) -> None:
    issues.raise_("link-down", "warning", "first")
    since = issues.list()[0]["since"]
    issues.raise_("link-down", "warning", "second")
    assert issues.list()[0]["since"] == since


def test_a_change_of_severity_is_told(issues: Issues, told: list[tuple[str, dict]]) -> None:
    issues.raise_("certificate-expires:server", "warning", "in 7 days")
    issues.raise_("certificate-expires:server", "error", "in 1 day")
    assert [issue["severity"] for _, issue in told] == ["warning", "error"]
    assert "certificate-expires:server" in issues


def test_oldest_first(issues: Issues) -> None:
    for id in ("a", "b", "c"):
        issues.raise_(id, "info", id)
    issues.raise_("a", "info", "again")
    assert [issue["id"] for issue in issues.list()] == ["a", "b", "c"]


@pytest.mark.parametrize("id", ["", "Disk", "disk full", "-disk", "disk-", "disk:", "disk:a b"])
def test_an_id_is_a_word(issues: Issues, id: str) -> None:
    with pytest.raises(ValueError, match="id of an issue"):
        issues.raise_(id, "info", "message")
