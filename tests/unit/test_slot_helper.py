"""The slot helper: whom it serves, what it does on a card as the kernel shows it, and all that it refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pwd
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drivers.base import DriverError
from drivers.helper import MAX_LINE, server
from drivers.helper import settings as settings_module
from drivers.helper.client import call
from drivers.helper.server import MAX_REQUESTS, Server
from drivers.helper.settings import BadSettings, Device, Settings, read_settings
from drivers.helper.verbs import Kernel, Refused, Verbs

ME = pwd.getpwuid(os.getuid()).pw_name
CARD = Device(
    "card0",
    frozenset({"clear_errors", "function_reset"}),
    fme="dfl-fme.0",
    port="dfl-port.0",
    pci="0000:3b:00.0",
    pci_id="8086:09c4",
)


@pytest.fixture(autouse=True)
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of whoever runs the tests count as root's."""
    monkeypatch.setattr(settings_module, "OWNER", os.getuid())


class FakeKernel(Kernel):
    """Attributes behave as the kernel's: errors clear by their own value, a manager loads, an item has attributes."""

    def __init__(self) -> None:
        self.written: list[tuple[str, bytes]] = []
        self.refuse: dict[str, int] = {}
        self.sticky = False
        self.state = "operating"
        self.loaded = b""
        self.firmware = Path()

    def write(self, path: Path, value: bytes) -> None:
        if path.name in self.refuse:
            raise OSError(self.refuse[path.name], os.strerror(self.refuse[path.name]))
        self.written.append((path.name, value))
        if path.name in ("pcie0_errors", "pcie1_errors", "fme_errors", "errors"):
            if int(value, 0) != int(path.read_text(), 0):
                raise OSError(errno.EINVAL, "Invalid argument")
            if not self.sticky:
                path.write_text("0x0\n")
        elif path.name == "firmware":
            self.loaded = (self.firmware / value.decode()).read_bytes()
            (path.parent / "state").write_text(self.state + "\n")
        elif path.name == "dtbo":
            (path.parent / "status").write_text("applied\n" if self.state == "operating" else "failed\n")
        else:
            super().write(path, value)

    def make(self, folder: Path) -> None:
        super().make(folder)
        for name in ("dtbo", "status"):
            (folder / name).touch()

    def remove(self, folder: Path) -> None:
        for attribute in folder.iterdir():
            attribute.unlink()
        super().remove(folder)


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """/sys with one DFL card and one manager."""
    root = tmp_path / "sys"
    files = {
        "bus/platform/devices/dfl-fme.0/errors/pcie0_errors": "0x0",
        "bus/platform/devices/dfl-fme.0/errors/pcie1_errors": "0x0",
        "bus/platform/devices/dfl-fme.0/errors/fme_errors": "0x41",
        "bus/platform/devices/dfl-fme.0/errors/nonfatal_errors": "0x8",
        "bus/platform/devices/dfl-port.0/errors/errors": "0x200000000000000",
        "bus/pci/devices/0000:3b:00.0/vendor": "0x8086",
        "bus/pci/devices/0000:3b:00.0/device": "0x09c4",
        "bus/pci/devices/0000:3b:00.0/reset": "",
        "class/fpga_manager/fpga0/name": "Xilinx ZynqMP FPGA Manager",
        "class/fpga_manager/fpga0/state": "unknown",
        "class/fpga_manager/fpga0/status": "reconfig CRC error",
        "class/fpga_manager/fpga0/firmware": "",
        "class/fpga_manager/fpga0/flags": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    (root / "config/device-tree/overlays").mkdir(parents=True)
    (tmp_path / "firmware/slotd").mkdir(parents=True)
    (tmp_path / "base.dtbo").write_bytes(b"\xd0\x0d\xfe\xed")
    return root


@pytest.fixture
def settings(sysfs: Path, tmp_path: Path) -> Settings:
    manager = Device(
        "pl",
        frozenset({"load", "apply_overlay", "remove_overlay"}),
        manager="fpga0",
        flags=frozenset({0, 4}),
        max_bitstream=1 << 16,
        overlays={"base": tmp_path / "base.dtbo"},
    )
    return Settings(
        user=ME,
        sysfs=sysfs,
        configfs=sysfs / "config",
        firmware=tmp_path / "firmware",
        devices={"card0": CARD, "pl": manager},
    )


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    fake = FakeKernel()
    fake.firmware = tmp_path / "firmware"
    return fake


@pytest.fixture
def verbs(settings: Settings, kernel: FakeKernel) -> Verbs:
    return Verbs(settings, kernel)


def refused(verbs: Verbs, verb: Any, device: Any = "card0", arguments: Any = None, file: int | None = None) -> str:
    with pytest.raises(Refused) as caught:
        verbs.run(verb, device, {} if arguments is None else arguments, file)
    return caught.value.code


# --- verbs ------------------------------------------------------------------------------------------------------------


def test_errors_are_cleared_by_their_own_value(verbs: Verbs, kernel: FakeKernel, sysfs: Path) -> None:
    assert verbs.run("clear_errors", "card0", {}, None) == {
        "cleared": {"dfl-fme.0/fme_errors": "0x41", "dfl-port.0/errors": "0x200000000000000"},
        "remaining": {},
    }
    assert kernel.written == [("fme_errors", b"0x41"), ("errors", b"0x200000000000000")]
    assert verbs.run("clear_errors", "card0", {}, None) == {"cleared": {}, "remaining": {}}
    kernel.sticky = True
    (sysfs / "bus/platform/devices/dfl-fme.0/errors/pcie0_errors").write_text("0x2\n")
    assert verbs.run("clear_errors", "card0", {}, None)["remaining"] == {"dfl-fme.0/pcie0_errors": "0x2"}


def test_a_function_is_reset_if_it_is_the_card_that_was_meant(verbs: Verbs, kernel: FakeKernel, sysfs: Path) -> None:
    assert verbs.run("function_reset", "card0", {}, None) == {"reset": "0000:3b:00.0"}
    assert kernel.written == [("reset", b"1")]
    function = sysfs / "bus/pci/devices/0000:3b:00.0"
    (function / "device").write_text("0x1533\n")
    assert refused(verbs, "function_reset") == "WRONG_DEVICE"
    assert len(kernel.written) == 1
    (function / "device").write_text("0x09c4\n")
    (function / "reset").unlink()
    assert refused(verbs, "function_reset") == "UNSUPPORTED"


def test_what_the_kernel_refuses_has_a_code(verbs: Verbs, kernel: FakeKernel, sysfs: Path) -> None:
    for number, code in (
        (errno.EBUSY, "DEVICE_BUSY"),
        (errno.ENODEV, "DEVICE_ABSENT"),
        (errno.EROFS, "NOT_PERMITTED"),
        (errno.ETIMEDOUT, "DEVICE_HUNG"),
        (errno.EIO, "DEVICE_FAILED"),
    ):
        kernel.refuse = {"reset": number}
        assert refused(verbs, "function_reset") == code
    (sysfs / "bus/platform/devices/dfl-fme.0/errors/fme_errors").write_text("garbage\n")
    assert refused(verbs, "clear_errors") == "DEVICE_FAILED"
    for name in ("dfl-fme.0", "dfl-port.0"):
        (sysfs / "bus/platform/devices" / name).rename(sysfs / name)
    assert refused(verbs, "clear_errors") == "DEVICE_ABSENT"


def test_a_bitstream_is_loaded_from_a_copy_that_was_hashed(verbs: Verbs, kernel: FakeKernel, tmp_path: Path) -> None:
    bits = os.urandom(50_000)
    (tmp_path / "bits").write_bytes(bits)
    digest = hashlib.sha256(bits).hexdigest()
    with (tmp_path / "bits").open("rb") as file:
        file.seek(100)  # where somebody has read to does not matter
        result = verbs.run("load", "pl", {"sha256": digest, "flags": 4}, file.fileno())
        assert result == {"state": "operating"}
        assert kernel.loaded == bits
        assert kernel.written == [("flags", b"4"), ("firmware", b"slotd/pl.bin")]
        assert list((tmp_path / "firmware/slotd").iterdir()) == []

        assert refused(verbs, "load", "pl", {"sha256": "0" * 64}, file.fileno()) == "INVALID_ARGUMENT"
        assert refused(verbs, "load", "pl", {"sha256": digest, "flags": 0x20}, file.fileno()) == "NOT_ALLOWED"
        assert refused(verbs, "load", "pl", {"sha256": digest, "flags": True}, file.fileno()) == "NOT_ALLOWED"
        assert refused(verbs, "load", "pl", {"sha256": "../../etc/x"}, file.fileno()) == "INVALID_ARGUMENT"
        assert refused(verbs, "load", "pl", {"sha256": digest, "path": "/etc/shadow"}, file.fileno())
        assert refused(verbs, "load", "pl", {"sha256": digest}) == "INVALID_ARGUMENT"
        kernel.state = "write error"
        with pytest.raises(Refused, match="fpga0: write error reconfig CRC error"):
            verbs.run("load", "pl", {"sha256": digest}, file.fileno())
        kernel.refuse = {"firmware": errno.EIO}
        assert refused(verbs, "load", "pl", {"sha256": digest}, file.fileno()) == "PROGRAM_FAILED"
    assert list((tmp_path / "firmware/slotd").iterdir()) == []
    assert refused(verbs, "load", "card0", {"sha256": digest}) == "NOT_ALLOWED"


def test_what_is_no_bitstream_is_not_copied(verbs: Verbs, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    assert refused(verbs, "load", "pl", {"sha256": "0" * 64}, reader) == "INVALID_ARGUMENT"
    os.close(reader)
    os.close(writer)
    big = os.memfd_create("big")
    os.truncate(big, (1 << 16) + 1)
    assert refused(verbs, "load", "pl", {"sha256": "0" * 64}, big) == "INVALID_ARGUMENT"
    os.close(big)
    # a link that somebody has laid where the copy goes is replaced, not followed
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    (tmp_path / "firmware/slotd/pl.bin").symlink_to(target)
    bits = os.memfd_create("bits")
    os.write(bits, b"bits")
    verbs.run("load", "pl", {"sha256": hashlib.sha256(b"bits").hexdigest()}, bits)
    os.close(bits)
    assert target.read_bytes() == b"precious"


def test_overlays_are_those_that_root_has_put_there(
    verbs: Verbs, kernel: FakeKernel, sysfs: Path, tmp_path: Path
) -> None:
    item = sysfs / "config/device-tree/overlays/slotd-pl-base"
    assert verbs.run("apply_overlay", "pl", {"overlay": "base"}, None)["status"] == "applied"
    assert kernel.written == [("dtbo", b"\xd0\x0d\xfe\xed")]
    assert item.is_dir()
    assert verbs.run("remove_overlay", "pl", {"overlay": "base"}, None) == {"overlay": "base", "removed": True}
    assert verbs.run("remove_overlay", "pl", {"overlay": "base"}, None) == {"overlay": "base", "removed": False}
    kernel.state = "bad"
    assert refused(verbs, "apply_overlay", "pl", {"overlay": "base"}) == "PROGRAM_FAILED"
    assert not item.exists()
    for name in ("other", "../base", "", None, 3):
        assert refused(verbs, "apply_overlay", "pl", {"overlay": name}) == "NOT_ALLOWED"
    (tmp_path / "base.dtbo").chmod(0o666)
    assert refused(verbs, "apply_overlay", "pl", {"overlay": "base"}) == "CONFIG_INVALID"


def test_nothing_else_is_done(verbs: Verbs, kernel: FakeKernel) -> None:
    assert verbs.run("devices", None, {}, None)["devices"]["card0"] == ["clear_errors", "function_reset"]
    for verb in ("write", "", None, 7, ["clear_errors"], "_clear_errors", "run", "__init__", "CLEAR_ERRORS"):
        assert refused(verbs, verb) == "UNKNOWN_VERB"
    for device in ("card1", "", None, 1, ["card0"], "../card0", "dfl-fme.0"):
        assert refused(verbs, "clear_errors", device) == "NOT_CONFIGURED"
    for arguments in ({"path": "/etc"}, [], "x", 3):
        assert refused(verbs, "clear_errors", "card0", arguments) == "INVALID_ARGUMENT"
    assert refused(verbs, "clear_errors", "card0", {}, 0) == "INVALID_ARGUMENT"
    assert kernel.written == []


# --- settings ---------------------------------------------------------------------------------------------------------

GOOD = """
[devices.card0]
fme = "dfl-fme.0"
pci = "0000:3B:00.0"
verbs = ["clear_errors", "function_reset"]
"""


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "slot-helper.toml"
    assert read_settings(path) == Settings()
    path.write_text(GOOD)
    path.chmod(0o644)
    found = read_settings(path)
    assert found.devices["card0"].pci == "0000:3b:00.0"
    assert (found.user, found.sysfs) == ("slotd", Path("/sys"))
    example = Path(__file__).parents[2] / "packaging" / "slot-helper.example.toml"
    bare = "".join(line.removeprefix("# ") for line in example.read_text().splitlines(keepends=True)[4:])
    path.write_text(bare)
    assert set(read_settings(path).devices) == {"card0", "pl"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text + "shell = 1\n", "devices.card0.shell"),
        (lambda text: text.replace("dfl-fme.0", "../../../etc"), "devices.card0.fme"),
        (lambda text: text.replace("0000:3B:00.0", "0000:3b:00.0/../../"), "devices.card0.pci"),
        (lambda text: text.replace('"function_reset"', '"load"'), "load needs manager"),
        (lambda text: text.replace('"function_reset"', '"exec"'), "'exec'"),
        (lambda text: text.replace("card0", '"../x"'), "devices.../x"),
        (lambda text: text + "max_bitstream = true\n", "max_bitstream"),
        (lambda text: text + "flags = [-1]\n", "flags"),
        (lambda text: text + 'overlays = {base = "relative.dtbo"}\n', "overlays.base"),
        (lambda text: 'sysfs = "/sys/../etc"\n' + text, "sysfs"),
        (lambda text: "user = 0\n" + text, "user"),
        (lambda text: "colour = 1\n" + text, "colour"),
        (lambda text: text + "[", "TOML"),
    ],
)
def test_settings_that_are_wrong_name_the_field(tmp_path: Path, change: Any, named: str) -> None:
    path = tmp_path / "slot-helper.toml"
    path.write_text(change(GOOD))
    path.chmod(0o644)
    with pytest.raises(BadSettings) as caught:
        read_settings(path)
    assert named in str(caught.value)


