"""The committed model's files, read and hashed from the first moment of a start: on another core, while the agent still
imports what it needs to do anything with them."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path

import structlog

from agent.errors import SlotdError
from agent.images.hashes import verify_hashes
from agent.journal.boot import read_boot

log = structlog.get_logger(__name__)
_begun: Future[str | None] | None = None


def begin(state_dir: Path) -> None:
    """What the host boots into; whatever goes wrong here is found again, and told, by whoever asks for it."""
    global _begun
    _begun = Future()
    # A daemon thread: a start that is refused does not wait for it.
    threading.Thread(target=_run, args=(_begun, state_dir), name="early", daemon=True).start()


def verified(digest: str) -> bool:
    """Whether the files of this model were found whole at this start; blocks until that is known. Tells once."""
    global _begun
    begun, _begun = _begun, None
    return begun is not None and begun.result() == digest


def _run(begun: Future[str | None], state_dir: Path) -> None:
    found = None
    try:
        found = _verified(state_dir)
    except Exception:  # a mistake of ours: whoever asks reads the files again
        log.exception("early_hashing_failed")
    finally:
        begun.set_result(found)


def _verified(state_dir: Path) -> str | None:
    try:
        committed = read_boot(state_dir).committed
        if committed is None:
            return None
        return verify_hashes(state_dir / "models" / committed.digest.removeprefix("sha256:")).digest
    except (SlotdError, OSError):
        return None
