"""One request's way from a body to a response, the same for each protocol that HTTP carries."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from agent.errors import DeadlineExceeded, InvalidInput, Unimplemented
from agent.executor.seat import Seat
from agent.model.signature import Strings
from agent.serving.binding import ModelFields
from agent.serving.dataplane import Answer, Dataplane
from agent.serving.dataplane import Request as Wanted
from agent.serving.encode import put_together
from agent.serving.exchange import priority_of, provenance, served, written
from agent.serving.forms import Form
from agent.serving.h2.messages import Room, in_turn, unpack
from agent.serving.handover import write_all
from agent.serving.http.messages import Body, Request, Response
from agent.serving.parse import LARGE, Parser
from agent.serving.tensorproto import Parsed

FIELDS = ModelFields("model", "version")
Read = Callable[[Body], Awaitable[Parsed]]
Encode = Callable[[Answer, Parsed], Response]
_COPIED = 1 << 20
_FEW = 128
"""Strings, or lists of all outputs together, that are written on the loop."""
_FEW_ELEMENTS = 8192
_FEW_BYTES = 64 << 10


class Exchange:
    """`room`: bytes of requests that may be in hand at one time, the body's own already taken."""

    def __init__(self, dataplane: Dataplane, parser: Parser, *, most: int, room: Room) -> None:
        self._dataplane = dataplane
        self._parser = parser
        self._most = most
        self._room = room
        self._unpacking = asyncio.Lock()

    def served(self, name: str, version: int | None) -> Seat:
        """The model that answers, if it is the one that is meant; no name is any. Raises NotFound, Unavailable."""
        return served(self._dataplane, name, version, FIELDS)

    def reader(self, form: Form, context: bytes, model: str, version: int | None) -> Read:
        """Reads bodies of a form as requests for this model."""

        async def read(body: Body) -> Parsed:
            return replace(await self._parser.parse(body, form, context), model=model, version=version)

        return read

    async def answer(self, request: Request, read: Read, encode: Encode) -> Response:
        """Its answer, encoded; who gave it is told in headers. Raises SlotdError."""
        timeout = _timeout(request)
        deadline = None if timeout is None else request.received + timeout
        held = 0
        try:
            try:
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    body = request.body
                    if (packed := await self._unpacked(request)) is not None:
                        body = packed
                        self._room.take(len(body))
                        held = len(body)
                    parsed = await read(body)
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed before the request was read") from None
            # Packed, or as text, it may have been less than what it has become.
            grown = max(0, sum(tensor.nbytes for tensor in parsed.inputs.values()) - len(body))
            self._room.take(grown)
            held += grown
            left = None if deadline is None else deadline - time.monotonic()
            wanted = Wanted(
                parsed.inputs,
                model=parsed.model,
                version=parsed.version,
                outputs=parsed.outputs,
                timeout=left,
                priority=priority_of(request.headers.items()),
                size=len(body),
                fields=FIELDS,
            )
            answer = await self._dataplane.predict(wanted)
        finally:
            self._room.give(held)
        told = provenance(answer)
        response = await written(answer, partial(self._response, encode, answer, parsed), slow=_slow(answer, parsed))
        response.headers += told
        return response

    async def _unpacked(self, request: Request) -> bytes | None:
        """The body, if it came packed. Raises InvalidInput, Oversize, Unimplemented."""
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding == "identity":
            return None
        if encoding not in ("gzip", "deflate"):
            raise Unimplemented(f"is {encoding[:50]!r}", field="content-encoding", hint="use gzip, deflate or none")
        return await in_turn(self._unpacking, None, unpack, request.body, encoding, self._most)

    def _response(self, encode: Encode, answer: Answer, parsed: Parsed) -> Response:
        """In one piece; a large one is put together without Python's lock."""
        response = encode(answer, parsed)
        response.body = (put_together(list(response.body), 4 * self._most),)  # as text it has several times its bytes
        return response


async def as_bytes(body: Body) -> bytes:
    """A copy, made without Python's lock if it is large."""
    if isinstance(body, bytes):
        return body
    return bytes(body) if len(body) <= _COPIED else await asyncio.to_thread(_copied, body)


def _copied(body: memoryview) -> bytes:
    memory = os.memfd_create("body", os.MFD_CLOEXEC)
    try:
        write_all(memory, body, 0)
        return os.pread(memory, len(body), 0)
    finally:
        os.close(memory)


def _slow(answer: Answer, parsed: Parsed) -> bool:
    """Whether it takes more than a millisecond to write it."""
    size = text = elements = strings = lists = 0
    for name, tensor in answer.outputs.items():
        size += tensor.nbytes
        if not isinstance(tensor, Strings) and parsed.binary.get(name, parsed.binary.get("", False)):
            continue
        # A list of nothing is something, and each list takes a step of its own.
        inner = math.prod(max(1, length) for length in tensor.shape[:-1])
        count = inner * max(1, tensor.shape[-1] if tensor.shape else 1)
        lists += inner
        if isinstance(tensor, Strings):
            strings, text = strings + count, text + tensor.nbytes
        else:
            elements += count
    return size > LARGE or text > _FEW_BYTES or elements > _FEW_ELEMENTS or max(strings, lists) > _FEW


def _timeout(request: Request) -> float | None:
    """Seconds that the client gives, in a header as gRPC has one in its protocol."""
    text = request.headers.get("slotd-timeout-ms")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9) or int(text) == 0:
        raise InvalidInput("must be a whole number of milliseconds", field="slotd-timeout-ms")
    return int(text) / 1000
