"""The guest as a process: booted once and frozen, then cloned for each boot, and killed.

The frozen machine's memory is a file that every clone maps copy-on-write, so that a clone stands in half a second.
"""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vm.power.image import BUSYBOX, copy_sparse

MEMORY = "1536M"
REGISTRY = "10.0.2.100:5000"
"""Where guests find the registry; nothing else of the network can be reached."""
COMMAND = (
    "setpriv", "--pdeathsig", "KILL",  # no guest outlives the tests
    "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", MEMORY,
    "-nodefaults", "-no-reboot", "-display", "none",
)  # fmt: skip


class Machine:
    """One QEMU process. `heard` has what the guest told, as (monotonic time, document); None at its end."""

    def __init__(self, folder: Path, arguments: list[str], *, on_heard: Callable[[dict[str, Any]], None] | None = None):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.heard: queue.Queue[tuple[float, dict[str, Any]] | None] = queue.Queue()
        self.console = folder / "console.log"
        self._on_heard = on_heard
        sockets = {name: self._listen(name) for name in ("port", "qmp")}
        command = [
            *COMMAND,
            "-serial", f"file:{self.console}",
            "-chardev", f"socket,id=port,path={folder / 'port'}", "-serial", "chardev:port",
            "-chardev", f"socket,id=qmp,path={folder / 'qmp'}", "-mon", "chardev=qmp,mode=control",
            *arguments,
        ]  # fmt: skip
        self.errors = folder / "qemu.log"
        with self.errors.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._connections: list[socket.socket] = []
        self._reader: threading.Thread | None = None
        try:
            self._port = self._accept(sockets["port"])
            self._qmp = self._accept(sockets["qmp"]).makefile("rwb")
        except BaseException:
            self.kill()
            raise
        finally:
            for listener in sockets.values():
                listener.close()
        self._qmp.readline()
        self.ask("qmp_capabilities")
        self._reader = threading.Thread(target=self._read, name="guest's port", daemon=True)
        self._reader.start()

    def _listen(self, name: str) -> socket.socket:
        path = self.folder / name
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(0.5)
        return listener

    def _accept(self, listener: socket.socket) -> socket.socket:
        for _ in range(40):
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if self.process.poll() is not None:
                    break
            else:
                connection.setblocking(True)
                self._connections.append(connection)
                return connection
        raise RuntimeError(f"QEMU did not start: {self.errors.read_text()}")

    def _read(self) -> None:
        try:
            with self._port.makefile("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break  # the power went in the middle of it
                    document = json.loads(line)
                    self.heard.put((time.monotonic(), document))
                    if self._on_heard is not None:
                        self._on_heard(document)
        except OSError:
            pass
        self.heard.put(None)

    def tell(self, document: dict[str, Any]) -> None:
        """A line to the guest."""
        self._port.sendall(json.dumps(document).encode() + b"\n")

    def wait_for(self, what: str, timeout: float) -> dict[str, Any]:
        """The next document of that kind. Raises RuntimeError with the console's end."""
        until = time.monotonic() + timeout
        while True:
            try:
                item = self.heard.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"the guest did not say {what!r}:\n{self.tail()}") from None
            if item is None:
                raise RuntimeError(f"the guest is gone:\n{self.tail()}")
            if item[1]["at"] == "failed":
                raise RuntimeError(f"the guest met {item[1]['error']}:\n{self.tail()}")
            if item[1]["at"] == what:
                return item[1]

    def tail(self, lines: int = 40) -> str:
        """The end of what the guest's console and QEMU said."""
        text = "".join(path.read_text(errors="replace") for path in (self.console, self.errors) if path.exists())
        return "\n".join(text.splitlines()[-lines:])

    def ask(self, command: str, **arguments: Any) -> Any:
        """A QMP command's answer. Raises RuntimeError."""
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._qmp.flush()
        while True:
            answer = json.loads(self._qmp.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")

    def kill(self) -> None:
        """SIGKILL, and what the guest said before it is heard to the end."""
        self.process.kill()
        self.process.wait()
        if self._reader is not None:
            self._reader.join(10)
        for connection in self._connections:
            connection.close()


@dataclass(frozen=True)
class Snapshot:
    """A frozen machine: its memory and the state of its devices. The disk is kept by whoever froze it."""

    memory: Path
    state: Path


@dataclass(frozen=True)
class Guest:
    """The parts that all machines have; `disk_size` in bytes."""

    kernel: Path
    initramfs: Path
    root: Path
    disk_size: int

    def _arguments(self, memory: Path, share: str, data: str, registry: int) -> list[str]:
        relay = f"{BUSYBOX} nc 127.0.0.1 {registry}"
        root = f"driver=raw,node-name=root,read-only=on,file.driver=file,file.filename={self.root},file.locking=off"
        return [
            "-object", f"memory-backend-file,id=ram,size={MEMORY},mem-path={memory},share={share}",
            "-machine", "pc,memory-backend=ram",
            "-kernel", str(self.kernel), "-initrd", str(self.initramfs),
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
            "-blockdev", root, "-device", "virtio-blk-pci,drive=root",
            "-netdev", f"user,id=net,ipv6=off,restrict=on,guestfwd=tcp:{REGISTRY}-cmd:{relay}",
            "-device", "virtio-net-pci,netdev=net,romfile=",
            "-blockdev", f"node-name=data,{data}",
            "-device", "virtio-blk-pci,drive=data,physical_block_size=4096,write-cache=on",
        ]  # fmt: skip

    def boot(self, folder: Path) -> Machine:
        """From the kernel on, with a disk that is not there yet; it can be frozen."""
        data = f"driver=null-co,size={self.disk_size}"
        return Machine(folder, self._arguments(folder / "memory", "on", data, 9))

    def clone(
        self,
        snapshot: Snapshot,
        folder: Path,
        disk: Path,
        registry: int,
        *,
        freezable: bool = False,
        on_heard: Callable[[dict[str, Any]], None] | None = None,
    ) -> Machine:
        """One more of a frozen machine, running: its disk is the NBD server at the socket `disk`, its registry is a
        port of this host.
        """
        memory, share = snapshot.memory, "off"
        if freezable:
            folder.mkdir(parents=True, exist_ok=True)
            memory, share = copy_sparse(snapshot.memory, folder / "memory"), "on"
        data = f"driver=nbd,server.type=unix,server.path={disk}"
        arguments = [*self._arguments(memory, share, data, registry), "-incoming", "defer"]
        machine = Machine(folder, arguments, on_heard=on_heard)
        try:
            _ignore_memory(machine)
            machine.ask("migrate-incoming", uri=f"exec:cat {snapshot.state}")
            until = time.monotonic() + 60
            while (status := machine.ask("query-status")["status"]) == "inmigrate":
                if time.monotonic() > until:
                    raise RuntimeError(f"the machine could not be cloned:\n{machine.tail()}")
                time.sleep(0.02)
            if status != "paused":
                raise RuntimeError(f"the machine is {status} instead of paused:\n{machine.tail()}")
            machine.ask("cont")
        except BaseException:
            machine.kill()
            raise
        return machine


def freeze(machine: Machine, folder: Path, name: str, keep: Callable[[], None] = lambda: None) -> Snapshot:
    """A snapshot of a machine that `boot` made, or `clone` with `freezable`; `keep` runs while it stands still."""
    folder.mkdir(parents=True, exist_ok=True)
    snapshot = Snapshot(folder / f"{name}.memory", folder / f"{name}.state")
    machine.ask("stop")
    _ignore_memory(machine)
    machine.ask("migrate", uri=f"exec:cat > {snapshot.state}")
    until = time.monotonic() + 60
    while (status := machine.ask("query-migrate")["status"]) != "completed":
        if status == "failed" or time.monotonic() > until:
            raise RuntimeError(f"the machine could not be frozen: {status}")
        time.sleep(0.02)
    copy_sparse(machine.folder / "memory", snapshot.memory)
    keep()
    machine.ask("cont")
    return snapshot


def _ignore_memory(machine: Machine) -> None:
    machine.ask("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
