"""`slotd demo`: two real models, swapped under load on this machine alone, and every answer judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agent.cli.app import ABOUT, JsonOption, app
from agent.cli.output import console, emit


@app.command(rich_help_panel=ABOUT)
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running, and say what to try next.")] = False,
    image: Annotated[
        Path | None, typer.Option("--image", help="A JPEG or PNG to classify. Default: a photograph.", metavar="FILE")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Work in this empty folder, and leave it. Default: a temporary one.", metavar="DIR"
        ),
    ] = None,
    seconds_each: Annotated[
        float, typer.Option(help="Seconds of load between two swaps.", min=0.5, max=3600, metavar="S")
    ] = 2.0,
    clients: Annotated[int, typer.Option(help="Clients that keep asking.", min=1, max=64)] = 8,
    as_json: JsonOption = False,
    requests: Annotated[
        int, typer.Option(min=1, hidden=True, help="The load goes on until there were so many.")
    ] = 2000,
    swaps: Annotated[int, typer.Option(min=1, max=100, hidden=True)] = 4,
) -> None:
    """Two real models, swapped under load, on this machine alone.

    Builds two image classifiers, starts slotd with a simulated slot and a broker of its own, deploys the first by an
    MQTT command, classifies a photograph, then swaps to the second and back while clients keep asking.

    Ends with 0 if no request failed and none was answered by the wrong model, else with 1.
    """
    import asyncio

    from agent.cli.demo.play import Demo, Options
    from agent.cli.demo.report import document, show, what_next
    from agent.cli.demo.steps import Steps

    out = console(stderr=as_json)
    options = Options(
        keep=keep,
        image=image,
        folder=folder,
        seconds_each=seconds_each,
        clients=clients,
        requests=requests,
        swaps=swaps,
    )
    played = Demo(options, Steps(out))
    asyncio.run(played.run())
    if played.signal is not None:
        raise typer.Exit(128 + played.signal)
    result = played.result
    assert result is not None
    if as_json:
        emit(document(result))
    else:
        show(result, out)
    if played.left is not None:
        what_next(played.left, out)
    if result.problems:
        raise typer.Exit(1)
