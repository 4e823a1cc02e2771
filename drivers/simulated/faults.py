"""Faults on demand. They live in the card's folder, so that they span processes; each is used up exactly once."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from drivers.base import DriverError

PLACES = ("program", "open", "infer", "probe", "health", "reset")
KINDS = ("error", "wrong_id", "wrong_result", "stale_result", "hang", "death", "slow", "hot")
LEVELS = (None, "port", "function")
_ONLY_AT = {"wrong_id": ("program", "probe"), "wrong_result": ("infer",), "stale_result": ("infer",)}
_POLL = 0.02


@dataclass(frozen=True)
class Fault:
    """One fault: where (`at`), which (`kind`), after `skip` matching calls, `count` times (None: for ever).

    `accelerator` limits it to that accelerator, `model` to stages whose file path contains it. `seconds` is how much
    longer `slow` takes; `code` what `error` raises; a reset of level `until` (or a higher one) ends the fault.
    A `hang` lasts until the fault is cleared. `id`, `seen` and `fired` are the card's own.
    """

    at: str
    kind: str
    skip: int = 0
    count: int | None = 1
    accelerator: str | None = None
    model: str | None = None
    seconds: float = 1.0
    code: str | None = None
    until: str | None = None
    id: str = ""
    seen: int = 0
    fired: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a fault that could never happen."""
        if self.at not in PLACES or self.kind not in KINDS or self.at not in _ONLY_AT.get(self.kind, PLACES):
            raise ValueError(f"no fault {self.kind!r} at {self.at!r}; places: {PLACES}, kinds: {KINDS}")
        if self.skip < 0 or (self.count is not None and self.count < 1) or self.seconds < 0:
            raise ValueError("skip and seconds must be at least 0, count at least 1 or null")
        if self.until not in LEVELS:
            raise ValueError(f"until must be one of {LEVELS}")

    def matches(self, at: str, accelerator: str | None, files: tuple[str, ...]) -> bool:
        """Whether a call is one of those that this fault counts."""
        return (
            self.at == at
            and self.accelerator in (None, accelerator)
            and (self.model is None or any(self.model in file for file in files))
        )

    @property
    def due(self) -> bool:
        return self.seen > self.skip and (self.count is None or self.fired < self.count)


def inject(device: Path | str, *faults: Fault | Mapping[str, Any]) -> None:
    """Add faults to the card in the folder `device`. Raises ValueError for an unknown place, kind or field."""
    known = {field.name for field in fields(Fault)}
    fresh = []
    for fault in faults:
        if not isinstance(fault, Fault):
            if unknown := set(fault) - known:
                raise ValueError(f"a fault has no field {sorted(unknown)[0]!r}; fields: {', '.join(sorted(known))}")
            fault = Fault(**fault)
        fresh.append(replace(fault, id=secrets.token_hex(8), seen=0, fired=0))
    folder = Path(device)
    folder.mkdir(parents=True, exist_ok=True)
    with _changing(folder) as held:
        held.extend(fresh)


def clear(device: Path | str) -> None:
    """End all faults of the card in the folder `device`; what hangs goes on."""
    folder = Path(device)
    if folder.is_dir():
        with _changing(folder) as held:
            held.clear()


def cure(folder: Path, level: str) -> None:
    """End the faults that a reset of this level ends."""
    if (folder / "faults.json").exists():
        with _changing(folder) as held:
            rank = LEVELS.index(level)
            held[:] = [fault for fault in held if fault.until is None or LEVELS.index(fault.until) > rank]


def take(folder: Path, at: str, accelerator: str | None = None, files: tuple[str, ...] = ()) -> Fault | None:
    """Count one call; the fault that it meets, if any. Raises DriverError if the folder cannot be used."""
    if not (folder / "faults.json").exists():
        return None
    met: Fault | None = None
    try:
        with _changing(folder) as held:
            for index, fault in enumerate(held):
                if not fault.matches(at, accelerator, files):
                    continue
                seen = replace(fault, seen=fault.seen + 1)
                if met is None and seen.due:
                    met = seen = replace(seen, fired=seen.fired + 1)
                held[index] = seen
    except (OSError, ValueError, TypeError) as error:
        raise DriverError("SLOT_FAILED", f"the simulated card's faults in {folder} cannot be used: {error}") from None
    return met


def hang(folder: Path, fault: Fault, stop: Callable[[float], bool] | None = None) -> bool:
    """Wait until the fault is cleared (True), or `stop(seconds)`, which waits that long, says so (False)."""
    pause = stop or threading.Event().wait
    while any(fault.id == held.id for held in _read(folder)):
        if pause(_POLL):
            return False
    return True


def _read(folder: Path) -> list[Fault]:
    try:
        document = json.loads((folder / "faults.json").read_bytes())
    except FileNotFoundError:
        return []
    return [Fault(**fault) for fault in document]


@contextmanager
def _changing(folder: Path) -> Iterator[list[Fault]]:
    lock = os.open(folder / "faults.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = _read(folder)
        held = list(before)
        yield held
        if held != before:
            _write(folder, held)
    finally:
        os.close(lock)


def _write(folder: Path, held: list[Fault]) -> None:
    path = folder / "faults.json"
    if not held:
        path.unlink(missing_ok=True)
        return
    partial = folder / f".faults.{os.getpid()}.{time.monotonic_ns()}"
    partial.write_text(json.dumps([asdict(fault) for fault in held]))
    partial.replace(path)
