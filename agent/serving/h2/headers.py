"""Header blocks: read by `hpack`, whose answer is kept for blocks that come again; ours are written without a table.

A gRPC client sends the same few bytes for each call on a connection once the table is filled, so that most blocks are
looked up rather than read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import hpack

from agent.serving.h2.frames import COMPRESSION_ERROR, ENHANCE_YOUR_CALM, ConnectionFault

MAX_BLOCK = 16 << 10
"""Bytes of a header block as it is sent; more end the connection."""
MAX_LIST = 64 << 10
"""Bytes of headers that a block may stand for."""
_KEPT_BLOCKS = 64
_KEPT_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Headers:
    """Of one request. `fault`: what is wrong with them by RFC 9113, section 8; then the rest may be missing."""

    method: str = ""
    path: str = ""
    content_type: str = ""
    encoding: str = ""
    timeout: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    size: int = 0
    fault: str | None = None


class HeaderReader:
    """Of one connection: blocks must be handed to it in the order in which they came, all of them."""

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=MAX_LIST)
        self._kept: dict[bytes, Headers] = {}

    def read(self, block: bytes) -> Headers:
        """Raises ConnectionFault: the table is lost then."""
        known = self._kept.get(block)
        if known is not None:
            return known
        table = self._decoder.header_table
        entries = table.dynamic_entries
        before = (len(entries), entries[0] if entries else None, table.maxsize)
        try:
            found = self._decoder.decode(block)
        except hpack.OversizedHeaderListError:
            raise ConnectionFault(ENHANCE_YOUR_CALM, f"headers of more than {MAX_LIST} bytes") from None
        except hpack.HPACKError as error:
            raise ConnectionFault(COMPRESSION_ERROR, f"headers that cannot be read: {error}") from None
        headers = _headers([(str(name), str(value)) for name, value in found])
        if (len(entries), entries[0] if entries else None, table.maxsize) != before:
            self._kept.clear()  # the same bytes may stand for something else now
        elif len(block) <= _KEPT_BYTES and len(self._kept) < _KEPT_BLOCKS:
            self._kept[block] = headers
        return headers


def _headers(fields: list[tuple[str, str]]) -> Headers:
    pseudo: dict[str, str] = {}
    plain: dict[str, str] = {}
    metadata: list[tuple[str, str]] = []
    size = 0
    for name, value in fields:
        size += len(name) + len(value) + 32
        if name.startswith(":"):
            if name in pseudo or metadata or name not in (":method", ":scheme", ":path", ":authority"):
                return Headers(fault=f"the header {name[:50]!r} has no place here")
            pseudo[name] = value
            continue
        if name != name.lower() or not name:
            return Headers(fault="header names must be in lower case")
        if name in ("connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"):
            return Headers(fault=f"the header {name!r} has no place in HTTP/2")
        plain.setdefault(name, value)
        metadata.append((name, value))
    if not all(pseudo.get(name) for name in (":method", ":scheme", ":path")):
        return Headers(fault=":method, :scheme or :path is missing")
    return Headers(
        pseudo[":method"],
        pseudo[":path"],
        plain.get("content-type", ""),
        plain.get("grpc-encoding", ""),
        plain.get("grpc-timeout"),
        tuple(metadata),
        size,
    )


def write(fields: Iterable[tuple[str, bytes]]) -> bytes:
    """A header block: each field a literal that no table keeps (RFC 7541, section 6.2.2)."""
    return b"".join(
        b"\x00" + _length(len(name)) + name.encode("ascii") + _length(len(value)) + value for name, value in fields
    )


def _length(value: int) -> bytes:
    """An integer with a prefix of seven bits (RFC 7541, section 5.1)."""
    if value < 0x7F:
        return bytes((value,))
    rest = value - 0x7F
    written = bytearray(b"\x7f")
    while rest >= 0x80:
        written.append(rest & 0x7F | 0x80)
        rest >>= 7
    written.append(rest)
    return bytes(written)
