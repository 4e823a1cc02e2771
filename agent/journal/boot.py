"""boot.json: what the host boots into. Its atomic rename is the commit point of a deployment.

The file is canonical JSON, `{"format":1,"record":{...},"sha256":"..."}`, where the hash is of the canonical JSON of
`record`; a file that is not byte for byte what slotd would have written is not believed. boot.json.bak is a copy,
written when boot.json is durable: damage to either costs nothing. Fields of a record that this version does not know
are left alone, so that a newer slotd may add some.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from agent.errors import StorageError
from agent.journal.reserve import Reserve, is_full

log = structlog.get_logger(__name__)

NAME = "boot.json"
BACKUP = "boot.json.bak"
FORMAT = 1
MAX_BYTES = 64 * 1024
_writing = threading.Lock()


@dataclass(frozen=True)
class ModelRef:
    """One model that the host can boot into; `digest` is its image's manifest digest, "sha256:..."."""

    digest: str
    reference: str
    name: str
    version: str


@dataclass(frozen=True)
class BootRecord:
    """What is committed. `generation` rises by one with each commit."""

    generation: int
    committed: ModelRef | None
    previous: ModelRef | None
    repaired: str | None = None
    """What is wrong with one of the two files, if anything: raise an issue, write the record again. Never written."""


class _Unusable(Exception):
    """A file that cannot be believed; the message says why."""


def read_boot(state_dir: Path) -> BootRecord:
    """What the host boots into; blocking.

    No file: generation 0 and no models. boot.json unusable or gone while boot.json.bak is there: the record of the
    latter, with `repaired` set; so it is if only boot.json.bak is bad. Both unusable: StorageError, and the next
    write_boot makes good files again (an unusable boot.json stays beside it as *.broken).
    """
    reasons = []
    found: dict[str, BootRecord] = {}
    for name in (NAME, BACKUP):
        try:
            content = _content(state_dir / name)
            if content is not None:
                found[name] = _decode(content)
        except _Unusable as fault:
            reasons.append(f"{name} {fault}")
    if NAME in found:
        # A backup that lags behind is what a power cut right after the rename leaves; one that is gone is not.
        if BACKUP not in found and not reasons and found[NAME].generation > 1:
            reasons.append(f"{BACKUP} is gone")
        return replace(found[NAME], repaired=reasons[0] if reasons else None)
    if BACKUP in found:
        why = reasons[0] if reasons else f"{NAME} is gone"
        log.error("boot record taken from the backup", reason=why, generation=found[BACKUP].generation)
        return replace(found[BACKUP], repaired=why)
    if reasons:
        raise StorageError(
            "what the host should boot into cannot be read: " + "; ".join(reasons),
            field=str(state_dir / NAME),
            hint="deploy the model again; check the disk",
        )
    return BootRecord(0, None, None)


def write_boot(state_dir: Path, record: BootRecord) -> str | None:
    """Commit a record; blocking. The rename of boot.json is the commit: what the file says then is so.

    None: it survives a power cut. A text: it is in force, but the disk did not confirm it, so a power cut may bring the
    old record back; write it again when the disk works. Raises StorageError: the old record is in force.
    """
    content = _encode(record)
    with _writing:
        try:
            try:
                return _commit(state_dir, content)
            except OSError as error:
                if not is_full(error) or not Reserve(state_dir).release():
                    raise
                return _commit(state_dir, content)
        except OSError as error:
            raise _error(state_dir, error) from error


def confirm_boot(state_dir: Path, record: BootRecord) -> str | None:
    """As write_boot, unless both files hold the record already; at the start, and when a disk works again."""
    wanted = replace(record, repaired=None)
    try:
        if all(_decode(_content(state_dir / name) or b"") == wanted for name in (NAME, BACKUP)):
            return None
    except _Unusable as fault:
        log.warning("the boot record is written again", reason=str(fault))
    return write_boot(state_dir, record)


def rehearse_boot(state_dir: Path) -> None:
    """Whether a record could be committed now: writes as much beside it. Blocking. Raises StorageError."""
    trial = state_dir / f"{NAME}.try"
    try:
        try:
            _write(trial, bytes(4096))
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        if not (is_full(error) and Reserve(state_dir).path.exists()):  # a commit may use that
            raise _error(state_dir, error) from error


