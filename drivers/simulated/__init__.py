"""A simulated slot: for the demo, the embedded host and the tests. As strict as a real card, and it fails on demand."""

from drivers.simulated.bitstream import Bitstream, read_bitstream, write_bitstream
from drivers.simulated.card import DEFAULT_SHELL, Card, Counters
from drivers.simulated.driver import Simulated
from drivers.simulated.faults import Fault, clear, inject
from drivers.simulated.mark import is_marked

__all__ = [
    "DEFAULT_SHELL",
    "Bitstream",
    "Card",
    "Counters",
    "Fault",
    "Simulated",
    "clear",
    "inject",
    "is_marked",
    "read_bitstream",
    "write_bitstream",
]
