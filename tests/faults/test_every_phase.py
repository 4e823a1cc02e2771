"""What may come at any time, in every phase of a deployment, on a whole host under load: nobody sees an error.

Each case starts from a host with tiny:1 committed that deploys tiny:2. `make test` takes a few cases of each event;
all of them: pytest -m long tests/faults/test_every_phase.py
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agent.errors import CommandRefused
from agent.slot.arbiter import Phase
from support.host import Host

X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    host = Host(folder)
    with host:
        for number in (1, 2, 3):
            host.pack(f"tiny:{number}", scale=1.0 + number, version=str(number))
        assert host.deploy("tiny:1")["outcome"] == "committed"
        host.stop()
    return folder


def same(host: Host, task: str, phase: Phase) -> int:
    assert host.call("deploy", image="tiny:2")["task"] == task
    host.let_go()
    assert host.ended(task)["outcome"] == "committed"
    return 2


def other(host: Host, task: str, phase: Phase) -> int:
    next_one = host.call("deploy", image="tiny:3")["task"]
    assert next_one != task
    host.let_go()
    assert host.ended(task)["outcome"] == "committed"
    done = host.ended(next_one)
    assert done["outcome"] == "committed", done
    return 3


def _called_off(host: Host, task: str, phase: Phase, command: str) -> int:
    if phase is Phase.COMMIT:
        with pytest.raises(CommandRefused):
            host.call(command)
        host.let_go()
        assert host.ended(task)["outcome"] == "committed"
        return 2
    host.call(command)
    if not phase.touches_slot:
        done = host.ended(task)  # at once, held or not
        host.let_go()
    else:
        host.let_go()
        done = host.ended(task)
    assert done["outcome"] == "cancelled", done
    return 1


def cancel(host: Host, task: str, phase: Phase) -> int:
    return _called_off(host, task, phase, "cancel")


def rollback(host: Host, task: str, phase: Phase) -> int:
    if phase is Phase.COMMIT:  # it cannot be called off any more: what was committed before comes back behind it
        back = host.call("rollback")["task"]
        host.let_go()
        assert host.ended(task)["outcome"] == "committed"
        assert host.ended(back)["outcome"] == "committed"
        return 1
    return _called_off(host, task, phase, "rollback")


def death(host: Host, task: str, phase: Phase) -> int:
    executor = host.status()["slot"]["executor"]
    if executor is None:  # between release and load there is none
        host.let_go()
        assert host.ended(task)["outcome"] == "committed"
        return 2
    os.kill(executor["pid"], signal.SIGKILL)
    host.until(lambda: (host.status()["slot"]["executor"] or {}).get("pid") != executor["pid"])
    host.let_go()
    done = host.ended(task)
    if phase in (Phase.PROVE, Phase.SWITCH, Phase.PROBATION):
        assert (done["outcome"], done["error"]["code"]) == ("rolled_back", "EXECUTOR_DIED"), done
        return 1
    assert done["outcome"] == "committed", done
    return 2


def sigterm(host: Host, task: str, phase: Phase) -> int:
    assert host.stop() == 0
    host.let_go()
    host.start()
    assert host.predict(X)[0].shape == (1, 4)
    document = host.ended(task)
    assert document["error"]["code"] == "INTERRUPTED", document
    again = host.until(lambda: (lambda s: s["last"] if not s["deployment"] else None)(host.status()))
    assert again["outcome"] == "committed", again
    return 2


EVENTS: dict[str, Callable[[Host, str, Phase], int]] = {
    "same": same,
    "other": other,
    "rollback": rollback,
    "cancel": cancel,
    "death": death,
    "sigterm": sigterm,
}
PHASES = list(Phase)
CASES = [
    pytest.param(
        event,
        phase,
        id=f"{event}-{phase.value}",
        # One case of each phase in `make test`, and each event at least twice.
        marks=[] if row == column % len(EVENTS) else [pytest.mark.long],
    )
    for row, event in enumerate(EVENTS)
    for column, phase in enumerate(PHASES)
]


@pytest.mark.parametrize(("event", "phase"), CASES)
def test_event_in_phase(prepared: Path, tmp_path: Path, event: str, phase: Phase) -> None:
    for name in ("state", "layout", "card"):
        shutil.copytree(prepared / name, tmp_path / name, symlinks=True)
    host = Host(tmp_path)
    host.start(hold_at=phase.value)
    try:
        host.until_host("slot")
        scale = {1: 2.0, 2: 3.0, 3: 4.0}
        if event == "sigterm":
            task = host.call("deploy", image="tiny:2")["task"]
            host.until_phase(task, phase.value)
            version = EVENTS[event](host, task, phase)
        else:
            with host.load(2) as load:
                task = host.call("deploy", image="tiny:2")["task"]
                host.until_phase(task, phase.value)
                version = EVENTS[event](host, task, phase)
            assert load.errors == []
        status = host.until_host("slot")
        assert status["committed"]["version"] == str(version)
        np.testing.assert_allclose(host.predict(X)[0], X * scale[version] + 1, rtol=1e-6)
        assert status["deployment"] is None
    finally:
        host.kill()
