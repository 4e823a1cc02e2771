"""How things are printed: consoles, JSON, errors, and figures as people write them."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from agent.errors import SlotdError

NONE = "—"
STATES = {"slot": "green", "bridge": "yellow", "dark": "red", "empty": "dim"}
OUTCOMES = {
    "committed": "green",
    "unchanged": "green",
    "refused": "red",
    "rolled_back": "red",
    "failed": "red",
    "cancelled": "yellow",
    "superseded": "yellow",
}
SEVERITIES = {"critical": "red", "error": "red", "warning": "yellow", "info": "cyan"}
_WIDE = 160  # columns where nobody says how wide it is: a file or a pipe


def console(*, stderr: bool = False) -> Console:
    """A console on standard output or error; made when it is needed, so that a redirection counts."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else _WIDE)


def emit(document: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str), flush=True)


def show_error(error: SlotdError) -> None:
    """`error:` and `hint:` on standard error."""
    from rich.text import Text

    out = console(stderr=True)
    several = [f"{field}: {message}" if field else message for field, message in getattr(error, "faults", ())]
    for words in several if len(several) > 1 else [str(error)]:
        out.print(Text.assemble(("error: ", "bold red"), plain(words)), soft_wrap=True)
    if error.hint:
        out.print(Text.assemble(("hint: ", "bold cyan"), plain(error.hint)), soft_wrap=True)


def plain(value: Any) -> str:
    """A text from outside, without control characters that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value))


def lines(*parts: Text | str) -> Text:
    """Parts under each other."""
    from rich.text import Text

    return Text("\n").join(part if isinstance(part, Text) else Text(part) for part in parts)


def dots(*parts: Text | str | None) -> Text:
    """Parts beside each other, with a dot between; those that are empty are left out."""
    from rich.text import Text

    return Text(" · ").join(part if isinstance(part, Text) else Text(part) for part in parts if part)


def seconds(value: float | None) -> str:
    """0.03 s, 1.2 s, 47 s, 3 min 05 s, 2 h 10 min, 4 d 3 h."""
    if value is None:
        return NONE
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(value: float | None) -> str:
    """Bytes in the largest unit that leaves a figure before the point."""
    if value is None:
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def count(value: Any) -> str:
    """12,345; a rate keeps one place."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def digest(value: str | None, *, short: bool = True) -> str:
    """sha256:0123456789ab, enough to tell images apart."""
    if not value:
        return NONE
    algorithm, _, rest = plain(value).partition(":")
    return f"{algorithm}:{rest[:12]}" if short and rest else plain(value)


def ago(moment: str | None) -> str:
    """An RFC 3339 time as how long ago it was."""
    if not moment:
        return NONE
    try:
        then = datetime.fromisoformat(moment)
    except ValueError:
        return plain(moment)
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    past = (datetime.now(UTC) - then).total_seconds()
    return f"{seconds(past)} ago" if past >= 1 else "now"
