"""Passwords for registries, from a docker config.json. Nothing of its content ever appears in an error."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.errors import InvalidConfig

MAX_BYTES = 1 << 20
_FIELD = "images.credentials"


@dataclass(frozen=True)
class Credentials:
    """Either a user and a password, or an identity token that a token server takes instead."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)

    @property
    def basic(self) -> str | None:
        """The value of a Basic `Authorization` header; None if there is no user."""
        if not self.user:
            return None
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be printed."""
        basic = (self.basic or "").removeprefix("Basic ")
        return tuple(secret for secret in (self.password, self.identity, basic) if secret)


def read_credentials(path: Path, host: str) -> Credentials | None:
    """What `auths` in the file has for `host`; None if nothing. Raises InvalidConfig."""
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(MAX_BYTES))
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error.strerror}", field=_FIELD) from None
    except (ValueError, RecursionError):
        raise InvalidConfig(
            f"{path} is not JSON", field=_FIELD, hint="it has the form of docker's config.json"
        ) from None
    auths = document.get("auths", {}) if isinstance(document, dict) else None
    if not isinstance(auths, dict):
        raise InvalidConfig(f"{path} has no valid auths", field=_FIELD, hint="it has the form of docker's config.json")
    for key, entry in auths.items():
        if isinstance(entry, dict) and _host(key) == host.lower():
            return _entry(entry, path, host)
    return None


def _host(key: str) -> str:
    """docker writes `host:port`, or `https://host:port/v1/`."""
    return key.partition("://")[2].partition("/")[0].lower() if "://" in key else key.partition("/")[0].lower()


def _entry(entry: dict[str, Any], path: Path, host: str) -> Credentials:
    identity = entry.get("identitytoken")
    user, password = entry.get("username"), entry.get("password")
    if isinstance(entry.get("auth"), str) and entry["auth"]:
        try:
            user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise InvalidConfig(f"{path}: auths.{host}.auth is not base64 of user:password", field=_FIELD) from None
    return Credentials(
        user if isinstance(user, str) else "",
        password if isinstance(password, str) else "",
        identity if isinstance(identity, str) else "",
    )
