"""Layers to a folder: whiteouts, links, compressions, and what the hash list then holds."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import InvalidImage, InvalidModel, StorageError
from agent.images.archive import Archive, LayerStream
from agent.images.blobs import StoreLayout
from agent.images.hashes import read_hashes, verify_hashes
from agent.images.unpack import Limits, unpack
from support.images import compress, file_member, make_image, make_image_of_tars, member, pack_tar

LIMITS = Limits(size=1 << 30, files=200, keep_free=0)


def unpacked(root: Path, digest: str, limits: Limits = LIMITS) -> Path:
    return unpack(StoreLayout(root / "store"), root / "models", digest, "host/a:1", limits, lambda count, total: None)


def files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop(".hashes.json")
    return found


def apply(root: Path, *layers: list) -> dict[str, bytes]:
    digest = make_image_of_tars(root / "store", "t", [pack_tar(layer) for layer in layers])
    return files(unpacked(root, digest))


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("docker", [False, True])
def test_files_come_out_as_they_went_in(tmp_path, compression, docker):
    content = {
        "models/a.onnx": os.urandom(3_000_000),
        "models/sub/deep/b": b"",
        "models/c": b"c" * 513,
        "etc/passwd": b"x",
    }
    digest = make_image(tmp_path / "store", "t", content, layers=2, compression=compression, docker=docker)
    folder = unpacked(tmp_path, digest)
    assert folder == tmp_path / "models" / digest.removeprefix("sha256:")
    assert files(folder) == {
        name.removeprefix("models/"): data for name, data in content.items() if name.startswith("models/")
    }
    listed = verify_hashes(folder)
    assert (listed.digest, listed.reference) == (digest, "host/a:1")
    assert set(listed.files) == set(files(folder))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [folder.name]


def test_later_layers_replace_remove_and_hide(tmp_path):
    found = apply(
        tmp_path,
        [file_member(f"models/{name}", b"old") for name in ("a", "b", "d/x", "d/y", "e/x", "f")],
        [
            file_member("models/a", b"new"),
            file_member("models/.wh.b", b""),
            file_member("models/d/z", b"new"),
            file_member("models/d/.wh..wh..opq", b""),
            file_member("models/.wh.e", b""),
        ],
    )
    assert found == {"a": b"new", "d/z": b"new", "f": b"old"}


@pytest.mark.parametrize("first", [True, False])
def test_a_whiteout_hides_lower_layers_only(tmp_path, first):
    marks = [file_member("models/d/.wh.x", b""), file_member("models/.wh.d", b"")]
    fresh = [file_member("models/d/x", b"new")]
    found = apply(
        tmp_path,
        [file_member("models/d/x", b"old"), file_member("models/d/y", b"old"), file_member("models/d/deep/z", b"old")],
        marks + fresh if first else fresh + marks,
    )
    assert found == {"d/x": b"new"}


def test_the_whole_of_models_may_be_hidden_and_made_again(tmp_path):
    old = [file_member("models/old", b"old"), file_member("models/d/old", b"old")]
    for mark in (".wh.models", ".wh..wh..opq", "models/.wh..wh..opq"):
        root = tmp_path / mark.replace("/", "_")
        assert apply(root, old, [file_member(mark, b""), file_member("models/new", b"new")]) == {"new": b"new"}
    digest = make_image_of_tars(tmp_path / "store", "t", [pack_tar(old), pack_tar([file_member(".wh.models", b"")])])
    with pytest.raises(InvalidModel, match="no /models"):
        unpacked(tmp_path, digest)


def test_a_folder_may_become_a_file_and_a_file_a_folder(tmp_path):
    found = apply(
        tmp_path,
        [file_member("models/a/x", b"1"), file_member("models/b", b"2")],
        [file_member("models/a", b"file"), member("models/b", tarfile.DIRTYPE), file_member("models/b/y", b"3")],
    )
    assert found == {"a": b"file", "b/y": b"3"}


def test_links_inside_become_plain_files(tmp_path):
    found = apply(
        tmp_path,
        [
            file_member("models/blobs/one", b"data"),
            member("models/snapshot/a.onnx", tarfile.SYMTYPE, "../blobs/one"),
            member("models/b.onnx", tarfile.SYMTYPE, "/models/snapshot/a.onnx"),
            member("models/hard", tarfile.LNKTYPE, "models/blobs/one"),
            member("bin", tarfile.SYMTYPE, "usr/bin"),
            member("dev/null", tarfile.CHRTYPE),
        ],
    )
    assert found == {"blobs/one": b"data", "snapshot/a.onnx": b"data", "b.onnx": b"data", "hard": b"data"}
    folder = next((tmp_path / "models").iterdir())
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_a_replaced_file_does_not_change_its_hard_links(tmp_path):
    found = apply(
        tmp_path,
        [file_member("models/a", b"old"), member("models/b", tarfile.LNKTYPE, "models/a")],
        [file_member("models/a", b"new")],
    )
    assert found == {"a": b"new", "b": b"old"}


def test_modes_of_the_archive_are_not_taken_over(tmp_path):
    digest = make_image_of_tars(tmp_path / "store", "t", [pack_tar([file_member("models/a", b"x", mode=0o6777)])])
    assert (unpacked(tmp_path, digest) / "a").stat().st_mode & 0o7777 == 0o644


def test_all_dialects_of_tar_are_read(tmp_path):
    long = "models/" + "/".join(["n" * 90] * 4) + "/file"
    for number, dialect in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        tar = pack_tar(
            [file_member("./" + long, b"x"), member("models/l", tarfile.SYMTYPE, long.removeprefix("models/"))], dialect
        )
        digest = make_image_of_tars(tmp_path / str(number) / "store", "t", [tar])
        found = files(unpacked(tmp_path / str(number), digest))
        assert found == {long.removeprefix("models/"): b"x", "l": b"x"}


def test_compressed_layers_may_have_several_parts(tmp_path):
    tar = pack_tar([file_member("models/a", os.urandom(200_000))])
    halves = tar[:100_000], tar[100_000:]
    for number, (kind, packed) in enumerate(
        (
            ("gzip", gzip.compress(halves[0]) + gzip.compress(halves[1]) + bytes(700)),
            ("zstd", b"".join(zstandard.ZstdCompressor().compress(half) for half in halves)),
            # A skippable frame, as tools that make layers seekable put at the end
            ("zstd", zstandard.ZstdCompressor().compress(tar) + b"\x50\x2a\x4d\x18\x04\0\0\0abcd"),
        )
    ):
        root = tmp_path / str(number)
        digest = make_image_of_tars(root / "store", "t", [tar], compression=kind, packed=[packed])
        assert len(files(unpacked(root, digest))["a"]) == 200_000


def test_unpacked_and_intact_is_left_alone_and_damaged_is_made_again(tmp_path):
    digest = make_image(tmp_path / "store", "t", {"models/a.onnx": b"data"})
    folder = unpacked(tmp_path, digest)
    before = (folder / "a.onnx").stat().st_ino
    assert (unpacked(tmp_path, digest) / "a.onnx").stat().st_ino == before
    (folder / "a.onnx").write_bytes(b"daTa")
    with pytest.raises(StorageError, match=r"a\.onnx"):
        verify_hashes(folder)
    assert (unpacked(tmp_path, digest) / "a.onnx").read_bytes() == b"data"


def test_a_blob_that_changed_on_the_disk_is_the_disks_fault(tmp_path):
    digest = make_image(tmp_path / "store", "t", {"models/a.onnx": os.urandom(5000)}, compression="none")
    blob = max((tmp_path / "store/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[1500] ^= 1
    blob.write_bytes(data)
    with pytest.raises(StorageError, match="changed on the disk"):
        unpacked(tmp_path, digest)
    assert not blob.exists()  # so that the next pull fetches it
    assert list((tmp_path / "models").iterdir()) == []


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    digest = make_image(tmp_path / "store", "t", {"models/a.onnx": b"data"})
    with pytest.raises(StorageError, match="must stay free"):
        unpacked(tmp_path, digest, Limits(1 << 30, 100, keep_free=1 << 49))
    assert list((tmp_path / "models").iterdir()) == []


def test_a_hash_list_that_was_touched_is_not_believed(tmp_path):
    digest = make_image(tmp_path / "store", "t", {"models/a.onnx": b"data"})
    path = unpacked(tmp_path, digest) / ".hashes.json"
    good = path.read_bytes()
    for bad in (good.replace(b"host/a:1", b"host/b:1"), good[:-20], b"", b"[]", b"{}", b'{"checksum": 1}'):
        path.write_bytes(bad)
        with pytest.raises(StorageError, match="damaged"):
            read_hashes(path.parent)


NAMES = st.from_regex(r"[a-z][a-z0-9_./-]{0,150}", fullmatch=True).filter(lambda name: not name.endswith("/"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=8),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_our_reader_sees_what_tarfile_wrote(members, dialect):
    tar = pack_tar([file_member(name, data) for name, data in members], dialect)
    stream = LayerStream(io.BytesIO(tar), "none", 1 << 30, "t", lambda packed: None)
    archive = Archive(stream, "t")
    assert [(entry.name, b"".join(bytes(part) for part in archive.content())) for entry in archive] == members


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 3000), st.binary(min_size=1, max_size=40), st.sampled_from(["none", "gzip", "zstd"]))
def test_a_damaged_archive_is_refused_or_read_never_worse(position, bytes_, kind):
    good = compress(pack_tar([file_member("models/a", b"x" * 900), member("models/l", tarfile.SYMTYPE, "a")]), kind)
    position %= len(good)
    bad = good[:position] + bytes_ + good[position + len(bytes_) :]
    try:
        archive = Archive(LayerStream(io.BytesIO(bad), kind, 1 << 20, "t", lambda packed: None), "t")
        for _ in archive:
            for _part in archive.content():
                pass
    except InvalidImage:
        pass
