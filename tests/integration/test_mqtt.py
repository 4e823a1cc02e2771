"""The link against a real mosquitto, MQTT 5 and 3.1.1."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import __version__
from agent.link import intake, mqtt, wishes
from support.linked import Outside, linked, make_config, outside, soon, until
from support.mosquitto import Mosquitto


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker") as broker:
        yield broker


@pytest.fixture(params=["5", "3.1.1"])
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def short_settling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the settling after a connect is not what is tested, it need not take its two seconds."""
    if "outage" not in request.node.name:
        monkeypatch.setattr(wishes, "SETTLE", 0.3)


# --- status, reported, health ----------------------------------------------------------------------------------------


async def test_online_then_offline(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other:
        async with linked(make_config(tmp_path, broker.port, protocol)) as parts:
            status = await other.next("status", lambda d: d["state"] == "online")
            assert (status["v"], status["boot_id"], status["version"]) == (1, "boot", __version__)
            assert json.loads(await other.retained("status"))["state"] == "online"
            assert json.loads(await other.retained("reported"))["host"] == "empty"
            assert parts.link.describe()["broker"] == f"127.0.0.1:{broker.port}"
        stopped = json.loads(await other.retained("status"))
        assert (stopped["state"], stopped["reason"]) == ("offline", "stop")


async def test_a_killed_host_is_lost(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other:
        script = Path(__file__).parents[1] / "support" / "run_link.py"
        child = await asyncio.create_subprocess_exec(
            sys.executable, str(script), str(tmp_path), str(broker.port), protocol, stdout=asyncio.subprocess.PIPE
        )
        try:
            assert child.stdout is not None
            while b"online" not in (line := await child.stdout.readline()) or b"broker" in line:
                assert line, "the child ended early"
        finally:
            child.kill()
            await child.wait()
        lost = await other.next("status", lambda d: d["state"] == "offline")
        assert lost == {"v": 1, "state": "offline", "boot_id": "boot", "version": __version__, "reason": "lost"}
        assert json.loads(await other.retained("status")) == lost
        async with linked(make_config(tmp_path, broker.port, protocol)):
            assert json.loads(await other.retained("status"))["state"] == "online"


async def test_reported_follows_the_host(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)) as parts:
        parts.host.committed = {"digest": "sha256:1", "reference": "r"}
        parts.link.changed()
        reported = await other.next("reported", lambda d: d["committed"] is not None)
        assert reported["ts"].endswith("Z")
        assert reported["config"]["revision"]
        assert reported["desired"] == {"epoch": "", "revision": None, "hash": None, "state": "none", "refused": None}
        count = len(other.on("reported"))
        for degrees in range(50):  # what moves by itself is no news
            parts.host.temperature = degrees
            parts.link.changed()
            await asyncio.sleep(0)
        await other.call("ping")
        assert len(other.on("reported")) == count


async def test_progress_is_held_back_and_phases_are_not(broker: Mosquitto, tmp_path: Path) -> None:
    async with outside(broker.port) as other, linked(make_config(tmp_path, broker.port)) as parts:
        parts.host.at_once = False
        await other.call("deploy", {"expires": soon(), "arguments": {"image": "a"}})
        await other.next("reported", lambda d: (d["deployment"] or {}).get("phase") == "pull")
        count = len(other.on("reported"))
        for done in range(100):
            assert parts.host.running is not None
            parts.host.running = parts.host.running | {"progress": {"bytes": done, "total": 100}, "seconds": done / 10}
            parts.link.changed()
            await asyncio.sleep(0.002)
        assert len(other.on("reported")) <= count + 1
        parts.host.running = parts.host.running | {"phase": "verify"}
        parts.link.changed()
        await other.next("reported", lambda d: (d["deployment"] or {}).get("phase") == "verify", timeout=3)


async def test_health_is_sent_and_not_retained(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    config = make_config(tmp_path, broker.port, protocol, health_interval=0.1)
    async with outside(broker.port, protocol) as other, linked(config):
        await until(lambda: len(other.on("health")) >= 3)
        health = other.on("health")[-1].document
        assert (health["v"], health["device"]) == (1, "box1")
        assert health["process"]["rss_bytes"] > 0
        assert health["disk"]["free_bytes"] > 0
        assert await other.retained("health") == b""


async def test_a_foreign_status_is_put_right(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)):
        await other.next("status", lambda d: d["state"] == "online")
        for wrong in (b"", b"{{{", b'{"state":"offline","reason":"lost"}'):
            seen = len(other.on("status"))
            await other.publish("status", wrong, retain=True)
            await other.next("status", lambda d: d.get("state") == "online", after=seen + 1)
            assert json.loads(await other.retained("status"))["state"] == "online"


# --- commands --------------------------------------------------------------------------------------------------------


async def test_an_answer_by_default_topic(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)):
        answer = await other.call("ping", {"id": "a1"})
        assert answer["ok"] is True
        assert (answer["v"], answer["id"], answer["result"]["pong"]) == (1, "a1", True)
        assert (await other.call("ping", b""))["ok"] is True
        assert not other.on("res/ping")[0].retain


