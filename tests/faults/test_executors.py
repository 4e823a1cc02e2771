"""Executors are killed, hang and meet requests that end them: nobody but the sender of such a request sees an error."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from support.host import Host, predict
from support.tiny import accelerator_of

X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)
POISON = np.array([[13.0, 1.0, 1.0, 1.0]], np.float32)
ONE = accelerator_of("tiny:1:2.0")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    host.pack("tiny:1")
    try:
        host.start(frail=True)
        assert host.deploy("tiny:1")["outcome"] == "committed"
        yield host
    finally:
        host.kill()


def children(pid: int) -> dict[int, str]:
    """The worker children of a process: pid to command line."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if "frail_child" in line or "executor.worker" in line:
                found[int(child)] = line
    return found


def test_executors_killed_twenty_times_under_load(host: Host) -> None:
    assert host.process is not None
    rng = random.Random(5)
    with host.load(6) as load:
        for _ in range(20):
            host.until_host("slot")
            victims = sorted(children(host.process.pid))
            os.kill(rng.choice(victims), signal.SIGKILL)
            time.sleep(0.15)
        host.until_host("slot")
    assert load.errors == [], Counter(error for _, _, error in load.errors).most_common(5)
    assert load.wrong({host.status()["committed"]["digest"]: 2.0}) == []
    assert host.status()["serving"]["retried"] > 0
    assert len(load.answers) > 500


def test_a_hang_costs_no_client_with_a_second_to_spare(host: Host) -> None:
    with host.load(4, timeout=1.0) as load:
        time.sleep(0.5)
        host.inject({"at": "infer", "kind": "hang", "accelerator": ONE})
        host.until(lambda: host.status()["host"] == "bridge" or None)
        time.sleep(0.5)
        host.cure()
        host.until_host("slot")
        time.sleep(0.3)
    assert load.errors == []
    assert host.status()["serving"]["hedged"] > 0
    assert {served for _, served in load.by()} == {"slot", "bridge"}


def test_poison_hurts_only_its_sender(host: Host) -> None:
    with host.load(4) as load:
        time.sleep(0.3)
        with grpc.insecure_channel(host.address) as channel, pytest.raises(grpc.RpcError) as error:
            predict(channel, POISON, timeout=20)
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert ("slotd-error-code", "POISON") in error.value.trailing_metadata()
        began = time.monotonic()
        with grpc.insecure_channel(host.address) as channel, pytest.raises(grpc.RpcError) as again:
            predict(channel, POISON, timeout=20)
        assert ("slotd-error-code", "POISON") in again.value.trailing_metadata()
        assert time.monotonic() - began < 0.5, "known, so not run again"
        host.until_host("slot")
    assert load.errors == []
    assert load.answers


def test_poison_in_probation_does_not_count(host: Host) -> None:
    two = host.pack("tiny:2", scale=3.0, version="2")
    with host.load(2) as load:
        task = host.call("deploy", image="tiny:2", probation=4)["task"]
        host.until_phase(task, "probation")
        host.until(lambda: host.predict(X)[1]["slotd-model-digest"] == two)
        with pytest.raises(grpc.RpcError):
            host.predict(POISON, timeout=20)
        done = host.ended(task)
    assert done["outcome"] == "committed", done
    assert load.errors == []
