"""Clients' bearer keys: two at a time, so that one is replaced while clients still have the other.

A file with a key on each line, the newest first. It is looked at once a second and may be replaced while slotd runs;
one that is wrong changes nothing but is told. Source: RFC 6750.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

import structlog

from agent.errors import InvalidConfig, Unauthenticated
from agent.health.issues import Issues

log = structlog.get_logger(__name__)

MOST = 2
EVERY = 1.0
"""Seconds between two looks at the file."""
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{24,256}")
_SIZE = 4096
_OPEN = ("/grpc.health.v1.Health/",)
"""Calls that need no key: what asks whether a host is well is rarely told secrets."""
_Mark = tuple[int, int, int, int]


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file. Raises InvalidConfig, which never shows one; blocks."""
    try:
        # A pipe would keep us waiting for who writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise _fault(path, "is no file", "name a file with a key on each line")
            text = file.read(_SIZE + 1).decode("ascii")
    except OSError as error:
        raise _fault(path, f"cannot be read: {error.strerror}", f"slotd keys --rotate --file {path}") from None
    except UnicodeDecodeError:
        raise _fault(path, "is no text", f"a key on each line, at most {MOST}") from None
    if stat.S_IMODE(mode) & 0o007:
        raise _fault(path, "is open to everybody", f"chmod o= {path}")
    if len(text) > _SIZE:
        raise _fault(path, f"is larger than {_SIZE} bytes", f"a key on each line, at most {MOST}")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    keys = [(number, line) for number, line in lines if line and not line.startswith("#")]
    for number, key in keys:
        if not _KEY.fullmatch(key):
            raise _fault(path, f"has no key in line {number}", "24 to 256 letters, digits and . _ ~ + / = -")
    if not 1 <= len(keys) <= MOST:
        raise _fault(path, f"has {len(keys)} keys", f"one on each line, at most {MOST}")
    return tuple(key for _, key in keys)


def fingerprint(key: str) -> str:
    """What may be shown of a key."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _fault(path: Path, text: str, hint: str) -> InvalidConfig:
    return InvalidConfig(f"{path} {text}", field="serving.keys", hint=hint)


class Keys:
    """Those that are good now. `load` before the first check; then `refresh` every EVERY seconds."""

    def __init__(self, path: Path, issues: Issues) -> None:
        self._path = path
        self._issues = issues
        self._good: tuple[bytes, ...] = ()
        self._seen: _Mark | None = None

    async def load(self) -> None:
        """Reads the file. Until there is a good one, nobody has a key."""
        self._seen, found = await asyncio.to_thread(_look, self._path)
        if isinstance(found, InvalidConfig):
            kept = "the keys from before stay good" if self._good else "requests over TCP are refused"
            self._issues.raise_("serving-keys", "error", f"{found}: {kept}", found.hint)
            return
        good = tuple(hashlib.sha256(key.encode()).digest() for key in found)
        if good != self._good:
            log.info("keys_read", path=str(self._path), fingerprints=[fingerprint(key) for key in found])
        self._good = good
        self._issues.clear("serving-keys")

    async def refresh(self) -> None:
        """Reads it again if it is another one."""
        if await asyncio.to_thread(_mark, self._path) != self._seen:
            await self.load()

    def check(self, path: str, metadata: Iterable[tuple[str, str]]) -> None:
        """Raises Unauthenticated unless the call has a good key, as `Bearer KEY` or, as older clients do, bare."""
        if path.startswith(_OPEN):
            return
        sent = [value for name, value in metadata if name == "authorization"]
        if len(sent) != 1:
            raise Unauthenticated(
                "the request has more than one key" if sent else "the request has no key",
                field="authorization",
                hint="send `authorization: Bearer KEY` as a header, or as gRPC's metadata",
            )
        scheme, _, key = sent[0].strip().rpartition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        fits = [hmac.compare_digest(digest, good) for good in self._good]  # all of them, whichever it is
        if scheme.strip().lower() not in ("", "bearer") or not any(fits):
            raise Unauthenticated(
                "the key is not one of this host's", field="authorization", hint="`slotd keys` shows which are good"
            )


def _look(path: Path) -> tuple[_Mark | None, tuple[str, ...] | InvalidConfig]:
    mark = _mark(path)  # before: what is written meanwhile is another mark
    try:
        return mark, read_keys(path)
    except InvalidConfig as fault:
        return mark, fault


def _mark(path: Path) -> _Mark | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode
