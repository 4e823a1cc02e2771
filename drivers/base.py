"""What a driver is: code for one kind of slot.

Each method says in which process it runs. Nothing here knows the agent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[np.generic]]
Compute = Callable[[Arrays], dict[str, npt.NDArray[np.generic]]]


class DriverError(Exception):
    """A slot that does not do what it should.

    `code` is one of PROGRAM_FAILED, PROGRAM_TIMEOUT, WRONG_ACCELERATOR, INCOMPATIBLE_BITSTREAM, DEVICE_BUSY,
    DEVICE_ABSENT, DEVICE_HUNG, DEVICE_STUCK, NO_RUNTIME, OVER_TEMPERATURE, or SLOT_FAILED for anything else.
    """

    def __init__(self, code: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


@dataclass(frozen=True)
class SlotState:
    """What a slot says of itself. Ids are 32 lower-case hex digits, None when it cannot tell."""

    present: bool
    shell: str | None = None
    accelerator: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class SlotHealth:
    """Sensors: degrees Celsius and watts; `errors` are the device's own words."""

    temperature_c: float | None = None
    power_w: float | None = None
    tripped: bool = False
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Numerics:
    """The arithmetic of the slot. `exact` is float32 as the CPU has it; else the CPU reference is run with it."""

    name: str = "float32"
    exact: bool = True


@dataclass(frozen=True)
class Wanted:
    """What must be in the slot: ids, and the sha256 (hex) of the bitstream that brings it."""

    interface: str | None = None
    accelerator: str | None = None
    bitstream_sha256: str | None = None


@dataclass(frozen=True)
class Needs:
    """What a driver's code, and its runtime, use of the host; its children get this and nothing more.

    `slotd doctor` shows it. A folder stands for all that is in it. What is not there grants nothing.
    """

    read: tuple[Path, ...] = ()
    """Files of the runtime and of the device (libraries and tables in unusual places, sysfs)."""
    write: tuple[Path, ...] = ()
    """Folders for its own files; one that is not there is made if the folder around it is."""
    devices: tuple[Path, ...] = ()
    """Device nodes, or folders of them: read, write, ioctl, mmap."""
    execute: tuple[Path, ...] = ()
    """Programs that it starts. They run in the same sandbox; scripts need their interpreter here, too."""
    connect: tuple[Path, ...] = ()
    """Unix sockets that it connects to. The kernel cannot be told which, so it may then connect to any."""
    address_space: int = 0
    """Bytes of private memory that it maps beyond executor.memory."""


@dataclass(frozen=True)
class SlotStage:
    """A stage that the slot computes: its graph file, and the names and shapes (-1 any) around it.

    `compute` runs the graph on the CPU. Only a simulated slot calls it.
    """

    index: int
    file: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    compute: Callable[[], Compute]


@dataclass(frozen=True)
class Completion:
    """The end of one submission: outputs by name, or the error."""

    ticket: int
    outputs: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    error: DriverError | None = None


class Runtime(Protocol):
    """Computes stages on the slot. Lives in an executor; used from one thread."""

    @property
    def depth(self) -> int:
        """How many submissions may be outstanding; at least 2, so that the device never waits."""

    def submit(self, ticket: int, stage: int, inputs: Arrays) -> None:
        """Start a computation; never blocks while fewer than `depth` are outstanding. Inputs stay until it ends."""

    def fileno(self) -> int:
        """A descriptor that polls readable while completions are waiting."""

    def completions(self) -> Sequence[Completion]:
        """Those that have ended since the last call; never blocks."""

    def close(self) -> None:
        """Let go of the device."""


class Driver(ABC):
    """One slot of one kind. Made from `slot.options` of the config; must not touch the device in its constructor."""

    name: ClassVar[str]
    simulated: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError naming the option that is wrong."""

    @property
    @abstractmethod
    def numerics(self) -> Numerics:
        """The slot's arithmetic."""

    @property
    def needs(self) -> Needs:
        """What `check`, `program`, `reset` and the runtime use of the host."""
        return Needs()

    @abstractmethod
    def probe(self) -> SlotState:
        """Agent, in a thread; at most a second. An absent slot is a state, not an error."""

    @abstractmethod
    def health(self) -> SlotHealth:
        """Agent, in a thread; at most a second."""

    @abstractmethod
    def check(self, bitstream: int, wanted: Wanted) -> None:
        """Programmer: whether the bitstream (an open descriptor) fits shell and `wanted`. Raises DriverError."""

    @abstractmethod
    def program(self, bitstream: int, wanted: Wanted) -> None:
        """Programmer: put the bitstream into the slot and read the accelerator id back. Raises DriverError."""

    @abstractmethod
    def reset(self, level: str) -> None:
        """Programmer: `port` or `function`. Raises DriverError."""

    @abstractmethod
    def open_runtime(self, wanted: Wanted, stages: Sequence[SlotStage]) -> Runtime:
        """Executor: open the device exclusively. Raises DriverError: NO_RUNTIME, DEVICE_BUSY, WRONG_ACCELERATOR …"""
