"""The simulated card's bitstream: magic, u32 header length, u32 CRC-32 of all that follows, JSON header, payload."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from drivers.base import DriverError

MAGIC = b"slotsim\x01"
MAX_HEADER = 4096
MAX_SIZE = 1 << 30
_FIXED = struct.Struct("<8sII")
_CHUNK = 1 << 20
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Bitstream:
    """What a bitstream says of itself; `sha256` (hex) and `size` (bytes) are those of the whole file."""

    interface: str
    accelerator: str
    sha256: str
    size: int


def write_bitstream(path: Path, interface: str, accelerator: str, payload: bytes) -> None:
    """Make a bitstream file. Raises ValueError for an id that is not 32 lower-case hex digits."""
    for value in (interface, accelerator):
        if not _ID.fullmatch(value):
            raise ValueError(f"{value!r} is not an id of 32 lower-case hex digits")
    header = json.dumps({"interface": interface, "accelerator": accelerator}).encode()
    path.write_bytes(_FIXED.pack(MAGIC, len(header), zlib.crc32(payload, zlib.crc32(header))) + header + payload)


def read_bitstream(fd: int) -> Bitstream:
    """Check a bitstream from its first to its last byte; the descriptor's position is left alone.

    Raises DriverError INCOMPATIBLE_BITSTREAM.
    """
    size = os.fstat(fd).st_size
    fixed = os.pread(fd, _FIXED.size, 0)
    if len(fixed) < _FIXED.size or not fixed.startswith(MAGIC):
        raise _unfit("it does not begin as one for the simulated card")
    _, length, crc = _FIXED.unpack(fixed)
    if not 0 < length <= MAX_HEADER or _FIXED.size + length > size:
        raise _unfit(f"its header is said to be {length} bytes long, in a file of {size}")
    if size > MAX_SIZE:
        raise _unfit(f"it has {size} bytes, more than {MAX_SIZE}")
    header = os.pread(fd, length, _FIXED.size)
    digest, found, offset = hashlib.sha256(fixed), 0, _FIXED.size
    while chunk := os.pread(fd, _CHUNK, offset):
        digest.update(chunk)
        found = zlib.crc32(chunk, found)
        offset += len(chunk)
    if found != crc:
        raise _unfit("its checksum is wrong: it is damaged or cut off")
    interface, accelerator = _ids(header)
    return Bitstream(interface, accelerator, digest.hexdigest(), offset)


def _ids(header: bytes) -> tuple[str, str]:
    try:
        document = json.loads(header)
    except (ValueError, RecursionError):
        raise _unfit("its header is not JSON") from None
    if not isinstance(document, dict) or set(document) != {"interface", "accelerator"}:
        raise _unfit("its header must have interface and accelerator, and nothing else")
    for name, value in document.items():
        if not isinstance(value, str) or not _ID.fullmatch(value):
            raise _unfit(f"its {name} is not an id of 32 lower-case hex digits")
    return document["interface"], document["accelerator"]


def _unfit(why: str) -> DriverError:
    return DriverError(
        "INCOMPATIBLE_BITSTREAM", f"the bitstream cannot be used: {why}", hint="pack the image again for this slot"
    )
