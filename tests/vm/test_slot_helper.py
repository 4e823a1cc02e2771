"""The slot helper in its real unit: started by its socket, root without capabilities, and closed to everybody else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from vm.installed import TREE, Installed

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]

SYSFS = "/sys/devices/virtual/mem"
"""Where a file system of our own plays the card: under /sys/devices, which the unit may write."""
CARD = f"""
mount -t tmpfs -o mode=755 tmpfs {SYSFS}
cd {SYSFS}
mkdir -p bus/platform/devices/dfl-fme.0/errors bus/pci/devices/0000:3b:00.0 class/fpga_manager/fpga0
mkdir -p config/device-tree/overlays/slotd-pl-base
echo 0x0 > bus/platform/devices/dfl-fme.0/errors/pcie0_errors
echo 0x00000041 > bus/platform/devices/dfl-fme.0/errors/fme_errors
echo 0x8086 > bus/pci/devices/0000:3b:00.0/vendor
echo 0x09c4 > bus/pci/devices/0000:3b:00.0/device
echo 0 > bus/pci/devices/0000:3b:00.0/reset
echo manager > class/fpga_manager/fpga0/name
echo operating > class/fpga_manager/fpga0/state
touch class/fpga_manager/fpga0/firmware class/fpga_manager/fpga0/flags
"""
SETTINGS = f"""
sysfs = "{SYSFS}"
configfs = "{SYSFS}/config"

[devices.card0]
fme = "dfl-fme.0"
pci = "0000:3b:00.0"
pci_id = "8086:09c4"
verbs = ["clear_errors", "function_reset"]

[devices.pl]
manager = "fpga0"
verbs = ["load", "remove_overlay"]
overlays = {{base = "/etc/slotd/base.dtbo"}}
"""
ASK = """
import json, os, sys
from drivers.base import DriverError
from drivers.helper.client import call
verb, device, bits, arguments = json.loads(sys.argv[1])
file = None
if bits is not None:
    file = os.memfd_create("bits")
    os.write(file, bits.encode())
try:
    print(json.dumps(call(verb, device, file=file, timeout=10, **arguments)))
except DriverError as error:
    print(json.dumps({"code": error.code, "message": error.message}))
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Installed]:
    with Installed() as machine:
        machine.run(CARD)
        machine.write("/etc/slotd/slot-helper.toml", SETTINGS)
        machine.write("/etc/slotd/base.dtbo", b"\xd0\x0d\xfe\xed")
        machine.run("systemctl start slotd-slot-helper.socket; useradd -M -G slotd friend")
        yield machine


def ask(
    host: Installed,
    verb: Any,
    device: Any = None,
    bits: str | None = None,
    user: str | None = "slotd",
    **arguments: Any,
) -> dict[str, Any]:
    """The helper's answer, or the error as a driver gets it."""
    request = json.dumps([verb, device, bits, arguments])
    return dict(json.loads(host.run([f"{TREE}/bin/python", "-I", "-c", ASK, request], user=user).stdout))


def test_every_verb_works_inside_its_sandbox(host: Installed) -> None:
    assert ask(host, "devices")["devices"] == {
        "card0": ["clear_errors", "function_reset"],
        "pl": ["load", "remove_overlay"],
    }
    before = host.run(f"stat -c %Y.%y {SYSFS}/bus/platform/devices/dfl-fme.0/errors/*").stdout.splitlines()
    # the file that plays the register does not clear
    assert ask(host, "clear_errors", "card0") == {
        "cleared": {"dfl-fme.0/fme_errors": "0x00000041"},
        "remaining": {"dfl-fme.0/fme_errors": "0x00000041"},
    }
    after = host.run(f"stat -c %Y.%y {SYSFS}/bus/platform/devices/dfl-fme.0/errors/*").stdout.splitlines()
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True]
    assert ask(host, "function_reset", "card0") == {"reset": "0000:3b:00.0"}
    assert host.read(f"{SYSFS}/bus/pci/devices/0000:3b:00.0/reset") == b"1\n"
    digest = hashlib.sha256(b"bitstream").hexdigest()
    assert ask(host, "load", "pl", "bitstream", sha256=digest) == {"state": "operating"}
    assert host.read(f"{SYSFS}/class/fpga_manager/fpga0/firmware") == b"slotd/pl.bin"
    assert host.run("ls -A /usr/lib/firmware/slotd").stdout == ""
    assert ask(host, "remove_overlay", "pl", overlay="base") == {"overlay": "base", "removed": True}
    assert host.run(f"ls {SYSFS}/config/device-tree/overlays").stdout == ""


def test_every_other_user_is_refused(host: Installed) -> None:
    for user in (None, "friend"):  # root; somebody of the socket's group
        answer = ask(host, "function_reset", "card0", user=user)
        assert "FORBIDDEN" in answer["message"], answer
    assert "Permission denied" in ask(host, "function_reset", "card0", user="nobody")["message"]
    refused = [
        entry["MESSAGE"] for entry in host.journal("slotd-slot-helper") if "connection_refused" in entry["MESSAGE"]
    ]
    assert {json.loads(line)["code"] for line in refused} == {"FORBIDDEN"}
    assert len(refused) >= 2


def test_every_other_verb_and_device_is_refused(host: Installed) -> None:
    card = host.run(f"cd {SYSFS}; find . -type f | xargs md5sum").stdout
    for verb, device, arguments in (
        ("exec", "card0", {}),
        ("load", "card0", {"sha256": "0" * 64}),
        ("apply_overlay", "pl", {"overlay": "base"}),
        ("function_reset", "card1", {}),
        ("function_reset", "../card0", {}),
        ("clear_errors", "card0", {"path": "/etc/shadow"}),
        ("remove_overlay", "pl", {"overlay": "../../x"}),
        (None, None, {}),
    ):
        answer = ask(host, verb, device, **arguments)
        assert answer["code"] == "SLOT_FAILED", (verb, device, answer)
    assert host.run(f"cd {SYSFS}; find . -type f | xargs md5sum").stdout == card


def test_it_is_root_and_little_else(host: Installed) -> None:
    ask(host, "devices")
    pid = host.show("slotd-slot-helper", "MainPID")
    status = dict(
        line.split(":\t", 1) for line in host.read(f"/proc/{pid}/status").decode().splitlines() if ":\t" in line
    )
    assert status["Uid"].split() == ["0"] * 4
    assert {status[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert host.run(f"tail -n +3 /proc/{pid}/net/dev").stdout.split(":")[0].strip() == "lo"
    assert host.run(["readlink", f"/proc/{pid}/ns/net"]).stdout != host.run("readlink /proc/1/ns/net").stdout


def test_it_writes_nowhere_but_where_the_unit_says(host: Installed) -> None:
    elsewhere = SETTINGS.replace(f'sysfs = "{SYSFS}"', 'sysfs = "/etc/mock"')
    host.run(f"cp -r {SYSFS} /etc/mock")
    host.write("/etc/slotd/slot-helper.toml", elsewhere)  # read anew for each connection
    assert "NOT_PERMITTED" in ask(host, "function_reset", "card0")["message"]
    host.write("/etc/slotd/slot-helper.toml", elsewhere, mode=0o666)
    assert "CONFIG_INVALID" in ask(host, "function_reset", "card0")["message"]
    host.run("rm /etc/slotd/slot-helper.toml")
    assert ask(host, "devices") == {"devices": {}}
    assert "NOT_CONFIGURED" in ask(host, "function_reset", "card0")["message"]
    host.write("/etc/slotd/slot-helper.toml", SETTINGS)
    assert ask(host, "function_reset", "card0") == {"reset": "0000:3b:00.0"}
