"""`slotd retire` on a whole host with a real broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.host import Host
from support.mosquitto import Mosquitto

USERS = {"edge": "secret", "operator": "other"}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker", users=USERS) as broker:
        yield broker


@pytest.fixture(params=["5", "3.1.1"])
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


def make_host(folder: Path, port: int, protocol: str = "5", **settings: Any) -> Host:
    """A host with a link; its password lies beside its configuration."""
    home = folder / "host"
    home.mkdir()
    (home / "password").write_text(f"{USERS['edge']}\n")
    link = {
        "enabled": port != 0,
        "port": port,
        "protocol": protocol,
        "username": "edge",
        "password_file": str(home / "password"),
        "backoff_first": "0.1s",
    }
    host = Host(home, link=link, **settings)
    (home / "config.yaml").write_text(yaml.safe_dump(host.config))
    return host


def retire(host: Host, *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """Its steps by name."""
    done = subprocess.run(
        [sys.executable, "-m", "agent", "retire", "--json", "--config", host.folder / "config.yaml", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    if "error" in answer:
        return answer
    assert answer["retired"] == (code == 0)
    return {step["what"]: step for step in answer["steps"]}


def _as_operator(broker: Mosquitto) -> tuple[str, ...]:
    return "-p", str(broker.port), "-u", "operator", "-P", USERS["operator"]


def retained(broker: Mosquitto) -> set[str]:
    """The topics with a retained message."""
    done = subprocess.run(
        ["mosquitto_sub", *_as_operator(broker), "-t", "slotd/#", "-W", "1", "--retained-only", "-F", "%t"],
        capture_output=True,
        text=True,
    )
    return set(done.stdout.split())


def publish(broker: Mosquitto, topic: str, message: str) -> None:
    subprocess.run(["mosquitto_pub", *_as_operator(broker), "-r", "-q", "1", "-t", topic, "-m", message], check=True)


def left_in(host: Host) -> list[str]:
    return sorted(os.listdir(host.config["state_dir"]))


def test_a_running_host_leaves_nothing(broker: Mosquitto, tmp_path: Path, protocol: str) -> None:
    host = make_host(tmp_path, broker.port, protocol)
    reference = f"oci:{host.layout}:one:1"
    host.pack("one:1", scale=2.0)
    with host:
        done = host.deploy(reference)
        assert done["outcome"] == "committed", done["error"]
        host.until(lambda: host.status()["link"]["connected"])
        publish(broker, "slotd/test-host/desired", json.dumps({"v": 1, "revision": 1, "model": {"image": reference}}))
        publish(broker, "slotd/test-host/cmd/ping", "{}")
        publish(broker, "slotd/another-host/status", "{}")
        steps = retire(host, "--yes")
        assert host.wait_dead(10) == 0
    assert steps["daemon"]["detail"].startswith("stopped (pid")
    assert "slotd/test-host/reported" in steps["broker"]["detail"]
    assert retained(broker) == {"slotd/another-host/status"}
    assert left_in(host) == ["retired.json"]
    assert not (host.folder / "password").exists() and (host.folder / "config.yaml").exists()
    for _ in range(2):  # nobody can ask the broker any more, but it was told
        assert retire(host, "--yes")["broker"]["detail"].startswith("was told at")

    (host.folder / "password").write_text(f"{USERS['edge']}\n")  # it comes back, and loses its password
    with host:
        host.until(lambda: host.status()["link"]["connected"])
    (host.folder / "password").unlink()
    again = retire(host, "--yes", code=75)
    assert not again["broker"]["done"] and "password" in again["broker"]["detail"]
    assert retire(host, "--yes", "--without-broker")["broker"]["detail"] == "left alone, as asked"
    assert left_in(host) == []


def test_a_broker_that_is_away_is_said_and_told_later(broker: Mosquitto, tmp_path: Path) -> None:
    host = make_host(tmp_path, broker.port)
    with host:
        host.until(lambda: host.status()["link"]["connected"])
        assert host.stop() == 0
    broker.stop()
    steps = retire(host, "--yes", code=75)
    assert not steps["broker"]["done"] and f"127.0.0.1:{broker.port}" in steps["broker"]["detail"]
    assert not steps["keys"]["done"] and (host.folder / "password").exists()
    assert steps["state"]["done"] and left_in(host) == []
    assert not retire(host, "--yes", code=75)["broker"]["done"]

    broker.start()
    assert retained(broker) == {"slotd/test-host/status", "slotd/test-host/reported"}
    steps = retire(host, "--yes")
    assert steps["broker"]["detail"] == "cleared slotd/test-host/reported, slotd/test-host/status"
    assert retained(broker) == set() and not (host.folder / "password").exists()


def test_what_the_broker_does_not_let_go_is_said(tmp_path: Path) -> None:
    acl = "user edge\ntopic read slotd/test-host/#\ntopic write slotd/test-host/status\nuser operator\ntopic #\n"
    with Mosquitto(tmp_path / "broker", users=USERS, acl=acl) as broker:
        host = make_host(tmp_path, broker.port)
        for name in ("status", "desired"):
            publish(broker, f"slotd/test-host/{name}", "{}")
        steps = retire(host, "--yes", code=75)
        assert "slotd/test-host/desired" in steps["broker"]["detail"]
        assert retained(broker) == {"slotd/test-host/desired"}


def test_a_wrong_password_is_said(broker: Mosquitto, tmp_path: Path) -> None:
    host = make_host(tmp_path, broker.port)
    (host.folder / "password").write_text("wrong\n")
    steps = retire(host, "--yes", code=75)
    assert "refuses" in steps["broker"]["detail"] and (host.folder / "password").exists()


def test_nothing_of_others_is_removed(tmp_path: Path) -> None:
    """Keys elsewhere and files in the state folder that slotd does not know: left, and said."""
    credentials = tmp_path / "docker" / "config.json"
    credentials.parent.mkdir()
    credentials.write_text("{}")
    host = make_host(tmp_path, 0, images={"credentials": str(credentials)})
    state = Path(host.config["state_dir"])
    (state / "models" / "x").mkdir(parents=True)
    (state / "thesis.odt").write_text("important")
    steps = retire(host, "--yes", code=75)
    assert str(credentials) in steps["keys"]["detail"] and credentials.exists()
    assert "thesis.odt" in steps["folder"]["detail"] and left_in(host) == ["thesis.odt"]
    assert steps["models"]["detail"] == "removed models"


def test_without_a_yes_nothing_is_touched(broker: Mosquitto, tmp_path: Path) -> None:
    host = make_host(tmp_path, broker.port)
    publish(broker, "slotd/test-host/status", "{}")
    answer: Any = retire(host, code=65)
    assert answer["error"]["field"] == "--yes"
    assert retained(broker) == {"slotd/test-host/status"} and (host.folder / "password").exists()


def test_a_host_that_never_ran(tmp_path: Path) -> None:
    host = make_host(tmp_path, 0)
    steps = retire(host, "--yes")
    assert steps["daemon"]["detail"] == "not running" and steps["folder"]["detail"].endswith("is gone")
