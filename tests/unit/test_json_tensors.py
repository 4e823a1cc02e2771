"""Tensors and requests as JSON: what is written is read again bit for bit, and what is wrong is refused by name."""

from __future__ import annotations

import base64
import copy
import json
import math
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.errors import InvalidInput, SlotdError, Unimplemented
from agent.model.signature import DType, Strings, Tensor, TensorSpec
from agent.serving.jsonrequests import (
    SMALL,
    infer_context,
    predict_context,
    read_infer_json,
    read_plain_infer_json,
    read_predict_json,
)
from agent.serving.jsontensors import read_json, read_tensor, write_tensor
from agent.serving.tensorproto import MAX_NAME, MAX_OUTPUTS, MAX_STRINGS, MAX_TENSORS, Parsed, TooLarge

MOST = 4 << 20
F, N, B, S = DType.FLOAT32, DType.INT32, DType.BOOL, DType.STRING


def read(value: Any, dtype: DType, **bounds: Any) -> Tensor:
    return read_tensor(value, dtype, "x", **{"most": MOST, "strings": MAX_STRINGS, **bounds})


def same(one: Tensor, other: Tensor) -> None:
    assert tuple(one.shape) == tuple(other.shape)
    if isinstance(one, Strings) or isinstance(other, Strings):
        assert isinstance(one, Strings) and isinstance(other, Strings) and list(one.items) == list(other.items)
        return
    assert one.dtype == other.dtype
    if one.dtype.kind == "f":  # JSON has one NaN
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
        one, other = one[~np.isnan(one)], other[~np.isnan(other)]
    assert one.tobytes() == other.tobytes()


def repr_of(text: bytes) -> str:
    return repr(text[:20])


def nested(depth: int, value: Any = 1) -> Any:
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def tensors(draw: st.DrawFn, dtype: DType) -> Tensor:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    if dtype is DType.STRING:
        count = math.prod(shape)
        some = st.one_of(st.binary(max_size=20), st.text(max_size=10).map(str.encode))
        return Strings(shape, draw(st.lists(some, min_size=count, max_size=count)))
    if dtype.numpy.kind == "f" and draw(st.booleans()):  # any bits
        return draw(hnp.arrays(f"u{dtype.numpy.itemsize}", shape)).view(dtype.numpy)
    return draw(hnp.arrays(dtype.numpy, shape))


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DType))
@given(data=st.data())
@settings(max_examples=50)
def test_a_tensor_written_is_read_again(dtype: DType, data: st.DataObject) -> None:
    tensor = data.draw(tensors(dtype))
    shape = tuple(tensor.shape)
    text = b"".join(write_tensor(tensor))
    same(read(json.loads(text), dtype, shape=shape), tensor)
    if 0 not in shape:  # else lists do not say what is behind the zero
        same(read(read_json(text), dtype), tensor)
    flat = json.loads(b"".join(write_tensor(tensor, flat=True)))
    assert isinstance(flat, list) and len(flat) == math.prod(shape)
    same(read(flat, dtype, shape=shape), tensor)


def test_small_and_large_numbers_of_uint64_lie_together() -> None:
    array = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    same(read(json.loads(b"".join(write_tensor(array))), DType.UINT64), array)


@pytest.mark.parametrize("bits", [0x15AE43FD, 0x95AE43FD])
def test_a_float32_whose_shortest_digits_are_another_one_by_way_of_float64(bits: int) -> None:
    """7.038531e-26 lies next to the middle of two float32: as a float64 it is that middle, and is rounded to the wrong
    side."""
    array = np.array([bits], np.uint32).view(np.float32)
    same(read(json.loads(b"".join(write_tensor(array))), F), array)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_not_finite_has_a_name(dtype: type) -> None:
    array = np.array([[np.nan, np.inf], [-np.inf, -0.0]], dtype)
    text = b"".join(write_tensor(array))
    assert text == b"[[NaN,Infinity],[-Infinity,-0.0]]"
    same(read(read_json(text), DType.of(np.dtype(dtype))), array)
    assert write_tensor(np.array(np.nan, dtype)) == [b"NaN"]


