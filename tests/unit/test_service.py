"""What goes to systemd, on a real datagram socket."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import service


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@slotd-test-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if name.startswith("@") else name)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_each_message_as_systemd_reads_it(manager: socket.socket) -> None:
    assert service.notify_ready("serving\nREADY=0")
    assert manager.recv(4096).decode().split("\n") == ["READY=1", f"MAINPID={os.getpid()}", "STATUS=serving READY=0"]
    assert service.notify_ready()
    assert manager.recv(4096).decode() == f"READY=1\nMAINPID={os.getpid()}"
    assert service.notify_status("slot: resnet50 3")
    assert manager.recv(4096) == b"STATUS=slot: resnet50 3"
    assert service.notify_stopping()
    assert manager.recv(4096) == b"STOPPING=1\nSTATUS=stopping"
    assert service.extend_timeout(1.5)
    assert manager.recv(4096) == b"EXTEND_TIMEOUT_USEC=1500000"


def test_a_status_is_one_bounded_line(manager: socket.socket) -> None:
    assert service.notify_status("x\n" * 100_000)
    line = manager.recv(1 << 20).decode()
    assert "\n" not in line
    assert len(line) == len("STATUS=") + service.MAX_STATUS


def test_nothing_happens_outside_a_service() -> None:
    assert not service.notify_ready()
    assert not service.notify("STATUS=nobody listens")


@pytest.mark.parametrize("name", ["relative", "vsock:2:1234", "/" + "x" * 200, "/nowhere/notify"])
def test_an_address_that_cannot_be_used_is_no_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    assert not service.notify_ready()


def test_a_manager_that_went_away_is_no_error(manager: socket.socket) -> None:
    manager.close()
    assert not service.notify_status("still here")


def test_a_full_queue_never_blocks(manager: socket.socket) -> None:
    sent = 0
    while service.notify_status("x" * 900) and sent < 100_000:
        sent += 1
    assert 0 < sent < 100_000, "the socket's queue filled and the call came back"


async def test_watchdog_pings_while_the_loop_lives(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    watchdog = service.Watchdog()
    assert watchdog.interval == 0.02
    task = asyncio.create_task(watchdog.run(), name="watchdog")
    for _ in range(3):
        assert await asyncio.to_thread(manager.recv, 4096) == b"WATCHDOG=1"
    await _stop(task)
    _drain(manager)

    task = asyncio.create_task(watchdog.run(), name="watchdog")
    await asyncio.sleep(0)
    assert manager.recv(4096) == b"WATCHDOG=1"
    time.sleep(0.2)  # the loop stands still for ten intervals
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)
    await _stop(task)


async def test_watchdog_withholds_the_ping_of_an_unhealthy_process(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    asked = 0

    def healthy() -> bool:
        nonlocal asked
        asked += 1
        return asked == 5

    task = asyncio.create_task(service.Watchdog(healthy).run(), name="watchdog")
    assert await asyncio.to_thread(manager.recv, 4096) == b"WATCHDOG=1"
    while asked < 10:
        await asyncio.sleep(0.001)
    await _stop(task)
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "-5"}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}],
)
async def test_watchdog_that_nobody_asked_for_ends_at_once(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    watchdog = service.Watchdog()
    assert watchdog.interval == 0
    await watchdog.run()


async def test_more_time_is_asked_for_while_the_loop_runs(manager: socket.socket) -> None:
    task = asyncio.create_task(service.keep_waiting(3600, step=0.01))
    for _ in range(5):
        assert await asyncio.to_thread(manager.recv, 4096) == b"EXTEND_TIMEOUT_USEC=30000"
    await _stop(task)
    await asyncio.wait_for(service.keep_waiting(0.05, step=0.01), 10)  # and no longer than the bound


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def _drain(sock: socket.socket) -> None:
    sock.setblocking(False)
    try:
        while True:
            sock.recv(4096)
    except BlockingIOError:
        sock.settimeout(5)
