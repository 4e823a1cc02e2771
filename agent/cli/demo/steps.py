"""What the demo does, a line for each step: on a terminal with a spinner and a clock, elsewhere when it has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from agent.cli.output import plain

_TITLE = 26
_BAR = 14


class Step:
    """One step while it runs; set what it says."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.detail: Text | str = ""
        self.live: Callable[[], Text] | None = None
        """Says more than `detail`, each time that it is drawn."""
        self.share: float | None = None
        """How much of it is done, 0 to 1; None if that is not known."""
        self._began = time.monotonic()
        self._spinner = Spinner("dots", style="cyan")

    def line(self, mark: RenderableType) -> Table:
        """As it stands now."""
        table = Table.grid(padding=(0, 2), pad_edge=False)
        table.add_column(width=1)
        table.add_column(min_width=_TITLE, no_wrap=True)
        table.add_column(justify="right", min_width=6, no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        seconds = f"{time.monotonic() - self._began:.1f} s"
        table.add_row(mark, self.title, seconds, self.live() if self.live is not None else self.detail)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.line(self._spinner)
        if self.share is not None:
            bar: Any = ProgressBar(total=1.0, completed=min(1.0, self.share), width=_TITLE + _BAR)
            indented = Table.grid(padding=(0, 2), pad_edge=False)
            indented.add_row(" ", bar)
            yield indented


class Steps:
    """Prints steps, one after the other."""

    def __init__(self, out: Console) -> None:
        self.out = out

    def headline(self, text: str, beneath: str) -> None:
        """What this is."""
        self.out.print(Text(text, "bold"))
        self.out.print(Text(f"{plain(beneath)}\n", "dim"), soft_wrap=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """A step lasts as long as the block; an exception marks it as failed, a cancellation as cut short."""
        step = Step(title)
        mark = Text("✗", "red")
        live = Live(step, console=self.out, refresh_per_second=10, transient=True) if self.out.is_terminal else None
        try:
            if live is not None:
                live.start()
            yield step
            mark = Text("✓", "green")
        except asyncio.CancelledError:
            mark = Text("–", "yellow")
            raise
        finally:
            if live is not None:
                live.stop()
            self.out.print(step.line(mark))

    def beneath(self, what: RenderableType) -> None:
        """Something that a step brought to light."""
        from rich.padding import Padding

        self.out.print(Padding(what, (0, 0, 0, 3), expand=False))
