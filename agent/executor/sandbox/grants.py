"""What one child may use beyond what every child may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Capability numbers (capabilities(7)). They matter only where slotd runs as root.
DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER = 1, 2, 3


@dataclass(frozen=True)
class Grants:
    """Paths are of files or folders; a folder stands for all that is in it. One that is not there grants nothing."""

    read: tuple[str, ...] = ()
    """Read."""
    write: tuple[str, ...] = ()
    """Folders in which it may make, change and remove files; one that is not there is made if the folder
    around it is."""
    devices: tuple[str, ...] = ()
    """Device nodes: read, write, ioctl."""
    execute: tuple[str, ...] = ()
    """Programs that it may start, which stay inside the same sandbox."""
    network: bool = False
    """TCP and UDP to anywhere, as a client."""
    unix: bool = False
    """Connect to Unix sockets; the kernel cannot be told which."""
    capabilities: tuple[int, ...] | None = ()
    """Those that a child of root keeps; None for all."""

    def as_dict(self) -> dict[str, Any]:
        """For the hello."""
        return asdict(self)

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Grants:
        """Back from `as_dict`, also by way of JSON."""
        known = {field.name for field in fields(cls)}
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in document.items()
            if name in known
        }
        return cls(**plain)
