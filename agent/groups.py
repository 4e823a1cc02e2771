"""Groups of the host that may use slotd's sockets."""

from __future__ import annotations

import grp
import os
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

ADMIN = "slotd-admin"
"""May give commands."""
CLIENTS = "slotd-clients"
"""May send requests."""


def give(path: Path, group: str) -> None:
    """Gives a file of ours to a group; where there is no such group, or we are not in it, it keeps our own. Blocks."""
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    except KeyError:
        log.info("no such group: the socket keeps our own", group=group)
    except PermissionError as error:
        log.warning("the socket could not be given to its group", group=group, error=str(error))
