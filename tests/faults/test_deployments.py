"""What goes wrong on the way into the slot: the committed model comes back, proven, and no client sees an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.host import Host
from support.tiny import accelerator_of, endless, huge

X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)
NEW = accelerator_of("tiny:2:3.0")
OLD = accelerator_of("tiny:1:2.0")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Host(tmp_path, slot={"prove_timeout": "3s"}) as host:
        host.pack("tiny:1")
        host.pack("tiny:2", scale=3.0, version="2")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        yield host


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "program error": ({"at": "program", "kind": "error", "accelerator": NEW}, "PROGRAM_FAILED"),
    "programming hangs": ({"at": "program", "kind": "hang", "accelerator": NEW}, "PROGRAM_TIMEOUT"),
    "the programmer dies": ({"at": "program", "kind": "death", "accelerator": NEW}, "PROGRAM_FAILED"),
    "wrong id after success": ({"at": "program", "kind": "wrong_id", "accelerator": NEW}, "WRONG_ACCELERATOR"),
    "device busy at open": ({"at": "open", "kind": "error", "code": "DEVICE_BUSY", "accelerator": NEW}, "DEVICE_BUSY"),
    "death at open": ({"at": "open", "kind": "death", "accelerator": NEW}, "EXECUTOR_DIED"),
    "wrong result": ({"at": "infer", "kind": "wrong_result", "accelerator": NEW, "count": None}, "PROOF_FAILED"),
    "stale result": ({"at": "infer", "kind": "stale_result", "accelerator": NEW, "count": None}, "PROOF_FAILED"),
    "hang in proof": ({"at": "infer", "kind": "hang", "accelerator": NEW}, "DEVICE_HUNG"),
    "death in proof": ({"at": "infer", "kind": "death", "accelerator": NEW}, "EXECUTOR_DIED"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_new_model_rolls_back(host: Host, name: str) -> None:
    fault, code = FAULTS[name]
    host.inject(fault)
    with host.load(4) as load:
        done = host.deploy("tiny:2")
        assert (done["outcome"], done["error"]["code"]) == ("rolled_back", code), done
        host.until_host("slot")
    assert load.errors == []
    assert {scale for scale, _ in load.by()} == {2.0}
    status = host.status()
    assert status["last"]["error"]["code"] == code
    assert status["committed"]["version"] == "1"
    assert status["slot"]["accelerator"] == OLD
    for _ in range(3):  # on a busy machine one request may be helped out by the bridge
        y, metadata = host.predict(X)
        np.testing.assert_allclose(y, X * 2 + 1, rtol=1e-6)
        if metadata["slotd-served-by"] == "slot":
            break
    assert metadata["slotd-served-by"] == "slot"


PROBATION: dict[str, tuple[dict[str, Any], str]] = {
    "hang": ({"at": "infer", "kind": "hang", "accelerator": NEW, "skip": 40}, "DEVICE_HUNG"),
    "death": ({"at": "infer", "kind": "death", "accelerator": NEW, "skip": 40}, "EXECUTOR_DIED"),
    "hot": ({"at": "health", "kind": "hot", "count": 3}, "OVER_TEMPERATURE"),
}


@pytest.mark.parametrize("name", PROBATION)
def test_a_fault_in_probation_rolls_back(host: Host, name: str) -> None:
    fault, code = PROBATION[name]
    with host.load(4) as load:
        if fault["at"] == "infer":
            host.inject(fault)
        task = host.call("deploy", image="tiny:2", probation=10)["task"]
        host.until_phase(task, "probation")
        if fault["at"] != "infer":
            host.inject(fault)
        done = host.ended(task)
        assert (done["outcome"], done["error"]["code"]) == ("rolled_back", code), done
        host.until_host("slot")
    assert load.errors == []
    np.testing.assert_allclose(host.predict(X)[0], X * 2 + 1, rtol=1e-6)


def test_wrong_on_the_cpu_is_refused_before_the_slot_is_touched(host: Host) -> None:
    host.pack("wrong:1", scale=5.0, wrong_golden=True)
    done = host.deploy("wrong:1", allow_signature_change=True)
    assert (done["outcome"], done["error"]["code"]) == ("failed", "PROOF_FAILED"), done
    assert [p["phase"] for p in done["phases"]][-1] == "preflight"
    assert host.status()["host"] == "slot"


def test_the_slot_computes_another_model(host: Host) -> None:
    host.pack("liar:1", scale=5.0, bitstream_scale=5.1, spec={"name": "tiny"})
    done = host.deploy("liar:1")
    assert (done["outcome"], done["error"]["code"]) == ("rolled_back", "PROOF_FAILED"), done
    host.until_host("slot")


def test_both_models_cannot_be_programmed(host: Host) -> None:
    with host.load(4) as load:
        host.inject({"at": "program", "kind": "error", "count": None})
        done = host.deploy("tiny:2")
        assert (done["outcome"], done["error"]["code"], done["host"]) == ("failed", "PROGRAM_FAILED", "bridge"), done
        status = host.until_host("bridge")
        assert status["reason"]["code"] == "PROGRAM_FAILED"
        assert host.predict(X)[1]["slotd-served-by"] == "bridge"
        host.cure()
        host.until_host("slot")
    assert load.errors == []
    assert host.status()["reason"] is None


def test_a_first_deployment_that_fails_leaves_empty(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.pack("tiny:2", scale=3.0, version="2")
        host.inject({"at": "program", "kind": "error", "count": None})
        done = host.deploy("tiny:2")
        assert (done["outcome"], done["error"]["code"], done["host"]) == ("failed", "PROGRAM_FAILED", "empty"), done
        assert host.status()["host"] == "empty"


@pytest.mark.parametrize(
    ("name", "graph", "codes"),
    [
        ("endless", endless(), {"CALL_TIMEOUT"}),
        ("huge", huge(), {"OUT_OF_MEMORY"}),
    ],
)
def test_hostile_graphs(tmp_path: Path, name: str, graph: Any, codes: set[str]) -> None:
    with Host(tmp_path, executor={"call_timeout": "2s", "memory": "1GiB"}, slot={"load_timeout": "20s"}) as host:
        host.pack("tiny:1")
        host.deploy("tiny:1")
        host.pack("hostile:1", graph=graph, spec={"name": "tiny"}, scale=7.0)
        with host.load(2) as load:
            done = host.deploy("hostile:1")
        assert done["outcome"] in ("failed", "refused"), done
        assert done["error"]["code"] in codes, done
        assert [p["phase"] for p in done["phases"]][-1] == "preflight"
        assert load.errors == []
        assert host.status()["host"] == "slot"