def test_settings_that_others_may_write_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slot-helper.toml"
    path.write_text(GOOD)
    path.chmod(0o664)
    with pytest.raises(BadSettings, match="root"):
        read_settings(path)
    path.chmod(0o644)
    monkeypatch.setattr(settings_module, "OWNER", os.getuid() + 1)
    with pytest.raises(BadSettings, match="root"):
        read_settings(path)
    (tmp_path / "link.toml").symlink_to(path)
    with pytest.raises(BadSettings):
        read_settings(tmp_path / "link.toml")


# --- the socket -------------------------------------------------------------------------------------------------------


class Running:
    """A helper in a thread."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.fault: BadSettings | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=Server(self._listener, self.load).run, kwargs={"idle": 0.5})
        self._thread.start()

    def load(self) -> Settings:
        if self.fault:
            raise self.fault
        return self.settings

    def close(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()  # it ends by itself when it is idle
        self._listener.close()

    def raw(self, *sends: bytes) -> list[dict[str, Any]]:
        """What it answers to bytes as they are, until it closes."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.path))
            try:
                for data in sends:
                    connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass
            said = b""
            try:
                while data := connection.recv(65536):
                    said += data
            except ConnectionResetError:
                pass
        return [json.loads(line) for line in said.splitlines()]


