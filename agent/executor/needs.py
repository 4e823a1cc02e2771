"""What a driver says that it needs, as what its children are granted."""

from __future__ import annotations

from collections.abc import Sequence

from agent.executor.sandbox import Grants
from drivers.base import Needs


def grants_of(needs: Needs, *, read: Sequence[str] = ()) -> Grants:
    """For a child that runs a driver's code; `read` comes on top.

    A child of root keeps its capabilities: the device's own driver in the kernel decides which of them it wants.
    """
    return Grants(
        read=(*read, *map(str, needs.read)),
        write=tuple(map(str, needs.write)),
        devices=tuple(map(str, needs.devices)),
        execute=tuple(map(str, needs.execute)),
        unix=bool(needs.connect),
        capabilities=None,
    )
