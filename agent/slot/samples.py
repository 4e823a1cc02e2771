"""Inputs that a seed makes for any signature: pictures with shapes in them, numbers like those of the golden cases.

Noise would prove little: on noise most classifiers say the same of everything. Nothing of an image is decoded here.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agent.model.golden import GoldenCase
from agent.model.signature import DType, Signature, Strings, Tensor, TensorSpec
from agent.model.spec import ImageStage

if TYPE_CHECKING:
    from PIL import Image

CHANNELS = (1, 3, 4)
PICTURE_SIDE = 64
"""Height and width of a picture tensor of any size; graphs halve it five times."""
FREE_SIZE = 8
"""The size of every other -1, but the first axis, which is 1."""
_SPREAD = (1.0, 0.5, 2.0)
_PICTURE_SIZE = (180, 180)
_HUE_STEP = 0.618034


def seeded_inputs(
    signature: Signature, image: ImageStage | None, cases: Sequence[GoldenCase], *, seed: int, count: int
) -> list[dict[str, Tensor]]:
    """`count` sets of inputs, the same for the same seed, each far from the next. Takes some 10 ms for a picture."""
    rng = np.random.default_rng([seed, 0x510D])
    found = []
    for index in range(count):
        like = cases[index % len(cases)].inputs if cases else {}
        found.append(
            {
                name: _tensor(spec, like.get(name), image if image and name == image.source else None, rng, index)
                for name, spec in signature.inputs.items()
            }
        )
    return found


def golden_pairs(
    signature: Signature, image: ImageStage | None, cases: Sequence[GoldenCase]
) -> list[dict[str, Tensor]]:
    """Two golden pictures in one request, in both orders: rows that change places are seen."""
    if image is None or list(signature.inputs) != [image.source] or signature.inputs[image.source].shape != (-1,):
        return []
    if any(not spec.shape or spec.shape[0] != -1 for spec in signature.outputs.values()):
        return []
    singles = [
        pictures.items[0]
        for case in cases
        if isinstance(pictures := case.inputs[image.source], Strings) and len(pictures.items) == 1
    ]
    if len(singles) < 2:
        return []
    first, second = singles[:2]
    return [{image.source: Strings((2,), pair)} for pair in ([first, second], [second, first])]


def picture(rng: np.random.Generator, index: int, height: int, width: int) -> Image.Image:
    """A picture that is smooth where photographs are, with strong shapes; `index` turns its colours."""
    from PIL import Image, ImageDraw  # not before the ports are open

    hue = (index * _HUE_STEP + rng.uniform(0, 0.1)) % 1.0
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * across + np.sin(angle) * down
    ramp = (ramp - ramp.min()) / (np.ptp(ramp) + 1e-9)
    ramp += 0.15 * np.sin(2 * np.pi * (rng.uniform(1, 4) * across + rng.uniform(1, 4) * down))
    ends = [_colour(hue, rng), _colour(hue + 0.45, rng)]
    pixels = ends[0] + np.clip(ramp, 0, 1)[..., None] * (ends[1] - ends[0])
    drawn = Image.fromarray(pixels.astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    for number in range(3 + index % 4):
        x, y = rng.uniform(-0.1, 0.8, 2) * (width, height)
        w, h = rng.uniform(0.15, 0.6, 2) * (width, height)
        fill = tuple(int(part) for part in _colour(hue + 0.3 * number, rng))
        kind = (index + number) % 3
        if kind == 0:
            pen.ellipse((x, y, x + w, y + h), fill=fill)
        elif kind == 1:
            pen.rectangle((x, y, x + w, y + h), fill=fill)
        else:
            pen.polygon([(x, y + h), (x + w / 2, y), (x + w, y + h)], fill=fill)
    return drawn


def _colour(hue: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.3, 1.0), rng.uniform(0.2, 1.0)))


def _tensor(
    spec: TensorSpec, like: Tensor | None, image: ImageStage | None, rng: np.random.Generator, index: int
) -> Tensor:
    axes = _picture_axes(spec.shape)
    shape = like.shape if like is not None else tuple(_sizes(spec.shape, axes))
    if spec.dtype is DType.STRING:
        count = int(np.prod(shape))
        numbers = range(index, index + count)
        if image is None:
            return Strings(shape, [_word(rng, number) for number in numbers])
        least = image.size if image.resize is None else _PICTURE_SIZE
        return Strings(shape, [_encoded(rng, number, least) for number in numbers])
    if axes is not None and spec.dtype in (DType.FLOAT32, DType.FLOAT16, DType.FLOAT64, DType.UINT8):
        return _picture_tensor(spec.dtype, shape, axes, rng, index)
    known = like if isinstance(like, np.ndarray) else None
    return _numbers(spec.dtype, shape, known, rng, index)


def _sizes(shape: Sequence[int], axes: Mapping[str, int] | None) -> list[int]:
    sides = (axes["height"], axes["width"]) if axes else ()
    return [
        size if size != -1 else PICTURE_SIDE if axis in sides else 1 if axis == 0 else FREE_SIZE
        for axis, size in enumerate(shape)
    ]


def _picture_axes(shape: Sequence[int]) -> dict[str, int] | None:
    """Where a tensor that looks like pictures has its height, width and channels."""
    if len(shape) != 4:
        return None
    if shape[3] in CHANNELS:
        return {"height": 1, "width": 2, "channels": 3}
    if shape[1] in CHANNELS:
        return {"height": 2, "width": 3, "channels": 1}
    return None


def _picture_tensor(
    dtype: DType, shape: tuple[int, ...], axes: Mapping[str, int], rng: np.random.Generator, index: int
) -> npt.NDArray[np.generic]:
    height, width, channels = (shape[axes[name]] for name in ("height", "width", "channels"))
    rows = []
    for number in range(shape[0]):
        drawn = np.asarray(picture(rng, index + number, height, width), np.float64)
        row = np.take(drawn, [channel % 3 for channel in range(channels)], axis=2)
        rows.append(row if axes["channels"] == 3 else row.transpose(2, 0, 1))
    pixels = np.stack(rows)
    if dtype is not DType.UINT8:
        pixels = (pixels / 255 - 0.5) * 4  # about what the usual mean and deviation leave
    return np.ascontiguousarray(pixels.astype(dtype.numpy))


def _numbers(
    dtype: DType,
    shape: tuple[int, ...],
    like: npt.NDArray[np.generic] | None,
    rng: np.random.Generator,
    index: int,
) -> npt.NDArray[np.generic]:
    kind = dtype.numpy.kind
    if kind == "b":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if kind in "iu":
        low, high = (int(like.min()), int(like.max())) if like is not None and like.size else (0, FREE_SIZE - 1)
        return rng.integers(low, high, shape, dtype=dtype.value, endpoint=True)
    middle, spread = 0.0, 1.0
    if like is not None and like.size:
        wide = like.astype(np.float64)
        middle, spread = float(wide.mean()), float(wide.std()) or 1.0
    scale = spread * _SPREAD[index % len(_SPREAD)]
    return (middle + rng.normal(0.0, scale, shape)).astype(dtype.numpy)


def _encoded(rng: np.random.Generator, index: int, least: tuple[int, int]) -> bytes:
    """JPEG and PNG in turn, of at least this height and width and at most twice as much."""
    height, width = (int(rng.integers(side, 2 * side)) for side in least)
    out = io.BytesIO()
    drawn = picture(rng, index, height, width)
    if index % 2:
        drawn.save(out, "PNG", compress_level=1)
    else:
        drawn.save(out, "JPEG", quality=90)
    return out.getvalue()


def _word(rng: np.random.Generator, index: int) -> bytes:
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)
    return rng.choice(letters, int(rng.integers(1, 12))).tobytes() + str(index).encode()
