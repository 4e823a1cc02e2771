"""Finding the daemon: its configuration, its admin socket, its answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.commands.admin import AdminClient
    from agent.config import Config

DEFAULT_SOCKET = Path("/run/slotd/admin.sock")


def load_config(path: Path | None, *, embedded: bool = False) -> Config:
    """The configuration that a daemon would start with. Raises InvalidConfig."""
    from agent.config import DEFAULT_PATH, parse_config, read_config

    if path is None and embedded and not os.path.exists(DEFAULT_PATH):
        return parse_config("link: {host: ''}", where="--embedded", embedded=True)
    return read_config(path or DEFAULT_PATH, embedded=embedded)


def nearby_config(path: Path | None) -> Config | None:
    """The configuration of the daemon on this host, to find its sockets. Raises InvalidConfig for a path that is given.

    Of one that is invalid its run_dir counts, if it has one. Nothing at the default path, or nothing that we may read,
    is no error: the sockets are looked for in their default place.
    """
    from agent.config import DEFAULT_PATH, Config, read_config
    from agent.errors import InvalidConfig
    from agent.reload.source import glance

    if path is None and not os.path.exists(DEFAULT_PATH):
        return None
    try:
        return read_config(path or DEFAULT_PATH, embedded=True)
    except InvalidConfig:
        # The daemon may well run, with the one before.
        run_dir = glance(path or DEFAULT_PATH).get("run_dir")
        if isinstance(run_dir, str):
            return Config(embedded=True, run_dir=Path(run_dir))
        if path is not None:
            raise
        return None


def admin_socket(socket: Path | None, config: Path | None) -> Path:
    """Where the daemon listens for us."""
    if socket is not None:
        return socket
    found = nearby_config(config)
    return found.run_dir / "admin.sock" if found else DEFAULT_SOCKET


def connect(socket: Path | None, config: Path | None) -> AdminClient:
    """A client of the daemon's admin socket. Raises Unavailable, Forbidden."""
    from agent.commands.admin import AdminClient

    return AdminClient(admin_socket(socket, config))


def ask(socket: Path | None, config: Path | None, command: str, **arguments: Any) -> dict[str, Any]:
    """One command and its result. Raises what the daemon answered."""
    with connect(socket, config) as client:
        return client.call(command, {name: value for name, value in arguments.items() if value is not None})


def watch(socket: Path | None, config: Path | None, task: str) -> Iterator[dict[str, Any]]:
    """A deployment's document whenever it changes, until it has ended. Raises Unavailable if the daemon goes away."""
    with connect(socket, config) as client:
        yield from client.watch(task)
