"""One attempt to make an image the model in the slot, as everybody sees it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from agent.errors import SlotdError
from agent.model.wish import Wish
from agent.slot.arbiter import Outcome, Turn


@dataclass
class Deployment:
    """One attempt, as everybody sees it."""

    id: str
    wish: Wish | None
    actor: str
    turn: Turn
    kind: str = "deploy"
    fresh: bool = False
    """Attempts that were cut off before do not count."""
    attempt: str | None = None
    """What this attempt at changing the slot is counted under."""
    digest: str | None = None
    name: str | None = None
    version: str | None = None
    phases: list[tuple[str, float]] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome | None = None
    error: SlotdError | None = None
    host: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    began: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    written: asyncio.Event = field(default_factory=asyncio.Event)
    """The journal has it, or could not take it: then it is done."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    called_off: asyncio.Event = field(default_factory=asyncio.Event)
    _phase_began: float = 0.0

    @property
    def phase(self) -> str | None:
        return self.phases[-1][0] if self.phases else None

    def entered(self, phase: str) -> None:
        """A phase begins; the one before it has its time."""
        now = time.monotonic()
        if self.phases:
            self.phases[-1] = (self.phases[-1][0], now - self._phase_began)
        self.phases.append((phase, 0.0))
        self._phase_began = now

    def as_dict(self) -> dict[str, Any]:
        """As `task`, `status` and `reported` show it."""
        now = time.monotonic()
        phases = [{"phase": name, "seconds": round(seconds, 3)} for name, seconds in self.phases]
        if phases and self.outcome is None:
            phases[-1]["seconds"] = round(now - self._phase_began, 3)
        return {
            "id": self.id,
            "kind": self.kind,
            "reference": self.wish.reference if self.wish else None,
            "digest": self.digest,
            "name": self.name,
            "version": self.version,
            "actor": self.actor,
            "phase": self.phase,
            "phases": phases,
            "progress": dict(self.progress),
            "outcome": self.outcome.value if self.outcome else None,
            "error": self.error.as_dict() if self.error else None,
            "host": self.host,
            "notes": dict(self.notes),
            "started": self.started.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "seconds": round(self.seconds if self.seconds is not None else now - self.began, 3),
        }
