"""A whole slotd whose configuration changes: what takes effect, what is refused, and that no request fails by it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from agent.errors import InvalidConfig
from agent.journal.database import Journal
from agent.journal.outbox import Outbox
from agent.reload.source import GOOD
from support.host import Host, merge
from support.mosquitto import Mosquitto

X = np.ones((1, 4), np.float32)
ROOT = Path(__file__).parents[2]


class Changing(Host):
    """A host whose file is changed while it runs."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self.path = folder / "config.yaml"

    def write(self, **settings: Any) -> None:
        """Renamed over the file, as editors do; what was changed before stays changed."""
        self.config = merge(self.config, settings)
        self.replace(yaml.safe_dump(self.config).encode())

    def replace(self, content: bytes) -> None:
        beside = self.folder / "config.yaml.tmp"
        beside.write_bytes(content)
        beside.rename(self.path)

    def change(self, **settings: Any) -> dict[str, Any]:
        """Written and reloaded by the command."""
        self.write(**settings)
        return self.call("reload")

    def issue(self, id: str) -> dict[str, Any] | None:
        return next((one for one in self.status()["issues"] if one["id"] == id), None)

    def slotd(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agent", *arguments],
            cwd=ROOT,
            env={**os.environ, "SLOTD_CONFIG": str(self.path), **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Those that wait for a broker, after the end of slotd."""

        async def read() -> list[dict[str, Any]]:
            journal = await Journal.open(self.folder / "state", "boot-of-the-test")
            try:
                return [document for _, _, document in await Outbox(journal).pending(0, 10_000)]
            finally:
                await journal.close()

        return [one for one in asyncio.run(read()) if one["kind"] in kinds]

    @property
    def good(self) -> dict[str, Any]:
        path = self.folder / "state" / GOOD
        return yaml.safe_load(path.read_text()) if path.exists() else {}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Changing]:
    host = Changing(tmp_path)
    host.pack("one:1", scale=2.0)
    host.pack("two:1", scale=3.0)
    with host:
        yield host


def _refused(host: Host, code: grpc.StatusCode, *, timeout: float = 10) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        host.predict(X, timeout=timeout)
    assert caught.value.code() is code
    return str(caught.value.details())


def test_live_fields_take_effect(host: Changing) -> None:
    """One of each part, on a host that is never restarted."""
    pid = host.status()["pid"]
    # images.*: no image may have so many files; then no layout has it.
    host.change(images={"max_files": 1})
    assert "files" in host.deploy("one:1")["error"]["message"]
    host.change(images={"max_files": 1000, "layouts": [str(host.folder / "empty")]})
    assert host.deploy("one:1")["error"]["code"] == "NOT_FOUND"
    shutil.copytree(host.layout, host.folder / "other")
    host.change(images={"layouts": [str(host.folder / "other")]})
    shutil.rmtree(host.layout)
    # slot.*: a time-out that programming cannot keep.
    host.change(slot={"program_timeout": "20ms"})
    assert host.deploy("one:1")["error"]["code"] == "PROGRAM_TIMEOUT"
    host.change(slot={"program_timeout": "5s"})
    # swap.probation: longer, and without other requests as many proof cases.
    host.change(swap={"probation": {"duration": "1200ms", "min_requests": 5}})
    done = host.deploy("one:1")
    assert done["outcome"] == "committed", done
    assert next(one["seconds"] for one in done["phases"] if one["phase"] == "probation") >= 1.2
    assert host.predict(X)[0][0, 0] == pytest.approx(3.0)
    # executor.*: for executors that start from now on; those that run stay.
    answer = host.change(executor={"memory": "1MiB"})
    assert answer["changed"][0]["effect"] == "new executors"
    assert host.deploy("two:1")["outcome"] == "refused" or host.status()["last"]["outcome"] == "failed"
    assert host.predict(X)[0][0, 0] == pytest.approx(3.0)
    host.change(executor={"memory": "4GiB"})
    # swap.*: what was refused is allowed.
    host.change(swap={"probation": {"duration": "100ms", "min_requests": 1}, "max_tolerance": 1e-9})
    strict = host.deploy("two:1")
    assert strict["outcome"] == "refused", strict
    host.change(swap={"max_tolerance": 0.05})
    assert host.deploy("two:1")["outcome"] == "committed"
    assert host.predict(X)[0][0, 0] == pytest.approx(4.0)
    # slot.proof_interval
    before = host.status()["slot"]["proven"]
    host.change(slot={"proof_interval": "300ms"})
    host.until(lambda: host.status()["slot"]["proven"] not in (None, before))
    host.change(slot={"proof_interval": 0})
    # log.level
    assert '"level": "debug"' not in host.log.read_text()
    host.change(log={"level": "debug"})
    name, _, port = host.address.rpartition(":")
    with socket.create_connection((name, int(port)), 10) as connection:
        connection.sendall(b"this is no HTTP/2 at all")
        host.until(lambda: '"level": "debug"' in host.log.read_text())
    host.change(log={"level": "error"})
    size = host.log.stat().st_size
    host.change(serving={"max_queue": 100})
    assert "config_changed" not in host.log.read_text()[size:]
    # serving.lame_duck, at the stop
    host.change(serving={"lame_duck": "1500ms"})
    assert host.status()["pid"] == pid
    began = time.monotonic()
    assert host.stop() == 0
    assert time.monotonic() - began >= 1.5


def test_a_queue_that_was_made_shorter(tmp_path: Path) -> None:
    """serving.max_deadline, max_queue and max_wait, with a model that takes its time and requests that wait."""
    host = Changing(tmp_path, slot={"options": {"latency": 0.2}})
    host.pack("one:1", scale=2.0)
    with host:
        assert host.deploy("one:1")["outcome"] == "committed"
        host.change(serving={"max_deadline": "50ms"})
        _refused(host, grpc.StatusCode.DEADLINE_EXCEEDED)
        host.change(serving={"max_deadline": "60s"})
        assert host.predict(X)[0][0, 0] == pytest.approx(3.0)
        host.change(serving={"max_queue": 0, "max_wait": "100ms"})
        with host.load(clients=8, pause=0.0) as load:
            host.until(lambda: load.errors)
        assert {error.partition(":")[0] for _, _, error in load.errors} == {"StatusCode.RESOURCE_EXHAUSTED"}
        host.change(serving={"max_queue": 512, "max_wait": "60s"})
        with host.load(clients=8, pause=0.0, timeout=60) as load:
            host.until(lambda: len(load.answers) > 16)
        assert load.errors == []


def test_files_that_are_wrong_change_nothing(host: Changing) -> None:
    host.change(serving={"max_queue": 99})
    before, good = host.status()["config"], host.good
    assert (before["source"], before["faults"], before["pending"]) == ("file", [], [])
    assert good["serving"]["max_queue"] == 99
    whole = host.path.read_bytes()
    seen: set[str] = set()

    def wrong(*words: str) -> None:
        issue = host.until(lambda: (one := host.issue("config")) and all(w in one["message"] for w in words) and one)
        assert issue["severity"] == "error"
        now = host.status()["config"]
        assert {key: now[key] for key in ("sha256", "source", "loaded")} == {
            key: before[key] for key in ("sha256", "source", "loaded")
        }
        assert host.good == good
        with pytest.raises(InvalidConfig) as caught:
            host.call("reload")
        assert all(any(w in f"{field}: {text}" for field, text in caught.value.faults) for w in words[:2])
        seen.add(issue["message"])

    # All of the faults, and seen without being asked.
    host.replace(whole.replace(b"drain_timeout: 2s", b"drain_timeout: soon") + b"colour: red\n")
    wrong("slot.drain_timeout: 'soon' is not a time", "colour: there is no such field", "nothing has changed")
    printed = host.slotd("reload")
    assert printed.returncode == 78
    assert "slot.drain_timeout" in printed.stderr
    assert "colour" in printed.stderr
    checked = host.slotd("check")
    assert (checked.returncode, checked.stderr.count("error:")) == (78, 2)
    assert host.slotd("status").returncode == 0, "the daemon is found all the same"
    host.replace(os.urandom(4096) + b"\xff\xfe")
    wrong("UTF-8")
    host.replace(b"#" * (2 << 20))
    wrong("longer than 256 KiB")
    host.replace(b"")
    wrong("is empty")
    host.path.unlink()
    wrong("No such file")
    host.path.mkdir()
    wrong("Is a directory")
    host.path.rmdir()
    os.mkfifo(host.path)
    wrong("not a plain file")
    host.path.unlink()
    # Half of a file is not read while it is written.
    with host.path.open("wb", buffering=0) as file:
        file.write(whole[: len(whole) // 2])
        time.sleep(1.5)
        assert len(seen) == 7
        assert host.issue("config")["message"] in seen  # type: ignore[index]
        file.write(whole[len(whole) // 2 :])
    host.until(lambda: host.issue("config") is None)
    assert host.status()["config"]["sha256"] == before["sha256"]
    host.kill()
    refused = host.events("config_refused")
    assert len(refused) >= 7
    assert all(one["actor"].startswith("local: ") for one in refused)
    assert {fault["field"] for fault in refused[0]["faults"]} == {
        f"{host.path}: slot.drain_timeout",
        f"{host.path}: colour",
    }


def test_each_way_a_file_becomes_another(tmp_path: Path) -> None:
    """Written over, renamed over, swapped behind a link; each is told with who did it."""
    host = Changing(tmp_path)
    real = tmp_path / "..1"
    real.mkdir()
    (tmp_path / "..data").symlink_to("..1")
    host.path.symlink_to("..data/config.yaml")
    with host:
        assert (real / "config.yaml").exists()

        def took(queue: int) -> None:
            host.until(lambda: host.status()["config"]["sha256"] != sha[0])
            sha[0] = host.status()["config"]["sha256"]
            host.until(lambda: host.good["serving"].get("max_queue") == queue)

        def content(queue: int) -> str:
            return yaml.safe_dump(merge(host.config, {"serving": {"max_queue": queue}}))

        sha = [host.status()["config"]["sha256"]]
        (real / "config.yaml").write_text(content(11))
        took(11)
        (tmp_path / "..2").mkdir()
        (tmp_path / "..2" / "config.yaml").write_text(content(12))
        (tmp_path / "..new").symlink_to("..2")
        (tmp_path / "..new").rename(tmp_path / "..data")
        took(12)
        host.replace(content(13).encode())
        took(13)
        host.path.write_text(content(14))
        took(14)
        host.path.write_text(content(15))
        assert host.process is not None
        host.process.send_signal(signal.SIGHUP)
        took(15)
        host.path.write_text(content(16))
        host.call("reload")
        took(16)
        host.kill()
        told = host.events("config_changed")
        assert [one["changed"][0]["to"] for one in told] == [11, 12, 13, 14, 15, 16]
        assert {one["actor"].partition(":")[0] for one in told} == {"local"}
        assert "uid" in told[-1]["actor"] or "the file" in told[-1]["actor"]


def test_a_restart_that_is_needed_and_the_good_one(tmp_path: Path) -> None:
    host = Changing(tmp_path)
    host.pack("one:1", scale=2.0)
    host.start()
    try:
        assert host.deploy("one:1")["outcome"] == "committed"
        printed = host.slotd("reload")
        assert printed.stdout == "nothing that is in force has changed\n"
        host.write(device="renamed", serving={"max_queue": 77}, executor={"threads": 2})
        printed = host.slotd("reload")
        assert printed.returncode == 0, printed.stderr
        config = host.status()["config"]
        if config["sha256"] and "serving.max_queue" in printed.stdout:  # else the watch was quicker
            assert "in force now\n  serving.max_queue  512 → 77\n" in printed.stdout
            assert "executors that start from now on\n  executor.threads  1 → 2\n" in printed.stdout
        assert 'at the next start of slotd\n  device  "test-host" → "renamed"\n' in printed.stdout
        status = host.status()
        assert (status["device"], status["config"]["pending"]) == ("test-host", ["device"])
        assert "device: 'test-host' → 'renamed'" in host.issue("restart-needed")["message"]  # type: ignore[index]
        assert host.good["device"] == "test-host", "not all of it has come up"
        assert "restart" in host.slotd("status").stdout

        assert host.stop() == 0
        host.keep_config = True
        host.start()
        status = host.status()
        assert (status["device"], status["config"]["pending"], status["config"]["source"]) == ("renamed", [], "file")
        host.until(lambda: host.good.get("device") == "renamed")
        valid = host.path.read_bytes()

        # Invalid at the start: the last good one, and an issue.
        assert host.stop() == 0
        host.path.write_bytes(valid + b"colour: red\n")
        host.start()
        status = host.status()
        assert (status["device"], status["config"]["source"]) == ("renamed", "good")
        assert status["committed"]["name"] == "one"
        assert host.predict(X)[0][0, 0] == pytest.approx(3.0)
        issue = host.issue("config")
        assert issue is not None
        assert "colour: there is no such field" in issue["message"]
        assert GOOD in issue["message"]
        host.replace(valid)
        host.until(lambda: host.status()["config"]["source"] == "file")
        assert host.issue("config") is None

        # Missing: systemd says where the state is.
        assert host.stop() == 0
        host.path.unlink()
        host.start(STATE_DIRECTORY=str(tmp_path / "state"))
        assert host.status()["config"]["source"] == "good"
        host.replace(valid)
        host.until(lambda: host.status()["config"]["source"] == "file")
        assert host.stop() == 0

        # None at all: every fault, and 78.
        (tmp_path / "state" / GOOD).unlink()
        host.path.write_bytes(valid + b"colour: red\nqueue: 3\n")
        ended = host.slotd("run")
        assert ended.returncode == 78
        assert (ended.stderr.count("error:"), "colour" in ended.stderr, "queue" in ended.stderr) == (2, True, True)
        (told,) = [one for one in host.events("config_changed") if one["actor"].startswith("boot")]
        assert told["changed"][0]["field"] == "device"
    finally:
        host.kill()


def test_fifty_reloads_and_two_swaps_under_load(host: Changing) -> None:
    """No request fails, and nothing is left of them."""
    for tag in ("one:1", "two:1"):
        assert host.deploy(tag)["outcome"] == "committed"
    assert host.process is not None
    process = Path(f"/proc/{host.process.pid}")

    def reload_often() -> None:
        for number in range(25):
            host.write(serving={"max_queue": 400 + number}, link={"health_interval": 10 + number})
            host.call("reload")

    def used() -> tuple[int, int]:
        return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))

    reload_often()
    before = used()
    with host.load(clients=4) as load:
        task = host.call("deploy", image="one:1")["task"]
        reload_often()
        assert host.ended(task)["outcome"] == "committed"
        task = host.call("deploy", image="two:1", probation=1)["task"]
        host.until_phase(task, "probation")
        # Rules that are made stricter while it runs; whoever is at it goes on.
        host.write(swap={"continuity": "queue", "probation": {"duration": "2s"}}, slot={"drain_timeout": "1s"})
        for _ in range(25):
            host.process.send_signal(signal.SIGHUP)
        assert host.ended(task)["outcome"] == "committed"
        host.until(lambda: host.status()["config"]["pending"] == [])
    assert load.errors == []
    assert len(load.answers) > 50
    assert host.status()["host"] == "slot"
    assert host.issue("fault:config-reload") is None
    host.until(lambda: all(now <= then + 3 for now, then in zip(used(), before, strict=True)))


def test_systemd_is_told_in_order(host: Changing) -> None:
    """RELOADING with the time, then READY, whether it went well or not: Type=notify-reload."""
    host.until(lambda: host.good)
    count = len(host.told)
    assert host.process is not None

    def told() -> list[str]:
        return [text for _, text in host.told[count:] if "STATUS" not in text]

    for content in (b"colour: red", yaml.safe_dump(host.config).encode()):
        at = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        host.path.write_bytes(content)
        host.process.send_signal(signal.SIGHUP)
        host.until(lambda: any("READY=1" in text.split("\n") for text in told()))
        host.until(lambda: len(told()) % 2 == 0)
        lines = [text.split("\n") for text in told()]
        assert lines[0][0] == "RELOADING=1"
        assert int(lines[0][1].removeprefix("MONOTONIC_USEC=")) >= at
        assert [one[0] for one in lines] == ["RELOADING=1", "READY=1"] * (len(lines) // 2)
        time.sleep(1.5)  # the watch sees it as well
        count = len(host.told)


def test_the_embedded_flag_is_kept(tmp_path: Path) -> None:
    host = Changing(tmp_path, embedded=None)
    del host.config["embedded"]
    host.start(EMBEDDED="1")
    try:
        assert host.status()["embedded"]
        host.change(serving={"max_queue": 9})
        host.change(embedded=False)
        status = host.status()
        assert (status["embedded"], status["config"]["pending"]) == (True, [])
        assert host.stop() == 0
        host.keep_config = True
        host.start(wait=False)
        assert host.wait_dead() == 78, "without the flag it is no configuration"
        assert "slot.driver is simulated" in host.tail()
    finally:
        host.kill()


class Retained:
    """What a broker keeps of the host."""

    def __init__(self, broker: Mosquitto, *login: str) -> None:
        self._arguments = ["-p", str(broker.port), *login]

    def state(self) -> str | None:
        told = subprocess.run(
            ["mosquitto_sub", *self._arguments, "-t", "slotd/test-host/status", "-C", "1", "-W", "1"],
            capture_output=True,
            text=True,
        ).stdout
        return json.loads(told)["state"] if told else None


def test_the_link_goes_where_it_is_told(tmp_path: Path) -> None:
    """Another broker, a password, none, one inside slotd: each in order, while requests are answered."""
    first = Mosquitto(tmp_path / "first")
    second = Mosquitto(tmp_path / "second", users={"edge": "right", "other": "x"})
    first.start()
    second.start()
    host = Changing(
        tmp_path, link={"enabled": True, "port": first.port, "backoff_first": "0.2s", "backoff_max": "0.5s"}
    )
    host.pack("one:1", scale=2.0)
    (tmp_path / "password").write_text("right\n")
    (tmp_path / "wrong").write_text("wrong\n")

    def connected(where: int) -> None:
        host.until(lambda: (s := host.status()["link"])["connected"] and s["broker"].endswith(f":{where}"))

    try:
        host.start()
        connected(first.port)
        assert host.deploy("one:1")["outcome"] == "committed"
        with host.load(clients=2) as load:
            host.change(link={"port": second.port, "username": "edge", "password_file": str(tmp_path / "wrong")})
            host.until(lambda: host.issue("link-refused"))
            host.until(lambda: Retained(first).state() == "offline")
            host.change(link={"password_file": str(tmp_path / "password")})
            connected(second.port)
            assert host.issue("link-refused") is None
            login = ("-u", "edge", "-P", "right")
            assert Retained(second, *login).state() == "online"
            host.change(link={"health_interval": "1s", "keep_alive": "10s", "backlog_rate": 500})
            connected(second.port)
            host.change(link={"enabled": False})
            host.until(lambda: host.status()["link"] == {"enabled": False, "connected": False})
            host.until(lambda: Retained(second, *login).state() == "offline")
            host.change(link={"enabled": True, "host": "", "port": 0, "username": None, "password_file": None})
            host.until(lambda: (s := host.status()["link"])["connected"] and s["embedded"])
            # A port that is taken: the link waits, the host goes on.
            host.change(link={"port": first.port})
            host.until(lambda: host.issue("link-refused"))
            host.change(link={"host": "127.0.0.1"})
            connected(first.port)
            assert Retained(first).state() == "online"
        assert load.errors == []
        assert load.answers

        # The command by MQTT: its answer comes, although the reload ends the link that brought it.
        answer = _ask_by_mqtt(first, host, lambda: host.write(link={"keep_alive": "20s"}, log={"level": "warning"}))
        assert answer["ok"], answer
        connected(first.port)
        host.write(colour="red")
        answer = _ask_by_mqtt(first, host, lambda: None)
        assert answer["error"]["code"] == "CONFIG_INVALID"
        assert answer["error"]["faults"] == [{"field": f"{host.path}: colour", "message": "there is no such field"}]
    finally:
        host.kill()
        first.stop()
        second.stop()


def _ask_by_mqtt(broker: Mosquitto, host: Changing, before: Callable[[], None]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    number = str(time.monotonic_ns())

    def listen() -> None:
        told = subprocess.run(
            ["mosquitto_sub", "-p", str(broker.port), "-t", "slotd/test-host/res/reload", "-C", "1", "-W", "20"],
            capture_output=True,
            text=True,
        ).stdout
        document.update(json.loads(told) if told else {"ok": False, "error": "no answer"})

    listener = threading.Thread(target=listen)
    listener.start()
    time.sleep(0.5)
    before()
    body = json.dumps({"id": number, "expires": time.time() + 60})
    subprocess.run(
        ["mosquitto_pub", "-p", str(broker.port), "-q", "1", "-t", "slotd/test-host/cmd/reload", "-m", body], check=True
    )
    listener.join(30)
    return document
