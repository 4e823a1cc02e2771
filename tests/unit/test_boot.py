"""boot.json: whatever happens to the file or to us, the host finds the old record or the new one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.errors import StorageError
from agent.journal import boot
from agent.journal.boot import BootRecord, ModelRef, confirm_boot, read_boot, rehearse_boot, write_boot

A = ModelRef("sha256:" + "a" * 64, "registry:5000/resnet50:3", "resnet50", "3")
B = ModelRef("sha256:" + "b" * 64, "oci:/layout:größe", "vgg16", "12")
OLD = BootRecord(7, A, None)
NEW = BootRecord(8, B, A)


def test_nothing_there_is_an_empty_host(tmp_path: Path) -> None:
    assert read_boot(tmp_path) == BootRecord(0, None, None)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    for record in (OLD, NEW, BootRecord(9, None, B)):
        write_boot(tmp_path, record)
        assert read_boot(tmp_path) == record
    assert sorted(os.listdir(tmp_path)) == ["boot.json", "boot.json.bak"]


def test_either_file_is_enough(tmp_path: Path) -> None:
    write_boot(tmp_path, OLD)
    write_boot(tmp_path, NEW)
    for name in ("boot.json", "boot.json.bak"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        found = read_boot(tmp_path)
        assert replace(found, repaired=None) == NEW
        assert found.repaired == f"{name} is gone"
        assert confirm_boot(tmp_path, found) is None
        assert (tmp_path / name).read_bytes() == content


def test_a_backup_that_lags_behind_is_brought_up_quietly(tmp_path: Path) -> None:
    write_boot(tmp_path, OLD)
    former = (tmp_path / "boot.json").read_bytes()
    write_boot(tmp_path, NEW)
    (tmp_path / "boot.json.bak").write_bytes(former)  # as a power cut right after the rename leaves it
    assert read_boot(tmp_path) == NEW
    assert confirm_boot(tmp_path, NEW) is None
    (tmp_path / "boot.json").unlink()
    assert replace(read_boot(tmp_path), repaired=None) == NEW


def test_the_first_commit_may_be_cut_off_before_its_backup(tmp_path: Path) -> None:
    write_boot(tmp_path, BootRecord(1, A, None))
    (tmp_path / "boot.json.bak").unlink()
    assert read_boot(tmp_path) == BootRecord(1, A, None)


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    write_boot(tmp_path, OLD)
    write_boot(tmp_path, NEW)
    path = tmp_path / "boot.json"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        found = read_boot(tmp_path)
        assert replace(found, repaired=None) == NEW, length
        assert found.repaired is not None and found.repaired.startswith("boot.json "), length


def test_a_bit_flipped_at_every_byte(tmp_path: Path) -> None:
    write_boot(tmp_path, OLD)
    write_boot(tmp_path, NEW)
    path = tmp_path / "boot.json"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            with pytest.raises(boot._Unusable):
                boot._decode(bytes(damaged))
        path.write_bytes(damaged)
        assert replace(read_boot(tmp_path), repaired=None) == NEW, place


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 512,
        b"null\n",
        b"[1]\n",
        b"{}\n",
        b'{"format":1,"record":NaN,"sha256":""}\n',
        b"[" * 60_000,
        b"x" * (boot.MAX_BYTES + 1),
        boot._sealed(1, {"generation": 1}),
        boot._sealed(1, None),
        boot._sealed(1, {"generation": "x", "committed": None, "previous": None}),
        boot._sealed(2, {"generation": 1, "committed": None, "previous": None}),
    ],
)
def test_what_is_no_record_is_not_believed(tmp_path: Path, content: bytes) -> None:
    write_boot(tmp_path, OLD)
    write_boot(tmp_path, NEW)
    (tmp_path / "boot.json").write_bytes(content)
    assert replace(read_boot(tmp_path), repaired=None) == NEW
    (tmp_path / "boot.json.bak").write_bytes(content)
    with pytest.raises(StorageError) as caught:
        read_boot(tmp_path)
    assert "boot.json.bak" in caught.value.message
    assert caught.value.hint
    write_boot(tmp_path, NEW)  # and the host can go on from there
    assert read_boot(tmp_path) == NEW


def test_only_the_backup_is_there_and_broken(tmp_path: Path) -> None:
    (tmp_path / "boot.json.bak").write_bytes(b"x")
    with pytest.raises(StorageError):
        read_boot(tmp_path)


def test_a_broken_record_does_not_become_the_backup(tmp_path: Path) -> None:
    write_boot(tmp_path, OLD)
    write_boot(tmp_path, NEW)
    (tmp_path / "boot.json").write_bytes(b"broken")
    third = BootRecord(9, B, None)
    write_boot(tmp_path, third)
    assert read_boot(tmp_path) == third
    assert (tmp_path / "boot.json.broken").read_bytes() == b"broken"
    (tmp_path / "boot.json").unlink()
    assert replace(read_boot(tmp_path), repaired=None) == third


def test_links_and_folders_are_no_record(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_boot(other, NEW)
    (tmp_path / "boot.json").symlink_to(other / "boot.json")
    with pytest.raises(StorageError, match="symbolic link"):
        read_boot(tmp_path)
    write_boot(tmp_path, OLD)
    assert read_boot(tmp_path) == OLD
    assert read_boot(other) == NEW
    (other / "boot.json").unlink()
    (other / "boot.json").mkdir()
    assert read_boot(other).repaired == "boot.json is not a plain file"
    write_boot(other, OLD)
    assert read_boot(other) == OLD


def test_fields_of_a_newer_slotd_are_left_alone(tmp_path: Path) -> None:
    fields = json.loads(boot._encode(NEW))["record"] | {"pinned": True}
    fields["committed"]["signed_by"] = "somebody"
    for name in ("boot.json", "boot.json.bak"):
        (tmp_path / name).write_bytes(boot._sealed(1, fields))
    assert read_boot(tmp_path) == NEW
    assert confirm_boot(tmp_path, NEW) is None
    assert (tmp_path / "boot.json").read_bytes() == boot._sealed(1, fields)


def test_no_folder(tmp_path: Path) -> None:
    assert read_boot(tmp_path / "none") == BootRecord(0, None, None)
    with pytest.raises(StorageError) as caught:
        write_boot(tmp_path / "none", OLD)
    assert caught.value.exit == 74


class PowerCut(BaseException):
    """Nothing after it happens."""


@pytest.mark.parametrize("torn", [False, True], ids=["before", "torn"])
def test_power_cut_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    """The n-th system call of a commit is the last one; of a torn write half of it happens."""
    calls = ("open", "write", "fsync", "rename", "link")
    real = {name: getattr(os, name) for name in calls}
    seen, outcomes = 0, set()
    for last in range(100):
        folder = tmp_path / f"{last}"
        folder.mkdir()
        write_boot(folder, BootRecord(6, B, None))
        write_boot(folder, OLD)
        count = 0

        def count_down(name: str, *arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count > last:
                if torn and name == "write" and count == last + 1:
                    real[name](arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise PowerCut
            return real[name](*arguments, **more)

        for name in calls:
            monkeypatch.setattr(os, name, lambda *a, _n=name, **k: count_down(_n, *a, **k))
        try:
            write_boot(folder, NEW)
            done = True
        except PowerCut:
            done = False
        finally:
            monkeypatch.undo()
        found = read_boot(folder)
        assert found.repaired is None
        assert found in (OLD, NEW), last
        outcomes.add(found.generation)
        seen = last
        if done:
            assert found == NEW
            break
        write_boot(folder, NEW)  # what is left over is in nobody's way
        assert read_boot(folder) == NEW
    assert seen >= 8
    assert outcomes == {7, 8}


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
def test_a_disk_that_fails_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_boot(tmp_path, OLD)

    def fail(path: Any, *_: Any, **__: Any) -> Any:
        if call == "open" and not str(path).endswith(".new"):
            return real(path, *_, **__)
        raise OSError(5, "Input/output error")

    real = getattr(os, call)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match="Input/output error") as caught:
        write_boot(tmp_path, NEW)
    monkeypatch.undo()
    assert caught.value.hint
    assert read_boot(tmp_path) == OLD
    assert not list(tmp_path.glob("*.new"))
    write_boot(tmp_path, NEW)
    assert read_boot(tmp_path) == NEW


def faulty(monkeypatch: pytest.MonkeyPatch, folder: Path, *, rename_done: bool, reading: bool = True) -> None:
    """The disk fails from the rename of boot.json on; `rename_done`: which says that it failed, but was done."""
    rename, fsync, open_, broken = os.rename, os.fsync, os.open, False

    def renamed(source: Any, target: Any) -> None:
        nonlocal broken
        if Path(target) == folder / "boot.json":
            broken = True
            if rename_done:
                rename(source, target)
                raise OSError(5, "Input/output error")
        rename(source, target)

    def synced(fd: int) -> None:
        if broken:
            raise OSError(5, "Input/output error")
        fsync(fd)

    def opened(path: Any, flags: int, *more: Any) -> int:
        if broken and not reading and Path(path).name == "boot.json":
            raise OSError(5, "Input/output error")
        return open_(path, flags, *more)

    for name, call in (("rename", renamed), ("fsync", synced), ("open", opened)):
        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("rename_done", [False, True], ids=["folder-not-synced", "rename-said-no"])
def test_what_the_file_says_is_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename_done: bool) -> None:
    """The new record is in the file: then it is in force, and the caller hears that it may not last."""
    write_boot(tmp_path, OLD)
    faulty(monkeypatch, tmp_path, rename_done=rename_done)
    doubt = write_boot(tmp_path, NEW)
    assert doubt is not None and "power cut" in doubt and "Input/output error" in doubt
    assert read_boot(tmp_path) == NEW
    monkeypatch.undo()
    assert json.loads((tmp_path / "boot.json.bak").read_bytes())["record"]["generation"] == OLD.generation
    assert confirm_boot(tmp_path, NEW) is None
    (tmp_path / "boot.json").unlink()
    assert replace(read_boot(tmp_path), repaired=None) == NEW


def test_a_file_that_cannot_even_be_read_is_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is told no writes the old record again when the disk works."""
    write_boot(tmp_path, OLD)
    faulty(monkeypatch, tmp_path, rename_done=True, reading=False)
    with pytest.raises(StorageError):
        write_boot(tmp_path, NEW)
    monkeypatch.undo()
    assert confirm_boot(tmp_path, OLD) is None
    assert read_boot(tmp_path) == OLD