async def test_an_answer_by_properties(broker: Mosquitto, tmp_path: Path) -> None:
    async with outside(broker.port) as other, linked(make_config(tmp_path, broker.port)):
        await other.publish("cmd/ping", {}, response="slotd/cli-7/res/x", correlation=b"\x00\xff17")
        await until(lambda: [m for m in other.heard if m.topic == "slotd/cli-7/res/x"])
        (message,) = [m for m in other.heard if m.topic == "slotd/cli-7/res/x"]
        assert message.correlation == b"\x00\xff17"
        assert message.document["ok"] is True


async def test_an_answer_by_the_body(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)):
        await other.publish("cmd/ping", {"id": "x", "reply": "slotd/cli/res/me"})
        await until(lambda: [m for m in other.heard if m.topic == "slotd/cli/res/me"])


@pytest.mark.parametrize(
    "topic", ["$SYS/x", "other/res/x", "slotd/box1/desired", "slotd/box1/cmd/ping", "slotd/box1/status", "", "a\u0001b"]
)
async def test_a_reply_goes_only_where_it_may(broker: Mosquitto, tmp_path: Path, topic: str) -> None:
    async with (
        outside(broker.port, "3.1.1") as other,
        linked(make_config(tmp_path, broker.port, reply_allow=["slotd/+/res/#", "slotd/box1/#"])) as parts,
    ):
        answer = await other.call("deploy", {"expires": soon(), "reply": topic, "arguments": {"image": "a"}})
        assert (answer["error"]["code"], answer["error"]["field"]) == ("REPLY_FORBIDDEN", "reply")
        assert parts.ran == []


async def test_a_response_topic_goes_only_where_it_may(broker: Mosquitto, tmp_path: Path) -> None:
    async with outside(broker.port) as other, linked(make_config(tmp_path, broker.port)):
        answer = await other.call("ping", response="elsewhere/res/x", correlation=b"1")
        assert answer["error"]["code"] == "REPLY_FORBIDDEN"
        assert other.on("res/ping")[-1].correlation == b"1"


async def test_errors_are_typed(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)):
        error = (await other.call("nonsense"))["error"]
        assert error["code"] == "NOT_FOUND"
        assert set(error) >= {"code", "message", "hint", "field"}
        error = (await other.call("deploy", {"expires": soon(), "arguments": {"imag": "a"}}))["error"]
        assert error["code"] == "INVALID_ARGUMENT"
        assert error["field"] is not None
        error = (await other.call("deploy", {"expires": soon(), "arguments": {"image": "bad"}}))["error"]
        assert (error["field"], error["hint"]) == ("image", "choose another")
        error = (await other.call("ping", {"arguments": [1]}))["error"]
        assert error["field"] == "arguments"
        error = (await other.call("ping", {"argument": {}}))["error"]
        assert error["field"] == "argument"
        error = (await other.call("broken"))["error"]
        assert error["code"] == "INTERNAL"
        assert "secret" not in error["message"]


async def test_what_changes_something_must_expire(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)) as parts:
        for expires, code in (
            (None, "EXPIRY_REQUIRED"),
            (soon(25 * 3600), "EXPIRY_REQUIRED"),
            (soon(-1), "EXPIRED"),
            (1.0, "EXPIRED"),
            ("tomorrow", "INVALID_ARGUMENT"),
            ("2026-01-01T00:00:00", "INVALID_ARGUMENT"),
            (True, "INVALID_ARGUMENT"),
        ):
            answer = await other.call("deploy", {"expires": expires, "arguments": {"image": "a"}})
            assert answer["error"]["code"] == code, expires
            assert answer["error"]["field"] == "expires"
        assert parts.ran == []
        assert (await other.call("ping", {"expires": soon(-1)}))["error"]["code"] == "EXPIRED"
        assert (await other.call("deploy", {"expires": soon(), "arguments": {"image": "a"}}))["ok"] is True


