"""Where the configuration comes from at a start: the file, or else the last one that came up.

`config.good.yaml` in the state folder is written when all of a configuration is in force. It holds the file's text, and
before it a line that says whose it is and its hash, so that a damaged one is not taken for a configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from agent.config import DEFAULT_PATH, MAX_BYTES, Config, ConfigFile, invalid, parse_config, read_file, read_text
from agent.errors import InvalidConfig
from agent.images.files import storage_error, sync_folder
from agent.model.documents import parse_yaml

GOOD = "config.good.yaml"
EMBEDDED = "link: {host: ''}"
"""What `--embedded` takes if there is no file."""
_HEAD = "# The last configuration that came up. Written by slotd, for a start without a valid file: "


@dataclass(frozen=True)
class Loaded:
    """A configuration and where it is from. `fault` says why the file was not taken."""

    config: Config
    path: Path
    text: str
    source: Literal["file", "good", "defaults"] = "file"
    embedded: bool = False
    """Whether `--embedded` was said; holds for every file that is read later."""
    fault: InvalidConfig | None = None

    @property
    def sha256(self) -> str:
        """Of the text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read(path: Path, *, embedded: bool = False, early: Callable[[Path], None] | None = None) -> ConfigFile:
    """A valid file, which the driver takes too; before the driver is asked, `early` is called with the state folder.

    Raises InvalidConfig with every field at fault.
    """
    file = read_file(path, embedded=embedded)
    if early is not None:
        early(file.config.state_dir)
    check_driver(file.config, str(path))
    return file


def check_driver(config: Config, where: str) -> None:
    """Whether there is such a driver and it takes its options. Raises InvalidConfig."""
    from drivers import make

    try:
        make(config.slot.driver, config.driver_options)
    except ValueError as error:
        raise invalid([("slot", str(error))], where) from None


def load(path: Path | None, *, embedded: bool = False, early: Callable[[Path], None] | None = None) -> Loaded:
    """What `slotd run` starts with; `early` as for `read`.

    Raises InvalidConfig with the faults of the file if there is no good one either.
    """
    chosen = (path or DEFAULT_PATH).absolute()
    if path is None and embedded and not os.path.lexists(chosen):
        config = parse_config(EMBEDDED, where="--embedded", embedded=True)
        return Loaded(config, chosen, EMBEDDED, "defaults", embedded)
    try:
        file = read(chosen, embedded=embedded, early=early)
    except InvalidConfig as fault:
        good = read_good(state_folder(chosen), chosen, embedded=embedded)
        if good is None:
            raise
        return Loaded(good.config, chosen, good.text, "good", embedded, fault)
    return Loaded(file.config, chosen, file.text, "file", embedded)


def glance(path: Path) -> dict[str, Any]:
    """What can be read of a file that need not be valid: its top level, empty if it is not even that."""
    try:
        document = parse_yaml(read_text(path))
    except (InvalidConfig, ValueError, yaml.YAMLError):
        return {}
    return document if isinstance(document, dict) else {}


def state_folder(path: Path) -> Path:
    """Where the state is, if the file is invalid: as it says if it can, else as systemd says, else the default."""
    told = glance(path).get("state_dir")
    if isinstance(told, str) and told.startswith("/") and "\0" not in told:
        return Path(told)
    service = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(service) if service.startswith("/") else Path(str(Config.model_fields["state_dir"].default))


# --- the last good one ------------------------------------------------------------------------------------------------


def read_good(state_dir: Path, path: Path, *, embedded: bool = False) -> ConfigFile | None:
    """The last one that came up from `path`; None if there is none, or none that is whole, valid and meant for it."""
    try:
        with (state_dir / GOOD).open("rb") as file:
            head, _, text = file.read(MAX_BYTES + 4096).decode().partition("\n")
        note = json.loads(head.removeprefix(_HEAD))
        if not head.startswith(_HEAD) or note["sha256"] != hashlib.sha256(text.encode()).hexdigest():
            return None
        if note["path"] != str(path):
            return None
        config = parse_config(text, where=str(state_dir / GOOD), embedded=embedded)
        check_driver(config, str(state_dir / GOOD))
    except (OSError, ValueError, KeyError, TypeError, InvalidConfig):
        return None
    if os.path.realpath(config.state_dir) != os.path.realpath(state_dir):  # of another host, or of another life of ours
        return None
    return ConfigFile(state_dir / GOOD, text, config)


def write_good(state_dir: Path, path: Path, text: str) -> None:
    """Replaces it at once and for good. Blocking. Raises StorageError; then the one before is still there."""
    note = {"path": str(path), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    content = f"{_HEAD}{json.dumps(note)}\n{text}".encode()
    beside = state_dir / f"{GOOD}.new"
    try:
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(state_dir / GOOD)
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                beside.unlink(missing_ok=True)
            raise
        sync_folder(state_dir)
    except OSError as error:
        raise storage_error(error, f"{state_dir / GOOD} cannot be written") from None