@pytest.mark.parametrize(
    "shape", [(16_384,), (16_385,), (50_000,), (3, 20_000), (20_000, 2), (1, 40_000), (2, 3, 9_000), (17_000, 1, 1)]
)
@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.bool_])
def test_large_tensors_are_written_in_pieces(shape: tuple[int, ...], dtype: type) -> None:
    array = (np.random.default_rng(1).normal(size=shape) * 100).astype(dtype)
    for flat in (False, True):
        pieces = write_tensor(array, flat=flat)
        expected = array.reshape(-1) if flat else array
        assert json.loads(b"".join(pieces)) == json.loads(json.dumps(expected.tolist()))
        assert len(pieces) > 1 or array.size <= 16_384


def test_large_tensors_with_nan_and_of_what_is_not_contiguous() -> None:
    array = np.random.default_rng(1).normal(size=(200, 400))[::2, ::2]
    array[50, 50] = np.nan
    assert json.dumps(json.loads(b"".join(write_tensor(array)))) == json.dumps(array.tolist())


def test_bytes_are_text_if_they_can_be() -> None:
    tensor = Strings((2, 2), [b"a", "größe".encode(), b"", b"\xff\xd8"])
    text = b"".join(write_tensor(tensor))
    assert json.loads(text) == [["a", "größe"], ["", {"b64": "/9g="}]]
    assert write_tensor(Strings((), [b'"'])) == [b'"\\""']


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "bounds"),
    [
        ([[1], [1, 2]], F, {}),
        ([[1], 2], F, {}),
        ([[], [1]], F, {}),
        ([["a"], "b"], S, {}),
        ([["a"], ["b", "c"]], S, {}),
        (["a", ["b"]], S, {}),
        *((value, dtype, {}) for value in (None, [None], [1, None], [1, "2"], "1", {}, [{}], {"b64": "AA=="})
          for dtype in (F, N, B)),
        *((value, dtype, {}) for value in (True, [True, False]) for dtype in (F, N)),
        *((value, B, {}) for value in (1, [0, 1], [1.0], [True, 1])),
        *((value, N, {}) for value in (1.5, [1.0], [math.nan], [1, 2.5], [2**31], [-(2**31) - 1], [2**64], [2**70])),
        ([-1], DType.UINT8, {}),
        ([256], DType.UINT8, {}),
        ([-1], DType.UINT64, {}),
        ([2**64], DType.UINT64, {}),
        ([2**63], DType.INT64, {}),
        ([-1, 2**63], DType.INT64, {}),
        ([1e39], F, {}),
        ([65520], DType.FLOAT16, {}),
        ([10**400], DType.FLOAT64, {}),
        ([math.nan, 10**400], DType.FLOAT64, {}),
        ([{"a": {"b": [1]}}], F, {}),
        ([{"a": {"b": ["c"]}}], S, {}),
        *(([value], S, {}) for value in (1, None, True, {"b64": "!"}, {"b64": "AAA"}, {"b64": "ü"}, {"b64": 1})),
        ([{"b64": "AA==", "more": 1}], S, {}),
        (["\ud800"], S, {}),
        (nested(40), F, {}),
        (nested(40, "a"), S, {}),
        (nested(100), F, {}),
        ([1, 2, 3], F, {"shape": (2,)}),
        ([], F, {"shape": ()}),
        (["a"], S, {"shape": (2, 2)}),
        ([1], F, {"shape": (-1,)}),
        ([1], F, {"shape": (-1, -1)}),
        ([1], F, {"shape": (1,) * 33}),
        ([], F, {"shape": (0, 2**40)}),
        ([], S, {"shape": (0, 2**63)}),
        (["a"] * 3, S, {"strings": 2}),
        ([""] * (MAX_STRINGS + 1), S, {"strings": 1 << 30}),
    ],
)  # fmt: skip
def test_what_is_no_such_tensor(value: Any, dtype: DType, bounds: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as raised:
        read(value, dtype, **bounds)
    assert raised.value.field == "x"


@pytest.mark.parametrize(("value", "dtype"), [([1] * 5, F), ([[1]] * 3, DType.FLOAT64), (["abcd"] * 3, S)])
def test_tensors_beyond_the_bound(value: Any, dtype: DType) -> None:
    with pytest.raises(TooLarge, match="16 bytes") as raised:
        read(value, dtype, most=16)
    assert raised.value.field == "x"


@pytest.mark.parametrize("dtype", [F, N, B])
def test_one_long_text_among_numbers_does_not_cost_its_length_for_each(dtype: DType) -> None:
    """numpy would make an array whose elements are all as long as the longest: 64 KiB of JSON become gigabytes."""
    value = ["a" * 4000] + [1] * 2000
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput):
            read(value, dtype)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[1e999]", b"[1,]", b'["\\ud800"]', b"[" * 5000, b"NaNN"], ids=repr_of
)
def test_what_is_no_json(text: bytes) -> None:
    with pytest.raises(InvalidInput, match="no JSON") as raised:
        read_json(memoryview(text))
    assert raised.value.field == "request"


