"""JPEG and PNG bytes to RGB pixels, to the grey level as TensorFlow's `decode_jpeg` and `decode_png` (channels=3) do.

That is: JPEG by libjpeg-turbo's fast integer DCT with fancy upsampling; of 16-bit PNGs the high byte; alpha, gamma,
transparency and EXIF orientation ignored. What TensorFlow refuses as truncated or corrupt is refused here too.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import PngImagePlugin

from agent.errors import InvalidInput

Pixels: TypeAlias = npt.NDArray[np.uint8]

MAX_PIXELS = 50_000_000
"""The largest picture, read from its header before anything is decoded (200 MB of memory at the most)."""
MAX_SCANS = 100
"""A progressive JPEG with more passes is built to waste time (ordinary ones have 10; each costs a pass over all)."""

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_KNOWN = {b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
# Colour type: channels, and the bit depths that the PNG standard allows with it.
_PNG_TYPES = {0: (1, (1, 2, 4, 8, 16)), 2: (3, (8, 16)), 3: (1, (1, 2, 4, 8)), 4: (2, (8, 16)), 6: (4, (8, 16))}
# The seven passes of an interlaced PNG: first column and row, step of columns and rows.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def decode(item: bytes) -> Pixels:
    """The picture as [height, width, 3], R, G, B.

    Raises InvalidInput: not a JPEG or PNG, more than MAX_PIXELS, truncated or corrupt.
    """
    if item.startswith(_JPEG):
        return _jpeg(item)
    if item.startswith(_PNG):
        return _png(item)
    if not item:
        raise InvalidInput("is empty, not a JPEG or PNG picture")
    kind = next((f", {name} is not supported" for start, name in _KNOWN.items() if item.startswith(start)), "")
    raise InvalidInput(
        f"is not a JPEG or PNG picture (first bytes {item[:4].hex(' ')}{kind})",
        hint="send the bytes of a .jpg or .png file as they are, not base64",
    )


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InvalidInput(
            f"is a picture of {width} x {height} pixels, more than {MAX_PIXELS} in all", hint="make it smaller first"
        )


# --- JPEG ------------------------------------------------------------------------------------------------------------


def _jpeg(item: bytes) -> Pixels:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(item, strict=False)
    except KeyError:  # simplejpeg's look-up of a colour space that is not known
        raise InvalidInput("is not a readable JPEG picture: its header is invalid") from None
    except ValueError as error:
        raise InvalidInput(f"is not a readable JPEG picture: {error}") from None
    if height <= 0 or width <= 0:
        raise InvalidInput("is not a readable JPEG picture: its header is invalid")
    _check_size(width, height)
    if _is_progressive(item) and (scans := item.count(b"\xff\xda")) > MAX_SCANS:
        raise InvalidInput(f"is a JPEG picture in {scans} passes, more than {MAX_SCANS}")
    if space in ("CMYK", "YCCK"):
        return _from_cmyk(_decode_jpeg(item, "CMYK"), inverted=_has_adobe_marker(item))
    return _decode_jpeg(item, "RGB")


def _decode_jpeg(item: bytes, space: str) -> Pixels:
    # TensorFlow takes pictures with damaged data (libjpeg's warnings), but not those that end too soon.
    try:
        return _turbo(item, space, strict=True)
    except ValueError as error:
        if "Premature end of JPEG" in str(error) or item.rfind(b"\xff\xd9") < item.rfind(b"\xff\xda"):
            raise InvalidInput("is a truncated JPEG picture") from None
    try:
        # simplejpeg forgives warnings over the data only, not those over the header.
        return _turbo(_with_clean_header(item), space, strict=False)
    except ValueError as error:
        raise InvalidInput(f"is not a readable JPEG picture: {error}") from None


def _turbo(item: bytes, space: str, *, strict: bool) -> Pixels:
    pixels: Pixels = simplejpeg.decode_jpeg(item, space, fastdct=True, strict=strict)
    return pixels


def _from_cmyk(cmyk: Pixels, *, inverted: bool) -> Pixels:
    """TensorFlow's own integer rule; Adobe's files store ink inverted."""
    ink = cmyk if inverted else 255 - cmyk
    colours = ink[:, :, :3].astype(np.uint16)
    colours *= ink[:, :, 3:]
    colours //= 255
    return colours.astype(np.uint8)


def _segments(item: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start and end of its content) of a JPEG's segments up to the first scan's, skipping stray bytes."""
    at = 2
    while (at := item.find(b"\xff", at)) >= 0:
        while item[at : at + 1] == b"\xff":  # any number of fill bytes
            at += 1
        if at + 3 > len(item):
            return
        marker = item[at]
        at += 1
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD7:  # these have no content
            continue
        end = at + int.from_bytes(item[at : at + 2], "big")
        yield marker, at + 2, end
        if marker == 0xDA:
            return
        at = max(end, at + 2)


