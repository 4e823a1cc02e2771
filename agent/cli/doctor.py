"""`slotd doctor`: whether this host has what slotd needs, and what its children may use."""

from __future__ import annotations

from typing import Any

import typer

from agent.cli.app import HOST, ConfigOption, JsonOption, SocketOption, app
from agent.cli.output import console, emit, lines, plain


@app.command(rich_help_panel=HOST)
def doctor(as_json: JsonOption = False, socket: SocketOption = None, config: ConfigOption = None) -> None:
    """Check the host: how its kernel confines slotd's children, and what the slot's driver is granted beyond.

    Asks the daemon; without one, the kernel alone. Ends with 0 if nothing is amiss, else with 1.
    """
    from agent.cli.connect import ask
    from agent.errors import Unavailable

    try:
        found = ask(socket, config, "doctor")
    except Unavailable as error:
        found = _alone(error)
    if as_json:
        emit(found)
    else:
        _print(found["checks"])
    raise typer.Exit(0 if found["ok"] else 1)


def _alone(error: Any) -> dict[str, Any]:
    """What can be seen without the daemon."""
    from agent.executor.sandbox import probe
    from agent.health.confinement import kernel_checks

    kernel = probe()
    missing = {"id": "daemon", "ok": False, "message": str(error), "hint": error.hint}
    return {"ok": False, "checks": [missing, *kernel_checks(kernel)], "sandbox": kernel}


def _print(checks: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3), pad_edge=False)
    for column in ("bold", "", ""):
        table.add_column(style=column, overflow="fold")
    for check in checks:
        hint = [Text(f"hint: {plain(check['hint'])}", "cyan")] if check.get("hint") else []
        table.add_row(
            plain(check["id"]),
            Text("ok", "green") if check["ok"] else Text("amiss", "red"),
            lines(plain(check["message"]), *hint),
        )
    console().print(table)
