"""The executor that is started before its task: taken once, by who wants just that, or ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.config import Config
from agent.executor import spawn
from agent.executor.client import Worker, launch_model
from agent.executor.launch import Launch
from agent.model.spec import Model, read_spec
from support.processes import gone
from support.tiny import write_model


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    spawn.drop_early()


def early_pid() -> int:
    spawn.start_early()
    assert spawn._early is not None
    return spawn._early.child.pid


def bridge(folder: Path) -> Launch:
    model = write_model(folder)
    return launch_model(
        Config(embedded=True), Model("sha256:0", "tiny:1", model, read_spec(model)), "cpu", role="bridge"
    )


async def test_it_becomes_the_first_executor_of_a_model(tmp_path: Path) -> None:
    pid = early_pid()
    first = await Worker.start(bridge(tmp_path), timeout=30)
    second = await Worker.start(bridge(tmp_path), timeout=30)
    assert first.pid == pid != second.pid
    assert first.ready["signature"] == second.ready["signature"]
    assert first.ready["sandbox"] == second.ready["sandbox"], "it is confined no less"
    for worker in (first, second):
        await worker.stop(grace=5)


async def test_one_that_has_died_is_not_taken(tmp_path: Path) -> None:
    pid = early_pid()
    os.kill(pid, 9)
    time.sleep(0.1)
    worker = await Worker.start(bridge(tmp_path), timeout=30)
    assert worker.pid != pid
    await worker.stop(grace=5)


def test_it_is_not_for_children_of_another_kind() -> None:
    before = os.listdir("/proc/self/fd")
    pid = early_pid()
    assert spawn.take_early(("/bin/true",)) is None
    spawn.drop_early()
    assert gone({pid})
    assert os.listdir("/proc/self/fd") == before
    spawn.drop_early()
    assert spawn.take_early(spawn.WORKER) is None