async def test_a_retained_command_is_refused(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other:
        await other.publish("cmd/deploy", {"expires": soon(), "arguments": {"image": "a"}}, retain=True)
        async with linked(make_config(tmp_path, broker.port, protocol)) as parts:
            answer = await other.next("res/deploy")
            assert answer["error"]["code"] == "RETAINED"
            assert "mosquitto_pub" in answer["error"]["hint"]
            await other.next("event", lambda d: d["kind"] == "message_refused")
            await other.publish("cmd/deploy", b"", retain=True)
            await other.call("ping")
            if protocol == "5":  # on 3.1.1 the empty message looks like a command without an expiry
                assert len(other.on("res/deploy")) == 1
            assert parts.ran == []


async def test_a_live_retained_command_is_refused_on_5(broker: Mosquitto, tmp_path: Path) -> None:
    async with outside(broker.port) as other, linked(make_config(tmp_path, broker.port)) as parts:
        answer = await other.call("deploy", {"expires": soon(), "arguments": {"image": "a"}}, retain=True)
        assert answer["error"]["code"] == "RETAINED"
        assert parts.ran == []


async def test_a_repeated_id_gets_the_first_answer(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    config = make_config(tmp_path, broker.port, protocol)
    body = {"id": "once", "expires": soon(), "arguments": {"image": "a"}}
    async with outside(broker.port, protocol) as other:
        async with linked(config) as parts:
            first = await other.call("deploy", body)
            again = await other.call("deploy", body)
            assert parts.ran == ["a"]
            assert again["result"] == first["result"]
            assert again["repeated"] is True
        async with linked(config) as parts:
            assert (await other.call("deploy", body))["result"] == first["result"]
            late = await other.call("deploy", body | {"expires": soon(-1)})
            assert late["result"] == first["result"]
            assert parts.ran == []


async def test_the_same_while_it_runs_gets_the_same_answer(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)) as parts:
        body = {"id": "s", "expires": soon()}
        for _ in range(3):
            await other.publish("cmd/slow", body)
        await other.call("ping")
        assert other.on("res/slow") == []
        parts.gate.set()
        await until(lambda: len(other.on("res/slow")) == 3)
        assert parts.ran == ["slow"]
        assert all(message.document["ok"] for message in other.on("res/slow"))


async def test_without_an_id_the_same_bytes_run_once(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)) as parts:
        body = {"expires": soon(), "arguments": {"image": "a"}}
        for _ in range(3):
            assert (await other.call("deploy", body))["ok"] is True
        assert parts.ran == ["a"]