@pytest.fixture
def helper(tmp_path: Path, settings: Settings) -> Iterator[Running]:
    running = Running(tmp_path / "helper.sock", settings)
    yield running
    running.close()


def test_a_driver_asks(helper: Running, sysfs: Path, tmp_path: Path) -> None:
    assert call("devices", path=helper.path)["devices"]["card0"] == ["clear_errors", "function_reset"]
    assert call("function_reset", "card0", path=helper.path) == {"reset": "0000:3b:00.0"}
    assert (sysfs / "bus/pci/devices/0000:3b:00.0/reset").read_text().startswith("1")
    with pytest.raises(DriverError) as caught:
        call("load", "card0", path=helper.path)
    assert (caught.value.code, "NOT_ALLOWED" in caught.value.message) == ("SLOT_FAILED", True)
    bits = os.memfd_create("bits")
    os.write(bits, b"bits")
    with pytest.raises(DriverError) as caught:  # the files of this card do nothing by themselves
        call("load", "pl", file=bits, sha256=hashlib.sha256(b"bits").hexdigest(), path=helper.path)
    assert caught.value.code == "PROGRAM_FAILED"
    os.close(bits)
    with pytest.raises(DriverError, match="cannot be reached"):
        call("devices", path=tmp_path / "nobody.sock")


