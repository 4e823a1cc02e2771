"""`slotd status`: one page that says how the host stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from agent.cli.app import HOST, ConfigOption, JsonOption, SocketOption, app
from agent.cli.output import (
    NONE,
    OUTCOMES,
    SEVERITIES,
    STATES,
    ago,
    console,
    count,
    digest,
    dots,
    emit,
    lines,
    plain,
    seconds,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

Document = Mapping[str, Any]
MEANING = {
    "slot": "the committed model answers from the slot",
    "bridge": "the committed model answers from the CPU",
    "dark": "the committed model runs nowhere: clients get UNAVAILABLE",
    "empty": "no model is committed",
}


@app.command(rich_help_panel=HOST)
def status(as_json: JsonOption = False, socket: SocketOption = None, config: ConfigOption = None) -> None:
    """Show how the host stands: slot, models, deployment, serving, link, issues.

    Ends with 0 if the daemon answers, with 69 if it does not.
    """
    from agent.cli.connect import ask

    found = ask(socket, config, "status")
    if as_json:
        emit(found)
    else:
        console().print(page(found))


def page(status: Document) -> RenderableType:
    """The status document as a table."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        plain(status["device"]),
        dots(
            f"slotd {plain(status['version'])}",
            f"up {seconds(status.get('uptime_s'))}",
            f"pid {status.get('pid')}",
            Text("embedded", "yellow") if status.get("embedded") else None,
        ),
    )
    for name, value in _rows(status):
        table.add_row(name, value)
    return table


def _rows(status: Document) -> Iterator[tuple[str, Text]]:
    from rich.text import Text

    yield "host", _host(status)
    yield "slot", _slot(status.get("slot") or {})
    yield "committed", model(status.get("committed"))
    yield "previous", model(status.get("previous"))
    for key in ("deployment", "waiting", "last"):
        if status.get(key):
            yield key, deployment(status[key])
    yield "serving", _serving(status.get("serving") or {})
    yield "link", _link(status.get("link") or {})
    if status.get("config"):
        yield "config", _config(status["config"])
    if (status.get("sandbox") or {}).get("lacks"):
        yield "sandbox", Text(f"lacks {plain(', '.join(status['sandbox']['lacks']))}: see slotd doctor", "yellow")
    yield "issues", lines(*map(_issue, status.get("issues") or [])) or Text("none", "green")


def _host(status: Document) -> Text:
    from rich.text import Text

    state = plain(status["host"])
    text = Text.assemble((state, f"bold {STATES.get(state, '')}"), f": {MEANING.get(state, '')}")
    return lines(text, *error_lines(status.get("reason")))


def _slot(slot: Document) -> Text:
    from rich.text import Text

    executor, temperature, power = slot.get("executor"), slot.get("temperature_c"), slot.get("power_w")
    first = dots(
        plain(slot.get("driver") or NONE),
        Text("a simulation", "yellow") if slot.get("simulated") else None,
        None if slot.get("present") else Text("absent", "red"),
        f"{temperature:.0f} °C" if temperature is not None else None,
        f"{power:.0f} W" if power is not None else None,
        f"executor {executor['pid']}" if executor else "no executor",
        f"proven {ago(slot['proven'])}" if slot.get("proven") else "not proven",
    )
    ids = [f"{name} {plain(slot[name])}" for name in ("shell", "accelerator") if slot.get(name)]
    return lines(first, *ids)


def model(ref: Document | None) -> Text:
    """A model in one line and its reference beneath."""
    from rich.text import Text

    if not ref:
        return Text(NONE, "dim")
    return lines(
        dots(f"{plain(ref.get('name') or '?')} {plain(ref.get('version') or '')}".rstrip(), digest(ref.get("digest"))),
        *([Text(plain(ref["reference"]), "dim")] if ref.get("reference") else []),
    )


def deployment(document: Document) -> Text:
    """A deployment in a line, its error beneath."""
    from rich.text import Text

    outcome, named = document.get("outcome"), document.get("name") or document.get("reference")
    how = (
        Text(outcome.replace("_", " "), OUTCOMES.get(outcome, ""))
        if outcome
        else Text(f"in {plain(document.get('phase') or 'the queue')}", "cyan")
    )
    first = dots(
        plain(document.get("id", "?")),
        f"{plain(named or document.get('kind') or '')} {plain(document.get('version') or '')}".rstrip(),
        how,
        seconds(document["seconds"]) if document.get("seconds") is not None else None,
        f"by {plain(document['actor'])}" if document.get("actor") else None,
        ago(document["started"]) if document.get("started") else None,
    )
    return lines(first, *error_lines(document.get("error")))


def error_lines(error: Document | None) -> list[Text]:
    """An error document as CODE: message, and its hint."""
    from rich.text import Text

    if not error:
        return []
    where = f"{plain(error['field'])}: " if error.get("field") else ""
    found = [Text.assemble((plain(error.get("code", "?")), "red"), f": {where}{plain(error.get('message', ''))}")]
    if error.get("hint"):
        found.append(Text(f"hint: {plain(error['hint'])}", "cyan"))
    return found


def _serving(serving: Document) -> Text:
    from rich.text import Text

    def figure(name: str, style: str = "") -> Text | None:
        value = serving.get(name)
        return Text(f"{count(value)} {name.replace('_', ' ')}", style if value else "") if value is not None else None

    def time(name: str) -> str | None:
        value = serving.get(f"{name}_ms")
        return f"{name} {value:.1f} ms" if value is not None else None

    capacity = serving.get("capacity_per_s")
    return lines(
        plain(", ".join(serving.get("listen") or []) or NONE),
        dots(figure("requests"), figure("failed", "red"), figure("refused", "yellow")),
        dots(figure("by_slot"), figure("by_bridge"), figure("in_flight"), figure("queued")),
        *filter(None, [dots(time("p50"), time("p99"), f"capacity {count(capacity)}/s" if capacity else None)]),
    )


def _link(link: Document) -> Text:
    from rich.text import Text

    if not link.get("enabled"):
        return Text("none", "dim")
    outbox = link.get("outbox") or {}
    waiting = outbox.get("depth") or 0
    return dots(
        Text("connected", "green") if link.get("connected") else Text("not connected", "yellow"),
        plain(link["broker"]) if link.get("broker") else None,
        f"{count(waiting)} events wait" if waiting else None,
        f"the oldest for {seconds(outbox['oldest_s'])}" if waiting and outbox.get("oldest_s") is not None else None,
    )


def _config(config: Document) -> Text:
    from rich.text import Text

    source, pending = config.get("source"), config.get("pending") or []
    return dots(
        plain(config.get("path") or NONE) if source == "file" else None,
        Text("the last good one, not the file", "red") if source == "good" else None,
        Text("the defaults: there is no file", "yellow") if source == "defaults" else None,
        ago(config["loaded"]) if config.get("loaded") else None,
        Text("the file is invalid", "red") if config.get("faults") and source == "file" else None,
        Text(f"at the next start: {plain(', '.join(pending))}", "yellow") if pending else None,
    )


def _issue(issue: Document) -> Text:
    from rich.text import Text

    severity = plain(issue.get("severity", "?"))
    first = dots(
        Text.assemble((severity, SEVERITIES.get(severity, "")), f" {plain(issue.get('id', '?'))}"),
        plain(issue.get("message", "")),
        ago(issue["since"]) if issue.get("since") else None,
    )
    return lines(first, *([Text(f"hint: {plain(issue['hint'])}", "cyan")] if issue.get("hint") else []))