async def test_what_was_cut_off_is_interrupted(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    config = make_config(tmp_path, broker.port, protocol)
    body = {"id": "s", "expires": soon()}
    async with outside(broker.port, protocol) as other:
        async with linked(config) as parts:
            await other.publish("cmd/slow", body)
            await until(lambda: parts.ran)
            await parts.stop()
        async with linked(config) as parts:
            answer = await other.call("slow", body)
            assert answer["error"]["code"] == "INTERRUPTED"
            assert parts.ran == []
            assert (await other.call("slow", body))["error"]["code"] == "INTERRUPTED"


async def test_commands_sent_while_away_are_run_once(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    config = make_config(tmp_path, broker.port, protocol)
    async with outside(broker.port, protocol) as other:
        async with linked(config):
            pass
        for number in range(150):  # more than there is room for: the broker keeps what is not acknowledged
            await other.publish("cmd/deploy", {"expires": soon(), "arguments": {"image": f"i{number}"}})
        await other.publish("cmd/deploy", {"expires": soon(-1), "arguments": {"image": "late"}})
        async with linked(config) as parts:
            await until(lambda: len(other.on("res/deploy")) == 151)
            assert parts.ran == [f"i{number}" for number in range(150)]
            errors = [m.document["error"]["code"] for m in other.on("res/deploy") if not m.document["ok"]]
            assert errors == ["EXPIRED"]


async def test_what_there_is_no_room_for_comes_again(
    broker: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr(intake, "ROOM", 3)
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)) as parts:
        for number in range(intake.PLACES):
            await other.publish("cmd/slow", {"id": f"s{number}", "expires": soon()})
        await until(lambda: len(parts.ran) == intake.PLACES)  # all places are taken
        for number in range(10):
            await other.publish("cmd/deploy", {"expires": soon(), "arguments": {"image": f"i{number}"}})
        for _ in range(10):
            await other.publish("cmd/ping", b"", qos=0)  # no promise was made for these
        await asyncio.sleep(0.2)
        assert not other.on("res/deploy")
        parts.gate.set()
        await until(lambda: len({m.document["result"]["task"] for m in other.on("res/deploy")}) == 10)
        assert parts.ran == ["slow"] * intake.PLACES + [f"i{number}" for number in range(10)]


# --- events ----------------------------------------------------------------------------------------------------------


async def test_events_in_order_and_without_gaps_after_an_outage(
    broker: Mosquitto, tmp_path: Path, protocol: str
) -> None:
    config = make_config(tmp_path, broker.port, protocol, backlog_rate=400)
    async with linked(config) as parts:
        for number in range(20):
            await parts.outbox.append("test", {"number": number})
        broker.stop()
        await until(lambda: not parts.link.connected)
        for number in range(20, 60):
            await parts.outbox.append("test", {"number": number})
        broker.start()
        async with outside(broker.port, protocol) as other:
            for number in range(60, 80):
                await parts.outbox.append("test", {"number": number})
            await other.next("event", lambda d: d.get("number") == 79)
            events = [m.document for m in other.on("event") if "number" in m.document]
            numbers = [event["number"] for event in events]
            assert numbers == list(range(numbers[0], 80))
            assert numbers[0] <= 60
            assert len({event["epoch"] for event in events}) == 1
            assert [event["seq"] for event in events] == list(range(events[0]["seq"], events[0]["seq"] + len(events)))
            await until(lambda: parts.outbox.depth() == 0)


async def test_the_backlog_has_a_bounded_rate_and_state_goes_first(broker: Mosquitto, tmp_path: Path) -> None:
    async with outside(broker.port) as other:
        async with linked(make_config(tmp_path, broker.port + 1), online=False) as parts:  # nobody there
            for number in range(30):
                await parts.outbox.append("test", {"number": number})
        loop = asyncio.get_running_loop()
        async with linked(make_config(tmp_path, broker.port, backlog_rate=20)):
            began = loop.time()
            await other.next("event", lambda d: d.get("number") == 29)
            assert loop.time() - began >= 29 / 20 - 0.2
        topics = [message.topic.removeprefix("slotd/box1/") for message in other.heard]
        assert topics.index("event") > topics.index("reported") > topics.index("status")


# --- desired ---------------------------------------------------------------------------------------------------------


async def test_desired_is_carried_out_and_reported(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)) as parts:
        await other.publish("desired", {"image": "r/a:1", "revision": 1}, retain=True)
        reported = await other.next("reported", lambda d: d["desired"].get("in_sync"))
        assert reported["desired"]["image"] == "r/a:1"
        assert reported["desired"]["state"] == "applied"
        assert parts.host.asked == [("desired", "r/a:1", "revision 1")]
        await other.publish("desired", {"image": None, "revision": 2}, retain=True)
        await other.next("reported", lambda d: d["desired"]["revision"] == 2 and d["desired"].get("in_sync"))
        assert parts.host.committed is None
        await other.publish("desired", b"", retain=True)
        await other.next("reported", lambda d: d["desired"]["state"] == "none" and d["desired"]["revision"] == 2)


