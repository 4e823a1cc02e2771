"""How a driver asks the slot helper. Blocks: for the programmer, or a thread."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from drivers.base import DriverError
from drivers.helper import SOCKET

_CODES = frozenset({"DEVICE_BUSY", "DEVICE_ABSENT", "DEVICE_HUNG", "PROGRAM_FAILED", "PROGRAM_TIMEOUT"})
_MAX_ANSWER = 64 << 10


def call(
    verb: str,
    device: str | None = None,
    *,
    file: int | None = None,
    timeout: float = 30.0,
    path: Path = SOCKET,
    **arguments: Any,
) -> dict[str, Any]:
    """The helper's result for one verb. `file`: the descriptor that goes along. `timeout` in seconds.

    Raises DriverError: DEVICE_BUSY, DEVICE_ABSENT, DEVICE_HUNG, PROGRAM_FAILED, PROGRAM_TIMEOUT as the helper says,
    SLOT_FAILED for what it refuses or if it cannot be reached.
    """
    request = {"id": 1, "verb": verb, "device": device, "arguments": arguments}
    line = json.dumps(request).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(timeout)
            connection.connect(os.fspath(path))
            try:
                socket.send_fds(connection, [line], [] if file is None else [file])
            except BrokenPipeError:
                pass  # it has refused us already, and says why
            answer = _line(connection)
    except TimeoutError:
        code = "PROGRAM_TIMEOUT" if verb == "load" else "DEVICE_HUNG"
        raise DriverError(code, f"the slot helper did not answer {verb} within {timeout:g} s") from None
    except OSError as error:
        raise DriverError(
            "SLOT_FAILED",
            f"the slot helper cannot be reached at {path}: {error.strerror or error}",
            hint="systemctl status slotd-slot-helper.socket; only the user slotd may use it",
        ) from None
    return _result(answer)


def _line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(4096)
        if not more or len(data) > _MAX_ANSWER:
            raise ConnectionResetError(104, "it ended without an answer")
        data += more
    return data


def _result(answer: bytes) -> dict[str, Any]:
    try:
        document = json.loads(answer)
        if document["ok"]:
            return dict(document["result"])
        error = document["error"]
        code, message, hint = error["code"], error["message"], error.get("hint")
    except (ValueError, KeyError, TypeError) as error:
        raise DriverError("SLOT_FAILED", f"the slot helper's answer makes no sense: {error}") from None
    if code in _CODES:
        raise DriverError(code, message, hint=hint)
    raise DriverError("SLOT_FAILED", f"the slot helper: {message} ({code})", hint=hint)
