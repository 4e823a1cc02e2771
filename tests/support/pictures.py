"""Photographs that packages ship, and pictures of every kind made from them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@cache
def shipped() -> dict[str, Path]:
    """Photographs in our dependencies: matplotlib's and scikit-image's."""
    import matplotlib
    import skimage

    data = Path(skimage.__file__).parent / "data"
    return {
        "grace_hopper": Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
        "chelsea": data / "chelsea.png",
        "coffee": data / "coffee.png",
        "rocket": data / "rocket.jpg",
    }


def lent() -> dict[str, Path]:
    """More photographs, if a folder of them lies beside the project (or where SLOTD_PHOTOS says); none otherwise."""
    folder = Path(os.environ.get("SLOTD_PHOTOS", Path(__file__).parents[3] / "shared" / "photos"))
    return {path.stem: path for path in sorted(folder.glob("*.jpg"))}


@cache
def photograph(name: str, size: tuple[int, int]) -> Image.Image:
    """A shipped photograph as RGB, at (width, height)."""
    with Image.open(shipped()[name]) as picture:
        return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a file of this kind, by Pillow."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    size: tuple[int, int],
    depth: int,
    colour: int,
    rows: Sequence[bytes],
    *,
    interlaced: bool = False,
    more: bytes = b"",
) -> bytes:
    """A PNG from raw rows; `more` goes between header and data. For kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, int(interlaced))
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return PNG_MAGIC + chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def wide_png(picture: Image.Image, colour: int) -> bytes:
    """A 16-bit PNG of a picture: colour type 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    mode = {0: "L", 2: "RGB", 4: "LA", 6: "RGBA"}[colour]
    high = np.atleast_3d(np.asarray(picture.convert(mode))).astype(np.uint16)
    low = np.random.default_rng(colour).integers(0, 256, high.shape, dtype=np.uint16)
    return png(picture.size, 16, colour, [row.astype(">u2").tobytes() for row in high * 256 + low])


def interlaced_rows(pixels: npt.NDArray[np.uint8]) -> list[bytes]:
    """The rows of an 8-bit picture in the order of PNG's seven passes."""
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = [pixels[y::dy, x::dx] for y, x, dy, dx in starts]
    return [row.tobytes() for part in passes if part.size for row in part]


