"""How a host ends: in order, in time, with nothing left behind; and what its next start makes of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.host import Host, predict
from support.mosquitto import Mosquitto, free_port
from support.outsider import Outsider
from support.processes import alive, descendants, gone

X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
BOUND = 12.0
"""Seconds in which a stop must be over here: lame duck, grace and the executors' time are short."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a host with tiny:1 committed."""
    folder = tmp_path_factory.mktemp("prepared")
    with Host(folder) as host:
        host.pack("tiny:1")
        host.pack("tiny:2", scale=3.0, version="2")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        host.stop()
    return folder


def copy_of(prepared: Path, folder: Path, **settings: Any) -> Host:
    """A host of its own with the same past."""
    for name in ("state", "layout", "card"):
        shutil.copytree(prepared / name, folder / name, symlinks=True)
    return Host(folder, **settings)


@pytest.fixture
def host(prepared: Path, tmp_path: Path) -> Iterator[Host]:
    """Not yet started."""
    host = copy_of(prepared, tmp_path)
    yield host
    host.kill()


def told(host: Host) -> list[dict[str, str]]:
    """What systemd heard, in order."""
    return [dict(line.split("=", 1) for line in text.splitlines()) for _, text in host.told]


def left_behind(host: Host) -> list[str]:
    return sorted(path.name for path in host.run_dir.iterdir())


@contextlib.contextmanager
def watched_health(address: str) -> Iterator[list[tuple[float, int]]]:
    """What a health watch says, and when."""
    seen: list[tuple[float, int]] = []
    with grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))

        def follow() -> None:
            with contextlib.suppress(grpc.RpcError):
                for answer in watch:
                    seen.append((time.monotonic(), answer.status))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            watch.cancel()
            thread.join(5)


def until_locked(host: Host) -> None:
    """Until it has taken its state folder: from then on it has something to put away."""
    lock = host.folder / "state" / "slotd.lock"
    end = time.monotonic() + 60
    while lock.read_text().strip() != str(host.process.pid if host.process else ""):
        assert time.monotonic() < end, host.tail()
        time.sleep(0.005)


def first_answer(host: Host) -> float:
    """When the first request is answered again, over the socket, which keeps its name over a restart."""
    address = f"unix:{host.run_dir / 'grpc.sock'}"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(grpc.RpcError), grpc.insecure_channel(address) as channel:
            predict(channel, X, timeout=2)
            return time.monotonic()
        time.sleep(0.01)
    raise AssertionError(host.tail())


