"""A real mosquitto for one test: its own port, folder and process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """Starts and stops as the test says; sessions and retained messages are kept between, unless `forget` is said."""

    def __init__(self, folder: Path, *, users: dict[str, str] | None = None, acl: str | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"listener {self.port} 127.0.0.1",
            f"persistence_location {folder}/",
            "persistence true",
            "set_tcp_nodelay true",
            "max_queued_messages 2000",
            f"log_dest file {folder}/mosquitto.log",
            "log_type all",
            f"allow_anonymous {'false' if users else 'true'}",
        ]
        if os.geteuid() == 0:
            lines.append("user root")
        if users:
            self.set_users(users)
            lines.append(f"password_file {folder}/users")
        if acl is not None:
            (folder / "acl").write_text(acl)
            lines.append(f"acl_file {folder}/acl")
        (folder / "mosquitto.conf").write_text("\n".join(lines) + "\n")

    def set_users(self, users: dict[str, str]) -> None:
        """The password file; read by the broker when it starts."""
        path = self.folder / "users"
        path.write_text("")
        path.chmod(0o600)
        for user, password in users.items():
            subprocess.run(["mosquitto_passwd", "-b", str(path), user, password], check=True, capture_output=True)

    def start(self) -> None:
        """Listens on return."""
        self._process = subprocess.Popen(
            ["/usr/sbin/mosquitto", "-c", str(self.folder / "mosquitto.conf")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"mosquitto: {self.log()[-2000:]}") from None
                time.sleep(0.02)

    def stop(self, *, forget: bool = False) -> None:
        """An orderly stop; `forget` loses sessions and retained messages."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(10)
            self._process = None
        if forget:
            (self.folder / "mosquitto.db").unlink(missing_ok=True)

    def kill(self) -> None:
        """Gone without a word, and nothing written."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def pause(self) -> None:
        """It hangs: connections stand, and nothing is answered."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def log(self) -> str:
        """What the broker told."""
        path = self.folder / "mosquitto.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
