"""The agent is killed in each phase: the next start serves the committed model, with nobody to ask."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from agent.slot.arbiter import Phase
from support.host import Host

X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a host with tiny:1 committed, to be copied for each case."""
    folder = tmp_path_factory.mktemp("prepared")
    host = Host(folder)
    with host:
        host.pack("tiny:1")
        host.pack("tiny:2", scale=3.0, version="2")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        host.stop()
    return folder


def copy_of(prepared: Path, folder: Path) -> Host:
    """A host of its own with the same past."""
    for name in ("state", "layout", "card"):
        shutil.copytree(prepared / name, folder / name, symlinks=True)
    return Host(folder)


@pytest.mark.parametrize("phase", [*Phase], ids=lambda phase: phase.value)
def test_killed_in_each_phase(prepared: Path, tmp_path: Path, phase: Phase) -> None:
    host = copy_of(prepared, tmp_path)
    host.start(kill_at=phase.value)
    task = host.call("deploy", image="tiny:2")["task"]
    assert host.wait_dead() == -9
    shutil.rmtree(host.layout)  # no registry any more
    host.start()
    try:
        np.testing.assert_allclose(host.predict(X)[0], X * 2 + 1, rtol=1e-6)
        cut_off = host.ended(task)
        assert cut_off["outcome"] == "failed", cut_off
        assert cut_off["error"]["code"] == "INTERRUPTED"
        assert phase.value in cut_off["error"]["message"]
        last = host.until(lambda: (lambda s: s["last"] if s["last"] and not s["deployment"] else None)(host.status()))
        assert last["outcome"] in ("failed", "committed"), last
        host.until_host("slot")
    finally:
        host.kill()


def test_killed_at_program_on_every_boot(prepared: Path, tmp_path: Path) -> None:
    host = copy_of(prepared, tmp_path)
    host.start(kill_at="program")
    host.call("deploy", image="tiny:2")
    assert host.wait_dead() == -9
    host.start(kill_at="program")
    assert host.wait_dead() == -9, "tried once more"
    host.start(kill_at="program")
    try:
        status = host.until_host("slot")
        assert status["committed"]["version"] == "1"
        assert status["deployment"] is None
        assert status["last"]["error"]["code"] == "INTERRUPTED"
        assert "program on each of 2 attempts" in status["last"]["error"]["message"]
        assert "--force" in status["last"]["error"]["hint"]
        np.testing.assert_allclose(host.predict(X)[0], X * 2 + 1, rtol=1e-6)
    finally:
        host.kill()


def test_a_planned_stop_is_redone_once(prepared: Path, tmp_path: Path) -> None:
    host = copy_of(prepared, tmp_path)
    host.start()
    task = host.call("deploy", image="tiny:2", probation=20)["task"]
    host.until_phase(task, "probation")
    assert host.stop() == 0
    host.start()
    try:
        np.testing.assert_allclose(host.predict(X)[0], X * 2 + 1, rtol=1e-6)
        again = host.until(lambda: host.status()["deployment"])
        assert again["id"] != task
        assert again["actor"] == f"resume of {task}"
    finally:
        host.kill()
