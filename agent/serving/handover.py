"""A parsed request in a sealed memfd, as the child that parses hands it to the agent.

The tensors, each at a multiple of 64 bytes; strings as a u32 length for each element and then their bytes; at the end
a JSON document that says where each lies. Sealed, so that what the agent maps can neither change nor shrink.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import struct
from typing import Any

import numpy as np

from agent.errors import SlotdError, revive
from agent.model.signature import DType, Strings, Tensor, dtype_of
from agent.serving.tensorproto import Parsed

TASK = struct.Struct("<QQQ")
"""What goes to the child beside the descriptor: the number of the request's form, its length, and that of its context,
which lies behind it."""
RECORD = struct.Struct("<QQ")
"""What comes back: offset and length of the document at the end."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_ALIGN = 64
_BY_PREAD = 64 << 10


def write(outcome: Parsed | SlotdError) -> tuple[int, bytes]:
    """A new sealed memfd with the outcome, and the record for it. The caller closes the descriptor."""
    memory = os.memfd_create("parsed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        document: dict[str, Any]
        end = 0
        if isinstance(outcome, SlotdError):
            document = {"error": outcome.as_dict()}
        else:
            inputs = {}
            for name, tensor in outcome.inputs.items():
                start = -(-end // _ALIGN) * _ALIGN
                inputs[name] = {"dtype": dtype_of(tensor).value, "shape": list(tensor.shape), "offset": start}
                if isinstance(tensor, Strings):
                    lengths = np.array([len(item) for item in tensor.items], np.uint32)
                    end = write_all(memory, lengths.tobytes() + b"".join(tensor.items), start)
                elif tensor.size:
                    end = write_all(memory, tensor.reshape(-1).view(np.uint8).data, start)
            document = {
                "inputs": inputs,
                "model": outcome.model,
                "version": outcome.version,
                "label": outcome.label,
                "signature": outcome.signature,
                "outputs": outcome.outputs,
                "id": outcome.id,
                "rows": outcome.rows,
                "binary": outcome.binary,
            }
        written = json.dumps(document).encode()
        write_all(memory, written, end)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(memory)
        raise
    return memory, RECORD.pack(end, len(written))


def read(memory: int, record: bytes) -> Parsed:
    """What `write` wrote; numeric tensors are read-only views that outlive the descriptor. Raises what it tells.

    ValueError, KeyError or struct.error if it is not what `write` writes.
    """
    if fcntl.fcntl(memory, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise ValueError("the memory is not sealed")
    offset, length = RECORD.unpack(record)
    document = json.loads(os.pread(memory, length, offset))
    if "error" in document:
        raise revive(document["error"])
    mapped = mmap.mmap(memory, 0, prot=mmap.PROT_READ)
    inputs = {name: _tensor(memory, mapped, entry) for name, entry in document.pop("inputs").items()}
    return Parsed(inputs, outputs=tuple(document.pop("outputs")), **document)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Writes all of `data`, without Python's lock while it copies; returns the offset behind it."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written
    return offset


def _tensor(memory: int, mapped: mmap.mmap, entry: dict[str, Any]) -> Tensor:
    dtype, shape, offset = DType(entry["dtype"]), tuple(entry["shape"]), entry["offset"]
    count = math.prod(shape)
    if dtype is not DType.STRING:
        if not count:
            return np.empty(shape, dtype.numpy)
        return np.frombuffer(mapped, dtype.numpy, count, offset).reshape(shape)
    items: list[bytes] = []
    start = offset + 4 * count
    for length in np.frombuffer(mapped, np.uint32, count, offset).tolist() if count else ():
        # pread copies without Python's lock; a slice is quicker for small ones.
        items.append(os.pread(memory, length, start) if length > _BY_PREAD else mapped[start : start + length])
        start += length
    return Strings(shape, items)
