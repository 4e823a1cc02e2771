"""What slotd tells systemd: ready, status, stopping, alive. Standard library only; nothing happens outside a service.

A notification is one datagram to the socket named by NOTIFY_SOCKET (sd_notify(3)). None of these raises: a service
manager that went away is no reason to stop serving.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable

MAX_STATUS = 1000


def notify(state: str, *, wait: float = 0.0) -> bool:
    """Send lines of NAME=value. Waits up to `wait` seconds if the manager's queue is full; whether it was sent."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name.startswith(("/", "@")):
        return False
    address = "\0" + name[1:] if name.startswith("@") else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(wait)
            sock.connect(address)
            sock.sendall(state.encode("utf-8", "replace"))
    except (OSError, ValueError):
        return False
    return True


def notify_ready(text: str = "") -> bool:
    """Tell that the ports are open. The one message that may wait: without it systemd ends the service."""
    lines = ["READY=1", f"MAINPID={os.getpid()}"]
    if text:
        lines.append(f"STATUS={_line(text)}")
    return notify("\n".join(lines), wait=1.0)


def notify_reloading() -> bool:
    """Tell that the configuration is being read again; `notify_ready` tells that this is over."""
    return notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}", wait=0.1)


def notify_status(text: str) -> bool:
    """Set the line that `systemctl status` shows."""
    return notify(f"STATUS={_line(text)}")


def notify_stopping(text: str = "stopping") -> bool:
    """Tell that an ordered stop has begun."""
    return notify(f"STOPPING=1\nSTATUS={_line(text)}", wait=0.1)


def extend_timeout(seconds: float) -> bool:
    """Ask for so much time from now on for the start or stop that is under way."""
    return notify(f"EXTEND_TIMEOUT_USEC={max(1, round(seconds * 1e6))}")


async def keep_waiting(bound: float, *, step: float = 10.0) -> None:
    """Asks for more time while a start or a stop is under way, for `bound` seconds at most, until cancelled.

    From the event loop: one that stands still asks for nothing and runs into the unit's own time-out.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + bound
    while (left := until - loop.time()) > 0:
        extend_timeout(min(3 * step, left + step))
        await asyncio.sleep(min(step, left))


def _line(text: str) -> str:
    return " ".join(text.split())[:MAX_STATUS]


class Watchdog:
    """Pings systemd at half of WATCHDOG_USEC, from the event loop: a loop that stands still does not ping.

    `healthy` may withhold the ping as well; it must not block.
    """

    def __init__(self, healthy: Callable[[], bool] = lambda: True) -> None:
        self._healthy = healthy
        self.interval = _interval()
        """Seconds between pings; 0 if systemd asked for none."""

    async def run(self) -> None:
        """Ping until cancelled; returns at once if systemd asked for no pings."""
        while self.interval > 0:
            if self._healthy():
                notify("WATCHDOG=1")
            await asyncio.sleep(self.interval)


def _interval() -> float:
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return max(0, int(os.environ.get("WATCHDOG_USEC", "0"))) / 2e6
    except ValueError:
        return 0.0
