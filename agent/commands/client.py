"""The client of the admin socket: for the command line, without an event loop."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from agent.commands.path import check_path
from agent.errors import DeadlineExceeded, Forbidden, SlotdError, Unavailable, revive

MAX_ANSWER = 64 << 20
CONNECT = 5.0


class AdminClient:
    """Asks the slotd that listens at `path`. Each call has a connection of its own, so a restart does no harm."""

    def __init__(self, path: Path, *, timeout: float = 30.0) -> None:
        """`timeout`: seconds for a call. Nothing is connected yet."""
        self.path = path
        self.timeout = timeout
        self._open: set[socket.socket] = set()

    def call(self, name: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A command's result. Raises what the command raised; Unavailable if no slotd listens or it goes away,
        Forbidden if we may not ask, DeadlineExceeded."""
        until = time.monotonic() + self.timeout
        connection = self._ask(name, arguments or {})
        try:
            answer = next(self._lines(connection, until), None)
        finally:
            self._drop(connection)
        if answer is None:
            raise self._gone()
        return _result(answer)

    def watch(self, task: str | None = None) -> Iterator[dict[str, Any]]:
        """Documents of deployments as they change; with `task` until that one has ended. Raises as `call`."""
        connection = self._ask("watch", {} if task is None else {"task": task})
        try:
            for answer in self._lines(connection, None):
                document = _result(answer)
                if not answer.get("more"):
                    return
                yield document
            raise self._gone()
        finally:
            self._drop(connection)

    def close(self) -> None:
        """Ends whatever is open."""
        for connection in list(self._open):
            self._drop(connection)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, command: str, arguments: Mapping[str, Any]) -> socket.socket:
        check_path(self.path)
        line = json.dumps({"id": 1, "command": command, "arguments": dict(arguments)}, allow_nan=False) + "\n"
        connection = self._connect()
        try:
            connection.settimeout(self.timeout)
            connection.sendall(line.encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # it refuses us; why is in what it has sent
        except TimeoutError:
            self._drop(connection)
            raise self._late() from None
        except BaseException:
            self._drop(connection)
            raise
        return connection

    def _connect(self) -> socket.socket:
        until = time.monotonic() + min(CONNECT, self.timeout)
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(max(0.01, until - time.monotonic()))
                connection.connect(os.fspath(self.path))
            except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
                connection.close()
                raise Unavailable(
                    f"no slotd listens on {self.path}", hint="start it with `slotd run`, or name its socket"
                ) from None
            except PermissionError:
                connection.close()
                raise Forbidden(
                    f"we may not use {self.path}", hint="become a member of its group (slotd-admin), or use sudo"
                ) from None
            except (BlockingIOError, TimeoutError):  # its queue of connections is full
                connection.close()
                if time.monotonic() >= until:
                    raise self._late() from None
                time.sleep(0.02)
            except OSError as error:
                connection.close()
                raise Unavailable(f"{self.path} cannot be used: {error.strerror}") from error
            except BaseException:
                connection.close()
                raise
            else:
                self._open.add(connection)
                return connection

    def _lines(self, connection: socket.socket, until: float | None) -> Iterator[dict[str, Any]]:
        """What it answers, line by line, until it closes. `until`: monotonic, None for as long as it takes."""
        rest = bytearray()
        while True:
            try:
                connection.settimeout(None if until is None else max(0.001, until - time.monotonic()))
                data = connection.recv(1 << 16)
            except TimeoutError:
                raise self._late() from None
            except ConnectionResetError:
                return
            if not data:
                return
            rest += data
            if b"\n" in data:
                *lines, tail = bytes(rest).split(b"\n")
                rest = bytearray(tail)
                for line in lines:
                    yield self._parse(line)
            if len(rest) > MAX_ANSWER:
                raise SlotdError(f"{self.path} answers with more than {MAX_ANSWER} bytes")

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or "ok" not in answer:
            raise SlotdError(f"what listens on {self.path} does not answer as slotd does", hint="is it slotd?")
        return answer

    def _drop(self, connection: socket.socket) -> None:
        self._open.discard(connection)
        connection.close()

    def _gone(self) -> Unavailable:
        return Unavailable("slotd went away before it had answered", hint="look at its log, or at `slotd status`")

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"slotd did not answer within {self.timeout:g} s", hint="look at its log")


def _result(answer: dict[str, Any]) -> dict[str, Any]:
    if not answer["ok"]:
        error = answer.get("error")
        raise revive(error if isinstance(error, dict) else {})
    result = answer.get("result")
    return result if isinstance(result, dict) else {}
