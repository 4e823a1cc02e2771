"""A whole host on a real file system that is full, or mounted read-only: a small tmpfs, in a namespace of its own."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import StorageError
from support.faulty_disk import can_mount
from support.host import Host

pytestmark = pytest.mark.skipif(not can_mount(), reason="needs root and a mount namespace of its own")


class SmallDisk:
    """64 MiB at `path`, for those who enter; `seen` is where the test sees it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        script = (
            f"mount -t tmpfs -o size=64m none {path} && mount --bind {path} {path} && echo mounted && exec sleep 900"
        )
        self._process = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", script], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == b"mounted\n"
        self.enter = ("nsenter", "-t", str(self._process.pid), "-m", "--")
        self.seen = Path(f"/proc/{self._process.pid}/root{path}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def fill(self) -> None:
        with (self.seen / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        (self.seen / "ballast").unlink()

    def remount(self, how: str) -> None:
        subprocess.run([*self.enter, "mount", "-o", f"remount,bind,{how}", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.fixture
def host(tmp_path: Path, disk: SmallDisk) -> Iterator[Host]:
    host = Host(tmp_path, state_dir=str(disk.path), images={"keep_free": "8MiB"}, slot={"program_timeout": "30s"})
    host.prefix = disk.enter
    for number in (1, 2, 3):
        host.pack(f"tiny:{number}", scale=1.0 + number, version=str(number))
    host.start(LOOK_EVERY="0.2")
    assert host.deploy("tiny:1")["outcome"] == "committed"
    assert host.deploy("tiny:2")["outcome"] == "committed"
    yield host
    host.kill()


def issues(host: Host) -> set[str]:
    return {issue["id"] for issue in host.status()["issues"]} & {"disk", "journal", "store", "boot-record"}


def refuses(host: Host) -> None:
    """A new image cannot be had; says so at once or as the end of the deployment."""
    try:
        error = host.deploy("tiny:3")["error"]
    except StorageError as refused:
        error = refused.as_dict()
    assert error["code"] == "STORAGE" and error["hint"], error
    assert host.status()["committed"]["version"] == "2"


def test_full(host: Host, disk: SmallDisk) -> None:
    with host.load(2, pause=0.02) as load:
        host.until_host("slot")
        disk.fill()
        host.until(lambda: "disk" in issues(host))
        refuses(host)
        disk.empty()
        host.until(lambda: not issues(host))
        assert host.deploy("tiny:3")["outcome"] == "committed"
    assert load.errors == []
    disk.fill()
    # The reserve is for this: the way back needs no room but for a few words.
    assert host.ended(host.call("rollback")["task"])["outcome"] == "committed"
    host.kill()
    host.start(LOOK_EVERY="0.2")
    assert host.until_host("slot")["committed"]["version"] == "2"
    assert "disk" in issues(host)
    disk.empty()
    host.until(lambda: not issues(host))
    assert host.deploy("tiny:3")["outcome"] == "committed"
    host.until(lambda: (disk.seen / "reserve").exists())


def test_read_only(host: Host, disk: SmallDisk) -> None:
    host.until_host("slot")
    host.kill()
    disk.remount("ro")
    with pytest.raises(OSError) as caught:
        (disk.seen / "x").touch()
    assert caught.value.errno == errno.EROFS
    host.start(LOOK_EVERY="0.2")
    with host.load(2, pause=0.02) as load:
        assert host.until_host("slot")["committed"]["version"] == "2"
        host.until(lambda: {"disk", "journal", "store"} <= issues(host))
        refuses(host)
        disk.remount("rw")
        host.until(lambda: not issues(host))
        assert host.deploy("tiny:3")["outcome"] == "committed"
    assert load.errors == []
    assert host.stop() == 0
