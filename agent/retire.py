"""A host leaves the fleet: what the broker keeps of it, its keys, models, store and journal go.

Every part is tried, whatever became of the others, and told. What is gone already counts as done, so it can be run
again until nothing is left. The configuration stays, and a note that the broker was told, since the password for it is
gone by then.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent.config import DEFAULT_PATH, Config
from agent.errors import Conflict, Forbidden, SlotdError
from agent.health.document import timestamp
from agent.journal.lock import Lock, take_lock

STOP_WAIT = 60.0
"""Seconds that the daemon gets to stop; by itself it takes at most half of it."""
LOCK = "slotd.lock"
NOTE = "retired.json"
"""In the state folder: when, as whom and at which broker. It counts as long as no slotd was started since."""
UNITS = ("slotd.service", "slotd-slot-helper.socket", "slotd-slot-helper.service")
PARTS = {
    "models": ("models", "store", "inbox", "simulated-slot"),
    "state": ("journal*", "boot.json*", "config.good.yaml*", "overlay*", "reserve*", NOTE),
}
"""What slotd makes in its state folder. Anything else there is somebody else's and is left, and said."""


@dataclass(frozen=True)
class Step:
    """One part: what it was about, whether nothing of it is left, and how it went."""

    what: str
    done: bool
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def retire(config: Config, path: Path | None, *, broker: bool = True) -> Iterator[Step]:
    """Does it, telling of each step when it has ended. `path`: where the configuration is from, None for the default.

    `broker` False gives up what the broker keeps. Raises Conflict, Forbidden, StorageError if the daemon cannot be
    stopped; then nothing was touched.
    """
    with ExitStack() as held:
        told = _told_before(config)
        yield _stop(config, path, held)
        if told is not None:
            link = Step("broker", True, f"was told at {told}")
        else:
            link = _clear_broker(config) if broker else Step("broker", True, "left alone, as asked")
        yield link
        yield _remove_keys(config, (path or DEFAULT_PATH).parent, link_too=link.done)
        for what, patterns in PARTS.items():
            yield _remove(what, [found for pattern in patterns for found in sorted(config.state_dir.glob(pattern))])
        if link.done and broker and config.link.enabled and config.link.host and config.state_dir.is_dir():
            _note(config, told or timestamp())
        yield _rest(config.state_dir)


# --- the daemon ------------------------------------------------------------------------------------------------------


def _stop(config: Config, path: Path | None, held: ExitStack) -> Step:
    """Stops it and holds its lock, so that none is started before we are done."""
    disabled = path in (None, DEFAULT_PATH) and _disable_units()
    how = "disabled, also for the next boot" if disabled else "not running"
    if not config.state_dir.is_dir():
        return Step("daemon", True, how)
    until = time.monotonic() + STOP_WAIT
    asked: int | None = None
    while True:
        try:
            held.callback(_lock(config.state_dir / LOCK).release)
        except Conflict as error:
            pid = _holder(config.state_dir / LOCK)
            if time.monotonic() > until:
                raise Conflict(
                    f"slotd does not stop: {error}", field=error.field, hint="stop it by hand, then run this again"
                ) from None
            if pid is not None and pid != asked:
                _terminate(pid)
                asked, how = pid, f"stopped (pid {pid})"
            time.sleep(0.1)
        else:
            return Step("daemon", True, how)


def _lock(path: Path) -> Lock:
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise Forbidden(f"{path.parent} is not ours to change", field="state_dir", hint="sudo slotd retire")
    return take_lock(path)


def _disable_units() -> bool:
    """Whether there is a service, which then is stopped and will not be started again. Raises Forbidden."""
    if not os.path.isdir("/run/systemd/system") or not _systemctl("cat", UNITS[0]):
        return False
    units = [unit for unit in UNITS if _systemctl("cat", unit)]
    if not _systemctl("disable", "--now", *units):
        raise Forbidden("systemd does not stop slotd for us", field=UNITS[0], hint="sudo slotd retire")
    return True


