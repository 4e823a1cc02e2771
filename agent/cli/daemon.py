"""`slotd run`, `slotd check`: the daemon itself, and what it would do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli.app import HOST, ConfigOption, JsonOption, app
from agent.cli.output import console, emit, plain, seconds, size

if TYPE_CHECKING:
    from agent.config import Config

EmbeddedOption = Annotated[
    bool, typer.Option("--embedded", help="Allow the simulated slot, and a broker inside slotd if link.host is empty.")
]


@app.command(rich_help_panel=HOST)
def run(config: ConfigOption = None, embedded: EmbeddedOption = False) -> None:
    """Run the daemon, in the foreground, until SIGTERM.

    Without a configuration it ends with 78; with --embedded it then takes the defaults.
    """
    from agent.memory import tune_malloc

    tune_malloc()  # before anything large is imported
    from agent.cli.connect import load_config
    from agent.logs import configure

    found = load_config(config, embedded=embedded)
    configure(found.log)
    from agent import daemon

    raise typer.Exit(daemon.run(found))


@app.command(rich_help_panel=HOST)
def check(config: ConfigOption = None, embedded: EmbeddedOption = False, as_json: JsonOption = False) -> None:
    """Check the configuration and say what `slotd run` would do with it.

    Touches nothing. Ends with 0, or with 78 and the field that is wrong.
    """
    from agent.cli.connect import load_config
    from agent.config import DEFAULT_PATH
    from agent.errors import InvalidConfig
    from drivers import make

    found = load_config(config, embedded=embedded)
    try:
        driver = make(found.slot.driver, found.driver_options)
    except ValueError as error:
        raise InvalidConfig(str(error), field=f"{config or DEFAULT_PATH}: slot") from None
    if as_json:
        emit({"valid": True, "config": found.model_dump(mode="json")})
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 3), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _plan(found, simulated=driver.simulated):
        table.add_row(name, plain(value))
    console().print(table)


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
        (
            "executors",
            f"{config.threads} threads, {size(config.executor.memory)} each; {config.decoder_count} decoders",
        ),
        ("images", f"{', then '.join(images)}; up to {size(config.images.max_image)}"),
        ("link", f"MQTT {link.protocol} to {broker}" if link.enabled else "none"),
        ("log", f"{config.log.level}, {config.log.format}"),
    ]
