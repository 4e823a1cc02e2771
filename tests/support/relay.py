"""A slow line: passes TCP connections on, at a bounded rate, to an address that may change."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Relay:
    """Use it as a context manager. `address` stays; `target` is where new connections go, None: nowhere."""

    def __init__(self, target: str | None, *, rate: float = 1e9) -> None:
        self.target = target
        self.rate = rate
        """Bytes each second, of what comes back."""
        self.passed = 0
        """Bytes that have come back."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            if self.target is None:
                return
            host, _, port = self.target.partition(":")
            with socket.create_connection((host, int(port)), 5) as far:
                far.settimeout(None)
                threading.Thread(target=self._upwards, args=(near, far), daemon=True).start()
                while data := far.recv(16384):
                    near.sendall(data)
                    self.passed += len(data)
                    time.sleep(len(data) / self.rate)

    @staticmethod
    def _upwards(near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(16384):
                far.sendall(data)
            far.shutdown(socket.SHUT_WR)
