"""The health document: what goes out from time to time, and how every document says when."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_TAKEN = ("device", "version", "boot_id", "uptime_s", "host", "embedded", "serving", "issues")
_SLOT = ("driver", "simulated", "present", "temperature_c", "power_w", "proven")


def timestamp(at: float | None = None) -> str:
    """RFC 3339 in UTC with milliseconds; `at` is unix time, now if None."""
    moment = datetime.fromtimestamp(time.time() if at is None else at, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def health_document(status: Mapping[str, Any], samples: Mapping[str, Any]) -> dict[str, Any]:
    """How the host is: the moving part of `status` and what the samplers read.

    `status` is the document of `Host.status()`; `samples` that of `Samplers.read()`. What is missing in either is left
    out, so that a broken sampler costs its own figures and no more.
    """
    document: dict[str, Any] = {"v": 1, "ts": timestamp()}
    document |= {key: status[key] for key in _TAKEN if key in status}
    slot = status.get("slot") or {}
    document["slot"] = {key: slot[key] for key in _SLOT if key in slot} | dict(samples.get("slot") or {})
    committed = status.get("committed")
    document["model"] = {key: committed.get(key) for key in ("name", "version", "digest")} if committed else None
    link = status.get("link") or {}
    if "outbox" in link:
        document["outbox"] = link["outbox"]
    document |= {key: value for key, value in samples.items() if key != "slot"}
    return document