def test_a_rehearsal_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_boot(tmp_path, OLD)
    rehearse_boot(tmp_path)
    assert read_boot(tmp_path) == OLD
    assert sorted(os.listdir(tmp_path)) == ["boot.json", "boot.json.bak"]

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="No space left") as caught:
        rehearse_boot(tmp_path)
    assert caught.value.hint == "free some space"
    assert sorted(os.listdir(tmp_path)) == ["boot.json", "boot.json.bak"]
    (tmp_path / "reserve").write_bytes(b"")
    rehearse_boot(tmp_path)  # a commit may use that


_WRITER = """
import sys
from pathlib import Path
from agent.journal.boot import BootRecord, ModelRef, read_boot, write_boot
folder = Path(sys.argv[1])
generation = read_boot(folder).generation
while True:
    generation += 1
    ref = ModelRef("sha256:%064x" % generation, "x" * (generation % 50), "m", str(generation))
    write_boot(folder, BootRecord(generation, ref, None))
    print(generation, flush=True)
"""


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """What was acknowledged is there; at most one more is."""
    chance = random.Random(1)
    generation = 0
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        first = writer.stdout.readline()
        assert first
        time.sleep(chance.random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        acknowledged = int([first, *writer.stdout.read().splitlines(keepends=True)][-1].split()[0])
        writer.stdout.close()
        writer.wait()
        found = read_boot(tmp_path)
        assert found.repaired is None
        assert found.generation in (acknowledged, acknowledged + 1)
        assert found.committed is not None and found.committed.version == str(found.generation)
        assert acknowledged > generation
        generation = found.generation
