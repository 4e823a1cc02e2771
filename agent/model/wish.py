"""What somebody wants the slot to hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wish:
    """One request for a deployment. `digest` pins the image; None fields take what the configuration says."""

    reference: str
    digest: str | None = None
    force: bool = False
    accept_dark: bool = False
    allow_signature_change: bool | None = None
    probation: float | None = None
    """Seconds of probation."""
