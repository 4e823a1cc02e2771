"""`slotd commands`, `slotd version`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from agent.cli.app import ABOUT, JsonOption, app
from agent.cli.output import NONE, console, emit

if TYPE_CHECKING:
    from rich.text import Text


@app.command(rich_help_panel=ABOUT)
def commands(as_json: JsonOption = False) -> None:
    """Print the commands that MQTT and the admin socket take.

    Needs no daemon.
    """
    from typing import cast

    from agent.commands.builtin import build_table
    from agent.commands.host import Host

    table = build_table(cast(Host, None))  # only read, never run
    described = [
        {
            "name": command.name,
            "help": command.help,
            "changes": command.changes,
            "arguments": command.arguments.model_json_schema(),
        }
        for command in table
    ]
    if as_json:
        emit(described)
        return
    from rich.table import Table

    shown = Table(box=None, padding=(0, 3, 1, 0), header_style="bold")
    for title in ("command", "changes", "arguments", "what it does"):
        shown.add_column(title, overflow="fold")
    for command in described:
        shown.add_row(
            str(command["name"]),
            "yes" if command["changes"] else "no",
            _arguments(command["arguments"]),
            str(command["help"]),
        )
    console().print(shown)


def _arguments(schema: Any) -> Text:
    """One line for each argument: name, type, default; what it is, beneath."""
    from rich.text import Text

    found = Text()
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        if found:
            found.append("\n")
        found.append(name, "bold" if name in required else "")
        default = "" if name in required or field.get("default") is None else f" = {field['default']}".lower()
        found.append(f": {_type(field)}{default}")
        if field.get("description"):
            found.append(f"\n  {field['description']}", "dim")
    return found or Text(NONE)


def _type(field: Any) -> str:
    if "anyOf" in field:
        return " | ".join(dict.fromkeys(_type(one) for one in field["anyOf"] if one.get("type") != "null"))
    return str(field.get("type", "any"))


@app.command(rich_help_panel=ABOUT)
def version(as_json: JsonOption = False) -> None:
    """Print the version."""
    from agent import __version__

    if not as_json:
        typer.echo(f"slotd {__version__}")
        return
    import platform

    emit({"slotd": __version__, "python": platform.python_version(), "machine": platform.machine()})
