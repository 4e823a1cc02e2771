"""A whole host as its operator sees it: a real broker, real registries, the real daemon."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.forge.pack import pack
from agent.health.document import timestamp
from agent.slot.arbiter import Phase
from support.host import Host, merge
from support.images import make_image, push_image
from support.mosquitto import Mosquitto
from support.outsider import Outsider
from support.processes import descendants, gone, holdings
from support.registry import USER, RunningRegistry, running_registry
from support.relay import Relay
from support.tiny import accelerator_of, write_model

X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)
PASSWORD = "hunter2 and more"
DEVICE = "edge-7"
SCALES = {1: 2.0, 2: 3.0, 3: 4.0}
BIG = 6 << 20


@dataclass(frozen=True)
class Site:
    """Three registries with the same images: open, with a password that hosts know, with one that they don't."""

    folder: Path
    open: RunningRegistry
    known: RunningRegistry
    closed: RunningRegistry
    digests: dict[str, str]
    logins: Path

    def host(self, folder: Path, **settings: Any) -> Host:
        """Not yet started; images come from the registries alone."""
        images = {
            "layouts": [],
            "insecure_registries": [self.open.host, self.known.host, self.closed.host],
            "credentials": str(self.logins),
            "timeout": "5s",
            "retries": 3,
        }
        link = {"enabled": True, "backoff_first": "0.1s", "backoff_max": "0.5s", "backlog_rate": 500}
        return Host(folder, **merge({"device": DEVICE, "images": images, "link": link}, settings))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    layout, digests = folder / "layout", {}
    for number, scale in SCALES.items():
        model = write_model(folder / f"tiny-{number}", scale=scale, version=str(number))
        digests[f"tiny:{number}"] = pack(model, layout, f"tiny:{number}")
    digests["wrong:1"] = pack(write_model(folder / "wrong", wrong_golden=True, scale=9.0), layout, "wrong:1")
    digests["nothing:1"] = make_image(layout, "nothing:1", {"etc/motd": b"no model here"})
    big = write_model(folder / "big", scale=3.0, version="2")
    (big / "ballast.bin").write_bytes(os.urandom(BIG))
    digests["big:1"] = pack(big, layout, "big:1")
    with ExitStack() as stack:
        registries = []
        for name, password in (("open", None), ("known", PASSWORD), ("closed", "nobody knows")):
            registry = stack.enter_context(running_registry(folder / name, password))
            for tag in digests:
                repository, _, version = tag.partition(":")
                push_image(layout, tag, registry.host, f"team/{repository}", version, registry.auth)
            registries.append(registry)
        logins = folder / "config.json"
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        logins.write_text(json.dumps({"auths": {registries[1].host: {"auth": login}}}))
        yield Site(folder, *registries, digests, logins)


