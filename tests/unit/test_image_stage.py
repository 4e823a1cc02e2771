"""The image stage: which bytes are pictures, and what comes of them. Equality with TensorFlow is tested elsewhere."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import InvalidInput
from agent.executor.stages.image import MAX_PIXELS, prepare
from agent.executor.stages.picture import MAX_SCANS, decode
from agent.model.spec import ImageStage
from support.pictures import PNG_MAGIC, bad, chunk, encode, good, photograph, png


def stage(**fields: Any) -> ImageStage:
    return ImageStage.model_validate({"stage": "image", "from": "Placeholder:0", "to": "images", **fields})


def prepared(item: bytes, **fields: Any) -> np.ndarray:
    what = stage(**fields)
    out = np.full((*what.size, 3) if what.layout == "NHWC" else (3, *what.size), np.nan, np.float32)
    prepare(what, item, out)
    return out


def slow_resize(pixels: np.ndarray, tall: int, wide: int) -> np.ndarray:
    """TF1's bilinear resize with align_corners=False, written out place by place."""
    height, width, _ = pixels.shape
    out = np.empty((tall, wide, 3), np.float32)
    for y in range(tall):
        v = np.float32(y) * (np.float32(height) / np.float32(tall))
        above, below = int(v), min(int(np.ceil(v)), height - 1)
        for x in range(wide):
            u = np.float32(x) * (np.float32(width) / np.float32(wide))
            left, right = int(u), min(int(np.ceil(u)), width - 1)
            corners = pixels[[[above], [below]], [left, right]].astype(np.float32)
            top, bottom = corners[:, 0] + (corners[:, 1] - corners[:, 0]) * (u - np.float32(left))
            out[y, x] = top + (bottom - top) * (v - np.float32(above))
    return out


@pytest.mark.parametrize("name", good())
def test_every_kind_of_picture_is_decoded(name: str) -> None:
    pixels = decode(good()[name])
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@pytest.mark.parametrize("name", bad())
def test_what_is_no_picture_is_refused_by_name(name: str) -> None:
    item, word = bad()[name]
    with pytest.raises(InvalidInput, match=word) as caught:
        prepared(item, crop=[2, 2])
    assert caught.value.field == "Placeholder:0"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "BMP", "TIFF"])
def test_other_formats_are_refused_by_name(kind: str) -> None:
    with pytest.raises(InvalidInput, match=f"(?i)not a JPEG or PNG.*{kind}"):
        decode(encode(photograph("coffee", (33, 21)), kind))


def test_png_keeps_the_pixels() -> None:
    picture = photograph("chelsea", (37, 29))
    np.testing.assert_array_equal(decode(encode(picture, "PNG")), np.asarray(picture))


def test_high_byte_of_16_bit() -> None:
    rows = [struct.pack(">6H", 0x12FF, 0xFF00, 0x80FF, 0x0001, 0x00FF, 0x0100)]
    assert decode(png((2, 1), 16, 2, rows)).tolist() == [[[0x12, 0xFF, 0x80], [0, 0, 1]]]
    assert decode(png((2, 1), 16, 0, [struct.pack(">2H", 0x12FF, 0xFFFF)])).tolist() == [[[0x12] * 3, [0xFF] * 3]]


def test_black_picture_is_not_taken_for_a_truncated_one() -> None:
    assert not decode(good()["png black"]).any()


def huge_png() -> bytes:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return PNG_MAGIC + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    item = good()["jpeg 4:2:0"]
    at = item.index(b"\xff\xc0") + 5
    return item[:at] + struct.pack(">HH", 65_000, 65_000) + item[at + 4 :]


@pytest.mark.parametrize("item", [huge_png(), huge_jpeg()], ids=["png", "jpeg"])
def test_a_huge_picture_costs_nothing(item: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=rf"(100000 x 100000|65000 x 65000) pixels, more than {MAX_PIXELS}"):
            decode(item)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_progressive_picture_of_too_many_passes() -> None:
    item = good()["jpeg progressive"]
    last = item.rindex(b"\xff\xda")
    with pytest.raises(InvalidInput, match="passes"):
        decode(item[:-2] + item[last:-2] * MAX_SCANS + item[-2:])