def test_every_other_user_is_refused(helper: Running, settings: Settings) -> None:
    object.__setattr__(settings, "user", "nobody")
    (answer,) = helper.raw(b'{"id":1,"verb":"clear_errors","device":"card0"}\n')
    assert (answer["ok"], answer["error"]["code"]) == (False, "FORBIDDEN")
    with pytest.raises(DriverError, match="FORBIDDEN"):
        call("function_reset", "card0", path=helper.path)
    object.__setattr__(settings, "user", "no-such-user")
    assert helper.raw(b'{"id":1,"verb":"devices"}\n')[0]["error"]["code"] == "CONFIG_INVALID"
    helper.fault = BadSettings("devices.card0.fme: wrong")
    (answer,) = helper.raw(b'{"id":1,"verb":"devices"}\n')
    assert (answer["error"]["code"], answer["error"]["message"]) == ("CONFIG_INVALID", "devices.card0.fme: wrong")


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b"3",
        b'{"verb": "devices", "more": 1}',
        b'{"id": {"a": 1}, "verb": "devices"}',
        b'{"id": "' + b"x" * 65 + b'", "verb": "devices"}',
        b"[" * 4000,
        b"\xff\xfe",
        b"",
    ],
)
def test_lines_that_are_no_requests(helper: Running, line: bytes) -> None:
    first, second = helper.raw(line + b'\n{"id":2,"verb":"devices"}\n')
    assert first["error"]["code"] == "INVALID_ARGUMENT"
    assert (second["id"], second["ok"]) == (2, True)


