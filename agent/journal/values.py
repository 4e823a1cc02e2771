"""JSON and times as the journal stores them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from agent.errors import InvalidInput

MAX_VALUE = 1 << 20
"""The longest JSON of one value, answer or document, in bytes."""


def pack(value: Any, what: str) -> str:
    """Compact JSON. Raises InvalidInput for what is no JSON value, or too long."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: as many bytes as characters
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"cannot be kept in the journal: {error}", field=what) from error
    if len(text) > MAX_VALUE:
        raise InvalidInput(f"is too long for the journal ({len(text)} bytes, at most {MAX_VALUE})", field=what)
    return text


def unpack(text: str | None) -> Any:
    """The value of what `pack` gave; None for None."""
    return None if text is None else json.loads(text)


def rfc3339(wall: float) -> str:
    """Unix time as a label: UTC, milliseconds."""
    try:
        moment = datetime.fromtimestamp(wall, UTC)
    except (OverflowError, ValueError, OSError):  # the clock was nonsense; labels must not fail
        moment = datetime.fromtimestamp(0, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
