"""The image stage: one JPEG or PNG to a normalised float32 tensor, exactly as the models' TensorFlow graphs did it.

The resize is TF1's bilinear one with `align_corners=False` (source = destination * scale, no half-pixel centres). All
sizes and coordinates are float32 and cut, not rounded: with another arithmetic every fifth picture comes out shifted.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from agent.errors import InvalidInput
from agent.executor.stages.picture import MAX_PIXELS, Pixels, decode
from agent.model.spec import ImageStage

__all__ = ["MAX_PIXELS", "prepare"]

Floats: TypeAlias = npt.NDArray[np.float32]
Indices: TypeAlias = npt.NDArray[np.int64]

_MAX_SIDE = 1 << 24
"""The longest side after the resize; float32 counts no further."""
_CHANNEL = np.arange(3)


def prepare(stage: ImageStage, item: bytes, out: npt.NDArray[np.float32]) -> None:
    """Decode, resize, crop and normalise one picture into `out`, (pixel - mean) / std * scale.

    `out` is float32 of the stage's size: [height, width, 3] or, with layout NCHW, [3, height, width]. Raises
    InvalidInput (field: the stage's input) if the bytes are no JPEG or PNG, are cut short, describe more than
    MAX_PIXELS, or make a picture smaller than the crop.
    """
    height, width = stage.size
    expected = (height, width, 3) if stage.layout == "NHWC" else (3, height, width)
    if out.shape != expected or out.dtype != np.float32:
        raise ValueError(f"out is {out.dtype} {out.shape}, not float32 {expected}")
    try:
        rows = _resized(stage, decode(item))
    except InvalidInput as error:
        error.field = error.field or stage.source
        raise
    # Rows of interleaved R, G, B: with long rows numpy is several times faster than with a last axis of 3.
    rows -= np.tile(np.asarray(stage.mean, np.float32), width)
    if stage.std != (1.0, 1.0, 1.0):
        rows /= np.tile(np.asarray(stage.std, np.float32), width)
    if stage.scale != 1.0:
        rows *= np.float32(stage.scale)
    target = out if stage.layout == "NHWC" else out.transpose(1, 2, 0)
    target[...] = rows.reshape(height, width, 3)[:, :, :: 1 if stage.order == "RGB" else -1]


def _resized(stage: ImageStage, pixels: Pixels) -> Floats:
    """The resized crop as [height, 3 * width]."""
    height, width, _ = pixels.shape
    tall, wide = _full_size(stage, height, width)
    crop_tall, crop_wide = stage.size
    if tall < crop_tall or wide < crop_wide:
        raise InvalidInput(
            f"is a picture of {width} x {height} pixels, {wide} x {tall} after the resize: "
            f"smaller than the crop of {crop_wide} x {crop_tall}"
        )
    flat = pixels.reshape(height, 3 * width)
    if (tall, wide) == (height, width):
        top, left = (tall - crop_tall) // 2, 3 * ((wide - crop_wide) // 2)
        return flat[top : top + crop_tall, left : left + 3 * crop_wide].astype(np.float32)
    needed, upper, lower, down = _rows(height, tall, crop_tall)
    first, second, across = _columns(width, wide, crop_wide)
    # Only the rows that the crop needs; across first, then down: TensorFlow's order, on which the last bit depends.
    source = flat.take(needed, axis=0)
    line = source.take(first, axis=1).astype(np.float32)
    step = source.take(second, axis=1).astype(np.float32)
    step -= line
    step *= across
    line += step
    result: Floats = line.take(upper, axis=0)
    fall = line.take(lower, axis=0)
    fall -= result
    fall *= down
    result += fall
    return result


def _full_size(stage: ImageStage, height: int, width: int) -> tuple[int, int]:
    """Height and width of the whole picture after the resize."""
    if stage.resize is None:
        return height, width
    if stage.resize.exact is not None:
        return stage.resize.exact
    assert stage.resize.shorter is not None
    scale = np.float32(stage.resize.shorter) / np.float32(min(height, width))
    tall, wide = int(np.float32(height) * scale), int(np.float32(width) * scale)
    if max(tall, wide) > _MAX_SIDE:
        raise InvalidInput(f"is a picture of {width} x {height} pixels, too long and narrow to be resized")
    return tall, wide


def _axis(source: int, full: int, crop: int) -> tuple[Indices, Indices, Floats]:
    """For each of the `crop` middle places of `full`: the source's places on both sides and the share of the second."""
    offset = (full - crop) // 2
    at = np.arange(offset, offset + crop, dtype=np.float32) * (np.float32(source) / np.float32(full))
    first = np.floor(at)
    second = np.minimum(np.ceil(at).astype(np.int64), source - 1)
    return first.astype(np.int64), second, at - first


@lru_cache(maxsize=64)
def _rows(source: int, full: int, crop: int) -> tuple[Indices, Indices, Indices, Floats]:
    """The source's rows that are needed, which of those lie above and below each row of the crop, and the share."""
    first, second, share = _axis(source, full, crop)
    needed, where = np.unique(np.concatenate((first, second)), return_inverse=True)
    return needed, where[:crop], where[crop:], share[:, None]


@lru_cache(maxsize=64)
def _columns(source: int, full: int, crop: int) -> tuple[Indices, Indices, Floats]:
    """The same along a row of interleaved R, G, B."""
    first, second, share = _axis(source, full, crop)
    return (
        (3 * first[:, None] + _CHANNEL).ravel(),
        (3 * second[:, None] + _CHANNEL).ravel(),
        np.repeat(share, 3),
    )
