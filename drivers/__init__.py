"""Code for one kind of slot each. Imports nothing of the agent."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the slot helper, which is root, starts without it and all that it brings
    from drivers.base import Driver

BUILT_IN = {"simulated": "drivers.simulated:Simulated"}


def make(name: str, options: Mapping[str, Any]) -> Driver:
    """The driver called `name`. Raises ValueError for an unknown name or a wrong option."""
    place = BUILT_IN.get(name)
    if place is None:
        raise ValueError(f"there is no driver {name!r}; known: {', '.join(sorted(BUILT_IN))}")
    module, _, attribute = place.partition(":")
    kind: type[Driver] = getattr(import_module(module), attribute)
    return kind(options)
