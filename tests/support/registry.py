"""A real docker-registry on a free loopback port, anonymous or with a password."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

USER = "puller"


@dataclass(frozen=True)
class RunningRegistry:
    """`host` is 127.0.0.1:port; `folder` holds its blobs and `ca.pem` (TLS); `auth` is (user, password) or None."""

    host: str
    folder: Path
    auth: tuple[str, str] | None

    def blob(self, digest: str) -> Path:
        """Where the registry keeps a blob, for tests that damage it."""
        name = digest.removeprefix("sha256:")
        return self.folder / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


@contextmanager
def running_registry(folder: Path, password: str | None = None, tls: bool = False) -> Iterator[RunningRegistry]:
    """Start docker-registry with its blobs in `folder`; with `password`, only user `puller` may do anything."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        host = f"127.0.0.1:{free.getsockname()[1]}"
    config: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder)}, "delete": {"enabled": True}},
        "http": {"addr": host},
    }
    if password is not None:
        users = folder / "htpasswd"
        made = subprocess.run(
            ["htpasswd", "-iBn", "-C", "4", USER], input=password.encode(), capture_output=True, check=True
        )
        users.write_bytes(made.stdout)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(users)}}
    if tls:
        config["http"]["tls"] = {"certificate": str(folder / "ca.pem"), "key": str(folder / "key.pem")}
        subject = ["-subj", "/CN=test registry", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes"]
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "ca.pem")]
        subprocess.run(["openssl", "req", "-x509", *kind, *subject, *files], capture_output=True, check=True)
    written = folder / "config.yml"
    written.write_text(json.dumps(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(written)], stdout=log, stderr=log)
        try:
            _wait(process, f"{'https' if tls else 'http'}://{host}/v2/", folder / "log")
            yield RunningRegistry(host, folder, (USER, password) if password is not None else None)
        finally:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, trust_env=False, timeout=5, verify=False).status_code in (200, 401):
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"docker-registry did not start: {log.read_text()[-2000:]}")