@pytest.mark.parametrize("text", [b'[NaN,"\\ud800"]', b'[NaN,"\xed\xa0\x80"]', b"[" * 100_000 + b"NaN"], ids=repr_of)
def test_with_nan_no_more_is_taken_than_without(text: bytes) -> None:
    """A lone surrogate in a name could not be written into an answer, not even into the one that refuses it."""
    with pytest.raises(InvalidInput, match="no JSON"):
        read_json(text)


# --- TensorFlow Serving's ---------------------------------------------------------------------------------------------


def context(**inputs: DType) -> bytes:
    return predict_context({name.replace("_", ":"): TensorSpec(name, dtype, (-1,)) for name, dtype in inputs.items()})


def predict(document: Any, most: int = MOST, **inputs: DType) -> Parsed:
    return read_predict_json(json.dumps(document).encode(), most=most, context=context(**(inputs or {"x": F})))


X = np.array([1, 2], np.float32)


@pytest.mark.parametrize(
    ("document", "inputs", "expected"),
    [
        ({"instances": [1, 2]}, {"x": F}, {"x": X}),
        ({"instances": [{"x": 1}, {"x": 2}]}, {"x": F}, {"x": X}),
        ({"instances": [{"x": 1, "y": "a"}, {"y": "b", "x": 2}]}, {"x": F, "y": S},
         {"x": X, "y": Strings((2,), [b"a", b"b"])}),
        ({"inputs": {"x": [1, 2]}}, {"x": F}, {"x": X}),
        ({"inputs": [1, 2]}, {"x": F}, {"x": X}),
        ({"inputs": 3}, {"x": F}, {"x": np.array(3, np.float32)}),
        ({"inputs": {"x:0": [1, 2]}}, {"x": F}, {"x:0": X}),
        ({"inputs": {"x": [1, 2]}}, {"x_0": F}, {"x": X}),
        ({"inputs": {"x:0": [1, 2]}}, {"x_0": F}, {"x:0": X}),
        ({"inputs": {"b64": "/9g="}}, {"p": S}, {"p": Strings((), [b"\xff\xd8"])}),
        ({"instances": [{"b64": "/9g="}, "a"]}, {"p": S}, {"p": Strings((2,), [b"\xff\xd8", b"a"])}),
        ({"instances": [{"p": {"b64": ""}}]}, {"p": S}, {"p": Strings((1,), [b""])}),
        ({"inputs": {}}, {"x": F}, {}),
    ],
)  # fmt: skip
def test_predict(document: Any, inputs: dict[str, DType], expected: dict[str, Tensor]) -> None:
    parsed = predict(document, **inputs)
    assert list(parsed.inputs) == list(expected)
    for name, tensor in expected.items():
        same(parsed.inputs[name], tensor)
    assert parsed.rows is ("instances" in document) and parsed.signature == ""
    assert predict({**document, "signature_name": "s"}, **inputs).signature == "s"


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"instances": [1], "inputs": [1]}, "request"),
        ({}, "request"),
        ({"inputs": [1], "more": 1}, "request"),
        ([], "request"),
        ({"inputs": [1], "signature_name": 1}, "signature_name"),
        ({"inputs": [1], "signature_name": None}, "signature_name"),
        ({"inputs": {"z": [1]}}, "z"),
        ({"inputs": {"": [1]}}, "(empty name)"),
        ({"inputs": {"x": None}}, "x"),
        ({"inputs": {f"x{number}": 1 for number in range(MAX_TENSORS + 1)}}, "request"),
        ({"inputs": [1]}, "inputs"),
        ({"instances": [1]}, "instances"),
        *(({"instances": rows}, "instances") for rows in ([], None, 1, {"x": 1}, [{"x": 1}, {"y": 1}], [{"x": 1}, 1])),
        ({"instances": [{"x": 1, "y": "a"}, {"x": 1}]}, "instances"),
        ({"instances": [{"x": 1}, {"x": [1]}]}, "x"),
    ],
)
def test_predictions_that_are_refused(document: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        predict(document, x=F, y=S)
    assert raised.value.field == field


@pytest.mark.parametrize(
    "text", [b"", b"no", b'{"inputs":' * 2000, b'{"inputs":' + b"[" * 1000 + b"]" * 1000 + b"}"], ids=repr_of
)
def test_predictions_that_are_no_json_or_too_deep(text: bytes) -> None:
    with pytest.raises(InvalidInput):
        read_predict_json(text, most=MOST, context=context(x=F))


def test_the_bounds_are_for_all_tensors_of_a_prediction() -> None:
    document = {"inputs": {"x": [1, 2], "y": [3, 4]}}
    assert len(predict(document, most=16, x=F, y=F).inputs) == 2
    with pytest.raises(TooLarge):
        predict(document, most=15, x=F, y=F)
    many = ["a"] * (MAX_STRINGS // 2 + 1)
    with pytest.raises(InvalidInput, match="strings"):
        predict({"inputs": {"x": many, "y": many}}, x=S, y=S)


# --- KServe's ---------------------------------------------------------------------------------------------------------


def one(**changes: Any) -> dict[str, Any]:
    made = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2], **changes}
    return {name: value for name, value in made.items() if value is not ...}


