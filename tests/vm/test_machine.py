"""The machine itself: its systemd enforces what units ask for, and the host sees nothing of it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from vm.machine import Machine, _hierarchies

pytestmark = pytest.mark.vm

UNIT = """[Service]
Type=oneshot
RemainAfterExit=yes
User=nobody
MemoryMax=50M
TasksMax=20
StateDirectory=probe
ProtectSystem=strict
PrivateNetwork=yes
SystemCallFilter=~mkdirat mkdir
SystemCallErrorNumber=EPERM
ExecStart=sh -c 'cd /var/lib/probe; exec >said 2>&1; id -un; ip -o link | wc -l; touch /etc/not; mkdir no'
SuccessExitStatus=0 1
"""


def test_what_a_unit_asks_for_is_enforced(machine: Machine) -> None:
    machine.write("/etc/systemd/system/probe.service", UNIT)
    machine.systemctl("daemon-reload")
    machine.systemctl("start", "probe")
    name, links, strict, filtered = machine.read("/var/lib/probe/said").decode().splitlines()
    assert (name, links) == ("nobody", "1")
    assert "Read-only file system" in strict
    assert "Operation not permitted" in filtered
    assert machine.run(["id", "-un"], user="nobody").stdout == "nobody\n"


def test_the_host_is_left_as_it_was(tmp_path: Path) -> None:
    name, mounts = Path("/proc/sys/kernel/hostname").read_text(), Path("/proc/self/mountinfo").read_text()
    (tmp_path / "seen").write_text("from the host")
    with Machine(binds={tmp_path: "/opt/bound"}) as machine:
        assert machine.read("/opt/bound/seen") == b"from the host"
        assert machine.run("echo no > /opt/bound/seen", check=False).returncode != 0
        assert machine.run("echo 1 > /proc/sys/vm/drop_caches", check=False).returncode != 0
        assert machine.run("ls -A /sys/class/net").stdout.split() == ["lo"]
        machine.write("/etc/slotd-vm-was-here", "x")
        machine.run("echo x > /dev/shm/slotd-vm-was-here")
        # what ignores the end is ended all the same
        machine.run("setsid sh -c 'trap \"\" TERM INT; sleep 1000' >/dev/null 2>&1 &")
        groups = [group for own in _hierarchies() for group in own.glob("slotd-vm-*")]
        assert groups
        machine.stop(timeout=3)
    assert not Path("/etc/slotd-vm-was-here").exists()
    assert not Path("/dev/shm/slotd-vm-was-here").exists()
    assert not any(group.exists() for group in groups)
    assert Path("/proc/sys/kernel/hostname").read_text() == name
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_a_stop_is_bounded(machine: Machine) -> None:
    machine.write(
        "/etc/systemd/system/stubborn.service",
        "[Service]\nTimeoutStopSec=1000\nExecStart=sh -c 'trap \"\" TERM; while :; do sleep 1; done'\n",
    )
    machine.systemctl("daemon-reload")
    machine.systemctl("start", "stubborn")
    unshare = machine._unshare
    assert unshare is not None
    start = time.monotonic()
    machine.stop(timeout=1)
    assert time.monotonic() - start < 20
    assert subprocess.run(["ps", "--ppid", str(unshare.pid)], capture_output=True).returncode == 1