def _with_clean_header(item: bytes) -> bytes:
    """The same picture without stray bytes, metadata and odd JFIF versions, so that libjpeg has no word about it."""
    parts = [b"\xff\xd8"]
    for marker, start, end in _segments(item):
        if marker == 0xDA:
            return b"".join([*parts, item[start - 4 :]])
        content = item[start - 2 : end]
        if marker == 0xE0 and content[2:7] == b"JFIF\0":
            content = content[:7] + b"\1" + content[8:]
        if not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):
            parts += [bytes((0xFF, marker)), content]
    return item


def _is_progressive(item: bytes) -> bool:
    return any(marker in (0xC2, 0xC6, 0xCA, 0xCE) for marker, _, _ in _segments(item))


def _has_adobe_marker(item: bytes) -> bool:
    return any(marker == 0xEE and item.startswith(b"Adobe", start) for marker, start, _ in _segments(item))


# --- PNG -------------------------------------------------------------------------------------------------------------


def _png(item: bytes) -> Pixels:
    """By way of a copy of only the chunks that make the pixels: text, profiles and animation are never parsed."""
    chunks = _chunks(item)
    kind, body = next(chunks, (b"", memoryview(b"")))
    if kind != b"IHDR" or len(body) != 13:
        raise InvalidInput("is not a readable PNG picture: it does not begin with a header")
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", body)
    channels, depths = _PNG_TYPES.get(colour, (0, ()))
    if depth not in depths or rest[:2] != [0, 0] or rest[2] > 1 or not width or not height:
        raise InvalidInput("is not a readable PNG picture: its header is invalid")
    _check_size(width, height)
    kept = [(kind, body)]
    kept += [(kind, body) for kind, body in chunks if kind in (b"PLTE", b"IDAT")]
    if colour == 3 and not any(kind == b"PLTE" for kind, _ in kept):
        raise InvalidInput("is not a readable PNG picture: it has no palette")
    plain: list[bytes | memoryview] = [_PNG]
    for kind, body in (*kept, (b"IEND", memoryview(b""))):
        plain += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))]
    try:
        with PngImagePlugin.PngImageFile(io.BytesIO(b"".join(plain))) as picture:
            picture.load()
            wide = picture.mode.startswith("I")  # 16-bit grey; of other 16-bit kinds Pillow keeps the high byte itself
            pixels = np.asarray(picture if wide or picture.mode == "RGB" else picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise InvalidInput(f"is not a readable PNG picture: {error}") from None
    # Pillow leaves the rows that are missing at zero without a word.
    if rest[2] or not pixels[-1].any():
        want = _raw_size(width, height, depth * channels, interlaced=bool(rest[2]))
        if not _inflates_to([body for kind, body in kept if kind == b"IDAT"], want):
            raise InvalidInput("is a truncated PNG picture")
    if wide:
        pixels = np.repeat((pixels >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    return pixels


def _chunks(item: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(type, content) of a PNG's critical chunks up to IEND, checksums checked. Raises InvalidInput."""
    view, at = memoryview(item), len(_PNG)
    while True:
        if at + 12 > len(item):
            raise InvalidInput("is a truncated PNG picture")
        size, kind = struct.unpack_from(">I4s", item, at)
        body = view[at + 8 : at + 8 + size]
        at += 12 + size
        if at > len(item):
            raise InvalidInput("is a truncated PNG picture")
        if kind[0] & 0x20:  # a lower-case letter: ancillary
            continue
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(item[at - 4 : at], "big"):
            raise InvalidInput("is a corrupt PNG picture: a checksum is wrong")
        if kind == b"IEND":
            return
        if kind not in (b"IHDR", b"PLTE", b"IDAT"):
            raise InvalidInput(f"is not a readable PNG picture: it has a chunk {kind!r}")
        yield kind, body


def _raw_size(width: int, height: int, bits: int, *, interlaced: bool) -> int:
    """Bytes of a PNG's filtered rows, `bits` to a pixel."""
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _inflates_to(parts: list[memoryview], want: int) -> bool:
    """Whether the zlib stream in `parts` holds at least `want` bytes; never more than 64 KiB of it in memory."""
    stream = zlib.decompressobj()
    have = 0
    try:
        for part in parts:
            data: bytes | memoryview = part
            while len(data) and not stream.eof and have < want:
                have += len(stream.decompress(data, 65536))
                data = stream.unconsumed_tail
    except zlib.error:
        return False
    return have >= want