def test_a_stop_under_load_and_the_next_start(
    prepared: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    with Mosquitto(tmp_path / "broker") as broker, Outsider(broker.port, "test-host") as operator:
        host = copy_of(
            prepared,
            tmp_path,
            # Slow enough that some requests are in flight whenever it stops.
            slot={"options": {"latency": 0.15}},
            serving={"lame_duck": "0.6s", "grace": "5s"},
            link={"enabled": True, "port": broker.port},
        )
        host.start()
        try:
            operator.until("status", lambda s: s["state"] == "online")
            host.until_host("slot")
            with watched_health(host.address) as health, host.load(6, pause=0.01) as load:
                host.until(lambda: len(load.answers) > 20 and health)
                children = descendants(host.process.pid if host.process else 0)
                assert len(children) >= 3  # bridge, slot, decoders or parser
                asked = time.monotonic()
                assert host.stop(timeout=BOUND) == 0, host.tail()
                ended = time.monotonic()
            assert gone(children), "children outlive the daemon"
            assert left_behind(host) == []

            # Health says it first, while everything is still answered.
            down = next(at for at, status in health if status == NOT_SERVING)
            assert health[0][1] == SERVING
            refusals = [(start, text) for start, _, text in load.errors]
            assert {text.partition(":")[0] for _, text in refusals} <= {"StatusCode.UNAVAILABLE"}, load.errors
            assert down - asked < 1.0
            first_refused = min((start for start, _ in refusals), default=ended)
            assert first_refused > down
            assert any(start > down for start, *_ in load.answers), "answered while health says NOT_SERVING"
            # What was in flight when the first was refused was answered.
            assert any(start < first_refused < start + took for start, took, *_ in load.answers)

            offline = operator.until("status", lambda s: s["state"] == "offline")
            assert offline["reason"] == "stop"
            with Outsider(broker.port, "test-host") as newcomer:
                assert newcomer.until("status", lambda _: True) == offline
                assert newcomer.on("status")[0].retain
            lines = [json.loads(line) for line in host.log.read_text().splitlines()]
            assert {line["level"] for line in lines} <= {"debug", "info", "warning"}, host.tail()
            assert lines[-1]["event"] == "stopped"

            # The one gap: as it is seen from outside, and as the host itself tells it.
            host.start(wait=False)
            answered = first_answer(host)
            host.await_ready()
            gap = host.status()["restart_gap_s"]
            record_property("SIGTERM to exit, s", round(ended - asked, 2))
            record_property("SIGTERM to first answer of the next start, s", round(answered - asked, 2))
            record_property("restart_gap_s", gap)
            print(f"\nstop {ended - asked:.2f} s, SIGTERM to first answer {answered - asked:.2f} s, gap {gap} s")
            assert answered - gap > down + 0.4  # it begins when the servers close, not with the lame duck
            operator.until("status", lambda s: s["state"] == "online", after=len(operator.on("status")) - 1)
        finally:
            host.kill()


def test_systemd_is_told(host: Host) -> None:
    host.start(WATCHDOG_USEC="400000")
    assert host.process is not None
    host.until_host("slot")
    host.until(lambda: any("answers from the slot" in one.get("STATUS", "") for one in told(host)))
    ready = next(one for one in told(host) if "READY" in one)
    assert ready["MAINPID"] == str(host.process.pid)
    host.until(lambda: sum("WATCHDOG" in one for one in told(host)) >= 5)
    children = descendants(host.process.pid)
    host.process.send_signal(signal.SIGINT)  # the same as SIGTERM
    assert host.wait_dead(BOUND) == 0, host.tail()
    assert gone(children)
    assert left_behind(host) == []
    stopping = [one for one in told(host) if "STOPPING" in one]
    assert len(stopping) == 1
    assert stopping[0]["STATUS"]
    pings = [at for at, text in host.told if "WATCHDOG=1" in text]
    assert len(pings) <= 2 + (pings[-1] - pings[0]) / 0.2  # at half of the time, no more


def test_ready_without_slot_registry_and_broker(prepared: Path, tmp_path: Path) -> None:
    host = copy_of(
        prepared,
        tmp_path,
        slot={"options": {"present": False}},
        link={"enabled": True, "port": free_port()},
        images={"insecure_registries": [f"127.0.0.1:{free_port()}"]},
    )
    shutil.rmtree(host.layout)
    host.start()
    try:
        y, metadata = host.predict(X)
        np.testing.assert_allclose(y, X * 2 + 1, rtol=1e-6)
        assert metadata["slotd-served-by"] == "bridge"
        status = host.until(lambda: (lambda s: s if s["reason"] else None)(host.status()))
        assert (status["host"], status["reason"]["code"]) == ("bridge", "DEVICE_ABSENT")
        assert not status["slot"]["present"]
        assert not status["link"]["connected"]
        with grpc.insecure_channel(host.address) as channel:
            ask = health_pb2_grpc.HealthStub(channel).Check
            assert ask(health_pb2.HealthCheckRequest(service="")).status == SERVING
            assert ask(health_pb2.HealthCheckRequest(service="slotd.slot")).status == NOT_SERVING
        assert host.stop(timeout=BOUND) == 0, host.tail()
    finally:
        host.kill()


def test_stopped_in_each_of_some_phases_and_taken_up_again(host: Host) -> None:
    """A chain: each start takes up what the last one left, and is stopped in a later phase, until one commits."""

    def stopped_in(phase: str, task: str) -> None:
        host.until_phase(task, phase)
        children = descendants(host.process.pid if host.process else 0)
        assert host.stop(timeout=BOUND) == 0, host.tail()
        assert gone(children), phase
        assert left_behind(host) == []

    def taken_up(task: str, phase: str, scale: float) -> str:
        np.testing.assert_allclose(host.predict(X)[0], X * scale + 1, rtol=1e-6)  # the committed one, at once
        cut_off = host.ended(task)
        assert (cut_off["outcome"], cut_off["error"]["code"]) == ("failed", "INTERRUPTED"), cut_off
        assert phase in cut_off["error"]["message"]
        again = host.until(lambda: host.status()["deployment"])
        assert again["actor"] == f"resume of {task}"
        return str(again["id"])

    host.start(hold_at="pull")
    task, before = host.call("deploy", image="tiny:2")["task"], "pull"
    stopped_in("pull", task)
    for phase in ("preflight", "program", "probation"):
        host.start(hold_at=phase)
        task = taken_up(task, before, 2.0)
        if phase != "probation":
            stopped_in(phase, task)
        before = phase
    host.let_go()
    assert host.ended(task)["outcome"] == "committed"
    np.testing.assert_allclose(host.predict(X)[0], X * 3 + 1, rtol=1e-6)

    # Twice cut off with the slot in its hands: given up, and the host says so.
    host.hold.touch()
    task = host.call("deploy", image="tiny:1")["task"]
    stopped_in("probation", task)
    host.start(hold_at="program")
    task = taken_up(task, "probation", 3.0)
    stopped_in("program", task)
    host.start()
    np.testing.assert_allclose(host.predict(X)[0], X * 3 + 1, rtol=1e-6)
    status = host.until_host("slot")
    assert status["deployment"] is None
    assert (status["last"]["id"], status["last"]["error"]["code"]) == (task, "INTERRUPTED")
    assert status["committed"]["version"] == "2"


def test_a_second_signal_ends_at_once(prepared: Path, tmp_path: Path) -> None:
    host = copy_of(prepared, tmp_path, serving={"lame_duck": "60s"})
    host.start()
    try:
        assert host.process is not None
        host.until_host("slot")
        children = descendants(host.process.pid)
        host.process.send_signal(signal.SIGTERM)
        host.until(lambda: any("STOPPING" in one for one in told(host)))
        time.sleep(0.2)
        assert host.process.poll() is None
        asked = time.monotonic()
        host.process.send_signal(signal.SIGTERM)
        assert host.wait_dead(5) == 75
        assert time.monotonic() - asked < 2.0
        assert gone(children, within=10), alive(children)
        assert "second_signal" in host.tail()
        # What it left lying there is in nobody's way.
        host.start()
        assert host.predict(X)[1]["slotd-model-digest"]
    finally:
        host.kill()


def test_stopped_before_it_was_ready(prepared: Path, tmp_path: Path) -> None:
    host = copy_of(prepared, tmp_path)
    try:
        for delay in (0.0, 0.2):
            host.start(wait=False)
            assert host.process is not None
            until_locked(host)
            time.sleep(delay)
            children = descendants(host.process.pid)
            assert host.stop(timeout=BOUND) in (0, -signal.SIGTERM), host.tail()
            assert gone(children)
            assert left_behind(host) == []

        # Also while the committed model loads for as long as it likes.
        host.start(wait=False)
        assert host.process is not None
        parent = host.process.pid
        until_locked(host)
        bridge = _until_child(parent, "agent.executor.worker")
        os.kill(bridge, signal.SIGSTOP)
        asked = time.monotonic()
        assert host.stop(timeout=BOUND) == 0, host.tail()
        assert time.monotonic() - asked < 10  # not load_timeout
        assert gone({bridge})
        assert left_behind(host) == []
        host.start()
        assert host.predict(X)[1]["slotd-model-digest"]
    finally:
        host.kill()


def _until_child(parent: int, command: str) -> int:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for pid in descendants(parent):
            with contextlib.suppress(OSError):
                if command in Path(f"/proc/{pid}/cmdline").read_text():
                    return pid
        time.sleep(0.005)
    raise AssertionError(f"no {command}")


def test_a_background_task_that_fails_ends_the_daemon(host: Host, tmp_path: Path) -> None:
    trap = tmp_path / "fail"
    host.start(FAIL_WHEN=str(trap))
    assert host.process is not None
    host.until_host("slot")
    children = descendants(host.process.pid)
    with host.load(2) as load:
        host.until(lambda: len(load.answers) > 10)
        trap.touch()
        assert host.wait_dead(BOUND) == 70, host.tail()
    # gRPC calls a request CANCELLED that comes in the very moment in which the server closes.
    allowed = {"StatusCode.UNAVAILABLE", "StatusCode.CANCELLED"}
    assert {text.partition(":")[0] for *_, text in load.errors} <= allowed, load.errors
    assert gone(children)
    assert left_behind(host) == []
    lines = [json.loads(line) for line in host.log.read_text().splitlines()]
    (failed,) = [line for line in lines if line["event"] == "background_task_failed"]
    assert failed["level"] == "error"
    assert failed["task"] == "samples"
    assert "an injected bug" in json.dumps(failed)
    assert any("STOPPING" in one for one in told(host))
    host.start()  # as systemd would
    assert host.predict(X)[1]["slotd-model-digest"]


def test_a_broker_that_hangs_holds_up_nobody(prepared: Path, tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "broker") as broker:
        host = copy_of(prepared, tmp_path, link={"enabled": True, "port": broker.port})
        host.start()
        try:
            host.until(lambda: host.status()["link"]["connected"])
            broker.pause()
            with watched_health(host.address) as health:
                host.until(lambda: health)
                asked = time.monotonic()
                assert host.stop(timeout=BOUND) == 0, host.tail()
            assert next(at for at, status in health if status == NOT_SERVING) - asked < 1.0
        finally:
            host.kill()


def test_a_stop_that_hangs_is_ended(prepared: Path, tmp_path: Path) -> None:
    host = copy_of(prepared, tmp_path, serving={"lame_duck": "60s"})
    host.start(STOP_BOUND="0.5")
    try:
        children = descendants(host.process.pid if host.process else 0)
        assert host.stop(timeout=10) == 75
        assert "stop_took_too_long" in host.tail()
        assert gone(children, within=10), alive(children)
    finally:
        host.kill()