def _systemctl(*arguments: str) -> bool:
    command = ("systemctl", "--quiet", "--no-ask-password", *arguments)
    try:
        return subprocess.run(command, check=False, capture_output=True, timeout=STOP_WAIT).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _holder(path: Path) -> int | None:
    text = path.read_text(errors="replace").strip()
    return int(text) if text.isdigit() and int(text) > 1 else None


def _terminate(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it has ended meanwhile
    except PermissionError:
        raise Forbidden(f"slotd (pid {pid}) is not ours to stop", field="pid", hint="sudo slotd retire") from None


# --- what goes -------------------------------------------------------------------------------------------------------


def _clear_broker(config: Config) -> Step:
    link = config.link
    if not link.enabled:
        return Step("broker", True, "the link is off; nothing was said")
    if not link.host:
        return Step("broker", True, "it was inside slotd and is gone with it")
    from agent.link.farewell import clear_broker

    try:
        cleared = asyncio.run(clear_broker(config))
    except SlotdError as error:
        return Step("broker", False, f"{error}; run this again when it is there, or give it up with --without-broker")
    if cleared.left:
        return Step("broker", False, f"it keeps {', '.join(cleared.left)}; somebody with more rights must clear that")
    gone = ", ".join(cleared.gone)
    return Step("broker", True, f"cleared {gone}" if gone else "nothing is retained")


def _told_before(config: Config) -> str | None:
    """When the broker was told, if there is a password that it takes and that is gone since. Before the lock is taken:
    a slotd that was started since has left its own there."""
    password = config.link.password_file
    if password is None or password.exists() or (config.state_dir / LOCK).exists():
        return None
    try:
        note = json.loads((config.state_dir / NOTE).read_text())
        return str(note["at"]) if [note["device"], note["broker"]] == _identity(config) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(config: Config) -> list[str]:
    return [config.device, f"{config.link.host}:{config.link.port}"]


def _note(config: Config, at: str) -> None:
    device, broker = _identity(config)
    text = json.dumps({"device": device, "broker": broker, "at": at})
    with suppress(OSError):  # without it the next run asks for the password; `folder` says what is wrong with the disk
        (config.state_dir / NOTE).write_text(text + "\n")


def _remove_keys(config: Config, folder: Path, *, link_too: bool) -> Step:
    """Files with passwords and keys, if they are in slotd's own folders; others may be of use to somebody else."""
    wanted = [path for path in (config.images.credentials, config.serving.keys) if path is not None]
    kept = ""
    if config.link.password_file is not None:
        if link_too:
            wanted.append(config.link.password_file)
        else:
            kept = f"{config.link.password_file} stays until the broker has been told"
    homes = [home.resolve() for home in (folder, DEFAULT_PATH.parent, config.state_dir)]
    own = [path for path in wanted if any(home in path.resolve().parents for home in homes)]
    foreign = [path for path in wanted if path not in own and path.exists()]
    step = _remove("keys", [path for path in own if path.exists()])
    said = [step.detail, kept, *(f"{path} is not in a folder of slotd's: remove it yourself" for path in foreign)]
    return Step("keys", step.done and not kept and not foreign, "; ".join(filter(None, said)))


def _remove(what: str, paths: list[Path]) -> Step:
    removed: list[str] = []
    faults: list[str] = []
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path.name)
        except FileNotFoundError:
            pass
        except OSError as error:
            faults.append(f"{error.filename or path} stays: {error.strerror}")
    text = f"removed {', '.join(removed)}" if removed else "" if faults else "none"
    return Step(what, not faults, "; ".join(filter(None, [text, *faults])))


def _rest(folder: Path) -> Step:
    """The lock, last of all; and what else lies there."""
    try:
        rest = sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, NOTE))
    except FileNotFoundError:
        return Step("folder", True, f"{folder} is gone")
    except OSError as error:
        return Step("folder", False, f"{folder} cannot be read: {error.strerror}")
    lock = _remove("folder", [path for path in (folder / LOCK,) if path.exists()])
    if rest:
        return Step("folder", False, f"{folder} holds what slotd does not know, or could not remove: {', '.join(rest)}")
    return Step("folder", lock.done, f"nothing of slotd is left in {folder}" if lock.done else lock.detail)
