"""What `slotd run` does; and the way there that systemd takes, past the rest of the command line.

To import that takes a quarter of a second, in which clients would have nobody to answer them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def plain(argv: Sequence[str]) -> tuple[Path | None, bool] | None:
    """(config, embedded) of a `run` written in the plainest way; None for whatever typer must read, or refuse."""
    if not argv or argv[0] != "run":
        return None
    config, embedded = os.environ.get("SLOTD_CONFIG"), False
    rest = iter(argv[1:])
    for option in rest:
        if option == "--embedded":
            embedded = True
        elif option in ("--config", "-c") and (value := next(rest, None)) is not None:
            config = value
        else:
            return None
    return Path(config) if config else None, embedded


def start(config: Path | None, embedded: bool) -> int:
    """The daemon, until it ends; its exit code. Raises InvalidConfig, and what `daemon.run` does."""
    import faulthandler
    import sys

    from agent.memory import take_turns, tune_malloc

    faulthandler.enable(2)  # a watchdog that was missed (SIGABRT) tells where the loop stood
    tune_malloc()  # before anything large is imported
    take_turns()
    # structlog would import rich, a twentieth of the start, for tracebacks in colour that the daemon never writes.
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog  # noqa: F401

    del sys.modules["rich"]
    from agent.images import early
    from agent.logs import configure
    from agent.reload.source import load

    loaded = load(config, embedded=embedded, early=early.begin)
    configure(loaded.config.log)
    from agent import daemon

    return daemon.run(loaded)
