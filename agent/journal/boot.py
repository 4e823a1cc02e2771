"""boot.json: what the host boots into. Its atomic rename is the commit point of a deployment.

The file is canonical JSON, `{"format":1,"record":{...},"sha256":"..."}`, where the hash is of the canonical JSON of
`record`; a file that is not byte for byte what slotd would have written is not believed. The former record is kept as
boot.json.bak. Fields of a record that this version does not know are left alone, so that a newer slotd may add some.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
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
    """Why this came from boot.json.bak, if it did; raise an issue and write the record again. Never written."""


class _Unusable(Exception):
    """A file that cannot be believed; the message says why."""


def read_boot(state_dir: Path) -> BootRecord:
    """What the host boots into; blocking.

    No file: generation 0 and no models. boot.json unreadable or gone while boot.json.bak is there: the record of the
    latter, with `repaired` set. Both unusable: StorageError; the daemon then starts `empty` with that as an issue, and
    the next write_boot makes a good file again (unusable ones stay beside it as *.broken).
    """
    reasons = []
    for name in (NAME, BACKUP):
        try:
            content = _content(state_dir / name)
            if content is None:
                continue
            record = _decode(content)
        except _Unusable as fault:
            reasons.append(f"{name} {fault}")
            continue
        if name == NAME:
            return record
        why = reasons[0] if reasons else f"{NAME} is gone"
        log.error("boot record taken from the backup", reason=why, generation=record.generation)
        return BootRecord(record.generation, record.committed, record.previous, repaired=why)
    if reasons:
        raise StorageError(
            "what the host should boot into cannot be read: " + "; ".join(reasons),
            field=str(state_dir / NAME),
            hint="deploy the model again; check the disk",
        )
    return BootRecord(0, None, None)


def write_boot(state_dir: Path, record: BootRecord) -> None:
    """Commit a record; blocking. When this returns it survives a power cut; if it raises, the old record is in force.

    Raises StorageError. A crash in between leaves the old record or the new one, never neither.
    """
    content = _encode(record)
    try:
        try:
            _commit(state_dir, content)
        except OSError as error:
            if not is_full(error) or not Reserve(state_dir).release():
                raise
            _commit(state_dir, content)
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror or error}",
            field=str(state_dir / NAME),
            hint="free some space" if is_full(error) else "check the disk and its mount",
        ) from error


def _commit(folder: Path, content: bytes) -> None:
    try:
        former = _content(folder / NAME)
        if former is not None:
            _decode(former)
    except _Unusable as fault:  # the backup is the better one then: it stays, and the unusable file is kept to look at
        log.error("the boot record was unusable and is replaced", reason=str(fault))
        _keep_broken(folder / NAME)
    else:
        if former is not None:
            _replace(folder, BACKUP, former)
    _replace(folder, NAME, content)


def _replace(folder: Path, name: str, content: bytes) -> None:
    temporary = folder / f"{name}.new"
    try:
        # O_TRUNC rather than O_EXCL: a crash may have left one behind.
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            written = 0
            while written < len(content):
                written += os.write(fd, content[written:])
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, folder / name)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)


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
        other.unlink(missing_ok=True)
        os.link(path, other)
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