@cache
def good() -> dict[str, bytes]:
    """Pictures of every kind that TensorFlow decodes, at odd sizes; a short side of 293, 307 or 321 becomes 255."""
    grace, cat = photograph("grace_hopper", (293, 403)), photograph("chelsea", (383, 519))
    coffee, rocket = photograph("coffee", (641, 307)), photograph("rocket", (321, 1021))
    alpha = cat.convert("RGBA")
    alpha.putalpha(cat.convert("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    cmyk = encode(grace.convert("CMYK"), "JPEG", quality=90)
    adobe = cmyk.index(b"Adobe")
    length = int.from_bytes(cmyk[adobe - 2 : adobe], "big")
    plain = encode(grace, "JPEG", quality=90)
    middle = len(plain) // 2
    grey16 = np.asarray(coffee.convert("L")).astype(np.uint16) * 257 + 17
    small = np.asarray(photograph("chelsea", (23, 19)))
    few = [np.random.default_rng(depth).bytes(4 * depth) for depth in (2, 4) for _ in range(21)]
    return {
        "jpeg 4:2:0": plain,
        "jpeg 4:2:2": encode(rocket, "JPEG", subsampling=1, quality=80),
        "jpeg 4:4:4": encode(coffee, "JPEG", subsampling=0, quality=95),
        "jpeg progressive": encode(cat, "JPEG", progressive=True, quality=85),
        "jpeg grayscale": encode(rocket.convert("L"), "JPEG"),
        "jpeg rgb": encode(coffee, "JPEG", keep_rgb=True),
        "jpeg cmyk": cmyk,
        "jpeg cmyk without adobe": cmyk[: adobe - 4] + cmyk[adobe - 2 + length :],
        "jpeg ycck": cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :],
        "jpeg turned by exif": encode(grace, "JPEG", exif=turned),
        "jpeg tiny": encode(photograph("coffee", (7, 5)), "JPEG"),
        "jpeg and more": plain + b"more" * 20,
        "jpeg damaged": plain[:middle] + bytes(40) + plain[middle + 40 :],
        "jpeg stray bytes": plain.replace(b"\xff\xdb", b"\0\1\2\xff\xdb", 1),
        "jpeg fill bytes": plain.replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
        "jpeg unknown jfif": plain[:11] + b"\7" + plain[12:],
        "png rgb": encode(coffee, "PNG"),
        "png grey": encode(cat.convert("L"), "PNG"),
        "png grey and alpha": encode(cat.convert("LA"), "PNG"),
        "png rgba": encode(alpha, "PNG"),
        "png black and white": encode(cat.convert("1"), "PNG"),
        "png palette": encode(cat.quantize(200), "PNG"),
        "png palette 4 bit": encode(cat.quantize(9), "PNG"),
        "png palette transparent": encode(cat.quantize(40), "PNG", transparency=bytes(range(40))),
        "png grey transparent": encode(cat.convert("L"), "PNG", transparency=100),
        "png grey 2 bit": png((16, 21), 2, 0, [row[:4] for row in few[:21]]),
        "png grey 4 bit": png((32, 21), 4, 0, few[21:]),
        "png 16 bit grey": encode(Image.fromarray(grey16), "PNG"),
        "png 16 bit grey and alpha": wide_png(cat, 4),
        "png 16 bit rgb": wide_png(rocket, 2),
        "png 16 bit rgba": wide_png(grace, 6),
        "png interlaced": png((23, 19), 8, 2, interlaced_rows(small), interlaced=True),
        "png with gamma": png((23, 19), 8, 2, [r.tobytes() for r in small], more=chunk(b"gAMA", b"\0\1\x86\xa0")),
        "png black": encode(Image.new("RGB", (300, 260)), "PNG"),
        "png too many rows": png((23, 10), 8, 2, [row.tobytes() for row in small]),
    }


@cache
def bad() -> dict[str, tuple[bytes, str]]:
    """Pictures that TensorFlow refuses, and a word that our refusal must have."""
    jpeg = good()["jpeg 4:2:0"]
    progressive = good()["jpeg progressive"]
    whole = good()["png rgb"]
    small = np.asarray(photograph("chelsea", (23, 19)))
    rows = [row.tobytes() for row in small]
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 0x55
    checksum = bytearray(whole)
    checksum[whole.index(b"IEND") - 5] ^= 1
    return {
        "nothing": (b"", "empty"),
        "text": (b"hello, world", "not a JPEG or PNG"),
        "bmp": (encode(photograph("coffee", (33, 21)), "BMP"), "BMP"),
        "jpeg start only": (jpeg[:3], "not a readable JPEG"),
        "jpeg header only": (jpeg[:300], "JPEG"),
        "jpeg noise": (jpeg[:3] + bytes(range(256)) * 8, "not a readable JPEG"),
        "jpeg half": (jpeg[: len(jpeg) // 2], "truncated JPEG"),
        "jpeg without its end": (jpeg[:-2], "truncated JPEG"),
        "jpeg without its last byte": (jpeg[:-1], "truncated JPEG"),
        "jpeg progressive half": (progressive[: len(progressive) // 2], "truncated JPEG"),
        "png half": (whole[: len(whole) // 2], "truncated PNG"),
        "png without its end": (whole[:-12], "truncated PNG"),
        "png with a flipped bit": (bytes(flipped), "checksum"),
        "png with a wrong checksum": (bytes(checksum), "checksum"),
        "png with too few rows": (png((23, 30), 8, 2, rows), "truncated PNG"),
        "png interlaced with too few rows": (
            png((23, 19), 8, 2, interlaced_rows(small)[:-3], interlaced=True),
            "truncated PNG",
        ),
        "png without a palette": (png((23, 19), 8, 3, [bytes(23)] * 19), "palette"),
        "png of an unknown kind": (png((23, 19), 8, 2, rows, more=chunk(b"CgBI", b"\0\0\0\0")), "CgBI"),
        "png of depth 5": (png((23, 19), 5, 2, rows), "header"),
        "png of no width": (png((0, 19), 8, 2, [b""] * 19), "header"),
    }