def in_order(events: list[dict[str, Any]]) -> None:
    """Asserts that nothing is missing, twice or out of order."""
    assert len({event["epoch"] for event in events}) == 1
    numbers = [event["seq"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), numbers
    assert all(event["v"] == 1 and event["ts"] for event in events)


def until_reported(operator: Outsider, match: Any, *, after: int = 0) -> dict[str, Any]:
    return operator.until("reported", match, after=after)


def settled_on(digest: str | None) -> Any:
    """Matches a `reported` of a host that has this model committed and does nothing else."""
    return lambda r: (r["committed"] or {}).get("digest") == digest and not r["deployment"] and not r["waiting"]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_host_by_mqtt(site: Site, tmp_path: Path, protocol: str) -> None:
    with (
        Mosquitto(tmp_path / "broker") as broker,
        Outsider(broker.port, DEVICE, protocol=protocol) as operator,
        site.host(tmp_path, link={"port": broker.port, "protocol": protocol}) as host,
    ):
        online = operator.until("status", lambda s: s["state"] == "online")
        operator.until("reported", lambda _: True)  # both are kept for whoever comes later
        with Outsider(broker.port, DEVICE, protocol=protocol) as newcomer:
            assert newcomer.until("status", lambda _: True)["boot_id"] == online["boot_id"]
            reported = newcomer.until("reported", lambda _: True)
            assert (reported["host"], reported["committed"], reported["last"]) == ("empty", None, None)
            assert newcomer.on("status")[0].retain and newcomer.on("reported")[0].retain

        assert operator.until("health", lambda _: True)["v"] == 1

        # From a registry that anybody may read.
        done = operator.deploy(f"{site.open.host}/team/tiny:1")
        assert (done["outcome"], done["digest"]) == ("committed", site.digests["tiny:1"]), done
        phases = [event["phase"] for event in operator.events(done["id"]) if event["kind"] == "deployment_phase"]
        assert phases == [phase.value for phase in Phase]
        kinds = [event["kind"] for event in operator.events(done["id"])]
        assert (kinds[0], kinds[-1]) == ("deployment_asked", "deployment_ended")
        reported = until_reported(operator, settled_on(site.digests["tiny:1"]))
        assert reported["host"] == "slot"
        assert reported["last"]["id"] == done["id"]

        # From one that wants a password; nobody notices the swap.
        with host.load(2) as load:
            done = operator.deploy(f"{site.known.host}/team/tiny:2")
        assert done["outcome"] == "committed", done
        assert load.errors == []
        assert load.wrong({site.digests[f"tiny:{number}"]: scale for number, scale in SCALES.items()}) == []
        reported = until_reported(operator, settled_on(site.digests["tiny:2"]))
        assert reported["previous"]["digest"] == site.digests["tiny:1"]
        denied = operator.deploy(f"{site.closed.host}/team/tiny:3")
        assert (denied["outcome"], denied["error"]["code"]) == ("failed", "REGISTRY_DENIED")
        missing = operator.deploy(f"{site.open.host}/team/tiny:99")
        assert (missing["outcome"], missing["error"]["code"]) == ("failed", "NOT_FOUND")

        # One that cannot be programmed comes back, and says why.
        host.inject({"at": "program", "kind": "error", "accelerator": accelerator_of("tiny:3:4.0")})
        failed = operator.deploy(f"{site.open.host}/team/tiny:3")
        assert (failed["outcome"], failed["error"]["code"]) == ("rolled_back", "PROGRAM_FAILED"), failed
        reported = until_reported(operator, lambda r: (r["last"] or {}).get("id") == failed["id"] and r["host"])
        assert reported["last"]["error"]["code"] == "PROGRAM_FAILED"
        assert reported["last"]["error"]["message"]
        assert (reported["host"], reported["committed"]["digest"]) == ("slot", site.digests["tiny:2"])
        assert [event["kind"] for event in operator.events(failed["id"])][-2:] == ["rolling_back", "deployment_ended"]

        # Back, a deployment that is called off, and nothing at all.
        back = operator.ended(operator.call("rollback")["task"])
        assert (back["outcome"], back["digest"]) == ("committed", site.digests["tiny:1"])
        task = operator.call("deploy", image=f"{site.open.host}/team/tiny:2", probation="60s")["task"]
        operator.until("event", lambda e: e.get("id") == task and e.get("phase") == "probation")
        assert operator.call("task", task=task)["phase"] == "probation"
        assert operator.call("cancel")["task"] == task
        assert operator.ended(task)["outcome"] == "cancelled"
        assert operator.refused("cancel", {"task": task})["code"] == "TOO_LATE"
        np.testing.assert_allclose(host.predict(X)[0], X * 2 + 1, rtol=1e-6)
        assert operator.ended(operator.call("undeploy")["task"])["outcome"] == "committed"
        until_reported(operator, lambda r: r["host"] == "empty" and settled_on(None)(r), after=1)

        answers_and_errors(operator, host, task)
        in_order(operator.events())
        assert host.stop() == 0
        assert operator.until("status", lambda s: s["state"] == "offline")["reason"] == "stop"


def answers_and_errors(operator: Outsider, host: Host, task: str) -> None:
    """Commands that change nothing, and what is wrong with others."""
    pong = operator.call("ping")
    assert (pong["pong"], pong["device"]) == (True, DEVICE)
    status, own = operator.call("status"), host.status()
    for key in ("committed", "previous", "last", "host", "boot_id", "pid"):
        assert status[key] == own[key], key
    assert status["link"]["connected"]
    assert operator.call("task", task=task)["outcome"] == "cancelled"

    unknown = operator.refused("deplyo")
    assert unknown["code"] == "NOT_FOUND" and "deploy" in f"{unknown['hint']}{unknown['message']}"
    assert operator.refused("task", {"task": "d-0"})["code"] == "NOT_FOUND"
    assert operator.refused("cancel")["code"] == "NOT_FOUND"
    wrong = operator.refused("deploy", {})
    assert (wrong["code"], wrong["field"]) == ("INVALID_ARGUMENT", "image")
    wrong = operator.refused("deploy", {"image": "a:1", "colour": "red"})
    assert (wrong["code"], wrong["field"]) == ("INVALID_ARGUMENT", "colour")
    wrong = operator.refused("deploy", {"image": "a:1", "probation": "a while"})
    assert (wrong["code"], wrong["field"]) == ("INVALID_ARGUMENT", "probation")
    assert operator.refused("deploy", {"image": "a:1"}, expires=None)["code"] == "EXPIRY_REQUIRED"
    past, far = timestamp(time.time() - 1), timestamp(time.time() + 90000)
    assert operator.refused("undeploy", expires=past)["code"] == "EXPIRED"
    assert operator.refused("undeploy", expires=far)["code"] == "EXPIRY_REQUIRED"
    assert operator.refused("undeploy", reply=f"slotd/{DEVICE}/desired")["code"] == "REPLY_FORBIDDEN"

    first = operator.send("deploy", {"image": "no-such-layout:1"}, id="once")
    again = operator.send("deploy", {"image": "no-such-layout:1"}, id="once")
    assert again["repeated"]
    assert (first["ok"], first["result"]) == (again["ok"], again["result"])
    assert operator.ended(first["result"]["task"])["error"]["code"] == "NOT_FOUND"


def test_desired_state(site: Site, tmp_path: Path) -> None:
    def wish(revision: int, image: str, **more: Any) -> None:
        body = {"epoch": "e", "revision": revision, "image": f"{site.open.host}/team/{image}", **more}
        operator.publish("desired", body, retain=True)

    def desired(match: Any) -> dict[str, Any]:
        return dict(until_reported(operator, lambda r: match(r["desired"]), after=seen)["desired"])

    with (
        Mosquitto(tmp_path / "broker") as broker,
        Outsider(broker.port, DEVICE) as operator,
        site.host(tmp_path, link={"port": broker.port}) as host,
    ):
        seen = 0
        wish(5, "tiny:1")
        state = desired(lambda d: d["state"] == "applied")
        assert (state["revision"], state["in_sync"], state["digest"]) == (5, True, site.digests["tiny:1"])
        with host.load(2) as load:
            wish(6, "tiny:2")
            assert desired(lambda d: d["revision"] == 6 and d["state"] == "applied")["in_sync"]
        assert load.errors == []
        assert host.status()["committed"]["digest"] == site.digests["tiny:2"]

        seen = len(operator.on("reported"))
        wish(4, "tiny:3")
        state = desired(lambda d: d["refused"])
        assert (state["refused"]["error"]["code"], state["refused"]["revision"]) == ("REVISION_TOO_LOW", 4)
        assert (state["revision"], state["in_sync"]) == (6, True)

        # Broken ones are reported, and in nobody's way.
        for revision, image, code in ((7, "wrong:1", "PROOF_FAILED"), (8, "nothing:1", "MODEL_INVALID")):
            wish(revision, image)
            state = desired(lambda d, r=revision: d["revision"] == r and d["state"] not in ("waiting", "applying"))
            assert (state["state"], state["in_sync"], state["error"]["code"]) == ("failed", False, code)
        assert host.status()["committed"]["digest"] == site.digests["tiny:2"]
        wish(9, "tiny:1")
        assert desired(lambda d: d["revision"] == 9 and d["state"] == "applied")["in_sync"]

        # Somebody at the host knows better, for the time being.
        assert host.deploy(f"{site.open.host}/team/tiny:2")["outcome"] == "committed"
        state = desired(lambda d: d["revision"] == 9 and d["override"])
        assert not state["in_sync"]
        assert state["override"]["by"].startswith("local")

        # The host comes back without the broker, then the broker.
        assert host.stop() == 0
        operator.until("status", lambda s: s["state"] == "offline")
        broker.stop()
        host.start()
        y, metadata = host.predict(X)
        np.testing.assert_allclose(y, X * 3 + 1, rtol=1e-6)
        assert metadata["slotd-model-digest"] == site.digests["tiny:2"]
        host.until_host("slot")
        seen, known = len(operator.on("reported")), len(operator.on("status"))
        broker.start()
        operator.until("status", lambda s: s["state"] == "online", after=known)
        state = desired(lambda d: d["override"])
        assert (state["revision"], state["in_sync"]) == (9, False)
        reported = operator.newest("reported")
        assert (reported["host"], reported["committed"]["digest"]) == ("slot", site.digests["tiny:2"])
        host.until(lambda: host.status()["link"]["connected"])
        time.sleep(2.5)  # the retained wish has settled: it is known, and does not come back by itself
        assert host.status()["deployment"] is None
        assert host.status()["committed"]["digest"] == site.digests["tiny:2"]

        wish(10, "tiny:3")
        state = desired(lambda d: d["revision"] == 10 and d["state"] == "applied")
        assert (state["in_sync"], state["override"]) == (True, None)
        operator.publish("desired", {"epoch": "e", "revision": 11, "image": None}, retain=True)
        assert desired(lambda d: d["revision"] == 11 and d["state"] == "applied")["in_sync"]
        assert host.status()["host"] == "empty"


def test_registry_broker_and_daemon_go_away_in_a_pull(site: Site, tmp_path: Path) -> None:
    """One image of 6 MB over a slow line: the host is stopped in the middle, then broker and registry are killed."""
    with ExitStack() as registry_life, Relay(None, rate=2.5e6) as relay:

        def registry_up() -> None:
            relay.target = registry_life.enter_context(running_registry(tmp_path / "registry")).host

        registry_up()
        assert relay.target is not None
        push_image(site.folder / "layout", "big:1", relay.target, "team/big", "1")
        with (
            Mosquitto(tmp_path / "broker") as broker,
            Outsider(broker.port, DEVICE) as operator,
            site.host(
                tmp_path, link={"port": broker.port}, images={"insecure_registries": [relay.address, site.open.host]}
            ) as host,
        ):
            assert operator.deploy(f"{site.open.host}/team/tiny:1")["outcome"] == "committed"

            first = operator.call("deploy", image=f"{relay.address}/team/big:1")["task"]
            host.until(lambda: relay.passed > BIG / 4)
            children = descendants(host.process.pid if host.process else 0)
            assert host.stop() == 0, host.tail()
            assert gone(children), "a puller goes on behind our back"
            host.start()
            resumed = host.until(lambda: host.status()["deployment"])
            assert resumed["actor"] == f"resume of {first}"

            with host.load(2) as load:
                host.until(lambda: relay.passed > BIG / 2)
                known = len(operator.on("status"))
                broker.kill()
                relay.target = None
                registry_life.close()  # connections in the middle of the blob are cut
                host.until(lambda: not host.status()["link"]["connected"])
                assert host.call("task", task=resumed["id"])["phase"] == "pull"
                broker.start()
                operator.until("status", lambda s: s["state"] == "online", after=known)
                registry_up()
                done = host.ended(resumed["id"])
            assert (done["outcome"], done["digest"]) == ("committed", site.digests["big:1"]), done
            assert load.errors == []
            assert relay.passed < BIG * 1.35, "what was there is not fetched again"
            assert operator.ended(resumed["id"])["outcome"] == "committed"
            until_reported(operator, settled_on(site.digests["big:1"]))

            # Away for good: a clear end, and the host serves.
            relay.target = None
            registry_life.close()
            with host.load(2) as load:
                done = operator.deploy(f"{relay.address}/team/other:1")
            assert (done["outcome"], done["error"]["code"]) == ("failed", "REGISTRY"), done
            assert load.errors == []
            assert host.status()["host"] == "slot"


def test_a_broker_with_a_password_and_the_command_line(site: Site, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("not yet right\n")
    with (
        Mosquitto(tmp_path / "broker", users={"slotd": "s3cret", "me": "too"}) as broker,
        Outsider(broker.port, DEVICE, username="me", password="too") as operator,
        site.host(tmp_path, link={"port": broker.port, "username": "slotd", "password_file": str(secret)}) as host,
    ):

        def cli(*arguments: str, code: int = 0) -> Any:
            ran = subprocess.run(
                [sys.executable, "-m", "agent", *arguments, "--json"],
                cwd=Path(__file__).parents[2],
                env={**os.environ, "SLOTD_CONFIG": str(tmp_path / "config.yaml")},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert ran.returncode == code, ran.stdout + ran.stderr
            return json.loads(ran.stdout)

        # Refused by the broker, it can be deployed to from the console all the same.
        done = cli("deploy", f"{site.known.host}/team/tiny:1")
        assert (done["outcome"], done["digest"]) == ("committed", site.digests["tiny:1"])
        refused = host.until(lambda: [i for i in cli("status")["issues"] if i["id"] == "link-refused"])
        assert refused[0]["hint"]
        assert "not yet right" not in host.log.read_text()
        assert operator.on("status") == []

        secret.write_text("s3cret\n")  # read anew for each try
        operator.until("status", lambda s: s["state"] == "online")
        status = cli("status")
        assert (status["host"], status["link"]["connected"]) == ("slot", True)
        assert status["committed"]["reference"] == f"{site.known.host}/team/tiny:1"
        assert not [issue for issue in status["issues"] if issue["id"] == "link-refused"]

        done = cli("deploy", f"{site.open.host}/team/tiny:2")
        assert done["outcome"] == "committed"
        assert done["actor"].startswith("local")
        back = cli("rollback")
        assert (back["outcome"], back["digest"]) == ("committed", site.digests["tiny:1"])
        host.inject({"at": "program", "kind": "error", "accelerator": accelerator_of("tiny:3:4.0")})
        failed = cli("deploy", f"{site.open.host}/team/tiny:3", code=69)
        assert (failed["outcome"], failed["error"]["code"]) == ("rolled_back", "PROGRAM_FAILED")
        # All of it is history at the broker too, from before it let us in as well.
        operator.ended(failed["id"])
        ended = [event["outcome"] for event in operator.events() if event["kind"] == "deployment_ended"]
        assert ended == ["committed", "committed", "committed", "rolled_back"]
        in_order(operator.events())


def test_twenty_swaps_leave_nothing_behind(site: Site, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    with (
        Mosquitto(tmp_path / "broker") as broker,
        Outsider(broker.port, DEVICE) as operator,
        site.host(tmp_path, link={"port": broker.port}) as host,
    ):
        assert host.process is not None
        pid = host.process.pid
        images = [f"{site.open.host}/team/tiny:{number}" for number in (1, 2)]
        assert host.deploy(images[1], probation=0)["outcome"] == "committed"
        operator.until("status", lambda s: s["state"] == "online")
        held: dict[int, dict[str, int]] = {}
        with host.load(1, pause=0.02) as load:
            for swap in range(1, 21):
                done = host.deploy(images[(swap - 1) % 2], probation=0)
                assert done["outcome"] == "committed", (swap, done)
                if swap in (5, 20):
                    operator.ended(done["id"])
                    held[swap] = at_rest(host, pid)
        assert load.errors == []
        assert load.wrong({site.digests[f"tiny:{number}"]: scale for number, scale in SCALES.items()}) == []
        in_order(operator.events())
        assert "fork_posix" not in host.log.read_text(), "gRPC's fork handlers crash children"
        growth = {key: held[20][key] - held[5][key] for key in held[5]}
        record_property("growth from swap 5 to swap 20", growth)
        print(f"\nafter swap 5 {held[5]}, growth to swap 20 {growth}, {len(load.answers)} answers")
        assert growth.pop("rss_kib") < 6 << 10
        assert set(growth.values()) == {0}, held


def at_rest(host: Host, pid: int) -> dict[str, int]:
    """What it holds, once that is the same twice: the old model's executors have ended."""

    def twice() -> dict[str, int]:
        found = holdings(pid)
        time.sleep(0.3)
        again = holdings(pid)
        counts = [{key: value for key, value in one.items() if key != "rss_kib"} for one in (found, again)]
        return again if counts[0] == counts[1] else {}

    return dict(host.until(twice))
