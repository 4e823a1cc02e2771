"""Image references: `host:port/name:tag@sha256:…`, or `oci:/folder:tag` for an OCI layout on this host."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from agent.errors import InvalidInput

MAX_LENGTH = 2048
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_LAYOUT_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/@-]{0,255}")
_EXAMPLE = "write host:port/name:tag, host/name@sha256:…, or oci:/folder:tag"


@dataclass(frozen=True)
class Reference:
    """Where an image is. Exactly one of `layout` and `name` says so; a reference without a host is looked up in
    `images.layouts` only. `digest` pins the bytes, whatever the tag says."""

    text: str
    host: str | None = None
    name: str = ""
    tag: str | None = None
    digest: str | None = None
    layout: Path | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def title(self) -> str | None:
        """The name under which an OCI layout knows the image; None if only a digest was given."""
        if self.tag is None or self.layout is not None:
            return self.tag
        return f"{self.host}/{self.name}:{self.tag}" if self.host else f"{self.name}:{self.tag}"

    @property
    def titles(self) -> frozenset[str]:
        """All spellings that an annotation in a layout may have for this image."""
        typed = self.text.partition("@")[0]
        return frozenset(name for name in (self.title, None if self.layout else typed) if name)


def parse_digest(text: str, field: str = "digest") -> str:
    """`sha256:` and 64 hex digits. Raises InvalidInput."""
    if not DIGEST.fullmatch(text):
        raise InvalidInput(f"{text[:100]!r} is not a digest", field=field, hint="write sha256: and 64 hex digits")
    return text


def parse_reference(text: str) -> Reference:
    """The parts of a reference; tag `latest` if it has neither tag nor digest. Raises InvalidInput (field `image`)."""
    if len(text) > MAX_LENGTH:
        raise InvalidInput(f"is longer than {MAX_LENGTH} characters", field="image", hint=_EXAMPLE)
    rest, at, digest = text.partition("@")
    if at:
        parse_digest(digest, "image")
    pinned = digest or None
    if rest.startswith("oci:"):
        return _layout(text, rest.removeprefix("oci:"), pinned)
    host, name = _split_host(rest)
    colon = name.rfind(":")
    tag = name[colon + 1 :] if colon >= 0 else None
    name = name[:colon] if colon >= 0 else name
    if host is not None and not (_HOST.fullmatch(host) and _port(host) <= 65535):
        raise InvalidInput(f"{text!r} has no valid host", field="image", hint=_EXAMPLE)
    if not _NAME.fullmatch(name) or len(name) > 255:
        raise InvalidInput(
            f"{text!r} is not an image reference", field="image", hint=f"{_EXAMPLE}; names are lower case"
        )
    if tag is not None and not _TAG.fullmatch(tag):
        raise InvalidInput(f"{tag!r} is not a tag", field="image", hint=_EXAMPLE)
    if tag is None and pinned is None:
        tag = "latest"
    return Reference(text, host, name, tag, pinned)


def _split_host(rest: str) -> tuple[str | None, str]:
    # As Docker does it: the first part is a host if it has a dot or a port, or is localhost.
    first, slash, name = rest.partition("/")
    if slash and (first == "localhost" or any(mark in first for mark in ".:[")):
        return first, name
    return None, rest


def _port(host: str) -> int:
    port = host.rpartition(":")[2]
    return int(port) if port.isdecimal() else 0


def _layout(text: str, rest: str, digest: str | None) -> Reference:
    # As skopeo does it: the folder ends at the first colon, the rest is the tag (which may itself be a full name).
    folder, colon, tag = rest.partition(":")
    if not folder.startswith("/") or "\0" in folder:
        raise InvalidInput(f"{text!r} needs an absolute folder", field="image", hint="write oci:/folder:tag")
    if colon and not _LAYOUT_TAG.fullmatch(tag):
        raise InvalidInput(f"{tag!r} is not a tag", field="image", hint="write oci:/folder:tag")
    return Reference(text, tag=tag or None, digest=digest, layout=Path(folder))