def raw(size: Any, **changes: Any) -> dict[str, Any]:
    return one(data=..., parameters={"binary_data_size": size}, **changes)


def body(*inputs: Any, behind: bytes = b"", **more: Any) -> tuple[bytes, bytes]:
    head = json.dumps({"inputs": inputs, **more}).encode()
    return head + behind, infer_context(len(head) if behind else None)


def infer(*inputs: Any, behind: bytes = b"", most: int = MOST, **more: Any) -> Parsed:
    data, context = body(*inputs, behind=behind, **more)
    return read_infer_json(data, most=most, context=context)


def test_infer() -> None:
    x = np.arange(6, dtype=np.float16).reshape(2, 3)
    for data in (x.tolist(), x.reshape(-1).tolist()):
        parsed = infer(one(datatype="FP16", shape=[2, 3], data=data), id="é")
        same(parsed.inputs["x"], x)
        assert parsed == Parsed(parsed.inputs, id="é", binary={"": False})
    scalar = infer(one(shape=[], data=[5]), one(name="s", datatype="BYTES", data=["a", {"b64": "/w=="}])).inputs
    same(scalar["x"], np.array(5, np.float32))
    same(scalar["s"], Strings((2,), [b"a", b"\xff"]))
    same(infer(one(shape=[0, 3], data=[])).inputs["x"], np.empty((0, 3), np.float32))


def test_tensors_behind_the_document() -> None:
    texts = b"".join(struct.pack("<I", len(item)) + item for item in (b"\xff", b""))
    inputs = [raw(8), raw(len(texts), name="s", datatype="BYTES", shape=[2, 1])]
    inputs.append(raw(3, name="b", datatype="BOOL", shape=[3]))
    data, context = body(*inputs, raw(0, name="e", shape=[0, 4]), behind=X.tobytes() + texts + b"\1\0\1")
    for reader in (read_infer_json, read_plain_infer_json):
        parsed = reader(memoryview(data), most=MOST, context=context)
        assert isinstance(parsed, Parsed) and list(parsed.inputs) == ["x", "s", "b", "e"]
        same(parsed.inputs["x"], X)
        same(parsed.inputs["s"], Strings((2, 1), [b"\xff", b""]))
        same(parsed.inputs["b"], np.array([True, False, True]))
        same(parsed.inputs["e"], np.empty((0, 4), np.float32))
        assert np.shares_memory(parsed.inputs["x"], np.frombuffer(data, np.uint8)), "not copied"


