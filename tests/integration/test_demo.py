"""`slotd demo` as a program, with fewer requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from drivers.simulated import inject

ROOT = Path(__file__).parents[2]
SHORT = ("--seconds-each", "0.5", "--clients", "3")


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the demo makes its folder; nothing that was started there may outlive the test."""
    folder = tmp_path_factory.mktemp("d")
    yield folder
    for process in running(folder):
        process.kill()


def running(folder: Path) -> list[psutil.Process]:
    """What the demo has started and what still runs: its children have the folder in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def start(temporary: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "agent", "demo", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def play(temporary: Path, *arguments: object) -> tuple[int, str, str]:
    with start(temporary, *arguments) as process:
        out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def until(what: Any, seconds: float = 90) -> Any:
    """Its first true value."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
    return found


def host_pid(folder: Path) -> int | None:
    """The daemon's, once it has taken its lock."""
    lock = folder / "state" / "slotd.lock"
    text = lock.read_text().split() if lock.exists() else []
    return int(text[0]) if text else None


def test_demo(temporary: Path) -> None:
    code, out, err = play(temporary, *SHORT, "--json", "--swaps", 2, "--requests", 120)
    assert code == 0, err
    told = json.loads(out)
    assert told["ok"] is True
    assert (told["failed"], told["wrong"], told["stale"], told["problems"]) == (0, 0, 0, [])
    assert told["requests"] >= 120
    assert told["by_slot"] + told["by_bridge"] == told["requests"]
    assert [swap["model"] for swap in told["swaps"]] == ["efficientnet-lite1", "efficientnet-lite0"]
    for swap in told["swaps"]:
        assert swap["outcome"] == "committed"
        assert {"preflight", "program", "prove", "switch", "commit"} <= set(swap["phases"])
        assert swap["during"]["by_bridge"] > 0  # it programs for longer than any request takes
        assert all(swap[part]["p99_ms"] > 0 for part in ("before", "during", "after"))
    ((best, *_),) = told["classified"]["outputs"]["classifier/predictions/Softmax:0"]["top"]
    assert (best["name"], told["classified"]["served_by"]) == ("military uniform", "slot")
    for title in ("Build two models", "Deploy efficientnet-lite0", "Swap to efficientnet-lite1", "Stop slotd"):
        assert f"✓  {title}" in err
    assert list(temporary.iterdir()) == []
    until(lambda: not running(temporary), 10)


def test_keep(temporary: Path) -> None:
    code, out, err = play(temporary, *SHORT, "--keep", "--swaps", 1, "--requests", 10)
    assert code == 0, err
    (folder,) = temporary.iterdir()
    pid = host_pid(folder)
    assert f"slotd goes on running, with pid {pid}" in out
    commands = [line.strip() for line in out.splitlines() if line.startswith("  ") and "slotd-demo" in line]
    status = next(line for line in commands if " status " in line)
    predict = next(line for line in commands if " predict " in line)
    for command, shown in ((status, "efficientnet-lite1"), (predict, "military uniform")):
        done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert shown in done.stdout, done.stderr
    stop = next(line for line in commands if line.startswith("kill "))
    assert stop.startswith(f"kill {pid} ")
    assert subprocess.run(["sh", "-c", stop], timeout=60).returncode == 0
    assert list(temporary.iterdir()) == []
    until(lambda: not running(temporary), 10)


def test_ctrl_c_leaves_nothing(temporary: Path) -> None:
    with start(temporary, *SHORT) as demo:
        until(lambda: any(host_pid(folder) for folder in temporary.iterdir()))
        time.sleep(1)
        demo.send_signal(signal.SIGINT)
        time.sleep(0.3)
        demo.send_signal(signal.SIGTERM)  # an impatient second one changes nothing
        _, err = demo.communicate(timeout=60)
    assert demo.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err
    assert list(temporary.iterdir()) == []
    until(lambda: not running(temporary), 10)


def test_a_daemon_that_dies_is_told_with_its_log(temporary: Path) -> None:
    with start(temporary, *SHORT) as demo:
        (pid,) = until(lambda: [pid for folder in temporary.iterdir() if (pid := host_pid(folder))])
        log = next(temporary.iterdir()) / "slotd.log"
        until(lambda: "phase=preflight" in log.read_text())
        os.kill(pid, signal.SIGKILL)
        out, err = demo.communicate(timeout=60)
    assert demo.returncode == 69
    assert "error: slotd ended with -9" in err
    assert "the end of slotd's log" in out
    assert "phase=preflight" in out
    assert list(temporary.iterdir()) == []
    until(lambda: not running(temporary), 10)


def test_wrong_answers_are_found(temporary: Path) -> None:
    with start(temporary, *SHORT, "--swaps", 1, "--requests", 10) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "clients start to ask" in line:
                break
        (folder,) = temporary.iterdir()
        inject(folder / "state" / "simulated-slot", {"at": "infer", "kind": "wrong_result", "count": 2})
        out, _ = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "2 answers were not those of the model that they name" in out
    assert "the end of slotd's log" in out


def test_missing_package_is_named(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "amqtt.py").write_text("raise ImportError('gone', name='amqtt')\n")
    with start(temporary, *SHORT, PYTHONPATH=str(tmp_path)) as demo:
        _, err = demo.communicate(timeout=60)
    assert demo.returncode == 66
    assert "the package amqtt is not installed" in err
    assert "pip install 'slotd[demo]'" in err
    assert list(temporary.iterdir()) == []


def test_bad_input_is_told_before_anything_is_done(temporary: Path, tmp_path: Path) -> None:
    text = tmp_path / "note.txt"
    text.write_text("no picture")
    for arguments, shown in (
        (("--image", text), "is no JPEG or PNG"),
        (("--image", tmp_path / "none.jpg"), "No such file"),
        (("--folder", tmp_path), "is not empty"),
        (("--folder", text), "File exists"),
        (("--clients", "0"), "--clients"),
    ):
        code, out, err = play(temporary, *arguments)
        assert code in (2, 65), arguments
        assert shown in err
        assert "✓" not in out
    assert list(temporary.iterdir()) == []
