"""The demo's figures as tables and as JSON, and what to try next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent.cli.output import NONE, dots, plain
from agent.slot.arbiter import Phase

if TYPE_CHECKING:
    from agent.cli.demo.judge import Around, Latency, Result, Swap
    from agent.cli.demo.play import Left

_BAR = 20
_LEGEND = """\
 during         from the command to the new model's first answer
 slot, bridge   who answered during the swap: the slot, or the CPU in its place"""


def classes(classified: Mapping[str, Any]) -> Table:
    """What `slotd predict --json` found, the likeliest first."""
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="bold")
    table.add_column(width=_BAR)
    table.add_column()
    for output in classified["outputs"].values():
        for one in output["top"][0]:
            bar = "━" * max(1, round(one["score"] * _BAR))
            name = Text.assemble(plain(one["name"] or ""), (f" ({one['class']})", "dim"))
            table.add_row(f"{one['score']:.3f}", Text(bar, "cyan"), name)
    return table


def show(result: Result, out: Console) -> None:
    """Both tables, and the verdict."""
    out.print()
    out.print(_swaps(result))
    out.print(Text(_LEGEND, "dim"))
    out.print()
    out.print(_phases(result))
    if result.log_tail:
        out.print(Text("the end of slotd's log:", "bold"))
        out.print(Text(result.log_tail, "dim"), soft_wrap=True)
        out.print()
    out.print(_verdict(result), soft_wrap=True)


def _swaps(result: Result) -> Table:
    table = Table(
        title="What the clients saw: latency in ms, p50/p99",
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
    )
    table.add_column("swap", no_wrap=True)
    for name in ("before", "during", "after", "slot", "bridge", "failed", "wrong"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, around in enumerate(result.swaps, 1):
        table.add_row(
            f"{number}: {_short(around.swap)}",
            _latency(around.before),
            _latency(around.during),
            _latency(around.after),
            f"{around.by_slot:,}",
            f"{around.by_bridge:,}",
            _bad(around.failed),
            _bad(around.wrong),
        )
    table.add_section()
    table.add_row(
        "in all",
        _latency(result.latency),
        "",
        "",
        f"{result.by_slot:,}",
        f"{result.by_bridge:,}",
        _bad(result.failed),
        _bad(result.wrong + result.stale),
    )
    return table


def _phases(result: Result) -> Table:
    assert result.first is not None
    swaps = [result.first, *(around.swap for around in result.swaps)]
    table = Table(
        title="Where each deployment spent its time, in seconds",
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
    )
    table.add_column("phase")
    for number, swap in enumerate(swaps):
        table.add_column(f"{'first' if number == 0 else f'swap {number}'}\n{_short(swap)}", justify="right")
    for phase in Phase:
        times = [swap.phases.get(phase.value) for swap in swaps]
        if any(time is not None for time in times):
            table.add_row(phase.value, *(Text(NONE, "dim") if time is None else f"{time:.2f}" for time in times))
    table.add_section()
    table.add_row("in all", *(f"{float(swap.document['seconds']):.2f}" for swap in swaps))
    return table


def _short(swap: Swap) -> str:
    return swap.model.name.rpartition("-")[2]


def _latency(latency: Latency) -> str:
    return NONE if latency.p50 is None or latency.p99 is None else f"{latency.p50:.0f}/{latency.p99:.0f}"


def _bad(number: int) -> Text:
    return Text(f"{number:,}", "bold red" if number else "green")


def _verdict(result: Result) -> Text:
    text = Text()
    for problem in result.problems:
        text.append("✗ ", "bold red").append(f"{plain(problem)}\n")
    if not result.problems:
        text.append("✓ ", "bold green")
    rate = result.requests / result.seconds if result.seconds else 0.0
    return text.append_text(
        dots(
            Text(f"{result.requests:,} requests", "bold"),
            f"{result.failed:,} failed",
            f"{result.wrong + result.stale:,} from the wrong model",
            f"{len(result.swaps)} swaps",
            f"{result.by_slot:,} answered by the slot, {result.by_bridge:,} by the bridge",
            f"{rate:.0f} a second",
            f"{result.took:.0f} s in all",
        )
    )


# --- JSON ------------------------------------------------------------------------------------------------------------


def document(result: Result) -> dict[str, Any]:
    """The same figures."""
    assert result.first is not None
    return {
        "ok": not result.problems,
        "problems": result.problems,
        "clients": result.clients,
        "pictures": result.pictures,
        "requests": result.requests,
        "failed": result.failed,
        "wrong": result.wrong,
        "stale": result.stale,
        "by_slot": result.by_slot,
        "by_bridge": result.by_bridge,
        "errors": result.errors,
        "latency": _milliseconds(result.latency),
        "load_s": round(result.seconds, 3),
        "took_s": round(result.took, 3),
        "classified": result.classified,
        "first": _deployment(result.first),
        "swaps": [_around(around) for around in result.swaps],
    }


def _around(around: Around) -> dict[str, Any]:
    return {
        **_deployment(around.swap),
        "before": _milliseconds(around.before),
        "during": {
            **_milliseconds(around.during),
            "by_slot": around.by_slot,
            "by_bridge": around.by_bridge,
            "failed": around.failed,
            "wrong": around.wrong,
        },
        "after": _milliseconds(around.after),
    }


def _deployment(swap: Swap) -> dict[str, Any]:
    return {
        "model": swap.model.name,
        "digest": swap.model.digest,
        "task": swap.document["id"],
        "outcome": swap.document["outcome"],
        "seconds": swap.document["seconds"],
        "phases": swap.phases,
    }


def _milliseconds(latency: Latency) -> dict[str, Any]:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 3)

    return {
        "requests": latency.count,
        "p50_ms": rounded(latency.p50),
        "p99_ms": rounded(latency.p99),
        "max_ms": rounded(latency.max),
    }


# --- what is left running --------------------------------------------------------------------------------------------


def what_next(left: Left, out: Console) -> None:
    """Commands for the slotd that is left running, ready to be pasted."""
    slotd, config = _program(), shlex.quote(str(left.folder / "config.yaml"))
    host, _, port = left.ends.broker.rpartition(":")
    pid = left.ends.pid
    other = left.models[1].tag
    message = f'{{\\"expires\\": $(($(date +%s) + 60)), \\"arguments\\": {{\\"image\\": \\"{other}\\"}}}}'
    picture = shlex.quote(str(left.picture))
    parts = (
        ("How it stands", f"{slotd} status -c {config}"),
        ("Ask the model", f"{slotd} predict --image {picture} --address {left.ends.address}"),
        ("The other model, and watch it go in", f"{slotd} deploy {other} -c {config}"),
        ("Back", f"{slotd} rollback -c {config}"),
        ("The same from afar: listen to it", f"mosquitto_sub -h {host} -p {port} -v -t 'slotd/{left.device}/#'"),
        (
            "and command it",
            f'mosquitto_pub -h {host} -p {port} -t slotd/{left.device}/cmd/deploy -m "{message}"',
        ),
        ("Its log", f"tail -f {shlex.quote(str(left.folder / 'slotd.log'))}"),
        (
            "Stop it, and remove everything",
            f"kill {pid} && tail --pid={pid} -f /dev/null && rm -r {shlex.quote(str(left.folder))}",
        ),
    )
    out.print(Text(f"\nslotd goes on running, with pid {pid}. What to try:", "bold"))
    for title, command in parts:
        out.print(Text.assemble((f"\n  # {title}\n", "dim"), f"  {command}"), soft_wrap=True)


def _program() -> str:
    """How this slotd is called from here."""
    beside = Path(sys.executable).parent / "slotd"
    found = shutil.which("slotd")
    if found is not None and Path(found) == beside:
        return "slotd"
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m agent"
    return shlex.quote(str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside))
