"""The socket: who may ask, how much, for how long."""

from __future__ import annotations

import array
import contextlib
import json
import os
import pwd
import select
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from drivers.helper import MAX_LINE
from drivers.helper.settings import BadSettings, Settings
from drivers.helper.verbs import Refused, Verbs

IDLE = 30.0
"""Seconds without a connection after which it ends; the next one starts it again."""
PATIENCE = 5.0
"""Seconds that a peer may take to send a line, or to take an answer."""
MAX_REQUESTS = 16
"""On one connection."""


class Server:
    """One connection at a time, one request at a time: devices are no place for two hands."""

    def __init__(self, listener: socket.socket, load: Callable[[], Settings]) -> None:
        """`load` reads the settings, anew for each connection. It raises BadSettings."""
        self._listener = listener
        self._load = load

    def run(self, *, idle: float = IDLE) -> None:
        """Until nobody has come for `idle` seconds."""
        self._listener.setblocking(False)
        while select.select([self._listener], [], [], idle)[0]:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            with connection:
                connection.settimeout(PATIENCE)
                try:
                    self._serve(connection)
                except (TimeoutError, ConnectionError) as error:
                    tell(5, "connection_dropped", error=str(error) or type(error).__name__)

    def _serve(self, connection: socket.socket) -> None:
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            settings = self._load()
            self._admit(uid, settings)
        except (BadSettings, Refused) as error:
            refused = error if isinstance(error, Refused) else Refused("CONFIG_INVALID", str(error))
            tell(4, "connection_refused", uid=uid, pid=pid, code=refused.code, error=refused.message)
            _answer(connection, None, refused.as_dict())
            return
        verbs = Verbs(settings)
        lines = Lines(connection)
        for _ in range(MAX_REQUESTS):
            try:
                line, files = lines.next()
            except Refused as error:
                _answer(connection, None, error.as_dict())
                return
            try:
                if line is None:
                    return
                self._request(connection, verbs, line, files, pid)
            finally:
                for file in files:
                    os.close(file)

    @staticmethod
    def _admit(uid: int, settings: Settings) -> None:
        try:
            wanted = pwd.getpwnam(settings.user).pw_uid
        except KeyError:
            raise Refused("CONFIG_INVALID", f"there is no user {settings.user}", "systemd-sysusers makes it") from None
        if uid != wanted:
            raise Refused("FORBIDDEN", f"uid {uid} may not use the slot helper; only {settings.user} may")

    def _request(self, connection: socket.socket, verbs: Verbs, line: bytes, files: list[int], pid: int) -> None:
        number = verb = device = None
        try:
            document = _parse(line)
            number, verb, device = document.get("id"), document.get("verb"), document.get("device")
            if len(files) > 1:
                raise Refused("INVALID_ARGUMENT", "one file at most")
            result = verbs.run(verb, device, document.get("arguments", {}), files[0] if files else None)
        except Refused as error:
            tell(4, "refused", pid=pid, verb=_short(verb), device=_short(device), code=error.code, error=error.message)
            _answer(connection, number, error.as_dict())
        else:
            tell(6, "done", pid=pid, verb=verb, device=device, result=result)
            _answer(connection, number, None, result)


class Lines:
    """Lines from a connection, each with the descriptors that came with it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def next(self) -> tuple[bytes | None, list[int]]:
        """None at the end. Raises Refused for a line that is too long, TimeoutError."""
        files = array.array("i")
        try:
            while b"\n" not in self._buffer:
                if len(self._buffer) > MAX_LINE:
                    raise Refused("INVALID_ARGUMENT", f"a line has at most {MAX_LINE} bytes")
                data, extra, flags, _ = self._connection.recvmsg(
                    MAX_LINE, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC
                )
                for level, kind, content in extra:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        files.frombytes(content[: len(content) // 4 * 4])
                if flags & socket.MSG_CTRUNC:
                    raise Refused("INVALID_ARGUMENT", "too many descriptors")
                if not data:
                    return None, list(files)
                self._buffer += data
            line, _, self._buffer = self._buffer.partition(b"\n")
            if len(line) > MAX_LINE:
                raise Refused("INVALID_ARGUMENT", f"a line has at most {MAX_LINE} bytes")
        except BaseException:
            for file in files:
                os.close(file)
            raise
        return line, list(files)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        raise Refused("INVALID_ARGUMENT", "the line is not JSON") from None
    if not isinstance(document, dict):
        raise Refused("INVALID_ARGUMENT", "a request is a JSON object")
    for key in document:
        if key not in ("id", "verb", "device", "arguments"):
            raise Refused("INVALID_ARGUMENT", f"{key[:60]!r}: no such field")
    if not isinstance(document.get("id"), int | str | None) or len(str(document.get("id"))) > 64:
        raise Refused("INVALID_ARGUMENT", "id: a whole number or a short text")
    return document


def _answer(
    connection: socket.socket, number: Any, error: dict[str, Any] | None, result: dict[str, Any] | None = None
) -> None:
    reply: dict[str, Any] = {"id": number, "ok": error is None}
    reply["result" if error is None else "error"] = result if error is None else error
    connection.sendall(json.dumps(reply).encode() + b"\n")


def _short(value: Any) -> str:
    return str(value)[:60]


def tell(level: int, event: str, **more: Any) -> None:
    """One line for the journal, with its priority (sd-daemon(3))."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"<{level}>{json.dumps({'event': event, **more}, default=str)}\n")
        sys.stderr.flush()
