"""`python -I -m drivers.helper`, started by systemd with its socket as descriptor 3 (sd_listen_fds(3))."""

from __future__ import annotations

import os
import socket
import sys

from drivers.helper.server import Server, tell
from drivers.helper.settings import read_settings

_FIRST = 3


def main() -> int:
    """The exit code."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        tell(3, "not_activated", error="this is started by slotd-slot-helper.socket")
        return 64
    os.set_inheritable(_FIRST, False)
    with socket.socket(fileno=_FIRST) as listener:
        Server(listener, read_settings).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
