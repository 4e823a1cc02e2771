"""A child that answers with a hash of everything it got: what crosses, is lost or is overwritten shows at once.

Input 0 is an int64 vector: [seed, outputs, milliseconds to wait, ...size of each output]. Output 0 is the digest of all
other inputs; output i is `filler(seed, i, size)`, or strings if the size is negative.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping

import numpy as np

from agent.errors import InvalidInput
from agent.executor.worker import Job, OneByOne, serve
from agent.model.signature import Strings, Tensor


def digest(tensors: Mapping[int, Tensor]) -> np.ndarray:
    """32 bytes for dtypes, shapes and contents of all inputs but 0."""
    state = hashlib.blake2b(digest_size=32)
    for index in sorted(tensors):
        if index == 0:
            continue
        tensor = tensors[index]
        state.update(f"{index} {tuple(tensor.shape)}".encode())
        if isinstance(tensor, Strings):
            state.update(b"strings")
            for item in tensor.items:
                state.update(len(item).to_bytes(4, "little") + item)
        else:
            state.update(tensor.dtype.name.encode())
            state.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
    return np.frombuffer(state.digest(), np.uint8)


def filler(seed: int, index: int, size: int) -> Tensor:
    """What output `index` of the request `seed` must be: `size` bytes, or -size strings."""
    if size < 0:
        return Strings((-size,), [b"%d.%d.%d" % (seed, index, place) for place in range(-size)])
    pattern = np.frombuffer(hashlib.blake2b(f"{seed} {index}".encode()).digest(), np.uint8)
    return np.resize(pattern, size) if size else np.empty(0, np.uint8)


class Hasher(OneByOne):
    """Answers one job at a time."""

    @property
    def ready(self) -> dict[str, str]:
        return {"kind": "hash"}

    def begin(self, job: Job) -> None:
        order = [int(value) for value in job.inputs[0]]  # type: ignore[union-attr]
        seed, outputs, wait = order[:3]
        job.start()
        if wait < 0:
            raise InvalidInput(f"refused {seed}", field="input")
        if wait:
            time.sleep(wait / 1000)
        job.answer([digest(job.inputs), *(filler(seed, i, order[2 + i]) for i in range(1, outputs))])


def load(_hello: dict) -> Hasher:
    return Hasher()


if __name__ == "__main__":
    sys.exit(serve(load))
