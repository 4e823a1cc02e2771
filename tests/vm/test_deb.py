"""The Debian package on a machine with real systemd: installed, upgraded, gone back, taken back, purged.

Other versions are the same package with a few files changed, since only that differs which is tested.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from support.host import predict
from support.tiny import write_model
from vm.machine import Machine

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

SOURCES = Path(__file__).parents[2]
DEBS, LAYOUT, SOCKET = "/srv/debs", "/srv/layout", "/run/slotd/grpc.sock"
SCALE = 3.0
SITE = "opt/slotd/package/lib/python3.11/site-packages/agent"
CONFIG = {
    "device": "deb-host",
    "embedded": True,
    "slot": {"driver": "simulated", "options": {"program_time": 0.1}},
    "swap": {"probation": {"duration": "0.2s", "min_requests": 3}},
    "serving": {"lame_duck": "0.1s", "grace": "1s"},
    "executor": {"threads": 1},
    "images": {"layouts": [LAYOUT]},
    "link": {"enabled": False},
}
SCHEMA = '\nMIGRATIONS = (*MIGRATIONS, ("CREATE TABLE added_by_the_next_version (x INTEGER)",))\n'
CRASH = """
import asyncio as _asyncio, os as _os
_start = Daemon._start
async def _crash_soon(self, stack):
    tasks = await _start(self, stack)
    _asyncio.get_running_loop().call_later(1.0, _os._exit, 1)
    return tasks
