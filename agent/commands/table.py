"""The one table of commands: MQTT, the admin socket and the CLI all run these, with the same checks and answers."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from agent.errors import InvalidInput, NotFound
from agent.model.spec import explain


@dataclass(frozen=True)
class Actor:
    """Who asks: `kind` is mqtt, local, desired or boot; `name` says who of these."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}" if self.name else self.kind


class Arguments(BaseModel):
    """The base of every command's arguments: unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


A = TypeVar("A", bound=BaseModel)
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Command(Generic[A]):
    """One command. `changes`: it changes what the host does, so it must not run late or twice."""

    name: str
    help: str
    arguments: type[A]
    changes: bool
    run: Callable[[A, Actor], Awaitable[dict[str, Any]]]

    def schema(self) -> dict[str, Any]:
        """The arguments as JSON Schema."""
        return self.arguments.model_json_schema()


class Table:
    """Commands by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._commands: dict[str, Command[Any]] = {}

    def add(self, command: Command[Any]) -> None:
        """Raises ValueError for a name that is taken."""
        if command.name in self._commands:
            raise ValueError(f"there is a command {command.name!r} already")
        self._commands[command.name] = command

    def __iter__(self) -> Iterator[Command[Any]]:
        return iter(self._commands.values())

    def __contains__(self, name: object) -> bool:
        return name in self._commands

    def get(self, name: str) -> Command[Any]:
        """Raises NotFound, with the names that are near."""
        command = self._commands.get(name)
        if command is None:
            near = difflib.get_close_matches(name, self._commands, 3)
            raise NotFound(
                f"there is no command {name[:64]!r}",
                field="command",
                hint=f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(self._commands)}",
            )
        return command

    async def run(self, name: str, arguments: Mapping[str, Any], actor: Actor) -> dict[str, Any]:
        """Check and run. Raises NotFound, InvalidInput naming the argument, or what the command raises."""
        command = self.get(name)
        try:
            checked = command.arguments.model_validate(dict(arguments))
        except ValidationError as error:
            field, message = explain(error)
            known = ", ".join(command.arguments.model_fields) or "none"
            raise InvalidInput(message, field=field or "arguments", hint=f"{name} takes: {known}") from None
        return await command.run(checked, actor)
