"""A deployment as it goes: all phases on a terminal, one line for each that ends elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from agent.cli.output import OUTCOMES, digest, dots, plain, seconds, size
from agent.cli.status import error_lines

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

Document = Mapping[str, Any]
ROLL_BACK = "roll_back"


def show(documents: Iterable[Document], out: Console) -> Document | None:
    """Prints documents of one deployment as they come; the last of them."""
    return _live(documents, out) if out.is_terminal else _log(documents, out)


def _live(documents: Iterable[Document], out: Console) -> Document | None:
    from rich.live import Live

    view = View()
    with Live(view, console=out, refresh_per_second=8):
        for document in documents:
            view.update(document)
    if view.document is not None:
        out.print(ending(view.document))
    return view.document


def _log(documents: Iterable[Document], out: Console) -> Document | None:
    last: Document | None = None
    told = 0
    for last in documents:
        phases = last.get("phases") or []
        ended = len(phases) if last.get("outcome") else len(phases) - 1
        for phase in phases[told:ended]:
            out.print(f"{plain(phase['phase']):<10} {seconds(phase.get('seconds'))}")
        told = max(told, ended)
    if last is not None:
        out.print(ending(last))
    return last


def ending(document: Document) -> Text:
    """How it ended, and why."""
    from rich.text import Text

    outcome = document.get("outcome")
    named = plain(document.get("name") or document.get("reference") or document.get("kind") or "")
    first = dots(
        Text(outcome.replace("_", " ") if outcome else "not ended", f"bold {OUTCOMES.get(str(outcome), '')}"),
        f"{named} {plain(document.get('version') or '')}".rstrip(),
        digest(document["digest"]) if document.get("digest") else None,
        seconds(document.get("seconds")),
        f"the host is in state {plain(document['host'])}" if document.get("host") else None,
    )
    return Text("\n").join([first, *error_lines(document.get("error"))])


def rows(document: Document) -> Iterator[tuple[str, str, float | None]]:
    """(state, phase, seconds) of every phase: done, running, failed, skipped or pending."""
    from agent.slot.arbiter import Phase

    plan = [phase.value for phase in Phase] if document.get("kind", "deploy") != "undeploy" else []
    phases = document.get("phases") or []
    names = [phase["phase"] for phase in phases]
    outcome = document.get("outcome")
    failed = -1
    if ROLL_BACK in names:
        failed = names.index(ROLL_BACK) - 1
    elif outcome in ("refused", "failed", "rolled_back", "cancelled"):
        failed = len(names) - 1
    at = 0
    for index, phase in enumerate(phases):
        if phase["phase"] in plan[at:]:
            reached = plan.index(phase["phase"])
            yield from (("skipped", name, None) for name in plan[at:reached])
            at = reached + 1
        running = index == len(phases) - 1 and outcome is None
        yield "running" if running else "failed" if index == failed else "done", phase["phase"], phase.get("seconds")
    if outcome is None and ROLL_BACK not in names:
        yield from (("pending", name, None) for name in plan[at:])


class View:
    """What Live redraws; between two documents the running phase's time goes on."""

    def __init__(self) -> None:
        from rich.spinner import Spinner

        self.document: Document | None = None
        self._since = time.monotonic()
        self._spinner = Spinner("dots", style="cyan")

    def update(self, document: Document) -> None:
        """The newest document."""
        self.document, self._since = document, time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.document is not None:
            yield self._table(self.document)

    def _table(self, document: Document) -> Table:
        from rich.table import Table
        from rich.text import Text

        marks: dict[str, Any] = {
            "done": Text("✓", "green"),
            "failed": Text("✗", "red"),
            "skipped": Text("–", "dim"),
            "pending": Text("·", "dim"),
            "running": self._spinner,
        }
        styles = {"skipped": "dim", "pending": "dim", "running": "bold", "failed": "red"}
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(width=1)
        table.add_column(min_width=10)
        table.add_column(justify="right", min_width=8)
        table.add_column()
        for state, phase, took in rows(document):
            if state == "running" and took is not None:
                took += time.monotonic() - self._since
            table.add_row(
                marks[state],
                Text(plain(phase).replace("_", " "), styles.get(state, "")),
                Text(seconds(took) if took is not None else "", "dim" if state == "done" else ""),
                _progress(document, phase, state),
            )
        return table


def _progress(document: Document, phase: str, state: str) -> Any:
    """The bar of a pull that runs."""
    progress = document.get("progress") or {}
    fetched, total = progress.get("bytes"), progress.get("total")
    if phase != "pull" or fetched is None or state not in ("running", "done"):
        return ""
    if state == "done":
        return size(fetched)
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    line = Table.grid(padding=(0, 2))
    line.add_row(
        ProgressBar(total=total or None, completed=fetched, width=32, pulse=not total),
        f"{size(fetched)} of {size(total)}" if total else size(fetched),
    )
    return line
