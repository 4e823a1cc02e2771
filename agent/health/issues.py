"""What is wrong with the host at the moment: raised once, kept while it lasts, cleared once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from agent.health.document import timestamp

Severity = Literal["info", "warning", "error", "critical"]
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*(:[A-Za-z0-9_.:/-]{1,128})?")


@dataclass(frozen=True)
class Issue:
    """One thing that is wrong. `id` is a word with dashes, with `:which` where there can be several of a kind."""

    id: str
    severity: Severity
    since: float
    """Unix time at which it was raised; labels only."""
    message: str
    hint: str | None

    def as_dict(self) -> dict[str, Any]:
        """The issue as it stands in `status`, `reported` and `health`."""
        return {
            "id": self.id,
            "severity": self.severity,
            "since": timestamp(self.since),
            "message": self.message,
            "hint": self.hint,
        }


class Issues:
    """The host's issues, oldest first. Belongs to the event loop's thread.

    `on_event` is called with ("issue_raised" | "issue_cleared", the issue's document) once for each; raising one that
    stands only brings its words up to date, so a fault that is seen every second makes one event.
    """

    def __init__(self, on_event: Callable[[str, dict[str, Any]], None] | None = None) -> None:
        self.on_event = on_event
        self._open: dict[str, Issue] = {}

    def raise_(self, id: str, severity: Severity, message: str, hint: str | None = None) -> None:
        """Something is wrong. Raises ValueError for an id that is not a word with dashes."""
        if not _ID.fullmatch(id):
            raise ValueError(f"{id!r} cannot be the id of an issue")
        standing = self._open.get(id)
        since = standing.since if standing else time.time()
        issue = self._open[id] = Issue(id, severity, since, message, hint)
        if self.on_event and (standing is None or standing.severity != severity):
            self.on_event("issue_raised", issue.as_dict())

    def fault(self, where: str, error: BaseException) -> None:
        """Something went wrong that nobody foresaw, in a part that goes on; it stands until slotd starts again.

        `where` is a word with dashes. The caller logs the trace.
        """
        self.raise_(
            f"fault:{where}",
            "error",
            f"an unforeseen {type(error).__name__} in {where}: {error}"[:512],
            "a bug of slotd: its log has the trace; the part goes on, and a restart clears this",
        )

    def clear(self, id: str) -> None:
        """It is over; nothing happens if it was not raised."""
        issue = self._open.pop(id, None)
        if issue and self.on_event:
            self.on_event("issue_cleared", issue.as_dict())

    def __contains__(self, id: object) -> bool:
        return id in self._open

    def list(self) -> list[dict[str, Any]]:
        """All that stand, oldest first, as documents."""
        return [issue.as_dict() for issue in self._open.values()]
