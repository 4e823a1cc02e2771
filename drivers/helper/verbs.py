"""What the helper does, each on one configured device. Sources: Documentation/ABI/testing/sysfs-platform-dfl-fme,
-dfl-port, sysfs-bus-pci of the kernel; the `firmware` and `flags` of managers are those of Xilinx kernels.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drivers.helper.settings import BadSettings, Device, Settings, read_trusted

CHUNK = 1 << 20
MAX_OVERLAY = 1 << 20
FME_ERRORS = ("pcie0_errors", "pcie1_errors", "fme_errors")
"""Those that can be cleared; the kernel has nonfatal_errors and catfatal_errors for reading only."""


class Refused(Exception):
    """A request that is not carried out, or a device that did not do what it should."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint

    def as_dict(self) -> dict[str, Any]:
        """As it goes over the socket."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class Kernel:
    """Attributes in sysfs and configfs."""

    def read(self, path: Path) -> str:
        """What an attribute says. Raises OSError."""
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(number, "rb") as file:
            return file.read(4096).decode("ascii", "replace").strip()

    def write(self, path: Path, value: bytes) -> None:
        """Hands a value over in one write. Raises OSError: the kernel's refusal."""
        number = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.write(number, value) != len(value):
                raise OSError(errno.EIO, f"{path.name} took only a part")
        finally:
            os.close(number)

    def make(self, folder: Path) -> None:
        """mkdir(2), which in configfs makes an item."""
        folder.mkdir()

    def remove(self, folder: Path) -> None:
        """rmdir(2)."""
        folder.rmdir()


class Verbs:
    """All verbs; `run` is the only way to them."""

    def __init__(self, settings: Settings, kernel: Kernel | None = None) -> None:
        self._settings = settings
        self._kernel = kernel or Kernel()

    def run(self, verb: Any, device: Any, arguments: Any, file: int | None) -> dict[str, Any]:
        """The result. `file`: the descriptor that came along. Raises Refused."""
        if not isinstance(arguments, dict):
            raise Refused("INVALID_ARGUMENT", "arguments must be an object")
        if verb == "devices":
            _only(arguments, file)
            return {"devices": {name: sorted(found.verbs) for name, found in self._settings.devices.items()}}
        known: dict[str, Callable[[Device, Mapping[str, Any], int | None], dict[str, Any]]] = {
            "clear_errors": self._clear_errors,
            "function_reset": self._function_reset,
            "load": self._load,
            "apply_overlay": self._apply_overlay,
            "remove_overlay": self._remove_overlay,
        }
        if not isinstance(verb, str) or verb not in known:
            raise Refused("UNKNOWN_VERB", f"there is no such verb; known: devices, {', '.join(known)}")
        found = self._settings.devices.get(device) if isinstance(device, str) else None
        if found is None:
            raise Refused("NOT_CONFIGURED", "no such device", "root lists devices in /etc/slotd/slot-helper.toml")
        if verb not in found.verbs:
            raise Refused("NOT_ALLOWED", f"{verb} is not among the verbs of {found.name}", "see its line `verbs`")
        try:
            return known[verb](found, arguments, file)
        except OSError as error:
            raise _refusal(verb, error) from error

    # --- verbs --------------------------------------------------------------------------------------------------------

    def _clear_errors(self, device: Device, arguments: Mapping[str, Any], file: int | None) -> dict[str, Any]:
        """Writes the errors that are set back to where they were read: that clears them."""
        _only(arguments, file)
        platform = self._settings.sysfs / "bus" / "platform" / "devices"
        places = [platform / device.fme / "errors" / name for name in FME_ERRORS] if device.fme else []
        if device.port:
            places.append(platform / device.port / "errors" / "errors")
        cleared, remaining = {}, {}
        seen = False
        for place in places:
            label = f"{place.parent.parent.name}/{place.name}"
            try:
                value = self._kernel.read(place)
            except FileNotFoundError:
                continue
            seen = True
            if _number(value) == 0:
                continue
            self._kernel.write(place, value.encode())
            cleared[label] = value
            after = self._kernel.read(place)
            if _number(after) != 0:
                remaining[label] = after
        if not seen:
            raise Refused("DEVICE_ABSENT", f"{device.name} has no error registers", "is its kernel driver loaded?")
        return {"cleared": cleared, "remaining": remaining}

    def _function_reset(self, device: Device, arguments: Mapping[str, Any], file: int | None) -> dict[str, Any]:
        """Resets the PCI function, by whatever way the kernel has for it."""
        _only(arguments, file)
        folder = self._settings.sysfs / "bus" / "pci" / "devices" / device.pci
        found = ":".join(self._kernel.read(folder / name).removeprefix("0x") for name in ("vendor", "device"))
        if device.pci_id and found != device.pci_id:
            raise Refused(
                "WRONG_DEVICE", f"at {device.pci} is {found}, not {device.pci_id}", "cards move when slots are changed"
            )
        try:
            self._kernel.write(folder / "reset", b"1")
        except FileNotFoundError:
            raise Refused("UNSUPPORTED", f"{device.pci} cannot be reset by itself") from None
        return {"reset": device.pci}

    def _load(self, device: Device, arguments: Mapping[str, Any], file: int | None) -> dict[str, Any]:
        """Has the manager load the file that came along, if its hash is the one that was said."""
        digest, flags = arguments.get("sha256"), arguments.get("flags", 0)
        _only({key: value for key, value in arguments.items() if key not in ("sha256", "flags")}, None)
        if not isinstance(digest, str) or len(digest) != 64 or digest.strip("0123456789abcdef"):
            raise Refused("INVALID_ARGUMENT", "sha256: 64 lower-case hex digits")
        if type(flags) is not int or flags not in device.flags:
            raise Refused("NOT_ALLOWED", f"flags {flags!r} are not among those of {device.name}")
        if file is None:
            raise Refused("INVALID_ARGUMENT", "the bitstream's descriptor must come along")
        manager = self._settings.sysfs / "class" / "fpga_manager" / device.manager
        self._kernel.read(manager / "name")
        if not (manager / "firmware").exists():
            raise Refused(
                "UNSUPPORTED", f"{device.manager} has no `firmware`: this kernel takes no bitstream from here"
            )
        folder = self._settings.firmware / "slotd"
        name = f"{device.name}.bin"
        with contextlib.ExitStack() as stack:
            stack.callback((folder / name).unlink, missing_ok=True)
            _copy(file, folder / name, digest, device.max_bitstream)
            if (manager / "flags").exists():
                self._kernel.write(manager / "flags", f"{flags:x}".encode())
            self._kernel.write(manager / "firmware", f"slotd/{name}".encode())
        state = self._kernel.read(manager / "state")
        if state != "operating":
            status = ""
            with contextlib.suppress(OSError):  # not every manager has one
                status = self._kernel.read(manager / "status")
            raise Refused("PROGRAM_FAILED", " ".join(f"{device.manager}: {state} {status}".split()))
        return {"state": state}

    def _apply_overlay(self, device: Device, arguments: Mapping[str, Any], file: int | None) -> dict[str, Any]:
        """Applies a device-tree overlay that root has put on this host."""
        name, item = self._overlay(device, arguments, file)
        try:
            tree = read_trusted(device.overlays[name], MAX_OVERLAY)
        except (BadSettings, FileNotFoundError) as error:
            raise Refused("CONFIG_INVALID", f"overlay {name}: {error}") from None
        self._kernel.make(item)
        try:
            self._kernel.write(item / "dtbo", tree)
            status = self._kernel.read(item / "status")
            if status != "applied":
                raise Refused("PROGRAM_FAILED", f"overlay {name}: {status}", "the kernel's log says why")
        except BaseException:
            self._kernel.remove(item)
            raise
        return {"overlay": name, "status": status}

    def _remove_overlay(self, device: Device, arguments: Mapping[str, Any], file: int | None) -> dict[str, Any]:
        """Removes one; one that is not there is removed already."""
        name, item = self._overlay(device, arguments, file)
        try:
            self._kernel.remove(item)
        except FileNotFoundError:
            return {"overlay": name, "removed": False}
        return {"overlay": name, "removed": True}

    def _overlay(self, device: Device, arguments: Mapping[str, Any], file: int | None) -> tuple[str, Path]:
        name = arguments.get("overlay")
        _only({key: value for key, value in arguments.items() if key != "overlay"}, file)
        if not isinstance(name, str) or name not in device.overlays:
            raise Refused("NOT_ALLOWED", f"this is no overlay of {device.name}", "see its table `overlays`")
        folder = self._settings.configfs / "device-tree" / "overlays"
        if not folder.is_dir():
            raise Refused("UNSUPPORTED", "this kernel has no overlays in configfs", "or configfs is not mounted")
        return name, folder / f"slotd-{device.name}-{name}"


