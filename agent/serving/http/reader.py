"""Requests out of bytes, strictly: what could be read in two ways is refused, and nothing takes longer than its length.

Source: RFC 9112. No line folding, no bare line feeds, one Host, one Content-Length, no transfer coding but `chunked`.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote

from agent.errors import InvalidInput, Unimplemented

MAX_HEAD = 32 << 10
"""Bytes of a request line and its headers; of trailers."""
MAX_FIELDS = 100
MAX_LINE = 256
"""Bytes of the line before a chunk."""
METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS")
TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CONTROLS = bytes([*range(9), *range(10, 32), 127])
_SPACES = bytes(range(33))
_HEX = b"0123456789abcdefABCDEF"
_SINGLE = ("authorization", "content-encoding", "content-type", "host", "slotd-priority", "slotd-timeout-ms")


@dataclass(frozen=True, slots=True)
class Head:
    """A request without its body. `length` is None if that comes in chunks; `keep`: the connection may go on."""

    method: str
    path: str
    headers: dict[str, str]
    length: int | None
    keep: bool
    waits: bool
    """The client sends no body before it is told to."""


def read_head(data: bytes) -> Head:
    """All up to, and without, the empty line. Raises InvalidInput, Unimplemented: the connection is of no use then."""
    first, *lines = data.split(b"\r\n")
    parts = first.split(b" ")
    if len(parts) != 3 or not parts[1] or parts[1].translate(None, _SPACES) != parts[1]:
        raise InvalidInput("this is no HTTP/1.1", field="request")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise Unimplemented("only HTTP/1.1 is spoken here", field="request")
    if method not in METHODS:
        raise Unimplemented(f"there is no method {_shown(method)}", field="request")
    if len(lines) > MAX_FIELDS:
        raise InvalidInput(f"has more than {MAX_FIELDS} headers", field="request", hint="send fewer")
    modern = version == b"HTTP/1.1"
    headers = _fields(lines)
    if modern and "host" not in headers:
        raise InvalidInput("is missing", field="host")
    length = _length(headers, modern)
    connection = [word.strip() for word in headers.get("connection", "").lower().split(",")]
    keep = "close" not in connection and (modern or "keep-alive" in connection)
    waits = modern and length != 0 and headers.get("expect", "").lower() == "100-continue"
    return Head(method.decode(), path_of(target), headers, length, keep, waits)


def _fields(lines: list[bytes]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        raw, found, value = line.partition(b":")
        if not found or not raw or raw.translate(None, TOKEN):
            raise InvalidInput(f"has no header in {_shown(line)}", field="request")
        value = value.strip(b" \t")
        if len(value.translate(None, _CONTROLS)) != len(value):
            raise InvalidInput("has a control character", field=raw.decode().lower()[:100])
        name, text = raw.decode().lower(), value.decode("latin-1")
        before = headers.get(name)
        if before is not None and (name in _SINGLE or name in ("content-length", "transfer-encoding")):
            raise InvalidInput("is given twice", field=name)
        headers[name] = text if before is None else f"{before}, {text}"
    return headers


def _length(headers: dict[str, str], modern: bool) -> int | None:
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or not modern:
            raise InvalidInput("goes with neither Content-Length nor HTTP/1.0", field="transfer-encoding")
        if coding.lower() != "chunked":
            raise Unimplemented(f"is {coding[:50]!r}", field="transfer-encoding", hint="send Content-Length, or chunks")
        return None
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit() and len(length) <= 18):
        raise InvalidInput("is no number of bytes", field="content-length")
    return int(length)


def read_chunk(line: bytes) -> int:
    """The length of a chunk, from the line before it. Raises InvalidInput."""
    size = line.partition(b";")[0].rstrip(b" \t")
    if not 1 <= len(size) <= 8 or size.translate(None, _HEX) or line.translate(None, _CONTROLS) != line:
        raise InvalidInput("has no length before a chunk", field="request")
    return int(size, 16)


def path_of(target: bytes) -> str:
    """Decoded, without the query. Raises InvalidInput."""
    try:
        text = target.decode("ascii")
        if not text.startswith("/"):  # absolute-form
            _, found, text = text.partition("://")
            text = "/" + text.partition("/")[2] if found else ""
        if not text:
            raise ValueError
        return unquote(text.partition("?")[0].partition("#")[0], errors="strict")
    except ValueError:  # includes what is no text
        raise InvalidInput("is no path", field="request") from None


def _shown(data: bytes) -> str:
    return repr(data[:40].decode("latin-1"))
