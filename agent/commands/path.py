"""Where a Unix socket may be."""

from __future__ import annotations

import os
from pathlib import Path

from agent.errors import InvalidConfig

MAX_PATH = 107
"""Bytes of a Unix socket's path (sun_path less the final NUL)."""


def check_path(path: Path) -> None:
    """Raises InvalidConfig if the path is too long for a Unix socket."""
    length = len(os.fsencode(path))
    if length > MAX_PATH:
        raise InvalidConfig(
            f"the path of a Unix socket may have {MAX_PATH} bytes, this has {length}",
            field=str(path),
            hint="choose a shorter run_dir",
        )
