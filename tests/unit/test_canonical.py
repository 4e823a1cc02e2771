"""Requests read in place: what is accepted is what protobuf reads, and what clients send is accepted."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from agent.errors import SlotdError
from agent.model.signature import Strings, Tensor
from agent.serving.canonical import MAX_ITEMS
from agent.serving.forms import INFER, PREDICT, Form
from agent.serving.protos import ModelInferRequest, PredictRequest
from agent.serving.tensorproto import Parsed
from support.infer_client import infer_request
from support.tfs_client import predict_request

MOST = 1 << 24


def same(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, Strings) or isinstance(other, Strings):
        return isinstance(one, Strings) and isinstance(other, Strings) and list(one.items) == list(other.items)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def agrees(data: bytes, form: Form) -> bool | None:
    """Whether it is read as the generated class reads it; None if it is left to that class."""
    plain = form.plain(data, most=MOST)
    if plain is None:
        return None
    try:
        full = form.read(data, most=MOST)
    except SlotdError:
        return False
    rest = [
        (one.model, one.version, one.label, one.signature, one.outputs, one.id, sorted(one.inputs))
        for one in (plain, full)
    ]
    return rest[0] == rest[1] and all(same(tensor, full.inputs[name]) for name, tensor in plain.inputs.items())


def wire(inputs: dict[str, Tensor], **spec: Any) -> bytes:
    return predict_request(inputs, **spec).SerializeToString(deterministic=True)


def infer(inputs: dict[str, Tensor], **more: Any) -> bytes:
    return infer_request(inputs, **more).SerializeToString(deterministic=True)


X = np.arange(6, dtype=np.float32).reshape(2, 3)
PREDICTS = {
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
INFERS = {
    "raw": infer({"x": X}),
    "double": infer({"x": X.astype(np.float64)}),
    "whole": infer({"x": X, "y:0": X.astype(np.int64)}, model="m", version="3", id="r-1", outputs=["a", "b"]),
    "half": infer({"x": X.astype(np.float16)}),
    "scalar": infer({"x": np.array(3.0, np.float32)}),
    "pictures": infer({"Placeholder:0": Strings((2,), [b"\xff\xd8 one", b"two"])}),
    "empty picture": infer({"Placeholder:0": Strings((1,), [b""])}),
    "name": infer({"größe": X}),
}
ALL = [(PREDICT, data) for data in PREDICTS.values()] + [(INFER, data) for data in INFERS.values()]
NAMES = [f"predict {name}" for name in PREDICTS] + [f"infer {name}" for name in INFERS]


@pytest.mark.parametrize(("form", "data"), ALL, ids=NAMES)
def test_what_clients_send_is_read_in_place(form: Form, data: bytes) -> None:
    assert agrees(data, form)


@pytest.mark.parametrize("form", [PREDICT, INFER])
def test_a_large_tensor_is_not_copied(form: Form) -> None:
    large = {"x": np.ones((1, 1 << 16), np.float32)}
    data = wire(large, content=True) if form is PREDICT else infer(large)
    parsed = form.plain(data, most=MOST)
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
        PREDICTS["content"] + PREDICTS["content"],  # the last one counts
        PREDICTS["content"] + b"\x0a\x00",
        PREDICTS["content"][:-1],
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x12\x07\x0a\x02\xff\xfe\x12\x01\x08",
    ],
)
def test_every_other_predict_is_left_to_protobuf(data: bytes) -> None:
    assert PREDICT.plain(data, most=MOST) is None


@pytest.mark.parametrize(
    "data",
    [
        infer({"x": X}, raw=False),
        infer({"x": np.array([True])}),
        infer({"x": np.empty((0, 3), np.float32)}),
        infer({"x": Strings((MAX_ITEMS + 1,), [b"a"] * (MAX_ITEMS + 1))}),
        infer({"x": X}, version="latest"),
        infer({"x": X}, outputs=["y", "y"]),
        INFERS["raw"] + INFERS["raw"],
        INFERS["raw"] + b"\x0a\x00",
        INFERS["raw"][:-1],
        b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        infer({"x": X}) + b"\x3a\x00",
    ],
)
def test_every_other_infer_is_left_to_protobuf(data: bytes) -> None:
    assert INFER.plain(data, most=MOST) is None


@pytest.mark.parametrize(("form", "corpus"), [(PREDICT, PREDICTS), (INFER, INFERS)])
def test_more_than_may_be_taken_is_left_to_protobuf_too(form: Form, corpus: dict[str, bytes]) -> None:
    one = corpus["content" if form is PREDICT else "raw"]
    assert form.plain(one, most=X.nbytes) is not None
    assert form.plain(one, most=X.nbytes - 1) is None
    assert form.plain(corpus["whole"], most=X.nbytes * 2) is None, "all tensors together"


def test_an_empty_request_has_no_inputs() -> None:
    assert agrees(b"", PREDICT)
    assert agrees(PredictRequest(output_filter=["y"]).SerializeToString(), PREDICT)
    assert agrees(b"", INFER)
    assert agrees(ModelInferRequest(model_name="m").SerializeToString(), INFER)


@pytest.mark.parametrize("runs", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])
@pytest.mark.parametrize(("form", "corpus"), [(PREDICT, PREDICTS), (INFER, INFERS)], ids=["predict", "infer"])
@pytest.mark.timeout(1800)
def test_mutated_messages_are_never_read_otherwise(form: Form, corpus: dict[str, bytes], runs: int) -> None:
    rng = random.Random(runs)
    messages = list(corpus.values())
    taken = 0
    for _ in range(runs):
        data = mutated(rng, messages)
        verdict = agrees(data, form)
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
                data[at] = rng.choice((0, 1, 2, 7, 8, 0x0A, 0x12, 0x1A, 0x22, 0x2A, 0x32, 0x3A, 0x42, 0x7F, 0x80, 0xFF))
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
