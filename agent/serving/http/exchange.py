"""One request's way from a body to a response, the same for each protocol that HTTP carries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from agent.errors import InvalidInput, Oversize, Unimplemented
from agent.executor.seat import Seat
from agent.model.signature import Strings
from agent.serving.binding import ModelFields
from agent.serving.dataplane import Answer, Dataplane
from agent.serving.dataplane import Request as Wanted
from agent.serving.exchange import SLOW_ELEMENTS, priority_of, served
from agent.serving.forms import Form
from agent.serving.h2.messages import Room, in_turn, unpack
from agent.serving.http.messages import Body, Request, Response
from agent.serving.parse import LARGE, Parser
from agent.serving.tensorproto import Parsed

FIELDS = ModelFields("model", "version")
Encode = Callable[[Answer, Parsed], Response]


class Exchange:
    """`room`: bytes of requests that may be in hand at one time, the body's own already taken."""

    def __init__(self, dataplane: Dataplane, parser: Parser, *, most: int, room: Room) -> None:
        self._dataplane = dataplane
        self._parser = parser
        self._most = most
        self._room = room
        self._unpacking = asyncio.Lock()

    def served(self, name: str, version: int | None) -> Seat:
        """The model that answers, if it is the one that is meant. Raises NotFound, Unavailable."""
        return served(self._dataplane, name, version, FIELDS)

    def any_served(self) -> Seat:
        """The model that answers. Raises Unavailable."""
        return served(self._dataplane, "", None, FIELDS)

    async def body(self, request: Request) -> Body:
        """Its bytes, unpacked. Raises InvalidInput, Oversize, Unimplemented."""
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding == "identity":
            return request.body
        if encoding not in ("gzip", "deflate"):
            raise Unimplemented(f"is {encoding[:50]!r}", field="content-encoding", hint="use gzip, deflate or none")
        return await in_turn(self._unpacking, None, unpack, request.body, encoding, self._most)

    async def parse(self, request: Request, form: Form, context: bytes, model: str, version: int | None) -> Parsed:
        """A request for this model. Raises SlotdError."""
        parsed = await self._parser.parse(await self.body(request), form, context)
        return replace(parsed, model=model, version=version)

    async def answer(self, parsed: Parsed, request: Request, encode: Encode) -> Response:
        """Its answer, encoded; who gave it is told in headers. Raises SlotdError."""
        size = sum(tensor.nbytes for tensor in parsed.inputs.values())
        grown = max(0, size - len(request.body))  # packed, or as text, it may be less than what it has become
        self._room.take(grown)
        try:
            wanted = Wanted(
                parsed.inputs,
                model=parsed.model,
                version=parsed.version,
                outputs=parsed.outputs,
                timeout=_timeout(request),
                priority=priority_of(request.headers.items()),
                size=len(request.body),
                fields=FIELDS,
            )
            answer = await self._dataplane.predict(wanted)
        finally:
            self._room.give(grown)
        told = (
            ("slotd-served-by", answer.served_by),
            ("slotd-model-digest", answer.digest),
            ("slotd-model-version", str(answer.version)),
        )
        response = await self._encoded(answer, parsed, encode)
        response.headers += told
        return response

    async def _encoded(self, answer: Answer, parsed: Parsed, encode: Encode) -> Response:
        if not _slow(answer, parsed):
            with answer:
                return self._bounded(encode(answer, parsed))
        encoding = asyncio.get_running_loop().run_in_executor(None, encode, answer, parsed)
        # Not `with`: a caller that is cancelled must not release what the thread still reads.
        encoding.add_done_callback(lambda _: answer.release())
        return self._bounded(await asyncio.shield(encoding))

    def _bounded(self, response: Response) -> Response:
        # As text, a tensor has several times its bytes.
        if (size := sum(map(len, response.body))) > 8 * self._most:
            raise Oversize(f"the reply has {size} bytes", hint="name the outputs that you need, or take them as bytes")
        return response


def _slow(answer: Answer, parsed: Parsed) -> bool:
    size = elements = 0
    for name, tensor in answer.outputs.items():
        size += tensor.nbytes
        if isinstance(tensor, Strings) or not parsed.binary.get(name, parsed.binary.get("", False)):
            elements += len(tensor.items) if isinstance(tensor, Strings) else tensor.size
    return size > LARGE or elements > SLOW_ELEMENTS // 4


def _timeout(request: Request) -> float | None:
    """Seconds that the client gives, in a header as gRPC has one in its protocol."""
    text = request.headers.get("slotd-timeout-ms")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9) or int(text) == 0:
        raise InvalidInput("must be a whole number of milliseconds", field="slotd-timeout-ms")
    return int(text) / 1000
