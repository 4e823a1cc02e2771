"""`slotd retire`: this host leaves the fleet."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from agent.cli.app import HOST, ConfigOption, JsonOption, app
from agent.cli.output import console, emit, plain

LEFT = 75
"""Exit code when something is left; sysexits' "try again"."""


@app.command(rich_help_panel=HOST)
def retire(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    without_broker: Annotated[
        bool, typer.Option("--without-broker", help="Leave what the broker keeps of this host.")
    ] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take this host out of the fleet: stop slotd, clear what the broker keeps, remove keys, models and history.

    Run it as root. The configuration stays. Ends with 0 if nothing is left, with 75 if something is: it says what, and
    can be run again.
    """
    from agent.cli.connect import load_config
    from agent.errors import InvalidInput
    from agent.retire import Step
    from agent.retire import retire as carry_out

    found = load_config(config, embedded=True)
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise InvalidInput("this removes all models and keys of this host", field="--yes", hint="say --yes")
        typer.confirm(f"Remove all models, keys and history of {found.device} ({found.state_dir})?", abort=True)
    steps: list[Step] = []
    for step in carry_out(found, config, broker=not without_broker):
        steps.append(step)
        if not as_json:
            mark = "done" if step.done else "left"
            console().print(f"{mark}  {step.what:<7} {plain(step.detail)}", soft_wrap=True)
    done = all(step.done for step in steps)
    if as_json:
        emit({"retired": done, "device": found.device, "steps": [step.as_dict() for step in steps]})
    elif done:
        console().print(f"{plain(found.device)} is retired. Its configuration is still there.", soft_wrap=True)
    raise typer.Exit(0 if done else LEFT)
