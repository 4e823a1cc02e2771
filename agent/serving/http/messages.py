"""What a request and a response are, and what is said of an error."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

import orjson

from agent.errors import Overloaded, SlotdError, Unauthenticated, Unavailable

Body = bytes | memoryview
JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
BINARY = "application/octet-stream"
MAX_TEXT = 1000
"""Characters of an error's text."""


@dataclass(frozen=True, slots=True)
class Request:
    """`headers` by their names in lower case; `path` is decoded, without the query."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Body = b""
    received: float = field(default_factory=time.monotonic)
    """When all of it was there, by the monotonic clock."""

    @property
    def content_type(self) -> str:
        """In lower case, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(slots=True)
class Response:
    """`headers` beside Content-Type and Content-Length."""

    status: int = 200
    body: Sequence[Body] = ()
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    text: str = field(default="", repr=False)
    """The body, if that is a text."""

    def bytes(self) -> list[Body]:
        """The body."""
        return [self.text.encode()] if self.text else list(self.body)

    def head(self, body: Sequence[Body], *, last: bool) -> Body:
        """All that comes before the body; `last`: the connection ends with this one."""
        lines = [
            f"HTTP/1.1 {self.status} {_REASONS.get(self.status, 'Error')}",
            f"content-type: {self.content_type}",
            f"content-length: {sum(map(len, body))}",
            "x-content-type-options: nosniff",
            *(f"{name}: {printable(value)}" for name, value in self.headers),
            *(["connection: close"] if last else []),
        ]
        return "\r\n".join((*lines, "", "")).encode()


Answer = Callable[[Request], Awaitable[Response]]
"""What answers requests. Raises SlotdError."""

_REASONS = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}


def json_response(document: object, *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """A small document."""
    return Response(status, (orjson.dumps(document),), headers=headers)


def error_response(error: SlotdError) -> Response:
    """`error` is what TensorFlow Serving's and KServe's clients show; the rest is for those who look further."""
    document = {"error": _text(str(error)), "code": error.code}
    for name in ("field", "hint"):
        if (value := getattr(error, name)) is not None:
            document[name] = _text(value)
    headers: tuple[tuple[str, str], ...] = ()
    if error.retry_after is not None and isinstance(error, Overloaded | Unavailable):
        headers = (("retry-after", str(max(1, math.ceil(error.retry_after)))),)
    elif isinstance(error, Unauthenticated):
        headers = (("www-authenticate", "Bearer"),)
    return json_response(document, status=error.http, headers=headers)


def _text(text: str) -> str:
    """What a client sent may be quoted, and need be no Unicode."""
    return text[:MAX_TEXT].encode(errors="replace").decode()


def printable(text: str) -> str:
    """As a header's value may be."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text).strip()
