"""slotd as a service of real systemd, in its real unit: start, watchdog, reload, stop under load, as its own user."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.host import Load
from vm.installed import TREE, Installed

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

UNITS = ("slotd.service", "slotd-slot-helper.service")
SCALE = 3.0
CAP_SYS_RESOURCE = 24
_effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
MAY_RAISE = bool(int(_effective.split()[1], 16) >> CAP_SYS_RESOURCE & 1)
QUICK = "[Service]\nWatchdogSec=2s\nTimeoutAbortSec=1s\nRestartSec=100ms\n"
BLOCKABLE = f"ExecStart=\nExecStart={TREE}/bin/python -I {TREE}/src/tests/vm/blocking_slotd.py run\n"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """One machine for all tests here; slotd runs, with a model committed and in the slot."""
    with Installed() as machine:
        machine.pack(tmp_path_factory.mktemp("model"), "tiny:1", scale=SCALE)
        machine.systemctl("enable", "--now", "slotd-slot-helper.socket", "slotd")
        machine.slotd("deploy", "tiny:1")
        yield machine


@pytest.fixture
def running(host: Installed) -> Iterator[Installed]:
    """The unit as it is shipped, active, the model in the slot."""
    yield host
    host.run("rm -rf /etc/systemd/system/slotd.service.d /run/slotd/slow-start")
    host.systemctl("daemon-reload")
    host.configure()
    host.systemctl("restart", "slotd")


def in_slot(host: Installed) -> None:
    host.until(lambda: host.status()["host"] == "slot", unit="slotd")
    assert host.scale() == (SCALE, "slot")


@pytest.mark.parametrize("unit", UNITS)
def test_exposure(unit: str, host: Installed) -> None:
    said = host.run(["systemd-analyze", "security", "--offline=true", f"/usr/lib/systemd/system/{unit}"]).stdout
    (level,) = [line.split()[-3] for line in said.splitlines() if "Overall exposure level" in line]
    print(f"{unit}: {level}")
    assert float(level) <= 1.8, said


def test_units_and_rules_have_no_mistakes(host: Installed) -> None:
    paths = " ".join(f"/usr/lib/systemd/system/{unit}" for unit in (*UNITS, "slotd-slot-helper.socket"))
    done = host.run(f"systemd-analyze verify --man=no {paths}")
    assert (done.stdout, done.stderr) == ("", "")
    read = host.run("udevadm test --action=add /sys/devices/virtual/mem/null 2>&1", check=False).stdout
    assert "70-slotd.rules" in read
    assert "70-slotd.rules:" not in read, read
    # what systemd itself says of settings that it does not know or that have no effect
    warned = [e["MESSAGE"] for e in host.journal() if e.get("_PID") == "1" and int(e["PRIORITY"]) <= 4]
    assert [line for line in warned if "slotd" in line and "slotd.service.d" not in line] == []


def test_active_with_the_slot_absent_and_broker_and_registry_away(running: Installed) -> None:
    running.systemctl("stop", "slotd")
    running.configure(
        link={"enabled": True, "host": "127.0.0.1", "port": 1},
        images={"layouts": [], "insecure_registries": ["127.0.0.1:2"]},
    )
    running.run("touch /var/lib/slotd/simulated-slot/absent")
    running.systemctl("start", "slotd")
    assert running.show("slotd", "ActiveState") == "active"
    assert running.scale() == (SCALE, "bridge")
    status = running.until(lambda: (lambda s: s if s["host"] == "bridge" else None)(running.status()))
    assert (status["slot"]["present"], status["link"]["connected"]) == (False, False)
    running.run("rm /var/lib/slotd/simulated-slot/absent")
    in_slot(running)


def test_it_runs_as_its_own_user_and_shows_little(host: Installed) -> None:
    in_slot(host)
    pids = host.run(["pgrep", "-u", "slotd"]).stdout.split()
    group = host.run("cat /sys/fs/cgroup/systemd/system.slice/slotd.service/cgroup.procs").stdout.split()
    assert sorted(pids) == sorted(group)
    assert len(pids) >= 3  # the agent, the bridge, the executor on the slot
    main = str(host.main_pid())
    for pid in pids:
        status = dict(
            line.split(":\t", 1) for line in host.read(f"/proc/{pid}/status").decode().splitlines() if ":\t" in line
        )
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert {status[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        score = int(host.read(f"/proc/{pid}/oom_score_adj"))
        policy = host.run(["chrt", "-p", pid]).stdout.splitlines()[0].split()[-1]
        if pid != main:
            assert score == 500
        # Where this host withholds CAP_SYS_RESOURCE from its root, systemd can neither lower a score nor raise a limit.
        elif MAY_RAISE:
            assert score == -500
        if MAY_RAISE:  # nobody is left at SCHED_IDLE: the agent may lift its children
            assert policy == "SCHED_OTHER"
        assert host.run(["ps", "-o", "ni=", "-p", pid]).stdout.split() == ["-10" if pid == main else "0"]
    assert host.show("slotd", "OOMScoreAdjust") == "-500"
    assert host.show("slotd", "LimitNICE") == "20"
    modes = host.run("stat -c '%U %G %a %n' /var/lib/slotd /run/slotd /run/slotd/*.sock").stdout.splitlines()
    assert modes == [
        "slotd slotd 700 /var/lib/slotd",
        "slotd slotd 755 /run/slotd",
        "slotd slotd-admin 660 /run/slotd/admin.sock",
        "slotd slotd-clients 660 /run/slotd/grpc.sock",
    ]


def test_groups_decide_who_may_do_what(host: Installed) -> None:
    host.run("useradd -M -G slotd-admin one-admin; useradd -M -G slotd-clients one-client; useradd -M stranger")
    assert host.slotd("status", user="one-admin").returncode == 0
    for name in ("one-client", "stranger"):
        refused = host.slotd("status", user=name, check=False)
        assert (refused.returncode, "slotd-admin" in refused.stderr) == (77, True)
    may = "import socket; socket.socket(socket.AF_UNIX).connect('/run/slotd/grpc.sock')"
    assert host.run(["python3", "-c", may], user="one-client").returncode == 0
    assert host.run(["python3", "-c", may], user="stranger", check=False).returncode == 1


def test_the_status_line_says_how_it_stands(running: Installed) -> None:
    in_slot(running)
    running.until(lambda: running.show("slotd", "StatusText") == "tiny 1 answers from the slot", unit="slotd")
    shown = running.systemctl("status", "slotd")
    assert 'Status: "tiny 1 answers from the slot"' in shown
    running.systemctl("stop", "slotd")
    running.configure(slot={"options": {"program_time": 2}})
    running.systemctl("start", "slotd")
    running.until(lambda: running.show("slotd", "StatusText") == "tiny 1 answers from the CPU", unit="slotd")
    in_slot(running)
    running.slotd("deploy", "tiny:1", "--force", "--no-wait")
    text = "tiny 1 answers from the CPU; deploying tiny 1: program"
    running.until(lambda: running.show("slotd", "StatusText") == text, unit="slotd")
    running.until(lambda: running.status()["deployment"] is None, unit="slotd")


def test_lines_in_the_journal_have_priorities_and_ids(host: Installed) -> None:
    host.slotd("deploy", "tiny:1", "--force")
    host.slotd("deploy", "nothing:1", check=False)
    entries = [e for e in host.journal("slotd") if str(e["MESSAGE"]).startswith("{")]
    lines = [(int(e["PRIORITY"]), json.loads(e["MESSAGE"])) for e in entries]
    numbers = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
    assert lines and all(priority == numbers[line["level"]] for priority, line in lines)
    assert {"info", "warning"} <= {line["level"] for _, line in lines}
    phases = [line for _, line in lines if line["event"] == "deployment_phase"]
    last = phases[-1]["deployment"]
    assert any(line.get("deployment") == last and line["event"] != "deployment_phase" for _, line in lines)


@pytest.mark.parametrize("how", ["stopped", "blocked"])
def test_a_missed_watchdog_restarts_it_and_the_model_is_served(running: Installed, how: str) -> None:
    running.drop_in("slotd.service", QUICK + BLOCKABLE)
    running.systemctl("restart", "slotd")
    in_slot(running)
    before, restarts = running.main_pid(), int(running.show("slotd", "NRestarts"))
    running.run(["kill", "-STOP" if how == "stopped" else "-USR1", str(before)])
    running.until(lambda: int(running.show("slotd", "NRestarts")) > restarts, timeout=20, unit="slotd")
    running.until(lambda: running.show("slotd", "ActiveState") == "active", unit="slotd")
    assert running.main_pid() != before
    assert running.scale()[0] == SCALE
    in_slot(running)
    said = running.messages("slotd", last=200)
    assert "Watchdog timeout (limit 2s)!" in said
    if how == "blocked":
        assert "in stand_still" in said  # where it stood is in the journal
    left = running.run(["pgrep", "-u", "slotd", "-f", "worker"]).stdout.split()
    assert len(left) == 2  # the children of the one before have ended


def test_a_long_start_is_not_cut_off(running: Installed) -> None:
    running.run("touch /run/slotd/slow-start")
    running.drop_in("slotd.service", f"[Service]\nTimeoutStartSec=8s\n{BLOCKABLE}")
    restarts = running.show("slotd", "NRestarts")
    start = time.monotonic()
    running.systemctl("restart", "slotd")
    assert time.monotonic() - start > 10
    assert (running.show("slotd", "ActiveState"), running.show("slotd", "NRestarts")) == ("active", restarts)


def test_reload(running: Installed) -> None:
    before = running.main_pid()
    running.configure(serving={"max_queue": 7})
    running.systemctl("reload", "slotd")
    assert running.show("slotd", "ActiveState") == "active"
    assert running.status()["config"]["faults"] == []
    seen = running.status()["config"]["sha256"]

    running.configure(serving={"max_queue": "many"}, colour="blue")
    failed = running.run(["systemctl", "reload", "slotd"], check=False)
    assert failed.returncode != 0
    status = running.status()
    assert (running.show("slotd", "ActiveState"), running.main_pid()) == ("active", before)
    assert status["config"]["sha256"] == seen
    assert "config" in [issue["id"] for issue in status["issues"]]
    said = running.messages("slotd")
    assert "serving.max_queue" in said and "colour" in said
    assert running.scale()[0] == SCALE

    running.configure()
    running.run(["kill", "-HUP", str(before)])
    running.until(lambda: running.status()["config"]["faults"] == [], unit="slotd")
    assert running.main_pid() == before


def test_without_settings_it_ends_with_78_and_is_not_started_again(running: Installed) -> None:
    running.systemctl("stop", "slotd")
    running.run("mv /etc/slotd/config.yaml /root/; mv /var/lib/slotd/config.good.yaml /root/")
    assert running.run(["systemctl", "start", "slotd"], check=False).returncode != 0
    assert running.show("slotd", "ExecMainStatus") == "78"
    assert running.show("slotd", "ActiveState") == "failed"
    time.sleep(3)
    assert running.show("slotd", "ActiveState") == "failed"
    running.configure()
    running.systemctl("reset-failed", "slotd")


def test_it_stops_in_order_and_in_time_under_load(running: Installed) -> None:
    in_slot(running)
    load = Load(running.address, 10, 0.002)
    threads = [threading.Thread(target=load.run, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    running.until(lambda: len(load.answers) > 50, unit="slotd")
    start = time.monotonic()
    running.systemctl("stop", "slotd")
    took = time.monotonic() - start
    load.stop.set()
    for thread in threads:
        thread.join(30)
    assert took < 30
    assert running.show("slotd", "Result") == "success"
    assert running.show("slotd", "ExecMainStatus") == "0"
    assert [text for at, seconds, text in load.errors if at + seconds < start] == []
    # gRPC calls a request CANCELLED that comes in the very moment in which the server closes.
    allowed = {"StatusCode.UNAVAILABLE", "StatusCode.CANCELLED"}
    assert {text.split(":")[0] for _, _, text in load.errors} <= allowed
    assert all(scale == SCALE for _, _, scale, _, _ in load.answers)
    events = [json.loads(e["MESSAGE"])["event"] for e in running.journal("slotd") if e["MESSAGE"].startswith("{")]
    last = events[len(events) - events[::-1].index("stopping") - 1 :]
    assert last[-1] == "stopped"
    assert running.run("ls -d /run/slotd", check=False).returncode != 0
    assert running.run(["pgrep", "-u", "slotd"], check=False).stdout == ""


def test_it_comes_back_after_a_crash_and_starts_at_boot(running: Installed) -> None:
    running.drop_in("slotd.service", "[Service]\nRestartSec=100ms\n")
    before = running.main_pid()
    running.run(["kill", "-KILL", str(before)])
    running.until(lambda: running.main_pid() not in (0, before), unit="slotd")
    running.until(lambda: running.show("slotd", "ActiveState") == "active", unit="slotd")
    assert running.scale()[0] == SCALE
    in_slot(running)
    wanted = running.systemctl("list-dependencies", "--plain", "multi-user.target")
    assert {"slotd.service", "slotd-slot-helper.socket"} <= {line.strip(" ●○×") for line in wanted.splitlines()}


def test_make_uninstall_leaves_what_is_the_owners(host: Installed) -> None:
    """The last one here: slotd is gone after it."""
    said = host.run("PREFIX=/usr /srv/slotd/packaging/install.sh uninstall").stdout
    assert "stopped and disabled slotd" in said
    assert host.run(["pgrep", "-u", "slotd"], check=False).stdout == ""
    assert host.run("ls /usr/lib/systemd/system /etc/systemd/system | grep slotd", check=False).stdout == ""
    assert host.run("ls /etc/slotd").stdout == "config.yaml\n"
    assert "boot.json" in host.run("ls /var/lib/slotd").stdout.split()