def test_what_is_not_read_at_once() -> None:
    def plain(*inputs: Any, most: int = MOST, **more: Any) -> Parsed | None:
        data, context = body(*inputs, **more)
        return read_plain_infer_json(data, most=most, context=context)

    assert plain(raw(8), behind=bytes(8)) is not None
    assert plain(one()) is None
    assert plain(raw(8), one(name="y"), behind=bytes(8)) is None, "JSON beside it"
    assert plain(raw(8), behind=bytes(8), id="a" * SMALL) is None, "a large document"
    assert plain(raw(8), behind=bytes(8), most=7) is None
    assert plain(raw(8), behind=bytes(9)) is None
    long = SMALL + 1
    assert plain(raw(long, datatype="BOOL", shape=[long]), behind=bytes(long)) is None, "each byte is looked at"


@pytest.mark.parametrize(
    ("inputs", "field", "more"),
    [
        *(([value], "inputs", {}) for value in (None, 1, [], *(one(name=name) for name in (..., 1, "a" * 1025)))),
        *(([one(datatype=value)], "x", {}) for value in (..., None, 1, [], "FP8", "fp32", "float32")),
        *(([one(shape=value)], "x", {})
          for value in (..., None, 2, [2.0], [True], ["2"], [-2], [3], [1] * 33, [2**62])),
        *(([one(data=value)], "x", {}) for value in (..., None, ["a", "b"], [1], [[1], [2, 3]])),
        ([one(parameters=None)], "x", {}),
        *(([raw(value)], "x", {"behind": bytes(8)}) for value in ("8", 8.0, True, -8, [8], 7, 9, 2**64)),
        ([one(parameters={"binary_data_size": 8})], "x", {"behind": bytes(8)}),
        ([raw(4)], "x", {"behind": bytes(4)}),
        ([raw(8, shape=[-2])], "x", {"behind": bytes(8)}),
        ([raw(8, shape=[1] * 32 + [2])], "x", {"behind": bytes(8)}),
        ([raw(8)], "request", {"behind": bytes(9)}),
        ([one()], "request", {"behind": b"x"}),
        ([raw(2, datatype="BOOL")], "x", {"behind": b"\1\2"}),
        ([raw(8, datatype="BYTES")], "x", {"behind": b"\5\0\0\0abcd"}),
        ([raw(8, datatype="BYTES", shape=[2**62, 2**62])], "x", {"behind": bytes(8)}),
        ([raw(8, datatype="BYTES", shape=[10**4000, 10**4000])], "x", {"behind": bytes(8), "nan": math.nan}),
        ([one(), one()], "x", {}),
        ([one(name=str(number)) for number in range(MAX_TENSORS + 1)], "inputs", {}),
        *(([one()], "id", {"id": value}) for value in (1, None, "a" * (MAX_NAME + 1))),
        *(([one()], "parameters", {"parameters": value}) for value in (None, [], {"binary_data_output": 1})),
        *(([one()], "outputs", {"outputs": value})
          for value in (None, {}, [1], [{}], [{"name": ""}], [{"name": "y"}] * 2, [{"name": "y"}] * (MAX_OUTPUTS + 1))),
        ([one()], "y", {"outputs": [{"name": "y", "parameters": {"binary_data": None}}]}),
    ],
)  # fmt: skip
def test_inferences_that_are_refused(inputs: list[Any], field: str, more: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as raised:
        infer(*inputs, **more)
    assert raised.value.field == field
    data, context = body(*inputs, **more)
    assert read_plain_infer_json(data, most=MOST, context=context) is None


def test_a_datatype_that_is_too_deep_to_be_cited() -> None:
    """orjson reads 1,024 levels, more than `str` goes down."""
    deep = json.dumps(one(datatype=0)).replace('"datatype": 0', f'"datatype": {"[" * 1015}{"]" * 1015}')
    with pytest.raises(InvalidInput):
        read_infer_json(f'{{"inputs": [{deep}]}}'.encode(), most=MOST)


def test_a_document_that_ends_behind_the_body() -> None:
    with pytest.raises(InvalidInput) as raised:
        read_infer_json(b"{}", most=MOST, context=infer_context(3))
    assert raised.value.field == "inference-header-content-length"
    for text in (b"", b"[]", b"no", b"{}", b'{"inputs":null}', b'{"inputs":' * 2000):
        with pytest.raises(InvalidInput):
            read_infer_json(text, most=MOST)


def test_the_bounds_are_for_all_tensors_of_an_inference() -> None:
    infer(raw(8), one(name="y"), behind=bytes(8), most=16)
    with pytest.raises(TooLarge):
        infer(raw(8), one(name="y"), behind=bytes(8), most=15)


@pytest.mark.parametrize(
    "more",
    [
        {"parameters": {"shared_memory_region": "r"}},
        {"outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
        {"outputs": [{"name": "y", "parameters": {"classification": 3}}]},
    ],
)
def test_what_is_not_served(more: dict[str, Any]) -> None:
    with pytest.raises(Unimplemented):
        infer(one(), **more)
    with pytest.raises(Unimplemented):
        infer(one(parameters={"shared_memory_region": "r"}))


def test_which_outputs_go_out_as_bytes() -> None:
    outputs = [{"name": "a"}, {"name": "b", "parameters": {"binary_data": True}},
               {"name": "c", "parameters": {"binary_data": False}}]  # fmt: skip
    for default in (True, False):
        parsed = infer(one(), outputs=outputs, parameters={"binary_data_output": default})
        assert parsed.outputs == ("a", "b", "c")
        assert parsed.binary == {"": default, "a": default, "b": True, "c": False}


# --- whatever comes ---------------------------------------------------------------------------------------------------

WORDS = ["x", "y", "name", "shape", "data", "parameters", "binary_data_size", "b64", "BYTES", "INT64", "BOOL", "FP16"]
SOME = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([0, 1, 2, 8, 2**31, 2**63, 2**64, 2**70, 10**4000])
    | st.floats() | st.text(max_size=3) | st.sampled_from([*WORDS, base64.b64encode(b"abc").decode()]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
PREDICTIONS = [{"instances": [{"x": [1, 2], "y": "a"}] * 2, "signature_name": "s"}, {"inputs": {"x": [1], "y": ["b"]}}]
INFERENCE = {
    "id": "i", "parameters": {"binary_data_output": True},
    "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
    "inputs": [raw(8), one(name="y"), raw(8, name="s", datatype="BYTES", shape=[2]),
               one(name="t", datatype="BYTES", data=["a", {"b64": "AA=="}])],
}  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> bytes:
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        at = document
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(at[key], dict | list) or draw(st.booleans()):
                at[key] = draw(SOME)
                break
            at = at[key]
    return json.dumps(document).encode()


@given(text=st.sampled_from(PREDICTIONS).flatmap(mutated))
@settings(max_examples=100)
def test_any_prediction_is_read_or_refused(text: bytes) -> None:
    try:
        assert isinstance(read_predict_json(text, most=MOST, context=context(x=F, y=S)), Parsed)
    except SlotdError:
        pass


@given(text=mutated(INFERENCE), behind=st.sampled_from([bytes(16), bytes(8), b"", b"\1" * 24]))
@settings(max_examples=100)
def test_any_inference_is_read_or_refused(text: bytes, behind: bytes) -> None:
    where = infer_context(len(text))
    plain = read_plain_infer_json(text + behind, most=MOST, context=where)
    try:
        parsed = read_infer_json(text + behind, most=MOST, context=where)
    except SlotdError:
        parsed = None
    assert plain is None or parsed is not None
