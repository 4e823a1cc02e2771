"""The one table of commands: MQTT, the admin socket and the CLI run what is in it. It knows no wire format."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from agent.errors import InvalidInput, NotFound, SlotdError

log = structlog.get_logger(__name__)

M = TypeVar("M", bound=BaseModel)
Result = dict[str, Any]


@dataclass(frozen=True)
class Actor:
    """Who asked for something; kept with every deployment, command and change."""

    kind: Literal["mqtt", "local", "desired", "boot"]
    name: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}" if self.name else self.kind


class Arguments(BaseModel):
    """What a command takes. Unknown names are refused, and a "true" is no true."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Command:
    """One command. `changes`: it changes something, so that it must not run twice, or late."""

    name: str
    help: str
    arguments: type[BaseModel]
    changes: bool
    run: Callable[[Any, Actor], Awaitable[Result]]
    """Called with a valid instance of `arguments`. Raises SlotdError."""

    def schema(self) -> Result:
        """The JSON Schema of the arguments."""
        return self.arguments.model_json_schema()


class Table:
    """Commands by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}

    def add(self, command: Command) -> None:
        """Raises ValueError for a name that is taken."""
        if command.name in self._commands:
            raise ValueError(f"there is a command {command.name!r} already")
        self._commands[command.name] = command

    def __iter__(self) -> Iterator[Command]:
        return iter(self._commands.values())

    def __contains__(self, name: object) -> bool:
        return name in self._commands

    def get(self, name: str) -> Command:
        """Raises NotFound, naming commands with a similar name."""
        command = self._commands.get(name)
        if command is None:
            near = difflib.get_close_matches(name[:64], self._commands, n=3, cutoff=0.55)
            raise NotFound(
                f"there is no command {_shown(name)}",
                field="command",
                hint=f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(self._commands)}",
            )
        return command

    async def run(self, name: str, arguments: Mapping[str, Any], actor: Actor) -> Result:
        """Runs a command. Raises NotFound, InvalidInput naming the argument at fault, and what the command raises.

        A fault of our own becomes a SlotdError without its details; the log has them.
        """
        command = self.get(name)
        checked = check(name, command.arguments, arguments)
        try:
            return await command.run(checked, actor)
        except SlotdError:
            raise
        except Exception as fault:
            log.exception("a command failed in an unforeseen way", command=name, actor=str(actor))
            raise SlotdError(
                f"{name} failed in an unforeseen way ({type(fault).__name__})", hint="the log of slotd has the details"
            ) from fault


def check(name: str, model: type[M], arguments: Mapping[str, Any]) -> M:
    """The arguments of the command `name` as its model has them. Raises InvalidInput naming the one at fault."""
    if not isinstance(arguments, Mapping):
        raise InvalidInput("must be a mapping of names to values", field="arguments")
    try:
        return model.model_validate(dict(arguments))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
    first = faults[0]
    field = ".".join(str(part) for part in first["loc"])[:128]
    message = first["msg"].removeprefix("Value error, ")
    known = list(model.model_fields)
    hint = f"{name} takes {', '.join(known)}" if known else f"{name} takes no arguments"
    if first["type"] == "extra_forbidden":
        message = "is no argument of this command"
        near = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {near[0]}?" if near else hint
    elif first["type"] == "missing":
        message = "is missing"
    if len(faults) > 1:
        message += f" (and {len(faults) - 1} more)"
    raise InvalidInput(message, field=field or "arguments", hint=hint)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:64] + "…")
