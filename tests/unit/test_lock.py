"""One slotd for one state folder, however the last one ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.errors import Conflict, StorageError
from agent.journal.lock import take_lock

_HOLDER = """
import sys, time
from pathlib import Path
from agent.journal.lock import take_lock
lock = take_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert holder.stdout is not None
    holder.stdout.close()


def test_the_second_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    path = tmp_path / "slotd.lock"
    holder = hold(path)
    try:
        with pytest.raises(Conflict) as caught:
            take_lock(path)
        assert caught.value.message == f"another slotd (pid {holder.pid}) holds {tmp_path}"
        assert caught.value.hint
    finally:
        end(holder)
    with take_lock(path):  # the kernel lets go for the dead
        assert path.read_text() == f"{os.getpid()}\n"


def test_within_one_process(tmp_path: Path) -> None:
    path = tmp_path / "slotd.lock"
    lock = take_lock(path)
    with pytest.raises(Conflict, match=f"pid {os.getpid()}"):
        take_lock(path)
    lock.release()
    lock.release()
    take_lock(path).release()
    assert path.read_text() == ""


def test_a_stale_file_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "slotd.lock"
    path.write_text("99999999999\n and a long line that somebody else left there\n")
    with take_lock(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_holder_without_a_pid(tmp_path: Path) -> None:
    path = tmp_path / "slotd.lock"
    with take_lock(path):
        path.write_text("")
        with pytest.raises(Conflict, match="pid unknown"):
            take_lock(path)


def test_children_do_not_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "slotd.lock"
    lock = take_lock(path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        lock.release()
        take_lock(path).release()
    finally:
        child.communicate(b"\n")


def test_a_file_that_was_removed_is_locked_anew(tmp_path: Path) -> None:
    path = tmp_path / "slotd.lock"
    with take_lock(path):
        path.unlink()
        with take_lock(path):
            assert path.read_text() == f"{os.getpid()}\n"
            with pytest.raises(Conflict):
                take_lock(path)


def test_where_no_file_can_be(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        take_lock(tmp_path / "none" / "slotd.lock")
    assert caught.value.hint
    (tmp_path / "target").write_text("")
    (tmp_path / "slotd.lock").symlink_to(tmp_path / "target")
    with pytest.raises(StorageError):
        take_lock(tmp_path / "slotd.lock")