def _only(arguments: Mapping[str, Any], file: int | None) -> None:
    if arguments:
        raise Refused("INVALID_ARGUMENT", f"{', '.join(sorted(map(repr, arguments)))[:200]}: no such argument")
    if file is not None:
        raise Refused("INVALID_ARGUMENT", "this verb takes no file")


def _number(value: str) -> int:
    try:
        return int(value, 0)
    except ValueError:
        raise Refused("DEVICE_FAILED", f"its error register says {value[:40]!r}") from None


def _copy(source: int, target: Path, digest: str, most: int) -> None:
    """From a descriptor that somebody else holds as well: what counts is what was copied."""
    found = os.fstat(source)
    if not stat.S_ISREG(found.st_mode):
        raise Refused("INVALID_ARGUMENT", "the bitstream must be a regular file")
    target.unlink(missing_ok=True)
    number = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    hashed, size = hashlib.sha256(), 0
    with os.fdopen(number, "wb") as file:
        while chunk := os.pread(source, min(CHUNK, most + 1 - size), size):
            size += len(chunk)
            if size > most:
                raise Refused("INVALID_ARGUMENT", f"the bitstream is larger than {most} bytes")
            hashed.update(chunk)
            file.write(chunk)
    if hashed.hexdigest() != digest:
        raise Refused("INVALID_ARGUMENT", "the bitstream has another sha256")


def _refusal(verb: str, error: OSError) -> Refused:
    text = f"{verb}: {error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    if error.errno == errno.EBUSY:
        return Refused("DEVICE_BUSY", text)
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return Refused("DEVICE_ABSENT", text, "is its kernel driver loaded?")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return Refused("NOT_PERMITTED", text, "the unit's ReadWritePaths must hold that folder")
    if error.errno == errno.ETIMEDOUT:
        return Refused("PROGRAM_TIMEOUT" if verb == "load" else "DEVICE_HUNG", text)
    return Refused("PROGRAM_FAILED" if verb == "load" else "DEVICE_FAILED", text)
