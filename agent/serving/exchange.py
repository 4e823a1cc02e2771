"""One request's way from wire bytes to wire bytes, the same for each protocol that gRPC carries.

No model knowledge: tensor names go to the dataplane as they came, and its answer's names go back as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from agent.errors import DeadlineExceeded, InvalidInput, Unavailable
from agent.executor.seat import Seat
from agent.model.signature import Strings, Tensor
from agent.serving.binding import ModelFields, check_model
from agent.serving.dataplane import Answer, Dataplane, Request
from agent.serving.forms import Form
from agent.serving.h2.call import Call, Reply
from agent.serving.h2.messages import Room
from agent.serving.parse import LARGE, Parser
from agent.serving.tensorproto import Parsed

T = TypeVar("T")

SLOW_ELEMENTS = 32_768
"""Elements that are encoded one by one on the loop; more of them are encoded in a thread."""


@dataclass(frozen=True)
class Wire:
    """What a protocol makes of requests and answers."""

    form: Form
    check: Callable[[Parsed], None]
    """Raises SlotdError for what it knows and slotd does not serve."""
    encode: Callable[[Answer, Parsed, int], Reply]
    """The reply to a request, of so many bytes at most. Raises Overloaded."""
    one_by_one: Callable[[Tensor], bool]
    """Whether a tensor's elements are encoded one by one."""
    fields: ModelFields


class Exchange:
    """`room`: bytes of requests that may be in hand at one time, the wire's own already taken."""

    def __init__(self, dataplane: Dataplane, parser: Parser, *, max_message: int, room: Room) -> None:
        self._dataplane = dataplane
        self._parser = parser
        self._max_message = max_message
        self._room = room

    async def answer(self, data: bytes | memoryview, call: Call, wire: Wire) -> Reply:
        """The reply to a request. Raises SlotdError."""
        # What a stream's handler has received, the wire counts no more.
        held = len(data) if call.method.streaming is not None else 0
        self._room.take(held)
        try:
            parsed = await self._parser.parse(data, wire.form)
            wire.check(parsed)
            # One value may stand for a whole tensor: what counts is what it has become.
            grown = max(0, sum(tensor.nbytes for tensor in parsed.inputs.values()) - len(data))
            self._room.take(grown)
            held += grown
            answer = await self._dataplane.predict(_request(parsed, len(data), call, wire))
        finally:
            self._room.give(held)
        told = provenance(answer)
        reply = await written(answer, partial(wire.encode, answer, parsed, self._max_message), slow=_slow(answer, wire))
        call.trailing = told
        return reply


def provenance(answer: Answer) -> tuple[tuple[str, str], ...]:
    """Who gave it, as names and values go over the wire."""
    return (
        ("slotd-served-by", answer.served_by),
        ("slotd-model-digest", answer.digest),
        ("slotd-model-version", str(answer.version)),
    )


async def written(answer: Answer, encode: Callable[[], T], *, slow: bool) -> T:
    """What `encode` makes of an answer, in a thread if that is `slow`; its memory is given back whatever happens."""
    if not slow:
        with answer:
            return encode()
    encoding = asyncio.get_running_loop().run_in_executor(None, encode)
    # Not `with`: a caller that is cancelled must not release what the thread still reads.
    encoding.add_done_callback(lambda _: answer.release())
    return await asyncio.shield(encoding)


def served(dataplane: Dataplane, name: str, version: int | None, fields: ModelFields) -> Seat:
    """The model that answers, if it is the one that is meant. Raises NotFound, Unavailable."""
    seat = dataplane.served()
    if seat is None:
        raise Unavailable("no model is served", hint="deploy one: slotd deploy IMAGE", retry_after=1.0)
    check_model(seat.model, name, version, fields)
    return seat


def _request(parsed: Parsed, size: int, call: Call, wire: Wire) -> Request:
    timeout = call.time_remaining()
    if timeout is not None and timeout <= 0:
        raise DeadlineExceeded("the deadline passed before the request was read")
    return Request(
        parsed.inputs,
        model=parsed.model,
        version=parsed.version,
        outputs=parsed.outputs,
        timeout=timeout,
        priority=priority_of(call.metadata),
        size=size,
        fields=wire.fields,
    )


def priority_of(metadata: Iterable[tuple[str, str]]) -> int:
    """What the client says of its request; 0 if nothing. Raises InvalidInput."""
    for key, value in metadata:
        if key == "slotd-priority":
            if len(value) == 1 and value in "0123456789":
                return int(value)
            raise InvalidInput("must be a whole number from 0 to 9", field="slotd-priority")
    return 0


def _slow(answer: Answer, wire: Wire) -> bool:
    size = elements = 0
    for tensor in answer.outputs.values():
        size += tensor.nbytes
        if wire.one_by_one(tensor):
            elements += len(tensor.items) if isinstance(tensor, Strings) else tensor.size
    return size > LARGE or elements > SLOW_ELEMENTS
