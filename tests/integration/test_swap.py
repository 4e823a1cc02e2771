"""A whole host under load: models are swapped, and no client notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.errors import CommandRefused, NotFound, Refused
from support.host import Host

X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    with host:
        yield host


def test_first_deployment_swap_and_rollback(host: Host) -> None:
    one = host.pack("tiny:1", scale=2.0)
    two = host.pack("tiny:2", scale=3.0, version="2")
    assert host.status()["host"] == "empty"
    done = host.deploy("tiny:1")
    assert done["outcome"] == "committed", done
    assert [p["phase"] for p in done["phases"]] == [
        "resolve", "pull", "verify", "unpack", "inspect", "preflight", "drain", "release", "program", "load", "prove",
        "switch", "probation", "commit",
    ]  # fmt: skip
    y, metadata = host.predict(X)
    np.testing.assert_allclose(y, X * 2 + 1, rtol=1e-6)
    assert metadata["slotd-served-by"] == "slot"
    assert metadata["slotd-model-digest"] == one

    with host.load(6) as load:
        done = host.deploy("tiny:2")
        assert done["outcome"] == "committed", done
        back = host.ended(host.call("rollback")["task"])
        assert back["outcome"] == "committed", back
    assert load.errors == []
    assert load.wrong({one: 2.0, two: 3.0}) == []
    served = load.by()
    assert served[2.0, "slot"] and served[3.0, "slot"] and served[2.0, "bridge"] and served[3.0, "bridge"], served
    status = host.status()
    assert (status["host"], status["committed"]["digest"], status["previous"]["digest"]) == ("slot", one, two)
    assert status["serving"]["failed"] == 0


def test_nobody_goes_back_after_the_first_new_answer(host: Host) -> None:
    one, two = host.pack("tiny:1", scale=2.0), host.pack("tiny:2", scale=3.0, version="2")
    host.deploy("tiny:1")
    with host.load(8) as load:
        assert host.deploy("tiny:2")["outcome"] == "committed"
    first_new = min(start + seconds for start, seconds, _, _, digest in load.answers if digest == two)
    late = [answer for answer in load.answers if answer[4] == one and answer[0] > first_new]
    assert late == []


def test_the_same_digest_is_unchanged_unless_forced(host: Host) -> None:
    host.pack("tiny:1")
    host.deploy("tiny:1")
    again = host.deploy("tiny:1")
    assert again["outcome"] == "unchanged"
    assert [p["phase"] for p in again["phases"]] == ["resolve"]
    forced = host.deploy("tiny:1", force=True)
    assert forced["outcome"] == "committed", forced
    assert host.status()["previous"] is None


def test_rollback_without_a_previous_model_and_undeploy(host: Host) -> None:
    with pytest.raises(Refused) as refused:
        host.call("rollback")
    assert refused.value.code == "NO_PREVIOUS"
    host.pack("tiny:1")
    host.deploy("tiny:1")
    assert host.ended(host.call("undeploy")["task"])["outcome"] == "committed"
    status = host.status()
    assert (status["host"], status["committed"]) == ("empty", None)
    assert host.ended(host.call("rollback")["task"])["outcome"] == "committed"
    host.until_host("slot")


def test_it_boots_into_the_committed_model(host: Host) -> None:
    one = host.pack("tiny:1")
    host.deploy("tiny:1")
    assert host.stop() == 0
    host.start()
    y, metadata = host.predict(X)
    np.testing.assert_allclose(y, X * 2 + 1, rtol=1e-6)
    assert metadata["slotd-model-digest"] == one
    host.until_host("slot")
    assert host.predict(X)[1]["slotd-served-by"] == "slot"


def test_a_changed_signature_is_refused_unless_allowed(host: Host) -> None:
    host.pack("tiny:1")
    host.pack("other:1", output="z", spec={"name": "other", "outputs": {"z": {"dtype": "float32", "shape": [-1, 4]}}})
    host.deploy("tiny:1")
    done = host.deploy("other:1")
    assert (done["outcome"], done["error"]["code"]) == ("refused", "SIGNATURE_CHANGED")
    assert "'y' is gone" in done["error"]["message"]
    assert host.deploy("other:1", allow_signature_change=True)["outcome"] == "committed"


def test_cancel_before_and_after_drain(host: Host) -> None:
    host.pack("tiny:1")
    host.deploy("tiny:1")
    host.pack("tiny:2", scale=3.0, version="2")
    with pytest.raises(NotFound):
        host.call("cancel")
    with host.load(4) as load:
        task = host.call("deploy", image="tiny:2", probation=30)["task"]
        host.until_phase(task, "probation")
        host.call("cancel", task=task)
        done = host.ended(task)
    assert done["outcome"] == "cancelled", done
    assert load.errors == []
    assert host.status()["host"] == "slot"
    np.testing.assert_allclose(host.predict(X)[0], X * 2 + 1, rtol=1e-6)
    with pytest.raises(CommandRefused):
        host.call("cancel", task=task)


def test_one_runs_one_waits_the_newest_wins(host: Host) -> None:
    for number in (1, 2, 3):
        host.pack(f"tiny:{number}", scale=1.0 + number, version=str(number))
    host.deploy("tiny:1")
    first = host.call("deploy", image="tiny:2", probation=1.5)["task"]
    host.until_phase(first, "probation")
    assert host.call("deploy", image="tiny:2", probation=1.5)["task"] == first
    second = host.call("deploy", image="tiny:1")["task"]
    third = host.call("deploy", image="tiny:3")["task"]
    assert host.ended(second)["outcome"] == "superseded"
    assert host.ended(first)["outcome"] == "committed"
    assert host.ended(third)["outcome"] == "committed"
    np.testing.assert_allclose(host.predict(X)[0], X * 4 + 1, rtol=1e-6)


@pytest.mark.parametrize("continuity", ["queue", "reject"])
def test_the_other_continuities(tmp_path: Path, continuity: str) -> None:
    with Host(tmp_path, swap={"continuity": continuity}) as host:
        one, two = host.pack("tiny:1"), host.pack("tiny:2", scale=3.0, version="2")
        host.deploy("tiny:1")
        with host.load(4, pause=0.005) as load:
            assert host.deploy("tiny:2")["outcome"] == "committed"
        assert load.wrong({one: 2.0, two: 3.0}) == []
        if continuity == "queue":
            assert load.errors == []
            assert load.by()[3.0, "slot"]
        else:
            assert load.errors
            assert {error for _, _, error in load.errors} == {"StatusCode.UNAVAILABLE: the slot is being reprogrammed"}
