"""Samplers and the health document."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

from agent.health.document import health_document, timestamp
from agent.health.samplers import Samplers, process

STATUS = {
    "device": "box1",
    "version": "0.1.0",
    "boot_id": "b",
    "pid": 1,
    "uptime_s": 12.5,
    "host": "slot",
    "embedded": False,
    "slot": {"driver": "simulated", "simulated": True, "present": True, "temperature_c": 40.0, "executor": {"pid": 2}},
    "committed": {"digest": "sha256:a", "reference": "r", "name": "m", "version": "3"},
    "serving": {"requests": 10},
    "link": {"enabled": True, "outbox": {"depth": 2, "oldest_s": 1.0}},
    "issues": [],
}


def test_timestamp_is_rfc3339_in_utc() -> None:
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"
    assert abs((datetime.fromisoformat(timestamp()) - datetime.now(UTC)).total_seconds()) < 5


def test_document_has_status_and_samples() -> None:
    document = health_document(STATUS, {"process": {"fds": 3}, "slot": {"temperature_c": 41.5}})
    assert (document["v"], document["device"], document["process"]) == (1, "box1", {"fds": 3})
    assert document["slot"]["temperature_c"] == 41.5  # the sampler's is newer
    assert document["slot"]["driver"] == "simulated"
    assert document["model"] == {"name": "m", "version": "3", "digest": "sha256:a"}
    assert document["outbox"] == {"depth": 2, "oldest_s": 1.0}
    json.dumps(document)


def test_document_of_an_empty_host_that_reads_nothing() -> None:
    document = health_document({"host": "empty", "slot": None, "committed": None}, {})
    assert (document["host"], document["model"], document["slot"]) == ("empty", None, {})


async def test_usual_samplers(tmp_path: Path) -> None:
    samples = await Samplers.usual(tmp_path, lambda: {"temperature_c": 50.0}).read()
    assert samples["process"]["rss_bytes"] > 1 << 20
    assert 0 < samples["disk"]["free_bytes"] <= samples["disk"]["total_bytes"]
    assert samples["load"]["cpus"] == os.cpu_count()
    assert samples["slot"] == {"temperature_c": 50.0}
    assert "unreadable" not in samples


def test_process_counts_descriptors() -> None:
    before = process()["fds"]
    with open("/dev/null"):
        assert process()["fds"] == before + 1


async def test_a_failing_sampler_costs_only_itself(tmp_path: Path) -> None:
    def broken() -> dict[str, float]:
        raise OSError("no such sensor")

    samples = await Samplers.usual(tmp_path / "missing", broken).read()
    assert "rss_bytes" in samples["process"]
    assert set(samples["unreadable"]) == {"disk", "slot"}
    assert "no such sensor" in samples["unreadable"]["slot"]


async def test_a_hanging_sampler_is_left_behind_and_not_piled_up() -> None:
    release, calls = threading.Event(), []

    def hanging() -> dict[str, float]:
        calls.append(1)
        release.wait()
        return {"temperature_c": 30.0}

    samplers = Samplers({"slot": hanging, "process": process}, timeout=0.05)
    for _ in range(3):
        samples = await samplers.read()
        assert "slot" in samples["unreadable"]
        assert "fds" in samples["process"]
    assert len(calls) == 1
    release.set()
    samplers._timeout = 5.0
    assert (await samplers.read())["slot"] == {"temperature_c": 30.0}
    assert len(calls) == 1
