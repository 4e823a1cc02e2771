"""tensorflow.serving.PredictionService over a dataplane: wire bytes in, wire bytes out, errors as clients expect them.

No model knowledge: tensor names go to the dataplane as they came, and its answer's names go back as they are.
"""

from __future__ import annotations

import asyncio

from agent.errors import DeadlineExceeded, InvalidInput, NotFound
from agent.model.signature import DType, Strings, dtype_of
from agent.serving.dataplane import Answer, Dataplane, Request
from agent.serving.encode import SIGNATURE_NAME, encode_response
from agent.serving.h2.call import Call, Metadata, Method, Reply
from agent.serving.h2.messages import Room
from agent.serving.parse import LARGE, Parser
from agent.serving.tensorproto import Parsed, short

SERVICE = "tensorflow.serving.PredictionService"
SLOW_ELEMENTS = 32_768
"""Strings and integers that are encoded on the loop; more of them are encoded in a thread."""


class PredictionService:
    """`room`: bytes of requests that may be in hand at one time, the wire's own already taken."""

    def __init__(self, dataplane: Dataplane, parser: Parser, *, max_message: int, room: Room) -> None:
        self._dataplane = dataplane
        self._parser = parser
        self._max_message = max_message
        self._room = room
        self.routes = {f"/{SERVICE}/Predict": Method(unary=self._predict)}

    async def _predict(self, data: bytes | memoryview, call: Call) -> Reply:
        parsed = await self._parser.parse(data)
        # One value may stand for a whole tensor: what counts is what it has become.
        grown = max(0, sum(tensor.nbytes for tensor in parsed.inputs.values()) - len(data))
        self._room.take(grown)
        try:
            answer = await self._dataplane.predict(_request(parsed, len(data), call))
        finally:
            self._room.give(grown)
        told = (
            ("slotd-served-by", answer.served_by),
            ("slotd-model-digest", answer.digest),
            ("slotd-model-version", str(answer.version)),
        )
        reply = await self._encode(answer)
        call.trailing = told
        return reply

    async def _encode(self, answer: Answer) -> Reply:
        """The reply; the answer's memory is given back whatever happens."""
        if not _slow(answer):
            with answer:
                return self._encoded(answer)
        encoding = asyncio.get_running_loop().run_in_executor(None, self._encoded, answer)
        # Not `with`: a caller that is cancelled must not release what the thread still reads.
        encoding.add_done_callback(lambda _: answer.release())
        return await asyncio.shield(encoding)

    def _encoded(self, answer: Answer) -> Reply:
        return encode_response(answer.outputs, name=answer.name, version=answer.version, most=self._max_message)


def _request(parsed: Parsed, size: int, call: Call) -> Request:
    if parsed.label is not None:
        raise NotFound(
            f"no version is labelled {short(parsed.label)!r}; labels are not supported",
            field="model_spec.version_label",
            hint="leave version_label out, or set version",
        )
    if parsed.signature not in ("", SIGNATURE_NAME):
        raise InvalidInput(
            f"there is no signature {short(parsed.signature)!r}, only {SIGNATURE_NAME!r}",
            field="model_spec.signature_name",
        )
    timeout = call.time_remaining()
    if timeout is not None and timeout <= 0:
        raise DeadlineExceeded("the deadline passed before the request was read")
    return Request(
        parsed.inputs,
        model=parsed.model,
        version=parsed.version,
        outputs=parsed.outputs,
        timeout=timeout,
        priority=_priority(call.metadata),
        size=size,
    )


def _priority(metadata: Metadata) -> int:
    for key, value in metadata:
        if key == "slotd-priority":
            if len(value) == 1 and value in "0123456789":
                return int(value)
            raise InvalidInput("must be a whole number from 0 to 9", field="slotd-priority")
    return 0


def _slow(answer: Answer) -> bool:
    size = elements = 0
    for tensor in answer.outputs.values():
        size += tensor.nbytes
        if isinstance(tensor, Strings):
            elements += len(tensor.items)
        elif dtype_of(tensor) not in (DType.FLOAT32, DType.FLOAT64, DType.BOOL):
            elements += tensor.size
    return size > LARGE or elements > SLOW_ELEMENTS
