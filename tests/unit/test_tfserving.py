"""TensorFlow Serving's messages: read as protobuf reads them, written as protobuf would, refused by name."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.errors import InvalidInput, Overloaded, Unavailable
from agent.model.signature import DType, Strings, Tensor, dtype_of
from agent.serving import handover, protos
from agent.serving.encode import encode_response, encode_tensor, packed_varints, varint
from agent.serving.forms import INFER, PREDICT
from agent.serving.parse import LARGE, Parser, is_light
from agent.serving.protos import PredictRequest, PredictResponse, TensorProto
from agent.serving.tensorproto import MAX_STRINGS, Parsed, TooLarge, read_request, read_tensor
from support.infer_client import infer_request
from support.stall import stall_probe
from support.tfs_client import predict_request, tensor_proto

MOST = 32 << 20
NUMBERS = [dtype for dtype in DType if dtype is not DType.STRING]


def same(one: Tensor, other: Tensor) -> None:
    assert dtype_of(one) is dtype_of(other)
    assert tuple(one.shape) == tuple(other.shape)
    if isinstance(one, Strings):
        assert isinstance(other, Strings)
        assert list(one.items) == list(other.items)
    else:
        assert one.tobytes() == other.tobytes()  # type: ignore[union-attr]  # bits, so that NaN is NaN


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    dtype = draw(st.sampled_from(list(DType)))
    if dtype is not DType.STRING:
        return draw(hnp.arrays(dtype.numpy, shape))
    count = math.prod(shape)
    return Strings(shape, draw(st.lists(st.binary(max_size=200), min_size=count, max_size=count)))


def proto(dtype: int = 1, shape: tuple[int, ...] = (2,), **fields: Any) -> Any:
    made = TensorProto(dtype=dtype, **fields)
    for size in shape:
        made.tensor_shape.dim.add(size=size)
    return made


# --- the messages -----------------------------------------------------------------------------------------------------


def test_the_compiled_messages_are_those_of_the_files(tmp_path: Path) -> None:
    """`make protos` was run after the last change."""
    names = sorted(path.name for path in protos.FOLDER.glob("*.proto"))
    fresh = tmp_path / "fresh.binpb"
    argv = (sys.executable, "-m", "grpc_tools.protoc", f"-I{protos.FOLDER}", "--include_imports")
    subprocess.run([*argv, f"--descriptor_set_out={fresh}", *names], check=True)
    read = descriptor_pb2.FileDescriptorSet.FromString
    committed, compiled = read((protos.FOLDER / "slotd.binpb").read_bytes()), read(fresh.read_bytes())
    assert {file.name: file for file in committed.file} == {file.name: file for file in compiled.file}


def test_they_live_beside_other_copies_of_the_same_names() -> None:
    other = descriptor_pb2.FileDescriptorProto(name="tensor.proto", package="tensorflow", syntax="proto3")
    other.message_type.add(name="TensorProto")
    descriptor_pool.Default().Add(other)
    assert descriptor_pool.Default().FindMessageTypeByName("tensorflow.TensorProto") is not TensorProto.DESCRIPTOR
    assert TensorProto.DESCRIPTOR.file.pool is protos.POOL


def test_published_numbers() -> None:
    """By heart from the published files: what must never change."""
    fields = {field.name: field.number for field in TensorProto.DESCRIPTOR.fields}
    assert fields["tensor_content"] == 4 and fields["float_val"] == 5 and fields["string_val"] == 8
    assert fields["half_val"] == 13 and fields["uint32_val"] == 16 and fields["uint64_val"] == 17
    assert {field.name: field.number for field in PredictRequest.DESCRIPTOR.fields} == {
        "model_spec": 1,
        "inputs": 2,
        "output_filter": 3,
    }
    assert {field.name: field.number for field in PredictResponse.DESCRIPTOR.fields} == {"outputs": 1, "model_spec": 2}


# --- there and back ---------------------------------------------------------------------------------------------------


@given(tensors(), st.booleans())
def test_a_tensor_read_is_the_tensor_sent(tensor: Tensor, content: bool) -> None:
    same(read_tensor("x", tensor_proto(tensor, content=content), most=MOST), tensor)


@given(tensors())
def test_a_tensor_written_is_what_the_generated_class_writes(tensor: Tensor) -> None:
    parts, size = encode_tensor(tensor)
    wire = b"".join(parts)
    assert len(wire) == size
    assert wire == tensor_proto(tensor).SerializeToString()


@given(
    st.dictionaries(st.text(max_size=20), tensors(), max_size=4),
    st.text(max_size=20),
    st.integers(min_value=-(2**63), max_value=2**63 - 1),
)
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_a_response_is_what_the_generated_class_would_be(outputs: dict[str, Tensor], name: str, version: int) -> None:
    response = PredictResponse.FromString(encode_response(outputs, name=name, version=version, most=MOST))
    expected = PredictResponse()
    expected.model_spec.name = name
    expected.model_spec.version.value = version
    expected.model_spec.signature_name = "serving_default"
    for output, tensor in outputs.items():
        expected.outputs[output].CopyFrom(tensor_proto(tensor))
    # Compared as bytes: NaN is not equal to itself.
    assert response.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@given(st.integers(min_value=-(2**63), max_value=2**64 - 1))
def test_varint(value: int) -> None:
    kind = np.int64 if value < 0 else np.uint64
    assert packed_varints(np.array([value], kind)) == varint(value)


def test_a_reply_of_what_is_not_contiguous_or_not_writable() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3]
    array.flags.writeable = False
    response = PredictResponse.FromString(encode_response({"y": array}, name="m", version=1, most=MOST))
    same(read_tensor("y", response.outputs["y"], most=MOST), array)


def test_a_reply_over_the_limit() -> None:
    with pytest.raises(Overloaded):
        encode_response({"y": np.zeros(100, np.float32)}, name="m", version=1, most=400)


# --- requests ---------------------------------------------------------------------------------------------------------


def test_model_spec_says_what_was_sent_and_what_was_not() -> None:
    plain = read_request(predict_request({}).SerializeToString(), most=MOST)
    assert plain == Parsed({}, "", None, None, "", ())
    zero = read_request(predict_request({}, version=0, model="m", outputs=["a:0"]).SerializeToString(), most=MOST)
    assert zero == Parsed({}, "m", 0, None, "", ("a:0",))
    labelled = read_request(predict_request({}, label="stable", signature="s").SerializeToString(), most=MOST)
    assert labelled == Parsed({}, "", None, "stable", "s", ())


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (proto(1, (2, 2), float_val=[1.5]), np.full((2, 2), 1.5, np.float32)),
        (proto(19, (3,), half_val=[15360]), np.ones(3, np.float16)),
        (proto(10, (3,), bool_val=[True]), np.ones(3, np.bool_)),
        (proto(7, (2,), string_val=[b"a"]), Strings((2,), [b"a", b"a"])),
        (proto(9, (), int64_val=[-5]), np.array(-5, np.int64)),
        (proto(1, (0, 3)), np.empty((0, 3), np.float32)),
        (proto(1, (0, 3), float_val=[1]), np.empty((0, 3), np.float32)),
    ],
)
def test_one_value_is_for_the_whole_shape(sent: Any, expected: Tensor) -> None:
    same(read_tensor("x", sent, most=MOST), expected)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (proto(0), "DT_INVALID"),
        (proto(8), "DT_COMPLEX64"),
        (proto(14), "DT_BFLOAT16"),
        (proto(9999), "9999"),
        (proto(1, (2,)), "0 values in float_val"),
        (proto(1, (3,), float_val=[1, 2]), "2 values in float_val"),
        (proto(1, (1,), float_val=[1, 2]), "2 values in float_val"),
        (proto(1, (0,), float_val=[1, 2]), "2 values in float_val"),
        (proto(1, (2,), int_val=[1, 2]), "it has int_val"),
        (proto(1, (2,), tensor_content=bytes(7)), "7 bytes of tensor_content; float32 [2] has 8"),
        (proto(1, (0,), tensor_content=bytes(4)), "4 bytes of tensor_content; float32 [0] has 0"),
        (proto(1, (2,), tensor_content=bytes(8), float_val=[1, 2]), "both tensor_content and float_val"),
        (proto(7, (1,), tensor_content=b"\x01a"), "string_val"),
        (proto(7, (3,), string_val=[b"", b""]), "2 values in string_val"),
        (proto(1, (-1,), float_val=[1]), "shape [-1]"),
        (proto(1, (1,) * 40, float_val=[1]), "40 dimensions"),
        (proto(10, (2,), tensor_content=b"\x00\x02"), "neither 0 nor 1"),
        (proto(4, (2,), int_val=[0, 256]), "uint8"),
        (proto(6, (2,), int_val=[-129, 0]), "int8"),
        (proto(19, (1,), half_val=[65536]), "float16"),
        (proto(19, (1,), half_val=[-1]), "float16"),
        (proto(1, (1_000_000, 1_000_000), float_val=[0]), "larger than"),
        (proto(1, (0, 2**62), float_val=[]), "larger than"),
        (proto(1, (2**62, 2**62), float_val=[0]), "larger than"),
        (proto(7, (2**40,), string_val=[b"a"]), "16384 strings"),
        (proto(7, (16_000,), string_val=[bytes(1 << 20)]), "larger than"),
    ],
)
def test_what_is_wrong_is_said_with_the_tensors_name(sent: Any, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_tensor("picture:0", sent, most=MOST)
    assert caught.value.field == "picture:0"
    assert said in caught.value.message


def test_an_unknown_rank() -> None:
    sent = proto(1, (), float_val=[1])
    sent.tensor_shape.unknown_rank = True
    with pytest.raises(InvalidInput, match="rank"):
        read_tensor("x", sent, most=MOST)


def test_tensors_count_together() -> None:
    two = predict_request({"a": np.zeros(100, np.float32), "b": np.zeros(100, np.float32)}).SerializeToString()
    assert len(read_request(two, most=800).inputs) == 2
    with pytest.raises(TooLarge):
        read_request(two, most=799)
    half = Strings((MAX_STRINGS // 2 + 1,), [b""] * (MAX_STRINGS // 2 + 1))
    with pytest.raises(InvalidInput, match="strings"):
        read_request(predict_request({"a": half, "b": half}).SerializeToString(), most=MOST)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (predict_request({f"x{number}": np.zeros(1) for number in range(33)}), "inputs"),
        (predict_request({}, outputs=["y"] * 257), "output_filter"),
        (predict_request({"n" * 2000: np.zeros(1)}), "n" * 100 + "…"),
        (predict_request({}, model="m" * 2000), "m" * 100 + "…"),
    ],
)
def test_counts_and_names_are_bounded(request_: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_request(request_.SerializeToString(), most=MOST)
    assert caught.value.field == field


@given(st.data())
@settings(max_examples=300)
def test_a_mutated_request_is_read_or_refused(data: st.DataObject) -> None:
    """Nothing but our own errors comes out, and the count that decides where it is parsed ends."""
    wire = bytearray(
        predict_request({"x": np.arange(6, dtype=np.int64), "s": Strings((2,), [b"a", b"bc"])}).SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    is_light(bytes(wire), PREDICT)
    with suppress(InvalidInput):
        read_request(bytes(wire), most=MOST)


# --- here or in the child ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "light"),
    [
        (predict_request({"x": np.zeros(1 << 19, np.float32)}, content=True).SerializeToString(), True),
        (predict_request({"x": np.zeros(1 << 19, np.float32)}).SerializeToString(), True),
        (predict_request({"x": Strings((64,), [os.urandom(20_000)] * 64)}).SerializeToString(), True),
        (predict_request({"x": np.zeros(200_000, np.int64)}).SerializeToString(), False),
        (predict_request({"x": Strings((10_000,), [b""] * 10_000)}).SerializeToString(), False),
        (predict_request({}, outputs=["y"] * 10_000).SerializeToString(), False),
        (b"\x12\x00" * 10_000, False),
        (b"\x0a\x00" * 10_000, False),
        (b"\x12\xff\xff\xff\x7f" + bytes(100), False),
        (b"\x12" + b"\xff" * 600_000, False),
        (b"\x0b\x0c", False),
    ],
)
def test_where_a_message_is_parsed(wire: bytes, light: bool) -> None:
    assert is_light(wire, PREDICT) is light


@pytest.mark.parametrize(
    ("wire", "light"),
    [
        (infer_request({"x": np.zeros(1 << 19, np.float32)}).SerializeToString(), True),
        (infer_request({"x": np.zeros(1 << 19, np.float32)}, raw=False).SerializeToString(), True),
        (infer_request({"x": np.zeros(200_000, np.int64)}, raw=False).SerializeToString(), False),
        (infer_request({"x": Strings((10_000,), [b""] * 10_000)}, raw=False).SerializeToString(), False),
        (infer_request({}, outputs=["y"] * 10_000).SerializeToString(), False),
        (b"\x22\x00" * 10_000, False),
    ],
)
def test_where_another_protocols_message_is_parsed(wire: bytes, light: bool) -> None:
    assert is_light(wire, INFER) is light


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": np.arange(3 << 19, dtype=np.float64).reshape(3, -1)},
        {"x": Strings((5000,), [b"%d" % number for number in range(5000)])},
        {"x": Strings((2, 2), [bytes([number]) * (2 << 20) for number in range(4)]), "y": np.zeros((0, 4), np.int8)},
        {"a": np.arange(500_000, dtype=np.int64), "b": np.array([True, False]), "c": Strings((0,), [])},
    ],
)
@pytest.mark.alone
async def test_the_child_reads_what_would_be_read_here(inputs: dict[str, Tensor]) -> None:
    wire = predict_request(inputs, model="m", version=4, label="", outputs=["é"]).SerializeToString()
    assert len(wire) > LARGE or not is_light(wire, PREDICT)
    parser = Parser(MOST)
    await parser.start()
    try:
        await parser.parse(wire, PREDICT)  # the child is up
        async with stall_probe(label=f"{len(wire)} bytes through the child"):
            parsed = await parser.parse(wire, PREDICT)
    finally:
        await parser.close()
    assert (parsed.model, parsed.version, parsed.label, parsed.outputs) == ("m", 4, None, ("é",))
    assert set(parsed.inputs) == set(inputs)
    for name, tensor in inputs.items():
        same(parsed.inputs[name], tensor)


@pytest.mark.alone
async def test_a_small_message_that_becomes_large_is_made_in_the_child() -> None:
    wire = PredictRequest(inputs={"x": proto(1, (7 << 20,), float_val=[2])}).SerializeToString()
    parser = Parser(MOST)
    try:
        async with stall_probe(label="28 MiB from one value"):
            parsed = await parser.parse(wire, PREDICT)
        same(parsed.inputs["x"], np.full(7 << 20, 2, np.float32))
        over = PredictRequest(inputs={"x": proto(1, (9 << 20,), float_val=[2])}).SerializeToString()
        with pytest.raises(InvalidInput, match="larger than"):
            await parser.parse(over, PREDICT)
    finally:
        await parser.close()


@pytest.mark.alone
async def test_hostile_messages_do_not_stop_the_loop() -> None:
    messages = {
        "15,000,000 empty strings": PredictRequest(
            inputs={"x": proto(7, (1,), string_val=[b""] * 15_000_000)}
        ).SerializeToString(),
        "16,000,000 map entries": b"\x12\x00" * (16 << 20),
        "32 MiB of varints": b"\x12\x85\x80\x80\x10\x12\x80\x80\x80\x10\x52\xfb\xff\xff\x0f" + bytes((32 << 20) - 5),
        "1 MB of dimensions": PredictRequest(inputs={"x": proto(1, (1,) * 200_000)}).SerializeToString(),
    }
    parser = Parser(MOST)
    await parser.start()
    try:
        for label, wire in messages.items():
            async with stall_probe(label=label):
                with pytest.raises((InvalidInput, Overloaded)):
                    await parser.parse(wire, PREDICT)
        good = predict_request({"x": np.zeros(2 << 20, np.float32)}, content=True).SerializeToString()
        assert (await parser.parse(good, PREDICT)).inputs["x"].shape == (2 << 20,)
    finally:
        await parser.close()


async def test_a_closed_parser_is_unavailable() -> None:
    parser = Parser(MOST)
    await parser.close()
    assert (await parser.parse(b"", PREDICT)).inputs == {}
    with pytest.raises(Unavailable):
        await parser.parse(bytes(LARGE + 1), PREDICT)


def test_the_child_imports_no_grpc() -> None:
    unwanted = ("grpc", "onnxruntime", "structlog", "asyncio")
    program = f"import sys, agent.serving.parse_child; print([n for n in sys.modules if n in {unwanted}])"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"


def test_what_the_child_hands_over_is_sealed() -> None:
    memory, record = handover.write(Parsed({"x": np.arange(4)}))
    try:
        with pytest.raises(PermissionError):
            os.pwrite(memory, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(memory, 0)
        tensor = handover.read(memory, record).inputs["x"]
    finally:
        os.close(memory)
    np.testing.assert_array_equal(tensor, np.arange(4))
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    try:
        with pytest.raises(ValueError, match="sealed"):
            handover.read(loose, record)
    finally:
        os.close(loose)
