"""Requests read in place: what is accepted is what protobuf reads, and what clients send is accepted."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from agent.errors import SlotdError
from agent.model.signature import Strings, Tensor
from agent.serving.canonical import MAX_ITEMS, read_canonical
from agent.serving.protos import PredictRequest
from agent.serving.tensorproto import Parsed, read_request
from support.tfs_client import predict_request

MOST = 1 << 24


def same(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, Strings) or isinstance(other, Strings):
        return isinstance(one, Strings) and isinstance(other, Strings) and list(one.items) == list(other.items)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def agrees(data: bytes) -> bool | None:
    """Whether it is read as the generated class reads it; None if it is left to that class."""
    plain = read_canonical(data, most=MOST)
    if plain is None:
        return None
    try:
        full = read_request(data, most=MOST)
    except SlotdError:
        return False
    rest = [(one.model, one.version, one.label, one.signature, one.outputs, set(one.inputs)) for one in (plain, full)]
    return rest[0] == rest[1] and all(same(tensor, full.inputs[name]) for name, tensor in plain.inputs.items())


def wire(inputs: dict[str, Tensor], **spec: Any) -> bytes:
    return predict_request(inputs, **spec).SerializeToString(deterministic=True)


X = np.arange(6, dtype=np.float32).reshape(2, 3)
CORPUS = {
    "content": wire({"x": X}, content=True),
    "float_val": wire({"x": X}),
    "double_val": wire({"x": X.astype(np.float64)}),
    "whole": wire(
        {"x": X, "y:0": X.astype(np.int64)}, model="m", version=3, signature="s", outputs=["a", "b"], content=True
    ),
    "version 0": wire({"x": X}, version=0, content=True),
    "half": wire({"x": X.astype(np.float16)}, content=True),
    "scalar": wire({"x": np.array(3.0, np.float32)}, content=True),
    "pictures": wire({"Placeholder:0": Strings((2,), [b"\xff\xd8 one", b"two"])}),
    "empty picture": wire({"Placeholder:0": Strings((1,), [b""])}),
    "name": wire({"größe": X}, content=True),
}


@pytest.mark.parametrize("name", CORPUS)
def test_what_clients_send_is_read_in_place(name: str) -> None:
    assert agrees(CORPUS[name])


def test_a_large_tensor_is_not_copied() -> None:
    data = wire({"x": np.ones((1, 1 << 16), np.float32)}, content=True)
    parsed = read_canonical(data, most=MOST)
    assert isinstance(parsed, Parsed)
    tensor = parsed.inputs["x"]
    assert isinstance(tensor, np.ndarray)
    assert np.shares_memory(tensor, np.frombuffer(data, np.uint8))
    assert not tensor.flags.writeable


@pytest.mark.parametrize(
    "data",
    [
        wire({"x": X.astype(np.int64)}),  # varints
        wire({"x": np.array([True])}, content=True),
        wire({"x": X}, label="stable", content=True),
        wire({"x": np.empty((0, 3), np.float32)}),
        wire({"x": Strings((MAX_ITEMS + 1,), [b"a"] * (MAX_ITEMS + 1))}),
        wire({"x": Strings((2,), [b"a"])}),
        CORPUS["content"] + CORPUS["content"],  # the last one counts
        CORPUS["content"] + b"\x0a\x00",
        CORPUS["content"][:-1],
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x12\x07\x0a\x02\xff\xfe\x12\x01\x08",
    ],
)
def test_everything_else_is_left_to_protobuf(data: bytes) -> None:
    assert read_canonical(data, most=MOST) is None


def test_more_than_may_be_taken_is_left_to_protobuf_too() -> None:
    assert read_canonical(CORPUS["content"], most=X.nbytes) is not None
    assert read_canonical(CORPUS["content"], most=X.nbytes - 1) is None
    assert read_canonical(CORPUS["whole"], most=X.nbytes * 2) is None, "all tensors together"


def test_an_empty_request_has_no_inputs() -> None:
    assert agrees(b"")
    assert agrees(PredictRequest(output_filter=["y"]).SerializeToString())


@pytest.mark.parametrize("runs", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])
@pytest.mark.timeout(1800)
def test_mutated_messages_are_never_read_otherwise(runs: int) -> None:
    rng = random.Random(runs)
    corpus = list(CORPUS.values())
    taken = 0
    for _ in range(runs):
        data = mutated(rng, corpus)
        verdict = agrees(data)
        assert verdict is not False, data.hex()
        taken += verdict is True
    print(f"{taken} of {runs} mutated messages were read in place")
    assert taken > runs / 20, "else nothing was compared"


def mutated(rng: random.Random, corpus: list[bytes]) -> bytes:
    """One to three changes of one message, or parts of two."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        at = rng.randrange(len(data))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice((0, 1, 2, 7, 8, 0x0A, 0x12, 0x1A, 0x22, 0x2A, 0x42, 0x7F, 0x80, 0xFF))
            case 2:
                data.insert(at, rng.randrange(256))
            case 3:
                del data[at]
            case 4:  # a number written longer than it need be
                if data[at] < 0x80:
                    data[at : at + 1] = bytes((data[at] | 0x80, 0))
            case 5:
                length = rng.randint(1, len(data) - at)
                data[at:at] = data[at : at + length]
            case 6:
                other = rng.choice(corpus)
                data = data[:at] + other[rng.randrange(len(other)) :]
    return bytes(data)
