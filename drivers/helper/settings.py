"""/etc/slotd/slot-helper.toml: which devices there are, and what may be done with each. Root's word, not slotd's."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATH = Path("/etc/slotd/slot-helper.toml")
MAX_SETTINGS = 64 << 10
OWNER = 0
"""Who must have written what it goes by: root."""
VERBS = ("clear_errors", "function_reset", "load", "apply_overlay", "remove_overlay")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_PARTS = {
    "fme": re.compile(r"dfl-fme\.\d{1,3}"),
    "port": re.compile(r"dfl-port\.\d{1,3}"),
    "pci": re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]"),
    "pci_id": re.compile(r"[0-9a-f]{4}:[0-9a-f]{4}"),
    "manager": re.compile(r"fpga\d{1,3}"),
}
_NEEDS = {
    "clear_errors": ("fme", "port"),
    "function_reset": ("pci",),
    "load": ("manager",),
    "apply_overlay": ("overlays",),
    "remove_overlay": ("overlays",),
}


class BadSettings(Exception):
    """The settings cannot be used; the message names the field."""


@dataclass(frozen=True)
class Device:
    """One configured device; a part that it does not have is empty."""

    name: str
    verbs: frozenset[str]
    fme: str = ""
    port: str = ""
    pci: str = ""
    pci_id: str = ""
    """vendor:device that must be found at `pci`; empty: whatever is there."""
    manager: str = ""
    flags: frozenset[int] = frozenset({0})
    """Values that `load` may write to the manager's `flags`."""
    max_bitstream: int = 256 << 20
    overlays: Mapping[str, Path] = field(default_factory=dict)
    """Device-tree overlays that root has put on this host, by name."""


@dataclass(frozen=True)
class Settings:
    """All that the helper may touch."""

    user: str = "slotd"
    sysfs: Path = Path("/sys")
    configfs: Path = Path("/sys/kernel/config")
    firmware: Path = Path("/usr/lib/firmware")
    """Where the kernel looks for firmware; bitstreams lie in its folder `slotd` for the moment of a load."""
    devices: Mapping[str, Device] = field(default_factory=dict)


def read_settings(path: Path = PATH) -> Settings:
    """The settings in a file; without one no device is configured. Raises BadSettings."""
    try:
        raw = read_trusted(path, MAX_SETTINGS)
    except FileNotFoundError:
        return Settings()
    try:
        document = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSettings(f"{path} is not TOML: {error}") from None
    return _settings(document)


def read_trusted(path: Path, most: int) -> bytes:
    """A file that root alone can have written. Raises BadSettings, FileNotFoundError."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadSettings(f"{path}: {error.strerror}") from None
    with os.fdopen(number, "rb") as file:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != OWNER or found.st_mode & 0o022:
            raise BadSettings(f"{path} must be a file that belongs to root and that nobody else may write")
        data = file.read(most + 1)
    if len(data) > most:
        raise BadSettings(f"{path} is larger than {most} bytes")
    return data


def _settings(document: dict[str, Any]) -> Settings:
    devices = {}
    for name, entry in _take(document, "devices", dict, {}).items():
        if not _NAME.fullmatch(name):
            raise BadSettings(f"devices.{name}: a name is lower-case letters, digits, - and _, at most 32")
        devices[name] = _device(name, entry)
    settings = Settings(
        user=_take(document, "user", str, "slotd"),
        sysfs=_folder(document, "sysfs", Settings.sysfs),
        configfs=_folder(document, "configfs", Settings.configfs),
        firmware=_folder(document, "firmware", Settings.firmware),
        devices=devices,
    )
    _nothing_else(document, "")
    return settings


def _device(name: str, entry: Any) -> Device:
    where = f"devices.{name}."
    if not isinstance(entry, dict):
        raise BadSettings(f"devices.{name} must be a table")
    entry = dict(entry)
    parts = {}
    for part, form in _PARTS.items():
        parts[part] = _take(entry, part, str, "", where).lower()
        if parts[part] and not form.fullmatch(parts[part]):
            raise BadSettings(f"{where}{part}: {parts[part]!r} has not the form {form.pattern}")
    overlays = {}
    for overlay, path in _take(entry, "overlays", dict, {}, where).items():
        if not _NAME.fullmatch(overlay) or not isinstance(path, str) or not path.startswith("/"):
            raise BadSettings(f'{where}overlays.{overlay}: write name = "/path/of/a/file.dtbo"')
        overlays[overlay] = Path(path)
    flags = _take(entry, "flags", list, [0], where)
    if not all(type(flag) is int and 0 <= flag <= 0xFF for flag in flags):
        raise BadSettings(f"{where}flags: a list of whole numbers from 0 to 255")
    verbs = _take(entry, "verbs", list, [], where)
    for verb in verbs:
        if verb not in VERBS:
            raise BadSettings(f"{where}verbs: {verb!r} is none of {', '.join(VERBS)}")
        if not any(overlays if part == "overlays" else parts[part] for part in _NEEDS[verb]):
            raise BadSettings(f"{where}verbs: {verb} needs {' or '.join(_NEEDS[verb])}")
    most = _take(entry, "max_bitstream", int, 256 << 20, where)
    if not 0 < most <= 1 << 30:
        raise BadSettings(f"{where}max_bitstream: from 1 to {1 << 30} bytes")
    _nothing_else(entry, where)
    return Device(name, frozenset(verbs), **parts, flags=frozenset(flags), max_bitstream=most, overlays=overlays)


def _take(document: dict[str, Any], key: str, kind: type, default: Any, where: str = "") -> Any:
    value = document.pop(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadSettings(f"{where}{key} must be of type {kind.__name__}")
    return value


def _folder(document: dict[str, Any], key: str, default: Path) -> Path:
    path = Path(_take(document, key, str, str(default)))
    if not path.is_absolute() or ".." in path.parts:
        raise BadSettings(f"{key}: an absolute path without ..")
    return path


def _nothing_else(document: dict[str, Any], where: str) -> None:
    for key in document:
        raise BadSettings(f"{where}{key}: there is no such field")