Daemon._start = _crash_soon
"""


# --- packages --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def debs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """now; next, with a new schema; broken, which does not import; crashing, READY for a second; refusing: it ends as
    if its settings were wrong, and systemd gives it up at once."""
    folder = tmp_path_factory.mktemp("debs")
    built = (
        os.environ.get("SLOTD_DEB")
        or subprocess.run(
            ["make", "-s", "-C", SOURCES, "deb"], check=True, capture_output=True, text=True
        ).stdout.split()[-1]
    )
    shutil.copy(built, folder / "now.deb")
    root = folder / "root"
    subprocess.run(["dpkg-deb", "-R", built, root], check=True)
    repack(root, folder / "next.deb", "90.1", {"journal/schema.py": SCHEMA})
    repack(root, folder / "broken.deb", "90.2", {"__init__.py": '\nraise ImportError("broken on purpose")\n'})
    repack(root, folder / "crashing.deb", "90.3", {"daemon.py": CRASH})
    repack(root, folder / "refusing.deb", "90.4", {"__init__.py": "\nraise SystemExit(78)\n"})
    shutil.rmtree(root)
    yield folder
    shutil.rmtree(folder)  # a gigabyte


def repack(root: Path, package: Path, version: str, added: dict[str, str]) -> None:
    """A package of another version, with something added to some of its modules; `root` stays as it is."""
    mine = root.with_name(version)
    shutil.copytree(root, mine, symlinks=True, copy_function=os.link)
    change(mine / "DEBIAN/control", lambda text: re.sub("(?m)^Version: .*", f"Version: {version}", text))
    change(mine / "opt/slotd/package/BUILD", lambda _: f"{version} repacked\n")
    agent = mine / SITE
    change(agent / "__init__.py", lambda text: re.sub('__version__ = ".*"', f'__version__ = "{version}"', text))
    for name, text in added.items():
        change(agent / name, lambda old, text=text: old + text)
    changed = [agent / name for name in {"__init__.py", *added}]
    for path in changed:
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()
    subprocess.run(
        ["/usr/bin/python3", "-I", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", *changed],
        check=True,
    )
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", mine, package], check=True, stdout=-3)
    shutil.rmtree(mine)


def change(path: Path, how: Any) -> None:
    """Anew, since the file has other names."""
    new = path.with_name(path.name + ".new")
    new.write_text(how(path.read_text()))
    new.chmod(path.stat().st_mode)
    new.replace(path)


# --- the machine -----------------------------------------------------------------------------------------------------


class Installed:
    """A machine with the package, and what a person would ask it."""

    def __init__(self, machine: Machine, before: set[str]) -> None:
        self.machine = machine
        self.before = before
        self.digest = ""
        self._channel: grpc.Channel | None = None

    def install(self, name: str) -> str:
        done = self.machine.run(f"DEBIAN_FRONTEND=noninteractive dpkg -i {DEBS}/{name}.deb 2>&1", timeout=120)
        return done.stdout

    def status(self) -> dict[str, Any]:
        return json.loads(self.machine.run(["slotd", "status", "--json"]).stdout)

    def current(self) -> str:
        return self.machine.run(["readlink", "/opt/slotd/current"]).stdout.strip()

    def versions(self) -> str:
        return self.machine.run(["slotd-versions"]).stdout

    def until_running(self, version: str, *, timeout: float = 60) -> dict[str, Any]:
        """Until this version serves, from the slot; its status."""

        def running() -> dict[str, Any] | None:
            done = self.machine.run(["slotd", "status", "--json"], check=False)
            if done.returncode:
                return None
            status = json.loads(done.stdout)
            return status if (status["version"], status["host"]) == (version, "slot") else None

        return self.machine.until(running, timeout=timeout, unit="slotd")

    def serves(self) -> str:
        """Whether the model answers rightly; who answered."""
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        with grpc.insecure_channel(f"unix:{self.machine.path(SOCKET)}") as channel:
            y, told = predict(channel, x)
        np.testing.assert_allclose(y, SCALE * x + 1, rtol=1e-2, atol=1e-2)
        assert told["slotd-model-digest"] == self.digest
        return told["slotd-served-by"]


def files(machine: Machine) -> set[str]:
    """Everything of ours on the machine."""
    found = machine.run("find /etc /opt /run /usr /var -name '*slotd*' -o -path '*/slotd/*'").stdout.split("\n")
    return {path for path in found if not path.startswith(("/var/tmp/", "/run/systemd/", "/run/log/"))}


def journal(machine: Machine, question: str) -> str:
    """The first column of what the journal answers."""
    code = "import sqlite3; print(*(row[0] for row in sqlite3.connect('/tmp/copy/journal.db').execute(input())))"
    copy = "rm -rf /tmp/copy; mkdir /tmp/copy; cp /var/lib/slotd/journal.db* /tmp/copy"  # slotd has locked its own
    machine.run(copy)
    return machine.run(["python3", "-c", code], stdin=question.encode()).stdout


def active(machine: Machine) -> bool:
    return machine.show("slotd", "ActiveState") == "active"


@pytest.fixture(scope="module")
def host(debs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """Installed and active, with a committed model."""
    from agent.forge.pack import pack

    folder = tmp_path_factory.mktemp("images")
    write_model(folder / "model", name="three", scale=SCALE)
    digest = pack(folder / "model", folder / "layout", "three:1")
    with Machine(binds={debs: DEBS, folder / "layout": LAYOUT}) as machine:
        machine.run("rm -f /usr/sbin/policy-rc.d")  # a container's: no service is to be started
        host = Installed(machine, files(machine))
        host.install("now")
        assert active(machine)  # on return of dpkg, with the settings as they came
        assert host.status()["host"] == "empty"
        machine.write("/etc/slotd/config.yaml", yaml.safe_dump(CONFIG))
        machine.systemctl("restart", "slotd")
        deployed = machine.run(["slotd", "deploy", f"oci:{LAYOUT}:three:1", "--json"], timeout=120)
        assert json.loads(deployed.stdout)["outcome"] == "committed", deployed.stdout
        host.digest = digest
        yield host


@pytest.fixture
def first(host: Installed) -> str:
    """The version that was installed first runs and has passed its trial; its name."""
    version = now(host)
    if host.current() != version:
        host.install("now")
    host.until_running(version)
    host.machine.run(["slotd-versions", "--healthy", "0", "starting"])  # as if its ten minutes were over
    assert "on trial" not in host.versions()
    return version


def now(host: Installed) -> str:
    return host.machine.run(f"dpkg-deb -f {DEBS}/now.deb Version").stdout.strip()


# --- tests, in the order of a package's life -------------------------------------------------------------------------


def test_installed_it_runs_as_its_own_user_from_its_own_tree(host: Installed, first: str) -> None:
    machine = host.machine
    assert machine.show("slotd", "User") == "slotd" and machine.show("slotd", "UnitFileState") == "enabled"
    pid = machine.show("slotd", "MainPID")
    assert machine.run(["stat", "-c", "%U", f"/proc/{pid}"]).stdout.strip() in ("slotd", "root")  # not dumpable: root
    arguments = machine.read(f"/proc/{pid}/cmdline").split(b"\0")
    assert arguments[0].decode() == f"/opt/slotd/{first}/bin/python"
    assert host.serves() == "slot"
    assert host.status()["embedded"] is True
    assert machine.run("dpkg --verify slotd").stdout.split("\n")[0].endswith("c /etc/slotd/config.yaml")
    # hard links: the current version takes no space of its own
    package, tree = (int(machine.run(f"du -sm /opt/slotd/{name} | cut -f1").stdout) for name in ("package", first))
    assert int(machine.run("du -sm /opt/slotd | cut -f1").stdout) <= max(package, tree) + 3


def test_up_to_a_new_schema_and_back(host: Installed, first: str) -> None:
    machine = host.machine
    host.install("next")
    status = host.until_running("90.1")
    assert status["committed"]["digest"] == host.digest and host.serves() == "slot"
    assert "on trial  90.1, 0 failed starts" in host.versions()
    schema = int(journal(machine, "PRAGMA user_version"))
    trees = machine.run("ls /opt/slotd").stdout.split()
    assert {first, "90.1", "current", "previous", "package"} <= set(trees)
    trial = json.loads(machine.read("/opt/slotd/trial.json"))
    assert trial["previous"] == first and trial["run"]["ready"] is not None and trial["failures"] == []

    host.install("now")
    status = host.until_running(first)
    assert status["committed"]["digest"] == host.digest and host.serves() == "slot"
    assert int(journal(machine, "PRAGMA user_version")) == schema - 1
    assert not any(issue["id"] == "upgrade-taken-back" for issue in status["issues"])

    machine.run(["slotd-versions", "back"])  # by hand, without a package
    host.until_running("90.1")
    assert host.serves() == "slot"


@pytest.mark.parametrize(
    ("package", "version", "last"),
    [
        ("broken", "90.2", "exit-code 1 before READY"),
        ("crashing", "90.3", "exit-code 1 after READY"),
        ("refusing", "90.4", "exit-code 78 before READY"),
    ],
)
def test_a_version_that_does_not_stay_up_is_taken_back(
    host: Installed, first: str, package: str, version: str, last: str
) -> None:
    machine = host.machine
    host.install(package)  # dpkg itself has done what it should
    status = host.until_running(first)
    assert host.current() == first and host.serves() == "slot"
    assert status["committed"]["digest"] == host.digest
    (issue,) = (issue for issue in status["issues"] if issue["id"] == "upgrade-taken-back")
    assert issue["message"] == f"slotd {version} was taken back after 3 failed starts, the last: {last}"
    assert f"slotd {version} was taken back" in machine.until(lambda: machine.show("slotd", "StatusText"))
    told = journal(machine, "SELECT document FROM outbox")
    assert told.count("upgrade_taken_back") >= 1 and version in told
    assert f"slotd {version} was taken back" in machine.messages("slotd", last=500)

    if package != "broken":
        return
    for _ in range(4):  # it stays so, for as many failures as come now
        before = machine.show("slotd", "NRestarts")
        machine.systemctl("kill", "--signal=KILL", "--kill-whom=main", "slotd")
        machine.until(lambda before=before: machine.show("slotd", "NRestarts") != before and active(machine))
    assert host.until_running(first) and host.current() == first
    host.install("now")  # whoever knows better says so
    assert "taken back" not in host.versions()
    assert not any(issue["id"] == "upgrade-taken-back" for issue in host.until_running(first)["issues"])


def test_retired(host: Installed, first: str) -> None:
    done = host.machine.run(["slotd", "retire", "--yes", "--json"])
    assert json.loads(done.stdout)["retired"] is True
    assert host.machine.show("slotd", "ActiveState") == "inactive"
    assert host.machine.show("slotd", "UnitFileState") == "disabled"
    assert host.machine.run("ls -A /var/lib/slotd").stdout == ""
    host.machine.systemctl("enable", "--now", "slotd")
    assert host.status()["host"] == "empty"


def test_removed_and_purged_it_leaves_nothing(host: Installed) -> None:
    machine = host.machine
    machine.run("dpkg --remove slotd 2>&1", timeout=120)
    assert machine.show("slotd", "ActiveState") == "inactive"
    assert machine.run("ls /opt/slotd", check=False).returncode != 0
    assert machine.run("ls /etc/slotd/config.yaml /var/lib/slotd").returncode == 0
    machine.run("dpkg --purge slotd 2>&1", timeout=120)
    assert files(machine) - host.before == set()
    assert "slotd" not in machine.run("getent passwd; getent group").stdout
    assert "slotd" not in machine.systemctl("list-units", "--all", "--plain", check=False)
