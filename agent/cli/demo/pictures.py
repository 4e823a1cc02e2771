"""Real photographs for the demo's clients, and what bare ONNX Runtime says of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from agent.errors import InvalidInput, InvalidModel

if TYPE_CHECKING:
    from agent.forge.demo_models import Reference

PORTRAIT = "grace_hopper"
TOLERANCE = 1e-3
"""The largest error of a probability."""
CLEAR = 10 * TOLERANCE
"""How far apart the two models must be on each picture, so that an answer is one model's and not the other's."""
_FOLDER, _LIST = "pictures", "pictures.json"
_EXPECTED = "expected.npz"
_QUALITY = 90


def write_pictures(folder: Path) -> list[str]:
    """The photographs as JPEGs, each once more as its mirror image; their names. Raises NotFound."""
    from agent.forge.demo_models import INPUT, photographs

    (folder / _FOLDER).mkdir()
    names: list[str] = []
    for name, path in sorted(photographs().items()):
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        files = {
            name: path.read_bytes() if path.suffix == ".jpg" else _jpeg(picture),
            f"{name}-mirrored": _jpeg(ImageOps.mirror(picture)),
        }
        for title, data in files.items():
            picture_path(folder, title).write_bytes(data)
        names += files
    (folder / _LIST).write_text(json.dumps({"input": INPUT, "names": names}))
    return names


def read_pictures(folder: Path) -> tuple[str, dict[str, bytes]]:
    """The models' input, and what `write_pictures` wrote, by name, in its order."""
    known = json.loads((folder / _LIST).read_bytes())
    return known["input"], {name: picture_path(folder, name).read_bytes() for name in known["names"]}


def picture_path(folder: Path, name: str) -> Path:
    """Where one of them is."""
    return folder / _FOLDER / f"{name}.jpg"


def write_expected(folder: Path, references: list[Reference]) -> None:
    """What each model says of each picture: float32 [pictures, models, classes].

    Raises InvalidModel if the models can't be told apart by their answers.
    """
    _, pictures = read_pictures(folder)
    expected = np.stack([np.stack([reference(data) for reference in references]) for data in pictures.values()])
    for name, (first, second) in zip(pictures, expected, strict=True):
        if np.abs(first - second).max() < CLEAR:
            raise InvalidModel("both models say the same of it, so no answer could be told from the other", field=name)
    np.savez(folder / _EXPECTED, expected=expected)


def read_expected(folder: Path) -> npt.NDArray[np.float32]:
    """What `write_expected` wrote."""
    with np.load(folder / _EXPECTED, allow_pickle=False) as arrays:
        expected: npt.NDArray[np.float32] = arrays["expected"]
    return expected


def check_picture(path: Path) -> None:
    """Raises InvalidInput for what is no JPEG or PNG."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as picture:
            picture.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None)
        raise InvalidInput(
            f"cannot be read: {reason}" if reason else "is no JPEG or PNG",
            field=str(path),
            hint="give --image a photograph",
        ) from None


def _jpeg(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()
