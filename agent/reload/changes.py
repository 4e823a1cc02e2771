"""What differs between two configurations, and what of it can be put into force without a restart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from agent.config import EFFECTS, Config, Effect
from agent.logs import redact

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Change:
    """One field with two values, as JSON has them and without secrets."""

    field: str
    before: Any
    after: Any
    effect: Effect

    def as_dict(self) -> dict[str, Any]:
        """As the `reload` command answers and the event says."""
        return {"field": self.field, "from": self.before, "to": self.after, "effect": self.effect.value}


def changes(before: Config, after: Config) -> list[Change]:
    """Every field that differs, in the order of the file."""
    old, new = values(before), values(after)
    return [
        Change(field, _shown(old[field]), _shown(new[field]), effect)
        for field, effect in EFFECTS.items()
        if old[field] != new[field]
    ]


def values(config: Config) -> dict[str, Any]:
    """Every field's value as JSON has it, by its path."""
    return dict(_values(config, config.model_dump(mode="json"), ""))


def in_force(running: Config, wanted: Config) -> Config:
    """`wanted`, but with what needs a restart as it is in `running`."""
    return _merged(running, wanted, "")


def _merged(running: M, wanted: M, prefix: str) -> M:
    kept: dict[str, Any] = {}
    for name in type(wanted).model_fields:
        old, new = getattr(running, name), getattr(wanted, name)
        if isinstance(new, BaseModel):
            kept[name] = _merged(old, new, f"{prefix}{name}.")
        elif EFFECTS[f"{prefix}{name}"] is Effect.RESTART:
            kept[name] = old
    return wanted.model_copy(update=kept)


def _values(model: BaseModel, dumped: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _values(value, dumped[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", dumped[name]


def _shown(value: Any) -> Any:
    return redact(None, "", {"value": value})["value"]
