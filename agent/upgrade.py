"""What became of an upgrade: a version that did not stay up was taken back, and this is the one before it.

`slotd-versions` (packaging/versions.py) decides and acts; it leaves a record beside the versions, which is read here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from agent.errors import StorageError
from agent.health.document import timestamp
from agent.health.issues import Issues
from agent.journal.database import Journal

log = structlog.get_logger(__name__)

RECORD = "taken-back.json"
ISSUE = "upgrade-taken-back"
EVENT = "upgrade_taken_back"
_TOLD = "upgrade.taken_back"
"""Journal key: the take-back that the fleet was told of."""
_MAX_BYTES = 64 << 10


@dataclass(frozen=True)
class TakenBack:
    """A version that was taken back."""

    version: str
    to: str
    at: float
    """Unix time, by the host's clock of then."""
    failures: tuple[str, ...]

    @property
    def text(self) -> str:
        """In one line."""
        last = f", the last: {self.failures[-1]}" if self.failures else ""
        return f"slotd {self.version} was taken back after {len(self.failures)} failed starts{last}"

    def as_dict(self) -> dict[str, Any]:
        """The event's document."""
        return {
            "version": self.version,
            "to": self.to,
            "at": timestamp(self.at),
            "failures": list(self.failures),
        }


def read_taken_back(tree: Path | None = None) -> TakenBack | None:
    """What was taken back for the version that lies in `tree` (ours); None if nothing was. Blocking, never raises."""
    tree = tree or Path(sys.prefix)
    try:
        with (tree.parent / RECORD).open("rb") as file:
            document = json.loads(file.read(_MAX_BYTES))
        if document["to"] != tree.name:
            return None
        failures = tuple(str(failure) for failure in document["failures"])
        return TakenBack(str(document["version"]), str(document["to"]), float(document["at"]), failures)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("upgrade_record_unreadable", error=str(error))
        return None


async def report(
    taken_back: TakenBack, issues: Issues, journal: Journal, tell: Callable[[str, dict[str, Any]], None]
) -> None:
    """An issue as long as it stands, and one event."""
    log.error("upgrade_taken_back", **taken_back.as_dict())
    issues.raise_(ISSUE, "error", taken_back.text, "journalctl -u slotd says why; install a version that is mended")
    mark = [taken_back.version, taken_back.at]
    try:
        if await journal.get(_TOLD) != mark:
            tell(EVENT, taken_back.as_dict())
            await journal.put(_TOLD, mark)
    except StorageError as error:  # then it is told again at the next start
        log.warning("upgrade_event_not_journaled", error=str(error))
