"""The driver of the simulated card."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from drivers.base import Driver, DriverError, Needs, Numerics, SlotHealth, SlotStage, SlotState, Wanted
from drivers.simulated.bitstream import Bitstream, read_bitstream
from drivers.simulated.card import DEFAULT_SHELL, Card, Programmed
from drivers.simulated.faults import Fault, cure, hang, take
from drivers.simulated.runtime import SimulatedRuntime

_LOAD_C = 20.0
_LOAD_W = 30.0
_HOT_C = 105.0


class Simulated(Driver):
    """A card that lives in a folder. Options:

    - `device`: the folder; made on demand.
    - `interface`: the shell's id. `present`: false for a host without the card. `runtime`: false for a card that no
      software here can compute on.
    - `program_time`, `latency`: seconds, for programming and for each inference. `depth`: submissions ahead.
    - `temperature`, `power`: °C and W at rest; load adds up to 20 °C and 30 W.
    - `secret`: answers carry a mark that only this card can make (see drivers/simulated/mark.py).
    """

    name: ClassVar[str] = "simulated"
    simulated: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        left = dict(options)
        device = left.pop("device", None)
        if not isinstance(device, str | Path) or not str(device):
            raise ValueError("option device: must name the folder that is the simulated card")
        shell = str(left.pop("interface", DEFAULT_SHELL)).replace("-", "").lower()
        if not re.fullmatch(r"[0-9a-f]{32}", shell):
            raise ValueError(f"option interface: {shell!r} is not an id of 32 hex digits")
        self._shell = shell
        self._card = Card(Path(device), present=_flag(left, "present", True))
        self._runtime = _flag(left, "runtime", True)
        self._secret = _flag(left, "secret", False)
        self._program_time = _number(left, "program_time", 0.0, 0.0, 3600.0)
        self._latency = _number(left, "latency", 0.0, 0.0, 3600.0)
        self._temperature = _number(left, "temperature", 45.0, -50.0, 200.0)
        self._power = _number(left, "power", 25.0, 0.0, 1000.0)
        depth = left.pop("depth", 2)
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= 64:
            raise ValueError("option depth: must be a whole number from 1 to 64")
        self._depth = depth
        if left:
            raise ValueError(f"option {sorted(left)[0]}: the simulated slot has none of that name")
        self._load_since: tuple[float, int | None] = (time.monotonic(), None)

    @property
    def numerics(self) -> Numerics:
        return Numerics()

    @property
    def needs(self) -> Needs:
        return Needs(write=(self._card.folder,) if self._card.present else ())

    def probe(self) -> SlotState:
        if not self._card.present:
            return SlotState(False, detail="the simulated card is absent")
        accelerator = self._card.programmed().accelerator
        fault = self._meet("probe", accelerator)
        if fault is not None and fault.kind == "wrong_id":
            accelerator = _other(accelerator)
        return SlotState(True, self._shell, accelerator, "simulated")

    def health(self) -> SlotHealth:
        if not self._card.present:
            return SlotHealth()
        load = self._load()
        temperature, power = self._temperature + _LOAD_C * load, self._power + _LOAD_W * load
        fault = take(self._card.folder, "health", self._card.programmed().accelerator)
        if fault is not None and fault.kind == "hot":
            return SlotHealth(_HOT_C, power, True, ("simulated: temperature trip",))
        if fault is not None:
            self._suffer(fault, "SLOT_FAILED")
        return SlotHealth(temperature, power)

    def check(self, bitstream: int, wanted: Wanted) -> None:
        self._card.require()
        self._check(bitstream, wanted)

    def program(self, bitstream: int, wanted: Wanted) -> None:
        port = self._card.open()
        try:
            new = self._check(bitstream, wanted)
            self._card.put(Programmed())  # from here on a programming that is cut off leaves an empty slot
            self._card.count(programmings=1)
            fault = take(self._card.folder, "program", new.accelerator)
            time.sleep(self._program_time)
            if fault is not None:
                self._suffer(fault, "PROGRAM_FAILED")
            wrong = fault is not None and fault.kind == "wrong_id"
            self._card.put(Programmed(_other(new.accelerator) if wrong else new.accelerator, new.sha256))
            self._require(wanted.accelerator or new.accelerator)
        finally:
            os.close(port)

    def reset(self, level: str) -> None:
        """`port` keeps the accelerator, `function` loses it."""
        if level not in ("port", "function"):
            raise ValueError(f"no reset of level {level!r}; port or function")
        port = self._card.open()
        try:
            self._meet("reset", self._card.programmed().accelerator)
            self._card.count(resets=1)
            cure(self._card.folder, level)
            if level == "function":
                self._card.put(Programmed())
        finally:
            os.close(port)

    def open_runtime(self, wanted: Wanted, stages: Sequence[SlotStage]) -> SimulatedRuntime:
        self._card.require()
        if not self._runtime:
            raise DriverError(
                "NO_RUNTIME",
                "nothing here can compute on the accelerator",
                hint="install the accelerator's runtime, or mark the stage `on: cpu`",
            )
        port = self._card.open()
        try:
            self._fits(wanted.interface)
            if wanted.accelerator is not None:
                self._require(wanted.accelerator)
            self._meet("open", self._card.programmed().accelerator, tuple(str(stage.file) for stage in stages))
            self._card.count(opens=1)
            return SimulatedRuntime(
                self._card, port, stages, latency=self._latency, depth=self._depth, secret=self._secret
            )
        except BaseException:
            os.close(port)
            raise

    def _check(self, fd: int, wanted: Wanted) -> Bitstream:
        new = read_bitstream(fd)
        self._fits(new.interface)
        self._fits(wanted.interface)
        if wanted.bitstream_sha256 not in (None, new.sha256):
            raise DriverError("INCOMPATIBLE_BITSTREAM", f"the bitstream is {new.sha256}, not {wanted.bitstream_sha256}")
        if wanted.accelerator not in (None, new.accelerator):
            raise DriverError(
                "WRONG_ACCELERATOR",
                f"the bitstream brings accelerator {new.accelerator}, the model needs {wanted.accelerator}",
                hint="the image's model.yaml and bitstream do not belong together",
            )
        return new

    def _fits(self, interface: str | None) -> None:
        if interface not in (None, self._shell):
            raise DriverError(
                "INCOMPATIBLE_BITSTREAM",
                f"made for shell {interface}, this host has shell {self._shell}",
                hint="deploy an image that was built for this shell",
            )

    def _require(self, accelerator: str) -> None:
        """What reads back must be the accelerator wanted."""
        there = self._card.programmed().accelerator
        if there != accelerator:
            raise DriverError("WRONG_ACCELERATOR", f"the slot holds accelerator {there or 'none'}, not {accelerator}")

    def _meet(self, at: str, accelerator: str | None, files: tuple[str, ...] = ()) -> Fault | None:
        fault = take(self._card.folder, at, accelerator, files)
        if fault is not None:
            self._suffer(fault, "SLOT_FAILED")
        return fault

    def _suffer(self, fault: Fault, code: str) -> None:
        if fault.kind == "death":
            os.abort()
        if fault.kind == "hang":
            hang(self._card.folder, fault)
        elif fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind == "hot":
            raise DriverError("OVER_TEMPERATURE", "the simulated card is too hot")
        elif fault.kind == "error":
            raise DriverError(fault.code or code, "the simulated card reports an error")

    def _load(self) -> float:
        """The share of time that the device was busy since the last call."""
        since, before = self._load_since
        now, busy = time.monotonic(), self._card.counters().busy_ns
        self._load_since = (now, busy)
        if before is None or now <= since:
            return 0.0
        return min(1.0, max(0.0, (busy - before) / 1e9 / (now - since)))


def _flag(options: dict[str, Any], name: str, default: bool) -> bool:
    value = options.pop(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"option {name}: must be true or false")
    return value


def _number(options: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = options.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"option {name}: must be a number from {low:g} to {high:g}")
    return float(value)


def _other(accelerator: str | None) -> str:
    """An id that is surely not this one."""
    return format((int(accelerator or "0", 16) ^ 1) or 2, "032x")
