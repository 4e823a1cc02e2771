"""A registry that misbehaves on purpose, over an OCI layout folder; counts what it was asked for and what it sent."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Asked:
    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    """Bytes of the body."""


@dataclass
class FakeRegistry:
    """What it serves and how. Change the fields while it runs."""

    layout: Path
    host: str = ""
    asked: list[Asked] = field(default_factory=list)
    answer: Callable[[Asked, Handler], bool] = lambda asked, handler: False
    """Called first; True if it has answered."""
    ranges: bool = True
    rate: float = 0.0
    """Bytes in a second; 0 is as fast as it goes."""
    cut_after: int = 0
    """Close the connection after so many bytes of a blob; 0 never."""

    def blobs(self, digest: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path.endswith(f"/blobs/{digest}")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    registry: FakeRegistry

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = Asked(self.path, {key.lower(): value for key, value in self.headers.items()})
        self.registry.asked.append(asked)
        self.current = asked
        try:
            if not self.registry.answer(asked, self):
                self._serve(asked)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_POST = do_GET

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.current.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if not any(key.lower() == "content_length" for key in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send(body)

    def _send(self, body: bytes) -> None:
        registry, step = self.registry, 1 << 16
        for start in range(0, len(body), step):
            part = body[start : start + step]
            if registry.cut_after and "/blobs/" in self.path and self.current.sent + len(part) > registry.cut_after:
                part = part[: registry.cut_after - self.current.sent]
                self.close_connection = True
            self.wfile.write(part)
            self.wfile.flush()
            self.current.sent += len(part)
            if self.close_connection and registry.cut_after:
                return
            if registry.rate:
                time.sleep(len(part) / registry.rate)

    def _blob(self, digest: str) -> Path:
        return self.registry.layout / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def _serve(self, asked: Asked) -> None:
        match = re.fullmatch(r"/v2/[a-z0-9/._-]+/(manifests|blobs)/([^/?]+)(?:\?.*)?", asked.path)
        if not match:
            self.reply(404)
            return
        digest, kind = match[2], "application/octet-stream"
        if match[1] == "manifests":
            for entry in json.loads((self.registry.layout / "index.json").read_bytes())["manifests"]:
                if match[2] in (entry["digest"], entry["annotations"]["org.opencontainers.image.ref.name"]):
                    digest, kind = entry["digest"], entry["mediaType"]
        path = self._blob(digest)
        if not path.is_file():
            self.reply(404, b'{"errors": [{"code": "UNKNOWN", "message": "not known here"}]}')
            return
        body = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("range", ""))
        if wanted and self.registry.ranges:
            start = int(wanted[1])
            if start >= len(body):
                self.reply(416)
                return
            content_range = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.reply(206, body[start:], Content_Type=kind, Content_Range=content_range)
            return
        self.reply(200, body, Content_Type=kind)


@contextmanager
def fake_registry(layout: Path) -> Iterator[FakeRegistry]:
    """Serve the images of `layout`, under any repository name, on a free loopback port."""
    registry = FakeRegistry(layout)
    handler = type("BoundHandler", (Handler,), {"registry": registry})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    registry.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="fake registry")
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
