"""Code planted in each kind of child, as root and as an ordinary user: what it tries, and that it could without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import host as host_module
from support.host import Host
from support.unprivileged import UID, become

SUPPORT = Path(__file__).parents[1] / "support"
REPOSITORY = Path(__file__).parents[2]
ROLES = ("executor", "slot", "decoder", "programmer", "puller", "registry", "parser")
REFUSED = {
    "inet": "EPERM",
    "listen": "EPERM",
    "admin": "EPERM",
    "key": "EACCES",
    "journal": "EACCES",
    "memory": "EACCES",
    "read_memory": "EPERM",
    "trace": "EPERM",
    "kill": "EPERM",
    "kill_thread": "EPERM",
    "kill_by_descriptor": "EPERM",
    "kill_by_owner": "EPERM",
    "limit": "EPERM",
    "slow_down": "EPERM",
    "execute": "EPERM",
    "spawn": "EPERM",
    "outside": "EACCES",
    "list_outside": "EACCES",
    "write_outside": "EACCES",
    "chmod_outside": "EPERM",
    "own": "EACCES",
    "alter_own": "EACCES",
}
"""What a child with nothing of its own gets."""
ALLOWED = {
    "executor": {"own"},
    "slot": {"own"},
    "puller": {"own", "alter_own"},
    "registry": {"own", "alter_own", "inet"},
}
"""What some may: the model's files read, the store written, the registry reached."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where another user may go, too, and short enough for a Unix socket."""
    path = Path(tempfile.mkdtemp(prefix="slotd-"))
    yield path
    shutil.rmtree(path)


def plant(folder: Path, mode: str, uid: int, *roles: str) -> dict[str, dict[str, str]]:
    os.chown(folder, uid, uid)
    done = subprocess.run(
        [sys.executable, "-I", str(SUPPORT / "planting.py"), mode, str(folder), str(REPOSITORY), *roles],
        preexec_fn=become(uid) if uid else None,
        cwd="/",
        stdout=subprocess.PIPE,
        timeout=200,
        check=True,
    )
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("uid", [0, UID])
def test_what_planted_code_tries_is_refused(folder: Path, uid: int) -> None:
    for role, found in plant(folder, "confined", uid, *ROLES).items():
        wanted = {name: "done" if name in ALLOWED.get(role, ()) else code for name, code in REFUSED.items()}
        assert found == wanted, role
    assert (folder / "state" / "journal.db").read_bytes() == b"0123456789"


@pytest.mark.parametrize("uid", [0, UID])
def test_without_the_sandbox_it_all_succeeds(folder: Path, uid: int) -> None:
    for role, found in plant(folder, "free", uid, *ROLES).items():
        assert found == dict.fromkeys(REFUSED, "done"), role


def test_the_agents_memory_is_closed_by_itself(folder: Path) -> None:
    """To a child of the same user that has no sandbox."""
    (found,) = plant(folder, "withheld", UID, "executor").values()
    assert (found["memory"], found["read_memory"], found["trace"]) == ("EACCES", "EPERM", "EPERM")
    assert found["key"] == found["kill"] == "done"


@pytest.mark.parametrize("lacks", [["landlock"], ["seccomp"], ["landlock", "seccomp"]])
def test_a_kernel_that_lacks_a_piece_serves_and_says_so(
    tmp_path: Path, lacks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "RUNNER", SUPPORT / "lacking_host.py")
    host = Host(tmp_path)
    host.pack("tiny:1")
    try:
        host.start(LACKS=",".join(lacks))
        assert host.deploy("tiny:1")["outcome"] == "committed"
        sandbox = host.until_host("slot")["sandbox"]
        assert sandbox["lacks"] == lacks
        assert {one["role"] for one in sandbox["children"]} == {"slot", "bridge"}
        for one in (sandbox, *sandbox["children"]):
            assert (one["landlock"] == 0, one["seccomp"]) == ("landlock" in lacks, "seccomp" not in lacks)
        (issue,) = host.until(lambda: [one for one in host.status()["issues"] if one["id"] == "sandbox"])
        assert issue["severity"] == "warning" and issue["hint"]
        found = host.call("doctor")
        assert not found["ok"]
        amiss = [check for check in found["checks"] if not check["ok"]]
        assert [check["id"] for check in amiss] == lacks and all(check["hint"] for check in amiss)
    finally:
        host.kill()


def test_a_whole_host_lacks_nothing_and_its_children_go_first(tmp_path: Path) -> None:
    """Also on the command line; the driver's needs are shown."""
    host = Host(tmp_path)
    host.pack("tiny:1")
    slotd = [str(Path(sys.executable).with_name("slotd")), "doctor", "--json", "--socket"]
    try:
        host.start()
        assert host.deploy("tiny:1")["outcome"] == "committed"
        status = host.until_host("slot")
        assert status["sandbox"]["lacks"] == [] and "sandbox" not in {one["id"] for one in status["issues"]}
        assert status["sandbox"]["granted"] == {"write": [str(host.device)]}
        for child in status["sandbox"]["children"]:
            fields = Path(f"/proc/{child['pid']}/status").read_text()
            assert "\nSeccomp:\t2\n" in fields and "\nNoNewPrivs:\t1\n" in fields
            assert int(Path(f"/proc/{child['pid']}/oom_score_adj").read_text()) >= 500
        done = subprocess.run([*slotd, str(host.run_dir / "admin.sock")], capture_output=True, check=True, timeout=60)
        found = json.loads(done.stdout)
        assert found["ok"] and {check["id"] for check in found["checks"]} >= {"landlock", "seccomp", "memory"}
        assert str(host.device) in next(one["message"] for one in found["checks"] if one["id"] == "driver-write")
    finally:
        host.kill()
    alone = subprocess.run([*slotd, str(tmp_path / "nobody")], capture_output=True, timeout=60)
    checks = {check["id"]: check["ok"] for check in json.loads(alone.stdout)["checks"]}
    assert alone.returncode == 1 and checks == {"daemon": False, "landlock": True, "seccomp": True}
