"""slotd as `make install-system` lays it out, in a machine; the program itself is the checkout, seen read-only."""

from __future__ import annotations

import contextlib
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import yaml

from agent.commands.admin import AdminClient
from support.host import merge, predict
from support.tiny import scale_of, write_model
from vm.machine import Machine

SOURCES = Path(__file__).parents[2]
TREE = "/usr/lib/slotd"
LAYOUT = "/srv/layout"
CONFIG: dict[str, Any] = {
    "device": "vm-host",
    "embedded": True,
    "slot": {
        "driver": "simulated",
        "options": {"program_time": 0.1, "latency": 0.002},
        "retry_first": "0.2s",
        "retry_max": "1s",
    },
    "swap": {"probation": {"duration": "0.3s", "min_requests": 3}},
    "serving": {"lame_duck": "0.1s", "grace": "3s"},
    "executor": {"threads": 1},
    "images": {"layouts": [LAYOUT]},
    "link": {"enabled": False},
}
LAUNCHER = f'#!/bin/sh\nexec {TREE}/bin/python -I -m agent "$@"\n'


class Installed(Machine):
    """A machine with slotd, not yet started."""

    def __init__(self) -> None:
        super().__init__(
            binds={
                # Debian's Python with our packages: the checkout's own may lie where a service may not look.
                Path(sysconfig.get_path("purelib")): f"{TREE}/site",
                SOURCES / "agent": f"{TREE}/src/agent",
                SOURCES / "drivers": f"{TREE}/src/drivers",
                SOURCES / "tests": f"{TREE}/src/tests",
                SOURCES: "/srv/slotd",
            }
        )

    def start(self, *, timeout: float = 60) -> Installed:
        """Boots and installs."""
        super().start(timeout=timeout)
        self.run(
            f"mkdir -p {TREE}/bin {TREE}/lib/python3.11/site-packages; ln -s /usr/bin/python3.11 {TREE}/bin/python"
        )
        self.write(f"{TREE}/pyvenv.cfg", "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11\n")
        self.write(f"{TREE}/lib/python3.11/site-packages/slotd.pth", f"{TREE}/site\n{TREE}/src\n")
        self.write("/usr/bin/slotd", LAUNCHER, mode=0o755)
        self.said = self.run("PREFIX=/usr /srv/slotd/packaging/install.sh system").stdout
        self.configure()
        return self

    def configure(self, **settings: Any) -> None:
        """Writes the settings: CONFIG with `settings` over it."""
        self.write("/etc/slotd/config.yaml", yaml.safe_dump(merge(CONFIG, settings)))

    def drop_in(self, unit: str, text: str) -> None:
        """Settings of a unit, for this test."""
        self.write(f"/etc/systemd/system/{unit}.d/test.conf", text)
        self.systemctl("daemon-reload")

    def pack(self, folder: Path, tag: str, **model: Any) -> None:
        """A tiny model as an image in the machine's layout folder; `folder` is a scratch folder of the host."""
        from agent.forge.pack import pack

        source = folder / tag.replace(":", "-")
        write_model(source, **{"name": tag.split(":")[0], **model})
        pack(source, folder / "layout", tag)
        self.copy(folder / "layout", LAYOUT)

    # --- slotd --------------------------------------------------------------------------------------------------------

    def slotd(self, *arguments: str, check: bool = True, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """The command, as root or another user."""
        return self.run(["slotd", *arguments], check=check, user=user, timeout=120)

    def status(self) -> dict[str, Any]:
        """What `slotd status --json` prints, without waiting for the command to start."""
        with contextlib.closing(AdminClient(self.path("/run/slotd/admin.sock"))) as client:
            return client.call("status", {})

    def main_pid(self) -> int:
        """As the machine numbers it."""
        return int(self.show("slotd", "MainPID"))

    @property
    def address(self) -> str:
        """Of its gRPC socket, for clients on the host."""
        return f"unix:{self.path('/run/slotd/grpc.sock')}"

    def scale(self, *, timeout: float = 10) -> tuple[float, str]:
        """One request: the scale of the model that answered, and `slot` or `bridge`."""
        x = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)
        with grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            y, metadata = predict(channel, x, timeout=timeout)
        return round(scale_of(x, y), 3), metadata["slotd-served-by"]