@pytest.mark.parametrize("where", ["link-commands", "link-desired", "link"])
async def test_a_bug_of_ours_is_an_issue_and_the_link_goes_on(
    broker: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    module, name = {
        "link-commands": (intake, "check_expiry"),
        "link-desired": (wishes, "fold"),
        "link": (mqtt.Link, "_clear_old_name"),
    }[where]
    right, calls = getattr(module, name), []

    def wrong_once(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise ZeroDivisionError("a bug")
        return right(*arguments, **named)

    monkeypatch.setattr(module, name, wrong_once)
    monkeypatch.setattr(wishes, "AGAIN", 0.1)
    async with outside(broker.port) as other, linked(make_config(tmp_path, broker.port)) as parts:
        await other.publish("cmd/deploy", {"expires": soon(), "id": "a", "arguments": {"image": "r/a:1"}})
        await other.publish("desired", {"image": "r/b:1", "revision": 1}, retain=True)
        await until(lambda: f"fault:{where}" in parts.issues)
        (fault,) = [issue for issue in parts.issues.list() if issue["id"] == f"fault:{where}"]
        assert "ZeroDivisionError" in fault["message"]
        assert (await other.call("ping"))["ok"] is True
        await other.publish("desired", {"image": "r/c:1", "revision": 2}, retain=True)
        await other.next("reported", lambda d: d["desired"]["revision"] == 2 and d["desired"].get("in_sync"))


async def test_only_the_newest_wish_of_an_outage_is_applied(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    config = make_config(tmp_path, broker.port, protocol)
    async with outside(broker.port, protocol) as other:
        async with linked(config):
            pass
        for revision in (5, 6, 7):
            await other.publish("desired", {"image": f"r/a:{revision}", "revision": revision}, retain=True)
        async with linked(config) as parts:
            await other.next("reported", lambda d: d["desired"].get("in_sync"))
            assert parts.host.asked == [("desired", "r/a:7", "revision 7")]
            for revision in (5, 6):
                await other.next("event", lambda d: d["kind"] == "desired_superseded" and d["revision"] == revision)
            assert parts.ran == ["r/a:7"]


async def test_the_same_wish_is_not_applied_again_after_a_restart(
    broker: Mosquitto, tmp_path: Path, protocol: str
) -> None:
    config = make_config(tmp_path, broker.port, protocol)
    async with outside(broker.port, protocol) as other:
        await other.publish("desired", {"image": "r/a:1", "revision": 1}, retain=True)
        async with linked(config) as parts:
            await other.next("reported", lambda d: d["desired"].get("in_sync"))
            host = parts.host
        async with linked(config, host=host) as parts:
            await other.publish("desired", {"image": "r/b:1", "revision": 0}, retain=True)
            reported = await other.next("reported", lambda d: d["desired"]["refused"])
            assert reported["desired"]["refused"]["error"]["code"] == "REVISION_TOO_LOW"
            assert reported["desired"]["in_sync"] is True
            await other.next("event", lambda d: d["kind"] == "desired_refused")
            assert len(host.asked) == 1


async def test_a_refused_wish_is_reported_and_left_alone(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    config = make_config(tmp_path, broker.port, protocol)
    async with outside(broker.port, protocol) as other:
        async with linked(config) as parts:
            await other.publish("desired", {"image": "bad", "revision": 1}, retain=True)
            reported = await other.next("reported", lambda d: d["desired"]["state"] == "failed")
            assert reported["desired"]["error"]["message"] == "no such image"
            assert reported["desired"]["in_sync"] is False
        async with linked(config) as parts:
            await other.publish("desired", {"image": "bad", "revision": 2}, retain=True)
            await other.next("reported", lambda d: d["desired"]["revision"] == 2)
            assert parts.ran == []
            await other.publish("desired", {"image": "r/a:1", "revision": 3}, retain=True)
            await other.next("reported", lambda d: d["desired"].get("in_sync"))


async def test_a_failing_deployment_is_told_in_reported(broker: Mosquitto, tmp_path: Path) -> None:
    async with outside(broker.port) as other, linked(make_config(tmp_path, broker.port)) as parts:
        parts.host.at_once = False
        await other.publish("desired", {"image": "r/a:1", "revision": 1}, retain=True)
        await other.next("reported", lambda d: d["desired"].get("state") == "applying")
        parts.host.finish("rolled_back", {"code": "PROOF_FAILED", "message": "wrong"})
        reported = await other.next("reported", lambda d: d["desired"].get("state") == "failed")
        assert reported["desired"]["error"]["code"] == "PROOF_FAILED"


async def test_a_wish_that_was_cut_off_is_tried_for_a_new_revision(broker: Mosquitto, tmp_path: Path) -> None:
    config = make_config(tmp_path, broker.port)
    async with outside(broker.port) as other:
        async with linked(config) as parts:
            host = parts.host
            host.at_once = False
            await other.publish("desired", {"image": "r/a:1", "revision": 1}, retain=True)
            await other.next("reported", lambda d: d["desired"].get("state") == "applying")
            await until(lambda: parts.link._wishes._memory.task is not None)  # it is reported before it is asked for
        host.finish("failed", {"code": "INTERRUPTED", "message": "cut off at program"})
        host.at_once = True
        async with linked(config, host=host):
            await other.next("reported", lambda d: d["desired"].get("state") == "interrupted")
            assert len(host.asked) == 1
            await other.publish("desired", {"image": "r/a:1", "revision": 2}, retain=True)
            await other.next("reported", lambda d: d["desired"].get("in_sync"))
            assert len(host.asked) == 2


async def test_a_wish_whose_deployment_is_unknown_is_carried_out_again(broker: Mosquitto, tmp_path: Path) -> None:
    config = make_config(tmp_path, broker.port)
    async with outside(broker.port) as other:
        async with linked(config) as parts:
            parts.host.at_once = False
            await other.publish("desired", {"image": "r/a:1", "revision": 1}, retain=True)
            await other.next("reported", lambda d: d["desired"].get("state") == "applying")
        async with linked(config) as parts:  # a host that knows of nothing
            await other.next("reported", lambda d: d["desired"].get("in_sync"))
            assert len(parts.host.asked) == 1


async def test_flapping_wishes_are_damped(broker: Mosquitto, tmp_path: Path) -> None:
    config = make_config(tmp_path, broker.port)
    config = config.model_copy(update={"swap": config.swap.model_copy(update={"min_interval": 1.0})})
    async with outside(broker.port) as other, linked(config) as parts:
        for revision in range(5):
            await other.publish("desired", {"image": f"r/a:{revision}", "revision": revision}, retain=True)
            await other.next("reported", lambda d: d["desired"]["revision"] == revision)
        await other.next("reported", lambda d: d["desired"]["revision"] == 4 and d["desired"].get("in_sync"))
        assert [image for _, image, _ in parts.host.asked] == ["r/a:0", "r/a:4"]


async def test_a_command_overrides_the_wish(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)):
        await other.publish("desired", {"image": "r/a:1", "revision": 1}, retain=True)
        await other.next("reported", lambda d: d["desired"].get("in_sync"))
        await other.call("deploy", {"id": "mine", "expires": soon(), "arguments": {"image": "r/b:1"}})
        reported = await other.next("reported", lambda d: d["desired"].get("override"))
        assert reported["desired"]["in_sync"] is False
        assert reported["desired"]["override"]["by"] == "mqtt: mine"
        await other.publish("desired", {"image": "r/c:1", "revision": 2}, retain=True)
        reported = await other.next("reported", lambda d: d["desired"]["revision"] == 2 and d["desired"]["in_sync"])
        assert reported["desired"]["override"] is None


# --- hostile ---------------------------------------------------------------------------------------------------------

HOSTILE = {
    "malformed": b'{"image": ',
    "not utf-8": b'{"image": "\xff\xfe"}',
    "half a pair": b'{"image": "\\ud800"}',
    "oversized": b'{"image": "' + b"x" * (65 << 10) + b'"}',
    "much oversized": b"[" * (300 << 10),
    "deep": b'{"image":' + b"[" * 30000 + b"]" * 30000 + b"}",
    "deeper than Python": b'{"image":' + b"[" * 2000 + b"]" * 2000 + b"}",
    "rather deep": b'{"image":' + b"[" * 100 + b"]" * 100 + b"}",
    "no object": b"[1, 2]",
    "a number": b"1" * 5000,
    "infinite": b'{"image": Infinity}',
    "twice": b'{"image": "a", "image": "b"}',
    "null": b"null",
    "nul": b"\x00\x00",
}


async def test_hostile_payloads_change_nothing_anywhere(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)) as parts:
        for name, payload in HOSTILE.items():
            await hostile(other, name, payload)
        assert (await other.call("ping", {"id": "alive"}))["ok"] is True
        await other.next("event", lambda d: d["kind"] == "message_refused")
        assert len([m for m in other.on("event") if b"message_refused" in m.payload]) <= 3
        assert (parts.ran, parts.host.asked) == ([], [])
        assert parts.link.connected


async def hostile(other: Outside, name: str, payload: bytes) -> None:
    """The same on every topic: a clear answer where there is somebody to answer."""
    for command in ("ping", "deploy", "undeploy", "status", "nonsense"):
        answer = await other.call(command, payload)
        assert answer["ok"] is False, name
        assert answer["error"]["code"] in ("INVALID_ARGUMENT", "TOO_LARGE"), name
        assert answer["error"]["field"] == "body", name
        assert answer["error"]["hint"], name
    for sent in (payload, b""):
        await other.publish("desired", sent, retain=True)
        await until(lambda: bool(_refusal(other)) == bool(sent))
        assert not sent or _refusal(other)["error"]["field"].startswith("desired"), name
        assert other.newest("reported")["desired"]["state"] == "none", name
    for topic in ("status", "reported", "health", "event", "cmd", "cmd/", "cmd/a/b/c", "res/ping", "other"):
        await other.publish(topic, payload)


def _refusal(other: Outside) -> Any:
    newest = other.newest("reported")
    return newest.get("desired", {}).get("refused") if isinstance(newest, dict) else None


@pytest.mark.parametrize("topic", ["cmd/ping", "cmd/deploy", "desired", "status"])
async def test_any_bytes_on_any_topic(broker: Mosquitto, tmp_path: Path, protocol: str, topic: str) -> None:
    rng = random.Random(topic)  # hypothesis drives the parser in the unit tests; this is the whole way
    async with outside(broker.port, protocol) as other, linked(make_config(tmp_path, broker.port, protocol)) as parts:
        for _ in range(40):
            await other.publish(topic, rng.randbytes(rng.choice((1, 10, 100, 1000))))
        await other.publish("cmd/ping", {"id": "alive"})
        assert (await other.next("res/ping", lambda d: d.get("id") == "alive"))["ok"] is True
        assert (parts.ran, parts.host.asked) == ([], [])
        assert parts.link.connected


# --- the connection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", [False, True], ids=["session kept", "session lost"])
async def test_a_restarted_broker_is_found_again(
    broker: Mosquitto, tmp_path: Path, protocol: str, forget: bool
) -> None:
    async with linked(make_config(tmp_path, broker.port, protocol)) as parts:
        for _ in range(2):
            broker.stop(forget=forget)
            await until(lambda: not parts.link.connected)
            broker.start()
            await until(lambda: parts.link.connected)
            async with outside(broker.port, protocol) as other:
                assert json.loads(await other.retained("status"))["state"] == "online"
                assert json.loads(await other.retained("reported"))["device"] == "box1"
                assert (await other.call("ping"))["ok"] is True
                await other.publish("desired", {"image": "r/a:1"}, retain=True)
                await other.next("reported", lambda d: d["desired"].get("in_sync"))
        assert parts.issues.list() == []


async def test_refused_credentials_are_tried_for_ever(
    tmp_path: Path, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    password = tmp_path / "password"
    password.write_text("wrong-secret\n")
    with Mosquitto(tmp_path / "broker", users={"box1": "right", "other": "o"}) as broker:
        config = make_config(tmp_path, broker.port, protocol, username="box1", password_file=password)
        async with linked(config, online=False) as parts:
            await until(lambda: "link-refused" in parts.issues)
            issue = parts.issues.list()[0]
            assert "wrong-secret" not in json.dumps(issue)
            password.unlink()
            await until(lambda: "cannot be read" in parts.issues.list()[0]["message"])
            password.write_text("right\nsecond line\n")  # read at every attempt
            await until(lambda: parts.link.connected)
            assert parts.issues.list() == []
            async with outside(broker.port, protocol, username="other", password="o") as other:
                assert (await other.call("ping"))["ok"] is True
    told = "".join(capsys.readouterr())
    assert "cannot be used" in told
    assert "wrong-secret" not in told


async def test_a_frozen_broker_is_left_and_found_again(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    assert broker._process is not None
    async with linked(make_config(tmp_path, broker.port, protocol, keep_alive=1)) as parts:
        os.kill(broker._process.pid, signal.SIGSTOP)
        await until(lambda: not parts.link.connected)
        os.kill(broker._process.pid, signal.SIGCONT)
        await until(lambda: parts.link.connected)
        async with outside(broker.port, protocol) as other:
            assert (await other.call("ping"))["ok"] is True


async def test_a_broker_that_stays_away_is_an_issue(
    broker: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "AWAY", 0.2)
    async with linked(make_config(tmp_path, broker.port)) as parts:
        broker.stop()
        await until(lambda: "link-down" in parts.issues)
        broker.start()
        await until(lambda: parts.link.connected)
        assert "link-down" not in parts.issues


async def test_reconnects_leave_nothing_behind(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with linked(make_config(tmp_path, broker.port, protocol)) as parts:
        counts = []
        for _ in range(5):
            broker.kill()
            await until(lambda: not parts.link.connected)
            await asyncio.sleep(0.3)  # some refused attempts
            broker.start()
            await until(lambda: parts.link.connected)
            await asyncio.sleep(0.1)
            counts.append((len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())))
        assert counts[-1] == counts[1]


async def test_denied_topics_are_an_issue(tmp_path: Path) -> None:
    acl = "user box1\ntopic readwrite slotd/box1/#\ntopic deny slotd/box1/event\nuser other\ntopic readwrite #\n"
    users = {"box1": "p", "other": "o"}
    password = tmp_path / "password"
    password.write_text("p")
    with Mosquitto(tmp_path / "broker", users=users, acl=acl) as broker:
        config = make_config(tmp_path, broker.port, username="box1", password_file=password)
        async with linked(config) as parts:
            await parts.outbox.append("test", {})
            await until(lambda: "link-denied:slotd/box1/event" in parts.issues)
            assert parts.outbox.depth() == 1  # not lost
            async with outside(broker.port, username="other", password="o") as other:
                assert (await other.call("ping"))["ok"] is True


async def test_a_twin_is_noticed(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    """They throw each other out, until one has had it three times."""
    async with (
        linked(make_config(tmp_path / "a", broker.port, protocol, backoff_max=30)) as first,
        linked(make_config(tmp_path / "b", broker.port, protocol, backoff_max=30)) as second,
    ):
        await until(lambda: "duplicate-identity" in first.issues or "duplicate-identity" in second.issues)


async def test_a_broker_that_says_who_came_is_believed_at_once(tmp_path: Path) -> None:
    """MQTT 5: DISCONNECT 0x8E. Mosquitto 2.0 never says it."""
    came = 0

    async def broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        came += 1
        await reader.read(2)
        writer.write(bytes.fromhex("2003000000" + "e0028e00"))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(broker, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, linked(make_config(tmp_path, port, backoff_max=30), online=False) as parts:
        await until(lambda: "duplicate-identity" in parts.issues)
        await asyncio.sleep(0.5)
        assert came == 1


async def test_a_new_name_clears_the_old_one(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with linked(make_config(tmp_path, broker.port, protocol)):
        pass
    async with outside(broker.port, protocol) as other:
        assert await other.retained("status")
        async with linked(make_config(tmp_path, broker.port, protocol, device="box2")):
            assert await other.retained("status") == b""
            assert await other.retained("reported") == b""


async def test_a_stop_is_bounded_when_the_broker_is_frozen(broker: Mosquitto, tmp_path: Path) -> None:
    async with linked(make_config(tmp_path, broker.port)) as parts:
        assert broker._process is not None
        os.kill(broker._process.pid, signal.SIGSTOP)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await parts.stop()
        assert loop.time() - began < 4.5


async def test_stopped_at_any_moment_of_a_connect(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    async with outside(broker.port, protocol) as other:
        for number in range(12):
            async with linked(make_config(tmp_path, broker.port, protocol), online=False) as parts:
                await asyncio.sleep(number * 0.002)
                loop = asyncio.get_running_loop()
                began = loop.time()
                await parts.stop()
                assert loop.time() - began < 2.5
            retained = await other.retained("status")
            assert not retained or json.loads(retained)["state"] == "offline"


async def test_stopped_while_nobody_answers(tmp_path: Path) -> None:
    async with linked(make_config(tmp_path, 1), online=False) as parts:
        await asyncio.sleep(0.1)
        assert not parts.link.connected
        await parts.stop()


async def test_a_cancelled_link_says_goodbye(broker: Mosquitto, tmp_path: Path) -> None:
    async with outside(broker.port) as other:
        async with linked(make_config(tmp_path, broker.port)) as parts:
            assert parts.task is not None
            parts.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await parts.task
        assert (await other.next("status", lambda d: d["state"] == "offline"))["reason"] == "stop"