def test_limits(helper: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    (answer,) = helper.raw(b"x" * (MAX_LINE * 3))
    assert answer["error"]["code"] == "INVALID_ARGUMENT"
    assert len(helper.raw(b'{"id":1,"verb":"devices"}\n' * (MAX_REQUESTS + 5))) == MAX_REQUESTS
    assert helper.raw(b'{"id":1,"verb":"dev', b'ices"}\n')[0]["ok"]
    assert helper.raw(b'{"id":1,"verb":"devices"}') == []
    with socket.socket(socket.AF_UNIX) as connection:  # more files than one, and more than it looks at
        connection.connect(str(helper.path))
        socket.send_fds(connection, [b'{"id":1,"verb":"devices"}\n'], [0, 1])
        assert json.loads(connection.recv(4096))["error"]["code"] == "INVALID_ARGUMENT"
    before = len(os.listdir("/proc/self/fd"))
    for count in (1, 4, 40):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(helper.path))
            socket.send_fds(connection, [b'{"id":1,"verb":"devices"}\n'], [0] * count)
            assert json.loads(connection.recv(4096))["error"]["code"] == "INVALID_ARGUMENT"
    helper.raw(b'{"id":1,"verb":"devices"}\n')  # it has done with the others
    assert len(os.listdir("/proc/self/fd")) <= before
    monkeypatch.setattr(server, "PATIENCE", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:  # who says nothing holds nobody up for long
        silent.connect(str(helper.path))
        assert call("devices", path=helper.path)["devices"]


def test_it_starts_by_its_socket_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from drivers.helper.__main__ import main

    monkeypatch.delenv("LISTEN_FDS", raising=False)
    assert main() == 64
    assert capsys.readouterr().err.startswith("<3>{")
