"""A strict, streaming tar reader with bounded memory, and the layer stream that feeds it.

The standard library's tarfile guesses where it should refuse: it reads extended headers of any size into memory,
expands sparse files, and keeps every member. An image layer needs none of that.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

import zstandard

from agent.errors import InvalidImage
from agent.images.manifest import Compression

BLOCK = 512
CHUNK = 1 << 20
MAX_EXTENDED = 1 << 20  # a pax header carries xattrs (64 KiB each) besides the name
MAX_EXTENSIONS = 4  # extended headers before one entry
RATIO = 200  # unpacked to packed; real weights and bitstreams stay under 20
RATIO_FLOOR = 64 << 20  # small layers may be as compressible as they like
GZIP_CHUNK = 64 << 10  # what follows a member is copied for each member, so both are bounded
GZIP_MEMBERS = 100_000
ZSTD_WINDOW = 1 << 27  # what the zstd tool itself accepts without being asked

Kind = Literal["file", "folder", "symlink", "hardlink", "device", "fifo", "sparse file"]
_KINDS: dict[bytes, Kind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "fifo",
    b"S": "sparse file",
}


class LayerStream:
    """The bytes of a layer, decompressed, hashed and counted as they pass. Raises InvalidImage for bombs."""

    def __init__(
        self, file: BinaryIO, compression: Compression, limit: int, where: str, progress: Callable[[int], None]
    ) -> None:
        """`limit`: bytes that may come out. `progress` is told how many compressed bytes went in."""
        self._file = file
        self._limit = limit
        self._where = where
        self._progress = progress
        self._hash = hashlib.sha256()
        self._chunks = {"none": _plain, "gzip": _gzip, "zstd": _zstd}[compression](file)
        self._chunk = memoryview(b"")
        self.out = 0

    @property
    def diff_id(self) -> str:
        """The digest of everything that came out so far."""
        return "sha256:" + self._hash.hexdigest()

    def read(self, size: int) -> memoryview:
        """1 to `size` bytes; empty at the end."""
        while not self._chunk:
            try:
                chunk = next(self._chunks, None)
            except (zlib.error, zstandard.ZstdError) as error:
                raise InvalidImage(f"does not decompress: {error}", field=self._where) from None
            if chunk is None:
                return self._chunk
            self._count(chunk)
            self._chunk = memoryview(chunk)
        part, self._chunk = self._chunk[:size], self._chunk[size:]
        return part

    def _count(self, chunk: bytes) -> None:
        self.out += len(chunk)
        if self.out > self._limit:
            raise InvalidImage(
                f"unpacks to more than is allowed ({self._limit} bytes are left)",
                field=self._where,
                hint="raise images.max_image if the image is meant to be that large",
            )
        packed = self._file.tell()
        if self.out > RATIO_FLOOR and self.out > RATIO * packed:
            raise InvalidImage(f"unpacks to more than {RATIO} times its size: a bomb", field=self._where)
        self._hash.update(chunk)
        self._progress(packed)

    def exactly(self, size: int) -> bytes:
        """`size` bytes, or fewer if the layer ends before."""
        parts, left = [], size
        while left and (part := self.read(left)):
            parts.append(bytes(part))
            left -= len(part)
        return b"".join(parts)

    def drain(self) -> None:
        """Read to the end, so that the hash covers everything."""
        while self.read(CHUNK):
            pass


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _gzip(file: BinaryIO) -> Iterator[bytes]:
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    members = 1
    started = False
    data = b""
    while data or (data := file.read(GZIP_CHUNK)):
        if stream.eof:  # another member follows, unless it is zero padding
            data = data.lstrip(b"\0")
            if not data:
                continue
            members += 1
            if members > GZIP_MEMBERS:
                raise zlib.error(f"more than {GZIP_MEMBERS} members")
            stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
        chunk = stream.decompress(data, CHUNK)
        started = True
        data = stream.unused_data if stream.eof else stream.unconsumed_tail
        if chunk:
            yield chunk
    # Output that zlib still holds after the last input
    while not stream.eof and (chunk := stream.decompress(b"", CHUNK)):
        yield chunk
    if not started or not stream.eof:
        raise zlib.error("ends in the middle")


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    reader = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).stream_reader(
        file, read_size=CHUNK, read_across_frames=True, closefd=False
    )
    while chunk := reader.read(CHUNK):
        yield chunk


@dataclass(frozen=True)
class Entry:
    """One member. Names are as the archive has them (undecodable bytes as surrogates)."""

    name: str
    kind: Kind
    size: int
    link: str


class Archive:
    """The members of a tar, in order; `content()` of one is read, or skipped, before the next."""

    def __init__(self, stream: LayerStream, where: str) -> None:
        self._stream = stream
        self._where = where
        self._left = 0  # of the current member's content
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        while (entry := self._next()) is not None:
            yield entry
        self._stream.drain()

    def content(self) -> Iterator[memoryview]:
        """The current member's bytes, at most 1 MiB at a time."""
        while self._left:
            part = self._stream.read(min(self._left, CHUNK))
            if not part:
                raise self._fault("ends in the middle of a file")
            self._left -= len(part)
            yield part

    def _fault(self, message: str) -> InvalidImage:
        return InvalidImage(f"is not a sound archive: {message}", field=self._where)

    def _skip(self) -> None:
        for _ in self.content():
            pass
        if len(self._stream.exactly(self._padding)) != self._padding:
            raise self._fault("ends in the middle of a file")
        self._padding = 0

    def _begin(self, size: int) -> None:
        self._left, self._padding = size, -size % BLOCK

    def _next(self) -> Entry | None:
        self._skip()
        extended: dict[str, str] = {}
        for _ in range(MAX_EXTENSIONS + 1):
            header = self._header()
            if header is None:
                if extended:
                    raise self._fault("ends after an extended header")
                return None
            flag = header[156:157]
            if flag not in (b"x", b"g", b"L", b"K"):
                return self._entry(header, flag, extended)
            size = _number(header[124:136])
            if size is None or size > MAX_EXTENDED:
                raise self._fault("an extended header is too large")
            self._begin(size)
            text = b"".join(bytes(part) for part in self.content())
            self._skip()
            self._extend(flag, text, extended)
        raise self._fault("too many extended headers")

    def _header(self) -> bytes | None:
        block = self._stream.exactly(BLOCK)
        if not block:  # some builders leave out the end mark; a cut is found by the diff_id
            return None
        if not block.strip(b"\0"):
            if self._stream.exactly(BLOCK).strip(b"\0"):
                raise self._fault("something follows half an end mark")
            return None
        if len(block) != BLOCK:
            raise self._fault("ends in the middle of a header")
        wanted = _number(block[148:156])
        plain = block[:148] + b" " * 8 + block[156:]
        if wanted != sum(plain) and wanted != sum(plain) - 256 * sum(
            byte > 127 for byte in plain
        ):  # old tars sum signed
            raise self._fault("a header's checksum is wrong")
        return block

    def _extend(self, flag: bytes, text: bytes, extended: dict[str, str]) -> None:
        if flag in (b"L", b"K"):
            extended["path" if flag == b"L" else "linkpath"] = _text(text.rstrip(b"\0"))
            return
        for key, value in self._pax(text):
            if key.startswith("GNU.sparse."):
                extended["sparse"] = "yes"
            elif key in ("path", "linkpath", "size"):
                if flag == b"g":
                    raise self._fault(f"a global header sets {key}")
                extended[key] = value

    def _pax(self, text: bytes) -> Iterator[tuple[str, str]]:
        position = 0
        while position < len(text):
            match = _PAX_LENGTH.match(text, position)
            if not match:
                raise self._fault("an extended header is malformed")
            end = position + int(match[1])
            if end > len(text) or text[end - 1 : end] != b"\n" or end <= match.end():
                raise self._fault("an extended header is malformed")
            key, equals, value = text[match.end() : end - 1].partition(b"=")
            if not equals:
                raise self._fault("an extended header is malformed")
            yield _text(key), _text(value)
            position = end

    def _entry(self, header: bytes, flag: bytes, extended: dict[str, str]) -> Entry:
        kind = _KINDS.get(flag)
        if kind is None:
            raise self._fault(f"an entry has the unknown type {flag!r}")
        name = header[:100].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].split(b"\0")[0] + b"/" + name
        size = _number(header[124:136])
        if "size" in extended:
            size = int(extended["size"]) if re.fullmatch(r"[0-9]{1,18}", extended["size"]) else None
        if size is None:
            raise self._fault("an entry has no valid size")
        path = extended.get("path", _text(name))
        link = extended.get("linkpath", _text(header[157:257].split(b"\0")[0]))
        if "sparse" in extended:
            kind = "sparse file"
        elif kind == "file" and path.endswith("/"):
            kind = "folder"  # as tar wrote it before 1988
        # All other kinds are headers only, whatever size they claim; every tar agrees on that.
        self._begin(size if kind in ("file", "sparse file") else 0)
        return Entry(path, kind, size if kind == "file" else 0, link)


_PAX_LENGTH = re.compile(rb"([0-9]{1,8}) ")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _number(raw: bytes) -> int | None:
    """An octal or base-256 field; None if it is neither, or negative."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    digits = raw.strip(b" \0")
    if not digits:
        return 0
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None
