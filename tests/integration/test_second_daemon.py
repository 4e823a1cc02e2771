"""A second slotd where one runs already: refused at once, naming the first, which notices nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from support.host import Host, merge, predict

ROOT = Path(__file__).parents[2]
X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Host(tmp_path_factory.mktemp("first")) as host:
        host.pack("tiny:1")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        yield host


def config_beside(first: Host, folder: Path, **settings: Any) -> dict[str, Any]:
    """A configuration that has nothing in common with the first one's."""
    own = {
        "state_dir": str(folder / "state"),
        "run_dir": str(folder / "run"),
        "slot": {"options": {"device": str(folder / "card")}},
        "serving": {"grpc": {"listen": "127.0.0.1:0"}, "http": {"listen": None}},
    }
    return merge(merge(first.config, own), settings)


def start(folder: Path, config: dict[str, Any]) -> subprocess.Popen[str]:
    """`slotd run`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "agent", "run", "--config", str(path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(first: Host, folder: Path, **settings: Any) -> tuple[str, str]:
    """Starts a second one, which must end with 73 and leave the first as it was; its `error:` and `hint:`."""
    before, files = first.status(), listing(first.run_dir)
    process = start(folder, config_beside(first, folder, **settings))
    try:
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 73, text
    assert "Traceback" not in text
    assert listing(first.run_dir) == files
    answers(first)
    after = first.status()
    for key in ("pid", "host", "committed", "previous"):
        assert after[key] == before[key]
    assert after["slot"]["executor"] == before["slot"]["executor"]
    error, hint = text.splitlines()[-2:]
    return error.removeprefix("error: "), hint.removeprefix("hint: ")


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((entry.name, entry.stat(follow_symlinks=False).st_ino) for entry in os.scandir(folder))


def answers(host: Host) -> None:
    """On TCP, on the Unix socket and on the admin socket (status was asked there)."""
    for address in (one for one in host.status()["serving"]["listen"] if not one.startswith("http")):
        with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            np.testing.assert_allclose(predict(channel, X)[0], X * 2 + 1, rtol=1e-6)


def pid_of(host: Host) -> str:
    assert host.process is not None
    return str(host.process.pid)


def test_the_same_state(first: Host, tmp_path: Path) -> None:
    error, hint = refused(first, tmp_path, state_dir=str(first.folder / "state"))
    assert f"another slotd (pid {pid_of(first)}) holds {first.folder / 'state'}" in error
    assert "state_dir" in hint


def test_the_same_port(first: Host, tmp_path: Path) -> None:
    error, hint = refused(first, tmp_path, serving={"grpc": {"listen": first.address}})
    assert f"{first.address} is in use by process {pid_of(first)}" in error
    assert error.startswith("serving.grpc.listen: ")
    assert "another port" in hint


def test_a_port_of_somebody_else(first: Host, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        error, _ = refused(first, tmp_path, serving={"grpc": {"listen": address}})
    assert f"{address} is in use by process {os.getpid()}" in error


def test_the_same_run_dir(first: Host, tmp_path: Path) -> None:
    error, hint = refused(first, tmp_path, run_dir=str(first.run_dir))
    assert f"{first.run_dir}/grpc.sock" in error
    assert pid_of(first) in error
    assert "another path" in hint


def test_the_same_admin_socket(first: Host, tmp_path: Path) -> None:
    """Its gRPC server has started by then, on addresses of its own, and must end again."""
    own = tmp_path / "grpc.sock"
    error, hint = refused(first, tmp_path, run_dir=str(first.run_dir), serving={"grpc": {"socket": str(own)}})
    assert f"{first.run_dir}/admin.sock" in error
    assert f"pid {pid_of(first)}" in error
    assert "run_dir" in hint
    assert not own.exists()


def test_the_same_card(first: Host, tmp_path: Path) -> None:
    """The slot is held by the first one's executor: the second runs, but gets nothing into it."""
    with Host(tmp_path, slot={"options": {"device": str(first.device)}}) as second:
        second.pack("tiny:2", scale=3.0)
        done = second.deploy("tiny:2")
        assert (done["outcome"], done["error"]["code"], done["host"]) == ("failed", "DEVICE_BUSY", "empty"), done
    answers(first)
    assert first.status()["host"] == "slot"
    assert first.predict(X)[1]["slotd-served-by"] == "slot"


def test_two_at_once(first: Host, tmp_path: Path) -> None:
    """One of them runs, the other is refused and names it."""
    config = config_beside(first, tmp_path)
    processes = [start(tmp_path, config) for _ in range(2)]
    try:
        while all(process.poll() is None for process in processes):
            try:
                processes[0].wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        loser, winner = sorted(processes, key=lambda process: process.poll() is None)
        assert loser.returncode == 73
        assert loser.stderr is not None
        assert f"pid {winner.pid}" in loser.stderr.read()
        assert winner.poll() is None
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def test_after_a_crash_the_place_is_free(tmp_path: Path) -> None:
    """Lock file and sockets of one that was killed are nobody's."""
    host = Host(tmp_path)
    with host:
        host.pack("tiny:1")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        left = listing(host.run_dir)
        host.kill()
        assert {"admin.sock", "grpc.sock"} <= {name for name, _ in listing(host.run_dir)}
        host.start()
        host.until_host("slot")
        answers(host)
        assert [name for name, _ in listing(host.run_dir)] == [name for name, _ in left]
