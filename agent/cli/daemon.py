"""`slotd run`, `slotd check`: the daemon itself, and what it would do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli.app import HOST, ConfigOption, JsonOption, app
from agent.cli.output import console, emit, plain, seconds, size

if TYPE_CHECKING:
    from agent.config import Config

WHEN = {
    "now": "on a reload",
    "new executors": "on a reload, for executors that start after it",
    "restart": "at the next start",
}
EmbeddedOption = Annotated[
    bool, typer.Option("--embedded", help="Allow the simulated slot, and a broker inside slotd if link.host is empty.")
]


@app.command(rich_help_panel=HOST)
def run(config: ConfigOption = None, embedded: EmbeddedOption = False) -> None:
    """Run the daemon, in the foreground, until SIGTERM.

    Without a valid configuration it takes the last one that came up; without that too, it ends with 78. With --embedded
    and no file at all it takes the defaults.
    """
    from agent.cli.start import start

    raise typer.Exit(start(config, embedded))


@app.command(rich_help_panel=HOST)
def check(
    config: ConfigOption = None,
    embedded: EmbeddedOption = False,
    fields: Annotated[bool, typer.Option("--fields", help="List every field.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check the configuration and say what `slotd run` would do with it.

    Touches nothing. Ends with 0, or with 78 and every field that is wrong. --fields lists each field, its value and
    when a change of it takes effect.
    """
    from agent.cli.connect import load_config
    from agent.config import DEFAULT_PATH, EFFECTS
    from agent.reload.changes import values
    from agent.reload.source import check_driver
    from drivers import make

    found = load_config(config, embedded=embedded)
    check_driver(found, str(config or DEFAULT_PATH))
    driver = make(found.slot.driver, found.driver_options)
    effects = {name: effect.value for name, effect in EFFECTS.items()}
    if as_json:
        emit({"valid": True, "config": found.model_dump(mode="json"), "effect": effects})
        return
    if fields:
        shown = values(found)
        show_fields([(name, json.dumps(shown[name]), effect) for name, effect in effects.items()])
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 3), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _plan(found, simulated=driver.simulated):
        table.add_row(name, plain(value))
    console().print(table)


def show_fields(rows: list[tuple[str, str, str]]) -> None:
    """Field, value, when a change takes effect."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold", pad_edge=False)
    for title in ("field", "value", "a change takes effect"):
        table.add_column(title, overflow="fold")
    for name, value, effect in rows:
        table.add_row(name, plain(value), WHEN[effect])
    console().print(table)


def _tls(config: Config) -> str:
    tls, keys = config.serving.tls, config.serving.keys
    asked = [text for text, wanted in (("a key", keys), ("a certificate", tls.client_ca)) if wanted is not None]
    sealed = f"TCP with {tls.certificate}" if tls.certificate is not None else "none: TCP is in the clear"
    return f"{sealed}; clients need {' and '.join(asked) or 'nothing'}"


def _plan(config: Config, *, simulated: bool) -> list[tuple[str, str]]:
    slot, swap, link = config.slot, config.swap, config.link
    probation = swap.probation
    listen = [config.serving.grpc.listen, f"unix:{config.serving.grpc.socket or config.run_dir / 'grpc.sock'}"]
    images = [f"oci:{layout}" for layout in config.images.layouts] + ["registries"]
    continuity = {
        "bridge": "the CPU answers",
        "queue": "requests wait",
        "reject": "requests get UNAVAILABLE",
    }[swap.continuity]
    broker = f"{link.host}:{link.port}" if link.host else "a broker inside slotd"
    return [
        ("device", config.device),
        ("state", f"{config.state_dir}, sockets in {config.run_dir}"),
        ("slot", f"{slot.driver}{' (a simulation)' if simulated else ''}, proven every {seconds(slot.proof_interval)}"),
        ("swap", f"{continuity} meanwhile; load above the bridge's capacity: {swap.on_weak_bridge}"),
        ("probation", f"{seconds(probation.duration)} and {probation.min_requests} answers"),
        ("gRPC", f"{', '.join(filter(None, listen))}, up to {size(config.serving.grpc.max_message)} a message"),
        ("HTTP", config.serving.http.listen or "none"),
        ("TLS", _tls(config)),
        (
            "executors",
            f"{config.threads} threads, {size(config.executor.memory)} each; {config.decoder_count} decoders",
        ),
        ("images", f"{', then '.join(images)}; up to {size(config.images.max_image)}"),
        ("link", f"MQTT {link.protocol} to {broker}" if link.enabled else "none"),
        ("log", f"{config.log.level}, {config.log.format}"),
    ]
