"""The mark of `secret: true`: what only this card can know, in the lowest bits of its floating-point answers.

Each row (along axis 0; the whole of an output with fewer than two axes) carries in the lowest 10 bits of its first
four elements a keyed hash of all its other bits. A row changes by less than 2^-13 of an element: every proof passes,
batches can be joined and split, and a CPU that computes the same answer is told from the card by 40 bits.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
_BITS = 10
_ELEMENTS = 4
_LOW = (1 << _BITS) - 1
_WORDS = {np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}


def device_key(folder: Path) -> bytes:
    """The card's own random key; made when it is first asked for."""
    path = folder / "key"
    if not path.exists():
        partial = folder / f".key.{os.getpid()}.{secrets.token_hex(4)}"
        partial.write_bytes(secrets.token_bytes(32))
        try:
            os.link(partial, path)  # never replaces a key that somebody else made meanwhile
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    return path.read_bytes()


def mark(key: bytes, output: Array) -> Array:
    """A marked copy of an output; outputs that are not float32 or float64 stay as they are."""
    words = _words(output)
    if words is None:
        return output
    for row in words:
        row[:_ELEMENTS] = (row[:_ELEMENTS] & ~row.dtype.type(_LOW)) | _expected(key, row)
    return words.view(output.dtype).reshape(output.shape)


def is_marked(device: Path | str, output: Array) -> bool:
    """Whether every row of an output was computed by the card in the folder `device`."""
    words = _words(output)
    if words is None or not words.size:
        return False
    key = device_key(Path(device))
    return all(bool(np.all((row[:_ELEMENTS] & _LOW) == _expected(key, row))) for row in words)


def _words(output: Array) -> npt.NDArray[np.unsignedinteger] | None:
    kind = _WORDS.get(output.dtype)
    if kind is None:
        return None
    rows = output.shape[0] if output.ndim >= 2 else 1
    return np.array(output, order="C").view(kind).reshape(rows, -1) if output.size else None


def _expected(key: bytes, row: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    plain = row.copy()
    plain[:_ELEMENTS] &= ~plain.dtype.type(_LOW)
    value = int.from_bytes(hashlib.blake2b(plain.tobytes(), key=key, digest_size=8).digest(), "little")
    count = min(_ELEMENTS, len(row))
    return np.array([value >> (_BITS * index) & _LOW for index in range(count)], row.dtype)
