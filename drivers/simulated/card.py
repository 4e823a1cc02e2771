"""The simulated card itself: a folder that outlives processes, as hardware does."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from drivers.base import DriverError

DEFAULT_SHELL = "9926ab6d6c925a68aabca7d84c545738"
_COUNTERS = struct.Struct("<5Q")


@dataclass(frozen=True)
class Programmed:
    """What is in the slot: the id that the card reads back, and (known to the simulation only) the file's sha256."""

    accelerator: str | None = None
    bitstream_sha256: str | None = None


class Counters(NamedTuple):
    """How often each thing was done since the folder was made; `busy_ns` is the device's computing time."""

    programmings: int = 0
    opens: int = 0
    inferences: int = 0
    resets: int = 0
    busy_ns: int = 0


class Card:
    """The folder of one card. Methods raise DriverError SLOT_FAILED if the folder cannot be used."""

    def __init__(self, folder: Path, *, present: bool = True) -> None:
        self.folder = folder
        self._present = present

    @property
    def present(self) -> bool:
        """Whether the card is there: not when the folder has a file `absent`, even while a runtime is open."""
        return self._present and not (self.folder / "absent").exists()

    def require(self) -> None:
        """Raises DriverError DEVICE_ABSENT."""
        if not self.present:
            raise DriverError("DEVICE_ABSENT", "the simulated card is absent", hint="remove the file `absent`")

    def open(self) -> int:
        """Take the card for oneself; closing the descriptor (or dying) lets go. Raises DriverError DEVICE_BUSY."""
        self.require()
        with self._folder():
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.folder / "port", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise DriverError(
                "DEVICE_BUSY",
                f"the simulated card in {self.folder} is open in another process",
                hint="wait until the executor that holds it has ended",
            ) from None
        return fd

    def programmed(self) -> Programmed:
        """What is in the slot now."""
        with self._folder():
            try:
                document = json.loads((self.folder / "state.json").read_bytes())
            except FileNotFoundError:
                return Programmed()
        return Programmed(document["accelerator"], document["bitstream_sha256"])

    def put(self, programmed: Programmed) -> None:
        """Change what is in the slot, at one instant; only while the card is open."""
        with self._folder():
            partial = self.folder / f".state.{os.getpid()}.{time.monotonic_ns()}"
            partial.write_text(json.dumps(asdict(programmed)))
            partial.replace(self.folder / "state.json")

    def counters(self) -> Counters:
        """The counters as they stand."""
        with self._folder():
            try:
                data = (self.folder / "counters").read_bytes()
            except FileNotFoundError:
                return Counters()
        return Counters(*_COUNTERS.unpack(data))

    def count(
        self, *, programmings: int = 0, opens: int = 0, inferences: int = 0, resets: int = 0, busy_ns: int = 0
    ) -> None:
        """Add to the counters; only while the card is open, so there is one writer."""
        more = (programmings, opens, inferences, resets, busy_ns)
        with self._folder():
            fd = os.open(self.folder / "counters", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                data = os.pread(fd, _COUNTERS.size, 0) or bytes(_COUNTERS.size)
                os.pwrite(fd, _COUNTERS.pack(*map(sum, zip(_COUNTERS.unpack(data), more, strict=True))), 0)
            finally:
                os.close(fd)

    @contextmanager
    def _folder(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise DriverError(
                "SLOT_FAILED", f"the simulated card's folder {self.folder} cannot be used: {error}"
            ) from None
