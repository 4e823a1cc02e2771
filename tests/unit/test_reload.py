"""The configuration while slotd runs: differences, the last good one, the watch, and what a reload does."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from agent.cli.verbs import app
from agent.commands.table import Actor
from agent.config import EFFECTS, MAX_BYTES, MAX_FAULTS, Config, Effect, parse_config, read_config, read_file
from agent.errors import InvalidConfig, StorageError, revive
from agent.health.issues import Issues
from agent.reload import reloader as reloading
from agent.reload import source, watch
from agent.reload.changes import changes, in_force, values
from agent.reload.reloader import Reloader
from agent.reload.source import GOOD, Loaded, load, read_good, write_good
from agent.reload.watch import Watch, hops

ME = Actor("local", "uid 1000 (me)")
OTHER: dict[str, Any] = {
    "slot.driver": "simulated2",
    "slot.options": {"latency": 1},
    "swap.continuity": "queue",
    "swap.on_weak_bridge": "refuse",
    "link.protocol": "3.1.1",
    "log.level": "debug",
    "log.format": "json",
    "images.layouts": ["/x"],
    "images.insecure_registries": ["r:5000"],
    "link.reply_allow": ["a/#"],
    "serving.grpc.listen": "127.0.0.1:1",
}


def _other(field: str, value: Any) -> Any:
    if field in OTHER:
        return OTHER[field]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 if isinstance(value, float) and value else 0.25 if isinstance(value, float) else value + 10
    return "/else/where" if value is None or str(value).startswith("/") else f"{value}-2"


def _set(config: Config, field: str, value: Any) -> Config:
    document = config.model_dump(mode="json")
    section = document
    *path, name = field.split(".")
    for part in path:
        section = section[part]
    section[name] = value
    return Config.model_validate(document)


class TestChanges:
    @pytest.mark.parametrize("field", [name for name in EFFECTS if name not in ("embedded", "slot.driver")])
    def test_each_field_is_told_and_a_restart_is_waited_for(self, field: str) -> None:
        before = Config(embedded=True)
        if field.startswith("serving.tls."):  # certificate and key go together
            tls = {"certificate": "/certificate", "key": "/key"}
            before = Config.model_validate({"embedded": True, "serving": {"tls": tls}})
        after = _set(before, field, _other(field, values(before)[field]))
        (change,) = changes(before, after)
        assert (change.field, change.before) == (field, values(before)[field])
        assert change.after == values(after)[field] != change.before
        running = in_force(before, after)
        assert (running == before) == (EFFECTS[field] is Effect.RESTART)
        assert (running == after) == (EFFECTS[field] is not Effect.RESTART)

    def test_what_names_the_host_and_its_slot_needs_a_restart_and_everything_else_does_not(self) -> None:
        assert [field for field, effect in EFFECTS.items() if effect is Effect.RESTART] == [
            "device",
            "state_dir",
            "run_dir",
            "embedded",
            "slot.driver",
            "slot.options",
            "serving.grpc.listen",
            "serving.grpc.socket",
            "serving.grpc.max_message",
            "serving.grpc.max_streams",
            "serving.http.listen",
            "serving.tls.certificate",
            "serving.tls.key",
            "serving.tls.client_ca",
            "serving.keys",
        ]
        assert {field for field, effect in EFFECTS.items() if effect is Effect.LAUNCH} == {
            field for field in EFFECTS if field.startswith("executor.")
        }

    def test_both_kinds_at_once(self) -> None:
        before = parse_config("embedded: true\ndevice: a")
        after = parse_config("embedded: true\ndevice: b\nserving: {max_queue: 7, grpc: {max_streams: 5}}")
        now = in_force(before, after)
        assert (now.device, now.serving.max_queue, now.serving.grpc.max_streams) == ("a", 7, 256)
        assert [one.field for one in changes(now, after)] == ["device", "serving.grpc.max_streams"]

    def test_secrets_in_options_are_not_told(self) -> None:
        before = Config(embedded=True)
        (change,) = changes(before, _set(before, "slot.options", {"api_key": "abc123", "speed": 3}))
        assert change.as_dict()["to"] == {"api_key": "***", "speed": 3}


class TestFaults:
    def test_all_of_them_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_text("embedded: true\ncolour: red\nslot: {load_timeout: soon}\nlink: {port: -1, qos: 2}\n")
        with pytest.raises(InvalidConfig) as caught:
            source.read(path)
        assert {field for field, _ in caught.value.faults} == {
            f"{path}: {field}" for field in ("colour", "slot.load_timeout", "link.port", "link.qos")
        }
        again = revive(caught.value.as_dict())
        assert isinstance(again, InvalidConfig)
        assert again.faults == caught.value.faults
        assert again.exit == 78

    def test_both_rules_between_fields(self) -> None:
        with pytest.raises(InvalidConfig, match=r"slot\.driver is simulated.*link\.host is empty"):
            parse_config("link: {host: ''}")

    def test_the_driver_is_asked_as_well(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_text("slot: {driver: abacus}")
        with pytest.raises(InvalidConfig, match="no driver 'abacus'") as caught:
            source.read(path)
        assert caught.value.field == f"{path}: slot"

    def test_endless_faults_are_counted(self) -> None:
        with pytest.raises(InvalidConfig) as caught:
            parse_config("embedded: true\n" + "\n".join(f"x{number}: 1" for number in range(900)))
        assert len(caught.value.faults) == MAX_FAULTS + 1
        assert caught.value.faults[-1][1] == f"{900 - MAX_FAULTS} more faults"

    @pytest.mark.parametrize("options", ["{a: .nan}", "{a: !!binary /w==}", "{a: 2020-01-01}"])
    def test_options_are_json(self, options: str) -> None:
        with pytest.raises(InvalidConfig, match="JSON") as caught:
            parse_config(f"embedded: true\nslot: {{options: {options}}}", where="c")
        assert caught.value.field == "c: slot.options"

    def test_what_is_no_configuration_file(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"

        def fault() -> str:
            with pytest.raises(InvalidConfig) as caught:
                read_file(path)
            assert caught.value.field == str(path)
            return caught.value.message

        assert fault() == "cannot be read: No such file or directory"
        path.mkdir()
        assert fault() == "cannot be read: Is a directory"
        path.rmdir()
        os.mkfifo(path)
        assert fault() == "is not a plain file"
        path.unlink()
        path.symlink_to(path.name)
        assert "symbolic links" in fault()
        path.unlink()
        path.write_bytes(b"embedded: true\n#" + b"x" * MAX_BYTES)
        assert fault() == "is longer than 256 KiB"
        path.write_bytes(os.urandom(1000) + b"\xff")
        assert "UTF-8" in fault()
        path.write_bytes(bytes(1000))
        assert "is not YAML" in fault()
        path.write_text("\n")
        assert fault() == "is empty"
        path.write_bytes(b"\xef\xbb\xbfembedded: true\n")
        assert read_config(path) == Config(embedded=True)

    def test_a_file_that_is_not_ours_to_read(self, tmp_path: Path) -> None:
        code = (
            "import os, sys; from pathlib import Path; from agent.config import read_text\n"
            "if os.geteuid() == 0: os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)\n"
            "read_text(Path('config.yaml'))"
        )
        path = tmp_path / "config.yaml"
        path.write_text("embedded: true")
        path.chmod(0)
        tmp_path.chmod(0o755)
        ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert "InvalidConfig: config.yaml: cannot be read: Permission denied" in ended.stderr


class TestGood:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "etc" / "config.yaml"
        path.parent.mkdir()
        (tmp_path / "state").mkdir()
        path.write_text(f"# ours\nembedded: true\ndevice: good\nstate_dir: {tmp_path / 'state'}\n")
        return path

    def _keep(self, path: Path) -> Path:
        loaded = load(path)
        assert (loaded.source, loaded.fault) == ("file", None)
        write_good(loaded.config.state_dir, path, loaded.text)
        return loaded.config.state_dir

    def test_what_was_written_is_read(self, path: Path) -> None:
        state = self._keep(path)
        good = read_good(state, path)
        assert good is not None
        assert (good.text, good.config) == (path.read_text(), read_config(path))
        assert [one.name for one in state.iterdir()] == [GOOD]
        assert (state / GOOD).stat().st_mode & 0o777 == 0o600
        assert yaml.safe_load((state / GOOD).read_text())["device"] == "good", "it is the configuration for people, too"

    def test_an_invalid_file_is_passed_over(self, path: Path) -> None:
        self._keep(path)
        path.write_text(path.read_text() + "colour: red\n")
        loaded = load(path)
        assert (loaded.source, loaded.config.device) == ("good", "good")
        assert loaded.fault is not None
        assert loaded.fault.faults == ((f"{path}: colour", "there is no such field"),)

    @pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"a: ["])
    def test_where_the_file_says_nothing_systemd_says_where_the_state_is(
        self, path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state = self._keep(path)
        path.unlink() if content is None else path.write_bytes(content)
        monkeypatch.setenv("STATE_DIRECTORY", f"{state}:/somewhere")
        loaded = load(path)
        assert (loaded.source, loaded.config.device) == ("good", "good")
        monkeypatch.setenv("STATE_DIRECTORY", str(path.parent))
        with pytest.raises(InvalidConfig) as caught:
            load(path)
        assert caught.value.exit == 78
        assert caught.value.field == str(path), "the fault of the file, not of the good one"

    def test_a_damaged_one_is_none(self, path: Path) -> None:
        state = self._keep(path)
        whole = (state / GOOD).read_bytes()
        for size in range(0, len(whole), 7):
            (state / GOOD).write_bytes(whole[:size])
            assert read_good(state, path) is None
        for at in range(0, len(whole), 7):
            (state / GOOD).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert read_good(state, path) is None
        (state / GOOD).write_bytes(whole)
        assert read_good(state, path) is not None

    def test_it_is_for_its_own_file_and_its_own_host(self, path: Path, tmp_path: Path) -> None:
        state = self._keep(path)
        assert read_good(state, tmp_path / "typo.yaml") is None
        copied = tmp_path / "copied"
        shutil.copytree(state, copied)
        assert read_good(copied, path) is None
        (tmp_path / "link").symlink_to(state)
        assert read_good(tmp_path / "link", path) is not None

    def test_what_needs_the_flag_is_not_good_without_it(self, path: Path, tmp_path: Path) -> None:
        path.write_text(f"state_dir: {tmp_path / 'state'}\n")
        loaded = load(path, embedded=True)
        assert loaded.embedded
        write_good(tmp_path / "state", path, loaded.text)
        assert read_good(tmp_path / "state", path, embedded=True) is not None
        assert read_good(tmp_path / "state", path) is None

    def test_a_disk_that_fails_leaves_the_one_before(self, path: Path) -> None:
        state = self._keep(path)
        (state / f"{GOOD}.new").mkdir()
        with pytest.raises(StorageError, match="cannot be written"):
            write_good(state, path, "device: other")
        good = read_good(state, path)
        assert good is not None
        assert good.config.device == "good"

    def test_embedded_needs_no_file_at_its_usual_place(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(source, "DEFAULT_PATH", path.with_name("none.yaml"))
        loaded = load(None, embedded=True)
        assert (loaded.source, loaded.config.embedded, loaded.config.link.host) == ("defaults", True, "")
        with pytest.raises(InvalidConfig, match="No such file"):
            load(None)
        monkeypatch.setattr(source, "DEFAULT_PATH", path)
        assert load(None, embedded=True).config.device == "good"


def test_hops_are_all_names_that_count(tmp_path: Path) -> None:
    real = tmp_path.resolve()
    (real / "..one").mkdir()
    (real / "..one" / "config.yaml").touch()
    (real / "..data").symlink_to("..one")
    (real / "config.yaml").symlink_to("..data/config.yaml")
    (real / "etc").symlink_to(real)
    top = str(real)
    expected = {top: {"etc", "config.yaml", "..data"}, f"{top}/..one": {"config.yaml"}}
    assert hops(real / "etc" / "config.yaml") == expected
    assert hops(real / "plain.yaml") == {top: {"plain.yaml"}}
    assert hops(real / "none" / "config.yaml") == {top: {"none"}}
    (real / "loop").symlink_to("loop")
    assert hops(real / "loop") == {top: {"loop"}}


class TestWatch:
    @pytest.fixture
    async def seen(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Seen]:
        monkeypatch.setattr(watch, "QUIET", 0.1)
        await asyncio.to_thread(str)  # its threads stay
        threads = set(threading.enumerate())
        fds = len(os.listdir("/proc/self/fd"))
        seen = Seen(tmp_path.resolve() / "etc" / "config.yaml")
        yield seen
        await seen.close()
        left = {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")} - threads
        assert left == set()
        assert len(os.listdir("/proc/self/fd")) <= fds

    @pytest.fixture
    def often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its own looks come soon."""
        monkeypatch.setattr(watch, "LOOK", 0.3)

    async def test_each_way_of_writing_is_seen(self, seen: Seen) -> None:
        path, outside = seen.path, seen.path.parent.parent
        path.write_text("1")
        await seen.start()
        path.write_text("2")
        await seen.one("2")
        _written(path.parent / "new", "3").rename(path)
        await seen.one("3")
        _written(outside / "moved", "4").rename(path)
        await seen.one("4")
        path.unlink()
        await seen.one(None)
        os.link(_written(outside / "linked", "5"), path)
        await seen.one("5")
        path.chmod(0o600)
        await seen.one("5")
        path.unlink()
        path.symlink_to(_written(outside / "target", "6"))
        await seen.one("6")
        (outside / "target").write_text("7")
        await seen.one("7")

    async def test_what_is_beside_it_is_none_of_ours(self, seen: Seen) -> None:
        seen.path.write_text("1")
        await seen.start()
        _written(seen.path.parent / "other.yaml", "x").rename(seen.path.parent / "another.yaml")
        (seen.path.parent / "another.yaml").unlink()
        (seen.path.parent / "folder").mkdir()
        seen.path.read_text()
        await seen.none()

    async def test_several_at_once_are_one(self, seen: Seen) -> None:
        seen.path.write_text("0")
        await seen.start()
        for number in range(50):
            _written(seen.path.parent / "new", str(number)).rename(seen.path)
        await seen.one("49")

    async def test_a_file_that_is_being_written_is_left_alone(self, seen: Seen, often: None) -> None:
        await seen.start()
        with seen.path.open("w", buffering=1) as file:
            for number in range(4):
                file.write(f"line {number}\n")
                await seen.none(0.4)
        await seen.saw("line 0\nline 1\nline 2\nline 3\n")
        await seen.quiet()
        with seen.path.open("a", buffering=1) as file:
            file.write("more\n")
            seen.path.chmod(0o600)
            await seen.none(0.8)
        await seen.saw("line 0\nline 1\nline 2\nline 3\nmore\n")

    async def test_the_swap_of_a_folder_behind_a_link(self, seen: Seen) -> None:
        etc = seen.path.parent
        for version in ("..1", "..2", "..3"):
            (etc / version).mkdir()
            (etc / version / "config.yaml").write_text(version)
        (etc / "..data").symlink_to("..1")
        seen.path.symlink_to("..data/config.yaml")
        await seen.start()
        for version in ("..2", "..3"):
            (etc / "..new").symlink_to(version)
            (etc / "..new").rename(etc / "..data")
            await seen.saw(version)
        await seen.quiet()
        (etc / "..3" / "config.yaml").write_text("also there")
        await seen.saw("also there")

    async def test_a_folder_that_is_replaced(self, seen: Seen, often: None) -> None:
        etc = seen.path.parent
        seen.path.write_text("1")
        await seen.start()
        other = etc.with_name("other")
        other.mkdir()
        (other / "config.yaml").write_text("2")
        etc.rename(etc.with_name("old"))
        other.rename(etc)
        await seen.saw("2")
        seen.path.write_text("3")
        await seen.saw("3")
        shutil.rmtree(etc)
        await seen.saw(None)
        etc.mkdir()
        seen.path.write_text("4")
        await seen.saw("4")

    async def test_without_watches_it_looks_itself_and_says_so(
        self, seen: Seen, often: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none_left(*_: Any, **__: Any) -> None:
            raise OSError(28, "inotify watch limit reached")

        seen.path.write_text("1")
        with monkeypatch.context() as failing:
            failing.setattr(watch.InotifyObserver, "schedule", none_left)
            seen.begin()
            await seen.until(lambda: "limit reached" in str(seen.trouble))
            await seen.saw("1")
            seen.path.write_text("2")
            await seen.saw("2")
        await seen.until(lambda: seen.trouble is None)
        seen.path.write_text("3")
        await seen.saw("3")

    async def test_a_watcher_that_died_is_replaced(self, seen: Seen, often: None) -> None:
        seen.path.write_text("1")
        await seen.start()
        observer = seen.watch._observer
        assert observer is not None
        for emitter in observer.emitters:
            emitter.stop()
        await seen.until(lambda: seen.watch._observer not in (None, observer))
        seen.path.write_text("2")
        await seen.saw("2")


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


class Seen:
    """A watch, and what was in the file whenever it called."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir()
        self.path = path
        self.contents: list[str | None] = []
        self.trouble: str | None = "nothing yet"
        self.watch = Watch(path, self._changed, self._told)
        self._task: asyncio.Task[None] | None = None

    def _changed(self) -> None:
        self.contents.append(self.path.read_text() if self.path.exists() else None)

    def _told(self, trouble: str | None) -> None:
        self.trouble = trouble

    def begin(self) -> None:
        self._task = asyncio.create_task(self.watch.run())

    async def start(self) -> None:
        """Until it watches and has told what was there."""
        self.begin()
        await self.until(lambda: self.trouble is None and self.contents)
        await self.quiet()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def quiet(self) -> None:
        """Nothing for a second."""
        count = -1
        while count != len(self.contents):
            count = len(self.contents)
            await asyncio.sleep(1.0)
        self.contents.clear()

    async def saw(self, content: str | None) -> None:
        await self.until(lambda: self.contents[-1:] == [content])

    async def one(self, content: str | None) -> None:
        """What was done is told once; a look of its own may add one."""
        await self.saw(content)
        await asyncio.sleep(0.3)
        assert len(self.contents) <= 2
        assert set(self.contents) == {content}
        self.contents.clear()

    async def none(self, seconds: float = 0.8) -> None:
        self.contents.clear()
        await asyncio.sleep(seconds)
        assert self.contents == []

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class TestReloader:
    @pytest.fixture
    def rig(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
        monkeypatch.setattr(reloading, "notify_reloading", lambda: rig.told.append("RELOADING"))
        monkeypatch.setattr(reloading, "notify_ready", lambda: rig.told.append("READY"))
        rig = Rig(tmp_path)
        return rig

    async def test_what_changed_what_waits_and_who_asked(self, rig: Rig) -> None:
        rig.write(device="b", serving={"max_queue": 7}, executor={"threads": 3})
        answer = await rig.reloader.reload(ME)
        assert answer["changed"] == [
            {"field": "serving.max_queue", "from": 512, "to": 7, "effect": "now"},
            {"field": "executor.threads", "from": 0, "to": 3, "effect": "new executors"},
        ]
        assert answer["pending"] == [{"field": "device", "from": "a", "to": "b", "effect": "restart"}]
        (applied,) = rig.applied
        assert (applied.device, applied.serving.max_queue) == ("a", 7)
        ((kind, event),) = rig.events
        assert (kind, event["actor"]) == ("config_changed", "local: uid 1000 (me)")
        assert [one["field"] for one in event["changed"]] == ["device", "serving.max_queue", "executor.threads"]
        assert event["pending"] == ["device"]
        (issue,) = rig.issues.list()
        assert (issue["id"], issue["severity"]) == ("restart-needed", "warning")
        assert "device: 'a' → 'b'" in issue["message"]
        assert rig.good is None, "not all of it is in force"
        assert rig.told == ["RELOADING", "READY"]

        rig.write(serving={"max_queue": 7}, executor={"threads": 3})
        answer = await rig.reloader.reload(ME)
        assert (answer["changed"], answer["pending"]) == ([], [])
        assert rig.issues.list() == []
        assert rig.good == rig.path.read_text()
        assert rig.events[-1][1]["changed"] == [{"field": "device", "from": "b", "to": "a", "effect": "restart"}]

    async def test_a_wrong_one_changes_nothing_and_is_told_once(self, rig: Rig) -> None:
        before = rig.reloader.describe()
        rig.write(colour="red", serving={"max_queue": -1, "max_wait": 3})
        for _ in range(3):
            with pytest.raises(InvalidConfig) as caught:
                await rig.reloader.reload(ME)
            assert len(caught.value.faults) == 2
        assert rig.applied == []
        assert [kind for kind, _ in rig.events] == ["config_refused"]
        assert [one["field"] for one in rig.events[0][1]["faults"]] == [
            f"{rig.path}: serving.max_queue",
            f"{rig.path}: colour",
        ]
        (issue,) = rig.issues.list()
        assert (issue["id"], issue["severity"]) == ("config", "error")
        for word in ("serving.max_queue: Input should be", "colour: there is no such field", "nothing has changed"):
            assert word in issue["message"]
        assert {**rig.reloader.describe(), "faults": []} == before
        assert len(rig.reloader.describe()["faults"]) == 2
        assert rig.told == ["RELOADING", "READY"] * 3
        rig.write()
        assert (await rig.reloader.reload(ME))["changed"] == []
        assert rig.issues.list() == []
        assert rig.reloader.describe()["faults"] == []

    async def test_a_part_that_fails_leaves_the_old_one(self, rig: Rig) -> None:
        rig.fail = lambda config: config.serving.max_queue == 13
        rig.write(serving={"max_queue": 13})
        with pytest.raises(RuntimeError, match="a bug"):
            await rig.reloader.reload(ME)
        assert [one.serving.max_queue for one in rig.applied] == [13, 512]
        assert rig.reloader.running.serving.max_queue == 512
        assert rig.told == ["RELOADING", "READY"]
        rig.write(serving={"max_queue": 14})
        await rig.reloader.reload(ME)
        assert rig.reloader.running.serving.max_queue == 14

    async def test_a_good_one_that_cannot_be_kept_is_an_issue_while_it_lasts(self, rig: Rig) -> None:
        blocked = rig.path.parent / f"{GOOD}.new"
        blocked.mkdir()
        rig.write(serving={"max_queue": 7})
        await rig.reloader.reload(ME)
        assert [issue["id"] for issue in rig.issues.list()] == ["config-good"]
        assert rig.reloader.running.serving.max_queue == 7
        blocked.rmdir()
        await rig.reloader.reload(ME)
        assert rig.issues.list() == []
        assert rig.good == rig.path.read_text()

    async def test_the_embedded_flag_is_kept(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path, embedded=True)
        rig.write(embedded=None, serving={"max_queue": 7})
        await rig.reloader.reload(ME)
        assert rig.reloader.running.embedded
        rig.write(embedded=False, serving={"max_queue": 8})
        await rig.reloader.reload(ME)
        assert (rig.reloader.running.embedded, rig.reloader.running.serving.max_queue) == (True, 8)
        assert rig.reloader.describe()["pending"] == []

    async def test_embedded_cannot_be_taken_away_from_a_simulation(self, rig: Rig) -> None:
        rig.write(embedded=False)
        with pytest.raises(InvalidConfig, match=r"slot\.driver is simulated"):
            await rig.reloader.reload(ME)
        assert rig.reloader.running.embedded

    async def test_defaults_without_a_file_until_there_is_one(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path, defaults=True)
        assert (await rig.reloader.reload(ME))["source"] == "defaults"
        assert rig.issues.list() == []
        rig.write(embedded=None, serving={"max_queue": 7})
        assert (await rig.reloader.reload(ME))["source"] == "file"
        rig.path.unlink()
        with pytest.raises(InvalidConfig, match="No such file"):
            await rig.reloader.reload(ME)

    async def test_the_life_of_a_file(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch, "LOOK", 0.3)
        monkeypatch.setattr(watch, "QUIET", 0.05)
        monkeypatch.setattr(reloading, "MISSING", 0.3)
        task = asyncio.create_task(rig.reloader.run())
        await rig.until(lambda: rig.good == rig.path.read_text())
        assert rig.events == []
        rig.write(serving={"max_queue": 7})
        await rig.until(lambda: rig.reloader.running.serving.max_queue == 7)
        assert rig.events[-1][1]["actor"] == "local: the file has changed"
        await rig.until(lambda: rig.good == rig.path.read_text())
        rig.path.touch()
        await asyncio.sleep(0.5)
        assert rig.told.count("READY") == 1, "the same again is no reload"

        text = rig.path.read_text()
        rig.path.unlink()
        await asyncio.sleep(0.1)
        rig.path.write_text(text)
        await asyncio.sleep(0.8)
        assert rig.issues.list() == [], "it was away for a moment"
        rig.path.unlink()
        await rig.until(lambda: "config" in rig.issues)
        assert "No such file" in rig.issues.list()[0]["message"]
        rig.path.write_text(text)
        await rig.until(lambda: "config" not in rig.issues)

        rig.hung_up.set()
        await rig.until(lambda: not rig.hung_up.is_set())
        rig.write(serving={"max_queue": 8})
        rig.hung_up.set()
        await rig.until(lambda: rig.reloader.running.serving.max_queue == 8)
        rig.fail = lambda config: config.serving.max_queue == 13
        rig.write(serving={"max_queue": 13})
        await rig.until(lambda: "fault:config-reload" in rig.issues)
        rig.write(serving={"max_queue": 9})
        await rig.until(lambda: rig.reloader.running.serving.max_queue == 9)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def test_a_change_over_a_restart_is_told_as_well(self, rig: Rig) -> None:
        write_good(rig.path.parent, rig.path, rig.path.read_text())
        rig.write(device="b")
        again = Rig(rig.path.parent, fresh=False)
        task = asyncio.create_task(again.reloader.run())
        await again.until(lambda: again.good == rig.path.read_text())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        ((kind, event),) = again.events
        assert (kind, event["actor"]) == ("config_changed", "boot: start")
        assert event["changed"] == [{"field": "device", "from": "a", "to": "b", "effect": "restart"}]

    async def test_what_waits_for_a_restart_is_not_good_at_a_start_either(self, rig: Rig) -> None:
        rig.write(device="b")
        await rig.reloader.reload(ME)  # before all was up
        task = asyncio.create_task(rig.reloader.run())
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert rig.good is None

    async def test_fifty_at_once_come_one_after_the_other(self, rig: Rig) -> None:
        async def one(number: int) -> None:
            rig.write(serving={"max_queue": number})
            await rig.reloader.reload(ME)

        await asyncio.gather(*(one(number) for number in range(1, 51)))
        assert rig.reloader.running.serving.max_queue == 50
        assert rig.told == ["RELOADING", "READY"] * 50
        assert rig.good == rig.path.read_text()


def test_each_field_is_listed_with_when_it_takes_effect(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("embedded: true\nslot: {load_timeout: 7s}\n")
    said = CliRunner().invoke(app, ["check", "--fields", "--config", str(path)], env={"COLUMNS": "160"})
    rows = {line.split()[0]: line.strip().split(maxsplit=2)[1:] for line in said.stdout.splitlines()}
    assert said.exit_code == 0
    assert set(rows) == {"field", *EFFECTS}
    assert rows["slot.load_timeout"] == ["7.0", "on a reload"]
    assert rows["executor.threads"] == ["0", "on a reload, for executors that start after it"]
    assert rows["serving.grpc.max_streams"] == ["256", "at the next start"]


class Rig:
    """A reloader over a file, and what it did."""

    def __init__(self, folder: Path, *, embedded: bool = False, defaults: bool = False, fresh: bool = True) -> None:
        self.path = folder / "config.yaml"
        self.applied: list[Config] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.told: list[str] = []
        self.fail: Callable[[Config], bool] = lambda _: False
        self.issues = Issues()
        self.hung_up = asyncio.Event()
        if defaults:
            config = parse_config(json.dumps({"state_dir": str(folder)}), embedded=True)
            loaded = Loaded(config, self.path, "", "defaults", True)
        else:
            if fresh:
                self.write(**({"embedded": None} if embedded else {}))
            loaded = load(self.path, embedded=embedded)
        self.reloader = Reloader(
            loaded, self._apply, self.issues, lambda kind, event: self.events.append((kind, event)), self.hung_up
        )

    def write(self, **settings: Any) -> None:
        document = {"device": "a", "state_dir": str(self.path.parent), "embedded": True, **settings}
        text = json.dumps({key: value for key, value in document.items() if value is not None})
        beside = self.path.with_name("beside")
        beside.write_text(text)
        beside.rename(self.path)

    @property
    def good(self) -> str | None:
        found = read_good(self.path.parent, self.path)
        return found.text if found else None

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    def _apply(self, config: Config) -> None:
        self.applied.append(config)
        if self.fail(config):
            raise RuntimeError("a bug")
