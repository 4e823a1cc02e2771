"""The real worker, but an input of 13 ends the process, as a fault in a native library would."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from agent.executor import sessions, worker

POISON = 13.0
run = sessions.Session.run


def frail(self: sessions.Session, feeds: Mapping[str, Any]) -> dict[str, Any]:
    if any(
        isinstance(value, np.ndarray) and value.dtype.kind == "f" and (value == POISON).any()
        for value in feeds.values()
    ):
        os.abort()
    return run(self, feeds)


sessions.Session.run = frail  # type: ignore[method-assign]
sys.exit(worker.main())
