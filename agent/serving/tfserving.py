"""tensorflow.serving.PredictionService over a dataplane: wire bytes in, wire bytes out, errors as clients expect them.

No model knowledge: tensor names go to the dataplane as they came, and its answer's names go back as they are.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable
from typing import Any, NoReturn

import grpc
import structlog

from agent.errors import DeadlineExceeded, InvalidInput, NotFound, Overloaded, SlotdError, Unavailable
from agent.model.signature import DType, Strings, dtype_of
from agent.scope import scope
from agent.serving.dataplane import Answer, Dataplane, Request
from agent.serving.encode import SIGNATURE_NAME, encode_response
from agent.serving.parse import LARGE, Parser
from agent.serving.tensorproto import Parsed, short

log = structlog.get_logger(__name__)

SERVICE = "tensorflow.serving.PredictionService"
SLOW_ELEMENTS = 32_768
"""Strings and integers that are encoded on the loop; more of them are encoded in a thread."""
_RUN = os.urandom(3).hex()
_numbers = itertools.count(1)
MAX_TEXT = 1000
"""Bytes of each text of an error: clients take 8 KiB of headers, and a byte beyond ASCII becomes three."""


class PredictionService(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """The handler to add to a grpc.aio server. `held`: bytes of requests that may be in hand at one time."""

    def __init__(self, dataplane: Dataplane, parser: Parser, *, max_message: int, held: int) -> None:
        self._dataplane = dataplane
        self._parser = parser
        self._max_message = max_message
        self._room = held
        self._handlers = {f"/{SERVICE}/Predict": grpc.unary_unary_rpc_method_handler(self._predict)}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(details.method)

    async def _predict(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return await answered(context, self._answer(data, context))

    async def _answer(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        held = self._hold(len(data))
        try:
            parsed = await self._parser.parse(data)
            # One value may stand for a whole tensor: what counts is what it has become.
            held += self._hold(max(0, sum(tensor.nbytes for tensor in parsed.inputs.values()) - held))
            answer = await self._dataplane.predict(_request(parsed, len(data), context))
        finally:
            self._room += held
        told = (
            ("slotd-served-by", answer.served_by),
            ("slotd-model-digest", answer.digest),
            ("slotd-model-version", str(answer.version)),
        )
        reply = await self._encode(answer)
        context.set_trailing_metadata(told)
        return reply

    def _hold(self, size: int) -> int:
        if size > self._room:
            raise Overloaded("too many bytes of requests are in hand", retry_after=0.1)
        self._room -= size
        return size

    async def _encode(self, answer: Answer) -> bytes:
        """The reply; the answer's memory is given back whatever happens."""
        if not _slow(answer):
            with answer:
                return self._encoded(answer)
        encoding = asyncio.get_running_loop().run_in_executor(None, self._encoded, answer)
        # Not `with`: a caller that is cancelled must not release what the thread still reads.
        encoding.add_done_callback(lambda _: answer.release())
        return await asyncio.shield(encoding)

    def _encoded(self, answer: Answer) -> bytes:
        return encode_response(answer.outputs, name=answer.name, version=answer.version, most=self._max_message)


async def answered(context: grpc.aio.ServicerContext, answer: Awaitable[bytes]) -> bytes:
    """The answer, its errors as gRPC statuses. What nobody foresaw is logged, and told without its details."""
    number = f"{_RUN}-{next(_numbers)}"
    with scope(request=number):
        try:
            return await answer
        except SlotdError as error:
            if error.grpc == "INTERNAL":
                log.error("request_failed", code=error.code, error=str(error), peer=context.peer())
            await _abort(context, error)
        except Exception:
            log.exception("request_failed", peer=context.peer())
            told = SlotdError(f"an error inside slotd; its log has request {number}")
            await _abort(context, told, ("slotd-request-id", number))


async def _abort(context: grpc.aio.ServicerContext, error: SlotdError, *more: tuple[str, str]) -> NoReturn:
    metadata = [("slotd-error-code", error.code), *more]
    if error.field:
        metadata.append(("slotd-error-field", _header(error.field)))
    if error.hint:
        metadata.append(("slotd-error-hint", _header(error.hint)))
    if error.retry_after is not None and isinstance(error, Overloaded | Unavailable):
        wait = str(max(1, round(error.retry_after * 1000)))
        # The first is for people and scripts, the second is what gRPC's own retries obey.
        metadata += [("retry-pushback-ms", wait), ("grpc-retry-pushback-ms", wait)]
    await context.abort(grpc.StatusCode[error.grpc], _cut(str(error)), tuple(metadata))
    raise AssertionError("abort always raises")


def _cut(text: str) -> str:
    return text.encode()[:MAX_TEXT].decode(errors="ignore")


def _header(text: str) -> str:
    """As a metadata value may be: printable ASCII."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:MAX_TEXT]).strip()


def _request(parsed: Parsed, size: int, context: grpc.aio.ServicerContext) -> Request:
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
    timeout = context.time_remaining()
    if timeout is not None and timeout <= 0:
        raise DeadlineExceeded("the deadline passed before the request was read")
    return Request(
        parsed.inputs,
        model=parsed.model,
        version=parsed.version,
        outputs=parsed.outputs,
        timeout=timeout,
        priority=_priority(context.invocation_metadata()),
        size=size,
    )


def _priority(metadata: Any) -> int:
    for key, value in metadata or ():
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