def _error(state_dir: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot be written: {error.strerror or error}",
        field=str(state_dir / NAME),
        hint="free some space" if is_full(error) else "check the disk and its mount",
    )


def _commit(folder: Path, content: bytes) -> str | None:
    """Raises OSError: then nothing has changed."""
    try:
        former = _content(folder / NAME)
        if former is not None:
            _decode(former)
    except _Unusable as fault:
        log.error("the boot record was unusable and is replaced", reason=str(fault))
        _keep_broken(folder / NAME)
    try:
        _replace(folder, NAME, content)
    except OSError:
        if not _holds(folder, content):  # a rename that failed may have been done all the same
            raise
    try:
        sync_folder(folder)
        # Not before: until here the former record must survive somewhere.
        _replace(folder, BACKUP, content)
        sync_folder(folder)
    except OSError as error:
        log.error("the boot record is in force but not confirmed", error=str(error))
        return f"{folder / NAME}: is in force, but may not survive a power cut: {error.strerror or error}"
    return None


def _holds(folder: Path, content: bytes) -> bool:
    try:
        return _content(folder / NAME) == content
    except _Unusable:
        return False


def _replace(folder: Path, name: str, content: bytes) -> None:
    temporary = folder / f"{name}.new"
    try:
        _write(temporary, content)
        os.rename(temporary, folder / name)
    except OSError:
        with suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def _write(path: Path, content: bytes) -> None:
    # O_TRUNC rather than O_EXCL: a crash may have left one behind.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        written = 0
        while written < len(content):
            written += os.write(fd, content[written:])
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _keep_broken(path: Path) -> None:
    """A second name for an unusable file; the first is about to be replaced. Only for people, so it may fail."""
    other = path.with_name(f"{path.name}.broken")
    try:
        if path.is_dir() and not path.is_symlink():
            os.rename(path, other)
        else:
            other.unlink(missing_ok=True)
            os.link(path, other, follow_symlinks=False)
    except OSError as error:
        log.warning("the unusable boot record could not be kept", path=str(path), error=str(error))


def _content(path: Path) -> bytes | None:
    """The bytes of a file, None if there is none. Raises _Unusable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        why = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"
        raise _Unusable(why) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _Unusable("is not a plain file")
        content = b""
        while len(content) <= MAX_BYTES and (part := os.read(fd, MAX_BYTES + 1 - len(content))):
            content += part
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)
    if len(content) > MAX_BYTES:
        raise _Unusable(f"is larger than {MAX_BYTES} bytes")
    return content


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _encode(record: BootRecord) -> bytes:
    fields = asdict(record)
    del fields["repaired"]
    return _sealed(FORMAT, fields)


def _sealed(version: int, fields: Any) -> bytes:
    digest = hashlib.sha256(_canonical(fields)).hexdigest()
    return _canonical({"format": version, "record": fields, "sha256": digest}) + b"\n"


def _decode(content: bytes) -> BootRecord:
    if not content:
        raise _Unusable("is empty")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise _Unusable("is not JSON") from None
    if not isinstance(document, dict) or "record" not in document:
        raise _Unusable("is not a boot record")
    if document.get("format") != FORMAT:
        raise _Unusable(f"has format {document.get('format')!r}, this slotd reads {FORMAT}")
    fields = document["record"]
    try:
        sealed = _sealed(FORMAT, fields)
    except ValueError:  # NaN is no number of ours
        raise _Unusable("is not a boot record") from None
    if sealed != content:
        raise _Unusable("does not match its checksum")
    try:
        return BootRecord(int(fields["generation"]), _reference(fields["committed"]), _reference(fields["previous"]))
    except (KeyError, TypeError, ValueError):
        raise _Unusable("lacks a field") from None


def _reference(fields: Any) -> ModelRef | None:
    if fields is None:
        return None
    return ModelRef(*(str(fields[key]) for key in ("digest", "reference", "name", "version")))
