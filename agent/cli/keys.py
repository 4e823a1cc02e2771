"""`slotd keys`: what clients must send."""

from __future__ import annotations

import os
import pwd
import secrets
from pathlib import Path
from typing import Annotated

import typer

from agent.cli.app import HOST, ConfigOption, JsonOption, app
from agent.cli.output import console, emit, plain

USER = "slotd"


@app.command(rich_help_panel=HOST)
def keys(
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Make a new key; the newest one from before stays good beside it.")
    ] = False,
    file: Annotated[
        Path | None, typer.Option("--file", help="Default: serving.keys of the configuration.", metavar="FILE")
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show which keys are good, by their fingerprints; with --rotate, make a new one and print it.

    To replace a key everywhere: rotate, give the new key to all clients, rotate once more when none has the old one. A
    running slotd takes the file within a second or so.
    """
    from agent.cli.connect import load_config
    from agent.errors import InvalidInput
    from agent.serving.keys import MOST, fingerprint, read_keys

    path = file or load_config(config, embedded=True).serving.keys
    if path is None:
        raise InvalidInput(
            "the configuration names no file with keys",
            field="serving.keys",
            hint="set serving.keys: /etc/slotd/keys, or say --file",
        )
    good = read_keys(path) if path.exists() or not rotate else ()
    made = secrets.token_urlsafe(32) if rotate else None
    if made is not None:
        good = (made, *good)[:MOST]
        _write(path, good)
    if as_json:
        emit({"file": str(path), "key": made, "fingerprints": [fingerprint(key) for key in good]})
        return
    if made is not None:
        console().print(f"new key  {made}", soft_wrap=True, highlight=False)
    for number, key in enumerate(good):
        console().print(f"{'newest ' if number == 0 else 'older  '}  {fingerprint(key)}", highlight=False)
    console().print(f"in       {plain(str(path))}", soft_wrap=True, highlight=False)


def _write(path: Path, good: tuple[str, ...]) -> None:
    """As the file was; a new one is root's, for slotd to read."""
    from agent.images.files import storage_error, write_file

    text = "# Keys of slotd's clients, the newest first; `slotd keys --rotate` makes another one.\n"
    try:
        if path.exists():
            found = path.stat()
            mode, owner = found.st_mode & 0o770, (found.st_uid, found.st_gid)
        else:
            mode, owner = 0o640, (-1, _group())
        write_file(path, (text + "".join(f"{key}\n" for key in good)).encode(), mode=mode, owner=owner)
    except OSError as error:
        raise storage_error(error, f"{path} cannot be written") from error


def _group() -> int:
    """That of the service; -1, which changes nothing, where there is none or we may not give files away."""
    try:
        return pwd.getpwnam(USER).pw_gid if os.geteuid() == 0 else -1
    except KeyError:
        return -1
