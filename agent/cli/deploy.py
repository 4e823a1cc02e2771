"""`slotd deploy`, `undeploy`, `rollback`, `cancel`, `task`: what the slot holds."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.cli.app import MODELS, ConfigOption, JsonOption, SocketOption, app
from agent.cli.output import console, emit

EXITS = {
    "committed": 0,
    "unchanged": 0,
    "refused": 65,
    "rolled_back": 69,
    "failed": 69,
    "cancelled": 75,
    "superseded": 75,
}

NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="Print the task's id and end at once.")]


@app.command(rich_help_panel=MODELS)
def deploy(
    image: Annotated[
        str, typer.Argument(help="REGISTRY/NAME:TAG, REGISTRY/NAME@sha256:…, or oci:FOLDER:TAG.", metavar="IMAGE")
    ],
    force: Annotated[bool, typer.Option("--force", help="Also if it is in force, or was given up before.")] = False,
    accept_dark: Annotated[
        bool, typer.Option("--accept-dark", help="Also if the CPU cannot answer for it meanwhile.")
    ] = False,
    allow_signature_change: Annotated[
        bool, typer.Option("--allow-signature-change", help="Also if tensor names, dtypes or shapes change.")
    ] = False,
    probation: Annotated[
        str | None, typer.Option(help="How long it is watched before it is committed.", metavar="TIME")
    ] = None,
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config: ConfigOption = None,
) -> None:
    """Pull a model, prove it, swap it into the slot, and watch it until it is committed.

    Ends with 0 (committed, unchanged), 65 (refused), 69 (failed, rolled back) or 75 (cancelled, superseded).
    Ctrl-C leaves the deployment running.

    Example: slotd deploy registry:5000/resnet50:3 --probation 30s
    """
    _start(
        "deploy",
        {
            "image": _absolute(image),
            "force": force,
            "accept_dark": accept_dark,
            "allow_signature_change": True if allow_signature_change else None,
            "probation": _time(probation),
        },
        no_wait=no_wait,
        as_json=as_json,
        socket=socket,
        config=config,
    )


@app.command(rich_help_panel=MODELS)
def undeploy(
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config: ConfigOption = None,
) -> None:
    """Commit the empty state: no model, and clients get UNAVAILABLE."""
    _start("undeploy", {}, no_wait=no_wait, as_json=as_json, socket=socket, config=config)


@app.command(rich_help_panel=MODELS)
def rollback(
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config: ConfigOption = None,
) -> None:
    """Go back: call off the deployment in hand, or deploy the previous model."""
    _start("rollback", {}, no_wait=no_wait, as_json=as_json, socket=socket, config=config)


@app.command(rich_help_panel=MODELS)
def cancel(
    task: Annotated[
        str | None, typer.Argument(help="Default: the one that waits, else the one that runs.", metavar="[TASK]")
    ] = None,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config: ConfigOption = None,
) -> None:
    """Call a deployment off: at once before drain, later at the end of the phase, with a roll-back."""
    from agent.cli.connect import ask

    answer = ask(socket, config, "cancel", task=task)
    if as_json:
        emit(answer)
    else:
        console().print(f"called off {answer['task']}; slotd task {answer['task']} --watch shows how it ends")


@app.command(rich_help_panel=MODELS)
def task(
    task: Annotated[str, typer.Argument(help="The id that deploy printed.", metavar="TASK")],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow it to its end, as deploy does.")] = False,
    as_json: JsonOption = False,
    socket: SocketOption = None,
    config: ConfigOption = None,
) -> None:
    """Show how a deployment stands or ended."""
    if watch:
        _follow(task, as_json=as_json, socket=socket, config=config)
    from agent.cli.connect import ask

    document = ask(socket, config, "task", task=task)
    if as_json:
        emit(document)
        return
    from agent.cli.live import View, ending

    view = View()
    view.update(document)
    out = console()
    out.print(view)
    out.print(ending(document))


def _start(
    command: str, arguments: dict[str, Any], *, no_wait: bool, as_json: bool, socket: Path | None, config: Path | None
) -> None:
    from agent.cli.connect import ask

    answer = ask(socket, config, command, **arguments)
    if not no_wait:
        _follow(answer["task"], as_json=as_json, socket=socket, config=config)
    elif as_json:
        emit(answer)
    else:
        console().print(answer["task"])


def _follow(task: str, *, as_json: bool, socket: Path | None, config: Path | None) -> None:
    """Watches a deployment to its end, and ends the program with what its outcome stands for."""
    from agent.cli.connect import watch
    from agent.cli.live import show
    from agent.errors import Unavailable

    last: Any = None
    try:
        documents = watch(socket, config, task)
        if as_json:
            last = next(iter(deque(documents, maxlen=1)), None)
            emit(last)
        else:
            last = show(documents, console())
    except KeyboardInterrupt:
        console(stderr=True).print(
            f"\nThe deployment goes on. Watch it: slotd task {task} --watch. Call it off: slotd cancel {task}"
        )
        raise typer.Exit(130) from None
    except Unavailable as error:
        raise Unavailable(
            f"lost the daemon while it worked on {task}: {error}",
            hint=f"slotd takes up a deployment after a restart; ask again: slotd task {task}",
        ) from None
    outcome = last.get("outcome") if last else None
    if outcome is None:
        raise Unavailable(f"the daemon stopped telling about {task}", hint=f"ask again: slotd task {task}")
    raise typer.Exit(EXITS.get(outcome, 70))


def _absolute(image: str) -> str:
    """The daemon runs in another folder than we."""
    scheme, _, place = image.partition(":")
    return f"oci:{os.path.abspath(place)}" if scheme == "oci" and place else image


def _time(text: str | None) -> float | None:
    """30s, 5m or plain seconds. Raises InvalidInput."""
    if text is None:
        return None
    from pydantic import TypeAdapter, ValidationError

    from agent.config import Seconds
    from agent.errors import InvalidInput

    try:
        return float(TypeAdapter(Seconds).validate_python(float(text) if text.replace(".", "", 1).isdigit() else text))
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InvalidInput(message, field="--probation") from None