def test_png_metadata_is_not_parsed() -> None:
    text = chunk(b"zTXt", b"Comment\0\0" + b"no zlib data") + chunk(b"iCCP", b"profile\0\0x") + chunk(b"tRNS", b"")
    rows = [bytes(range(9)), bytes(range(9, 18))]
    assert decode(png((3, 2), 8, 2, rows, more=text)).ravel().tolist() == list(range(18))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_gives_a_picture_or_a_refusal(data: st.DataObject) -> None:
    item = bytearray(data.draw(st.sampled_from([good()["jpeg tiny"], good()["png interlaced"], bad()["png half"][0]])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(item) - 1))
        item[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        assert decode(bytes(item)).shape[2] == 3
    except InvalidInput:
        pass


@pytest.mark.parametrize("size", [(41, 30), (30, 41), (13, 9), (24, 24), (97, 25)])
def test_shorter_side_crop_and_normalisation(size: tuple[int, int]) -> None:
    picture = photograph("coffee", size)
    mean, std, scale = [123.68, 116.779, 103.939], [58.4, 57.1, 57.4], 0.5
    out = prepared(
        encode(picture, "PNG"), resize={"shorter": 24}, crop=[20, 18], mean=mean, std=std, scale=scale, order="BGR"
    )
    factor = np.float32(24) / np.float32(min(size))
    tall, wide = int(np.float32(size[1]) * factor), int(np.float32(size[0]) * factor)
    full = slow_resize(np.asarray(picture), tall, wide)
    top, left = int((tall - 20) / 2), int((wide - 18) / 2)
    want = full[top : top + 20, left : left + 18]
    want = ((want - np.float32(mean)) / np.float32(std) * np.float32(scale))[:, :, ::-1]
    np.testing.assert_array_equal(out, want)


def test_layouts_hold_the_same_numbers() -> None:
    item = good()["jpeg 4:4:4"]
    fields: dict[str, Any] = {"resize": {"shorter": 256}, "crop": [224, 224], "mean": [127] * 3, "std": [128] * 3}
    rows, planes = prepared(item, **fields), prepared(item, **fields, layout="NCHW")
    assert planes.shape == (3, 224, 224)
    np.testing.assert_array_equal(rows, planes.transpose(1, 2, 0))
    assert -1 <= rows.min() < rows.max() <= 1


def test_exact_resize_does_not_keep_the_aspect() -> None:
    picture = photograph("rocket", (31, 17))
    out = prepared(encode(picture, "PNG"), resize={"exact": [30, 30]})
    np.testing.assert_array_equal(out, slow_resize(np.asarray(picture), 30, 30))


def test_crop_alone_takes_the_middle() -> None:
    picture = photograph("rocket", (31, 17))
    out = prepared(encode(picture, "PNG"), crop=[4, 6])
    np.testing.assert_array_equal(out, np.asarray(picture)[6:10, 12:18])


def test_short_sides_are_cut_in_float32() -> None:
    # 209 * (256/209) is 255.99998 in float32: TensorFlow makes 255 of it, and cuts 224 from there.
    picture = photograph("grace_hopper", (209, 230))
    out = prepared(encode(picture, "PNG"), resize={"shorter": 256}, crop=[224, 224])
    full = slow_resize(np.asarray(picture), 281, 255)
    np.testing.assert_array_equal(out, full[28:252, 15:239])


def test_a_picture_smaller_than_the_crop_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"31 x 17 pixels.*smaller than the crop of 6 x 20") as caught:
        prepared(encode(photograph("rocket", (31, 17)), "PNG"), crop=[20, 6])
    assert caught.value.field == "Placeholder:0"


def test_a_picture_too_long_to_resize_is_refused() -> None:
    with pytest.raises(InvalidInput, match="too long and narrow"):
        prepared(png((200_000, 1), 1, 0, [bytes(25_000)]), resize={"shorter": 256}, crop=[224, 224])


def test_a_wrong_place_for_the_result_is_a_fault_of_the_program() -> None:
    with pytest.raises(ValueError, match="not float32"):
        prepare(stage(crop=[4, 4]), good()["jpeg tiny"], np.empty((3, 4, 4), np.float32))
    with pytest.raises(ValueError, match="float64"):
        prepare(stage(crop=[4, 4]), good()["jpeg tiny"], np.empty((4, 4, 3)))  # type: ignore[arg-type]
