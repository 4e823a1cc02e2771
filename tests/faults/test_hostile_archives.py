"""Images that want to do harm: each is refused in its own words, and nothing is left or written elsewhere."""

from __future__ import annotations

import gzip
import os
import struct
import tarfile
import zlib

import psutil
import pytest
import zstandard

from agent.errors import InvalidImage, InvalidModel
from agent.images.blobs import StoreLayout
from agent.images.unpack import Limits, unpack
from support.images import compress, digest, file_member, make_image_of_tars, member, pack_tar
from support.pulling import fetch, images_config, open_store

GOOD = file_member("models/a.onnx", b"graph")


def pax(path: str, /, **headers: str) -> bytes:
    info = tarfile.TarInfo(path)
    info.size = 4
    info.pax_headers = headers
    return pack_tar([(info, b"data")])


def raw(tar: bytes, offset: int, data: bytes) -> bytes:
    """`tar` with bytes of its first header changed, and the checksum made right again."""
    header = bytearray(tar[:512])
    header[offset : offset + len(data)] = data
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar[512:]


def deep(parts: int) -> str:
    return "models/" + "/".join("d" * parts)


HOSTILE = {
    "absolute": (pack_tar([file_member("/etc/cron.d/x", b"")]), "absolute path"),
    "absolute by pax": (pax("x", path="/etc/cron.d/x"), "absolute path"),
    "dots": (pack_tar([file_member("models/../../etc/x", b"")]), "leaves the image"),
    "dots outside models": (pack_tar([file_member("../x", b"")]), "leaves the image"),
    "dots in a whiteout": (pack_tar([file_member("models/../.wh.x", b"")]), "leaves the image"),
    "whiteout of dots": (pack_tar([file_member("models/.wh...", b"")]), "whiteout of nothing"),
    "symlink out": (pack_tar([member("models/x", tarfile.SYMTYPE, "/etc/passwd")]), "leaves /models"),
    "symlink out, relative": (pack_tar([member("models/x", tarfile.SYMTYPE, "../etc/passwd")]), "leaves /models"),
    "symlink far out": (pack_tar([member("models/x", tarfile.SYMTYPE, "../../../../etc/passwd")]), "leaves /models"),
    "symlink to /models/..": (pack_tar([member("models/x", tarfile.SYMTYPE, "/models/../etc")]), "leaves /models"),
    "symlink to a folder": (
        pack_tar([GOOD, member("models/d", tarfile.DIRTYPE), member("models/x", tarfile.SYMTYPE, "d")]),
        "symlink to a folder",
    ),
    "symlink to nothing": (pack_tar([member("models/x", tarfile.SYMTYPE, "y")]), "not in /models"),
    "symlink in a ring": (
        pack_tar([member("models/x", tarfile.SYMTYPE, "y"), member("models/y", tarfile.SYMTYPE, "x")]),
        "leads nowhere",
    ),
    "write through a symlink": (
        pack_tar([member("models/x", tarfile.SYMTYPE, "a"), file_member("models/x/y", b"")]),
        "lies below a symlink",
    ),
    "models is a symlink": (pack_tar([member("models", tarfile.SYMTYPE, "/etc")]), "leaves /models"),
    "models is a symlink to itself": (pack_tar([member("models", tarfile.SYMTYPE, "models/x")]), "not a folder"),
    "models is a file": (pack_tar([file_member("models", b"x")]), "/models is not a folder"),
    "hard link out": (pack_tar([member("models/x", tarfile.LNKTYPE, "etc/passwd")]), "leaves /models"),
    "hard link out, absolute": (pack_tar([member("models/x", tarfile.LNKTYPE, "/etc/passwd")]), "absolute path"),
    "hard link out, dots": (pack_tar([member("models/x", tarfile.LNKTYPE, "models/../../x")]), "leaves the image"),
    "hard link to nothing": (pack_tar([member("models/x", tarfile.LNKTYPE, "models/y")]), "not in the image"),
    "hard link to a folder": (
        pack_tar([member("models/d", tarfile.DIRTYPE), member("models/x", tarfile.LNKTYPE, "models/d")]),
        "not in the image",
    ),
    "character device": (pack_tar([member("models/x", tarfile.CHRTYPE)]), "is a device"),
    "block device": (pack_tar([member("models/x", tarfile.BLKTYPE)]), "is a device"),
    "fifo": (pack_tar([member("models/x", tarfile.FIFOTYPE)]), "is a fifo"),
    "socket or what else": (raw(pack_tar([file_member("models/x", b"")]), 156, b"s"), "unknown type"),
    "sparse": (raw(pack_tar([file_member("models/x", b"1234")]), 156, b"S"), "sparse file"),
    "sparse by pax": (
        pax("models/x", **{"GNU.sparse.major": "1", "GNU.sparse.realsize": "1099511627776"}),
        "sparse file",
    ),
    "newline in a name": (pack_tar([file_member("models/a\nb", b"")]), "control characters"),
    "escape in a name": (pack_tar([file_member("models/\x1b[2J", b"")]), "control characters"),
    "NUL in a name": (pax("x", path="models/a\0b"), "NUL"),
    "not UTF-8": (raw(pack_tar([file_member("models/xy", b"")]), 7, b"\xff\xfe"), "not UTF-8"),
    "long name": (pack_tar([file_member("models/" + "n" * 256, b"")]), "too long or too deep"),
    "long path": (pack_tar([file_member("models/" + "/".join(["n" * 100] * 12), b"")]), "too long or too deep"),
    "very long path": (pack_tar([file_member("n/" * 3000, b"")]), "name of 6000 characters"),
    "deep": (pack_tar([file_member(deep(40), b"")]), "too long or too deep"),
    "our hash list": (pack_tar([file_member("models/.hashes.json", b"{}")]), "reserved"),
    "negative size": (raw(pack_tar([file_member("models/x", b"1234")]), 124, b"\xff" * 12), "no valid size"),
    "size of an exabyte": (
        raw(pack_tar([file_member("models/x", b"1234")]), 124, b"\x80" + b"\0" * 3 + b"\x0f" + b"\0" * 7),
        "ends in the middle",
    ),
    "huge extended header": (raw(pax("x", path="models/x"), 124, b"77777777777\0"), "too large"),
    "extended headers only": (pax("x", path="models/x")[:512] * 9, "ends in the middle|malformed|too many"),
    "malformed pax": (pax("x", path="models/x").replace(b"17 path=models/x", b"99 path=models/x"), "malformed"),
    "wrong checksum": (pack_tar([GOOD]).replace(b"models/a.onnx", b"models/b.onnx"), "checksum"),
    "not a tar": (os.urandom(4096), "checksum"),
    "cut in a header": (pack_tar([GOOD])[:300], "middle of a header"),
    "cut in a file": (pack_tar([file_member("models/a", b"x" * 4000)])[:2048], "middle of a file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_each_is_refused_in_its_own_words(tmp_path, name):
    tar, match = HOSTILE[name]
    digest = make_image_of_tars(tmp_path / "store", "t", [tar])
    limits = Limits(size=1 << 40, files=100, keep_free=0)
    outside = sorted(tmp_path.iterdir())
    with pytest.raises(InvalidImage, match=match) as caught:
        unpack(StoreLayout(tmp_path / "store"), tmp_path / "models", digest, "", limits, lambda count, total: None)
    assert caught.value.message.isprintable()
    assert list((tmp_path / "models").iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [tmp_path / "models", *outside]


async def refused(tmp_path, tars, match, kind=InvalidImage, fields=None, **how) -> None:
    digest = make_image_of_tars(tmp_path / "made", "t", tars, **how)
    config = images_config(**(fields or {}))
    store = await open_store(tmp_path / "state", config)
    outside = sorted(path for path in tmp_path.iterdir())
    with pytest.raises(kind, match=match) as caught:
        await fetch(f"oci:{tmp_path}/made:t", store, config)
    assert type(caught.value) is kind
    assert caught.value.message.isprintable()
    assert list(store.models.iterdir()) == [] and not store.has(digest)
    assert sorted(path for path in tmp_path.iterdir()) == outside
    assert not [child for child in psutil.Process().children() if "agent.images.puller" in child.cmdline()]


async def test_hostile_from_end_to_end(tmp_path):
    for name in ("dots", "symlink out", "hard link out", "character device"):
        tar, match = HOSTILE[name]
        await refused(tmp_path / name, [tar], match)


async def test_an_image_without_models(tmp_path):
    await refused(tmp_path, [pack_tar([file_member("etc/x", b"")])], "no /models folder", InvalidModel)


async def test_a_link_from_a_lower_layer_is_not_written_through(tmp_path):
    lower = pack_tar([file_member("models/real", b"real"), member("models/x", tarfile.SYMTYPE, "real")])
    await refused(tmp_path, [lower, pack_tar([file_member("models/x/y", b"")])], "lies below a symlink")


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
async def test_truncated_layers(tmp_path, compression):
    tar = pack_tar([file_member("models/a", os.urandom(200_000))])
    packed = compress(tar, compression)
    await refused(
        tmp_path, [tar], "in the middle|unpacks to", compression=compression, packed=[packed[: len(packed) // 2]]
    )


async def test_a_tar_cut_between_two_files_is_found_by_its_diff_id(tmp_path):
    tar = pack_tar([GOOD, file_member("models/b", b"x")])
    await refused(tmp_path, [tar], "the image says", compression="none", packed=[tar[:1024]])


async def test_another_layer_than_the_image_says(tmp_path):
    await refused(tmp_path, [pack_tar([GOOD])], "the image says", diff_ids=[digest(b"something else")])


async def test_a_layer_that_is_not_what_its_type_says(tmp_path):
    tar = pack_tar([GOOD])
    await refused(tmp_path / "1", [tar], "does not decompress", compression="gzip", packed=[tar])
    await refused(tmp_path / "2", [tar], "does not decompress", compression="zstd", packed=[gzip.compress(tar)])
    await refused(tmp_path / "3", [tar], "not a sound archive", compression="none", packed=[gzip.compress(tar)])
    await refused(tmp_path / "4", [tar], "does not decompress", packed=[gzip.compress(tar) + b"garbage"])


def bomb_head(size: int) -> bytes:
    info = tarfile.TarInfo("models/a.onnx")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


async def test_a_gzip_bomb(tmp_path):
    pack = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    packed = (
        pack.compress(bomb_head(8 << 30)) + b"".join(pack.compress(bytes(1 << 20)) for _ in range(200)) + pack.flush()
    )
    assert len(packed) < 300_000
    await refused(tmp_path, [b"bomb"], "a bomb", packed=[packed])


async def test_a_gzip_bomb_of_many_parts(tmp_path):
    await refused(tmp_path, [b"bomb"], "more than 100000 members", packed=[gzip.compress(b"") * 100_100])


async def test_a_zstd_bomb(tmp_path):
    pack = zstandard.ZstdCompressor(level=3).compressobj()
    packed = (
        pack.compress(bomb_head(8 << 30)) + b"".join(pack.compress(bytes(1 << 20)) for _ in range(200)) + pack.flush()
    )
    assert len(packed) < 50_000
    await refused(tmp_path, [b"bomb"], "a bomb", compression="zstd", packed=[packed])


async def test_a_zstd_frame_that_wants_gigabytes_of_memory(tmp_path):
    # A frame header that asks for a window of 2 GiB, then one raw block
    frame = struct.pack("<I", 0xFD2FB528) + b"\x00" + bytes([21 << 3]) + struct.pack("<I", (4 << 3) | 1)[:3] + b"abcd"
    await refused(tmp_path, [b"abcd"], "does not decompress", compression="zstd", packed=[frame])


async def test_more_than_an_image_may_unpack_to(tmp_path):
    tar = pack_tar([file_member("models/a", os.urandom(300_000))])
    more = pack_tar([file_member("models/b", bytes(900_000))])
    await refused(tmp_path, [tar, more], "more than is allowed", fields={"max_image": 1_000_000})


async def test_more_files_than_an_image_may_have(tmp_path):
    many = pack_tar([file_member(f"models/{number}", b"") for number in range(60)])
    await refused(tmp_path / "1", [many], "more than 50 files", fields={"max_files": 50})
    again = pack_tar([file_member(f"models/{number % 7}", b"") for number in range(60)])
    await refused(tmp_path / "2", [again], "more than 50 files", fields={"max_files": 50})


async def test_a_million_entries(tmp_path):
    one = pack_tar([file_member("etc/x", b"")])[:512]
    pack = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    packed = b"".join(pack.compress(one * 10_000) for _ in range(100)) + pack.flush()
    await refused(tmp_path, [b"bomb"], "too many entries", packed=[packed], fields={"max_files": 1000})


async def test_a_hundred_thousand_whiteouts_cost_nothing(tmp_path):
    lower = pack_tar([file_member(f"models/{number}", b"") for number in range(2000)])
    mark = pack_tar([file_member("models/.wh..wh..opq", b"")])[:512]
    upper = pack_tar([file_member(f"models/new{number}", b"") for number in range(2000)])[:-10240] + mark * 30_000
    made = make_image_of_tars(tmp_path / "made", "t", [lower, upper + bytes(1024)])
    config = images_config()
    store = await open_store(tmp_path / "state", config)
    with pytest.raises(InvalidModel, match=r"no model\.yaml"):
        await fetch(f"oci:{tmp_path}/made:t", store, config)
    assert len(list(store.folder(made).iterdir())) == 2001
