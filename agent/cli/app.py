"""The typer application, how it ends on errors, and the options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agent.cli.output import emit, show_error
from agent.errors import SlotdError

HOST, MODELS, CLIENTS, ABOUT = "The host", "Models", "Clients", "About"


class Group(TyperGroup):
    """Every SlotdError becomes `error:` and `hint:` on standard error and its own exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb."""
        try:
            return super().invoke(ctx)
        except SlotdError as error:
            if ctx.meta.get(_JSON):
                emit({"error": error.as_dict()})
            show_error(error)
            raise typer.Exit(error.exit) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    name="slotd",
    cls=Group,
    help="Keeps one accelerator slot serving: swaps models without a client noticing, proves the slot before trusting"
    " it, always comes back to the last model that worked.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_JSON = "slotd.json"


def _remember(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[_JSON] = value
    return value


ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="SLOTD_CONFIG", help="Default: /etc/slotd/config.yaml.", metavar="PATH"),
]
SocketOption = Annotated[
    Path | None,
    typer.Option("--socket", help="The daemon's admin socket. Default: admin.sock in run_dir.", metavar="PATH"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=_remember)]


def _version(value: bool) -> None:
    if value:
        from agent import __version__

        typer.echo(f"slotd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
