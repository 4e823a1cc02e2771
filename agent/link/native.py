"""Dialect `native`: topics, documents and the shape of a command. JSON in UTF-8, each with `v` and `ts`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from paho.mqtt.client import topic_matches_sub

from agent.config import DEVICE
from agent.errors import CommandRefused, Forbidden, InvalidConfig, InvalidInput, SlotdError
from agent.health.document import timestamp

MAX_PAYLOAD = 64 << 10
"""Bytes; what is larger is refused unread, since parsing it would hold up the loop."""
MAX_DEPTH = 32
MAX_ELEMENTS = 4096
"""Commas and brackets; no command has a hundred, and 64 KiB of nothing else hold up the loop for 10 ms."""
MAX_AHEAD = 24 * 3600.0
"""Seconds that an expiry may lie ahead; also how long a repeated id gets its first answer."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}(/[A-Za-z0-9_.-]{1,64}){0,3}")
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_COMMAND_FIELDS = frozenset({"v", "ts", "id", "reply", "expires", "arguments"})


class Topics:
    """The topics of one device."""

    def __init__(self, device: str) -> None:
        """Raises InvalidConfig for a name that cannot be a level of a topic."""
        if not re.fullmatch(DEVICE, device):
            raise InvalidConfig(
                f"{device!r} cannot be the name of a device", field="device", hint="letters, digits, _ . -; at most 64"
            )
        self.root = f"slotd/{device}/"
        self.status = self.root + "status"
        self.reported = self.root + "reported"
        self.desired = self.root + "desired"
        self.health = self.root + "health"
        self.event = self.root + "event"
        self.commands = self.root + "cmd/#"

    def command(self, topic: str) -> str | None:
        """The command that a topic names; None if it is none. Not checked: it may be unknown, or have slashes."""
        prefix = self.root + "cmd"
        return topic[len(prefix) + 1 :] if topic == prefix or topic.startswith(prefix + "/") else None

    def answer(self, command: str) -> str:
        """Where an answer goes unless its sender says otherwise. A name that no command could have is not repeated."""
        return f"{self.root}res/{command}" if _NAME.fullmatch(command) else self.root + "res"


# --- what comes in ---------------------------------------------------------------------------------------------------


def decode(payload: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises InvalidInput naming `what`: too large, not UTF-8, not JSON, too deep, no object."""

    def fault(message: str, code: str | None = None) -> InvalidInput:
        return InvalidInput(message, field=what, code=code, hint="one JSON object, UTF-8, at most 64 KiB")

    if len(payload) > MAX_PAYLOAD:
        raise fault(f"is larger than {MAX_PAYLOAD} bytes", "TOO_LARGE")
    if sum(payload.count(sign) for sign in (b",", b"[", b"{")) > MAX_ELEMENTS:
        raise fault(f"has more than {MAX_ELEMENTS} elements", "TOO_LARGE")
    try:
        document = json.loads(payload.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_twice)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise fault(f"is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise fault("has half a surrogate pair, which is no character") from None
    except RecursionError:
        raise fault(f"is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise fault(f"is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        raise fault(f"is not JSON: {str(error).splitlines()[0][:200]}") from None
    if not isinstance(document, dict):
        raise fault("must be a JSON object")
    if _depth(document) > MAX_DEPTH:
        raise fault(f"is nested deeper than {MAX_DEPTH} levels")
    return document


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands there twice")
        found[key] = value
    return found


def _depth(document: Any) -> int:
    level, depth = [document], 0
    while level:
        depth += 1
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
    return depth


@dataclass(frozen=True)
class Reply:
    """Where the answer to a command goes, and what it carries so that its sender knows it again."""

    topic: str
    correlation: bytes | None = None
    id: str | None = None


@dataclass(frozen=True)
class Call:
    """A command as it came in; its name and arguments are still unchecked."""

    name: str
    arguments: Mapping[str, Any]
    expires: float | None
    """Unix time."""
    key: str | None
    """By which a repetition is known: the id within its command; None if the sender gave none."""
    fingerprint: str
    """Identity of one that has no id: the same bytes from the same sender are the same command."""
    reply: Reply


class Unreadable(Exception):
    """A command that will not be run; `error` goes to `reply`."""

    def __init__(self, error: SlotdError, reply: Reply) -> None:
        super().__init__(str(error))
        self.error = error
        self.reply = reply


def parse_call(
    name: str,
    payload: bytes,
    *,
    topics: Topics,
    allow: Iterable[str],
    response_topic: str | None = None,
    correlation: bytes | None = None,
) -> Call:
    """A command from its topic, body and MQTT 5 properties. Raises Unreadable.

    The properties count before the body. A reply topic that is not allowed refuses the command; that error goes to the
    default topic.
    """
    default = topics.answer(name)
    reply = Reply(default, correlation)
    try:
        if response_topic is not None:
            check_reply(response_topic, topics=topics, allow=allow, field="ResponseTopic")
            reply = Reply(response_topic, correlation)
        body = decode(payload, "body") if payload else {}
        id = body.get("id")
        if id is not None and not (isinstance(id, str) and _ID.fullmatch(id)):
            raise InvalidInput("must be a text of 1 to 128 ASCII characters without spaces", field="id")
        reply = Reply(reply.topic, correlation, id)
        wanted = body.get("reply")
        if wanted is not None:
            if not isinstance(wanted, str):
                raise InvalidInput("must be a topic", field="reply")
            check_reply(wanted, topics=topics, allow=allow, field="reply")
            if response_topic is None:
                reply = Reply(wanted, correlation, id)
        if unknown := sorted(set(body) - _COMMAND_FIELDS):
            raise InvalidInput(
                "is not a field of a command",
                field=unknown[0][:128],
                hint="id, expires, reply; everything else goes into `arguments`",
            )
        if body.get("v", 1) != 1:
            raise InvalidInput("only version 1 is known", field="v")
        arguments = body.get("arguments", {})
        if not isinstance(arguments, dict):
            raise InvalidInput("must be a JSON object", field="arguments")
        expires = parse_expiry(body["expires"]) if body.get("expires") is not None else None
    except SlotdError as error:
        raise Unreadable(error, reply) from None
    marks = (name.encode(), reply.topic.encode(), correlation or b"", payload)
    return Call(
        name=name,
        arguments=arguments,
        expires=expires,
        key=f"{name}:{id}" if id is not None else None,
        fingerprint=f"{name}#{hashlib.sha256(b'|'.join(b'%d:%s' % (len(m), m) for m in marks)).hexdigest()}",
        reply=reply,
    )


def check_reply(topic: str, *, topics: Topics, allow: Iterable[str], field: str) -> None:
    """Raises Forbidden unless an answer may go to this topic."""

    def fault(message: str) -> Forbidden:
        return Forbidden(message, field=field, code="REPLY_FORBIDDEN", hint="link.reply_allow lists what is allowed")

    if not topic or len(topic.encode("utf-8", "surrogatepass")) > 1024 or any(ord(sign) < 0x20 for sign in topic):
        raise fault("is not a topic")
    if "+" in topic or "#" in topic:
        raise fault("has wildcards")
    if topic.startswith("$"):
        raise fault("topics of the broker ($...) get no answers")
    if topic.startswith(topics.root) and not topic.startswith(topics.root + "res/"):
        raise fault("is one of the device's own topics")
    if not any(topic_matches_sub(allowed, topic) for allowed in allow):
        raise fault("is not allowed to get answers")


def parse_expiry(value: Any) -> float:
    """Unix time from RFC 3339 with an offset, or from seconds. Raises InvalidInput."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e11:
        return float(value)
    if isinstance(value, str) and len(value) <= 64:
        try:
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is not None:
                return moment.timestamp()
        except (ValueError, OverflowError):
            pass
    raise InvalidInput("must be RFC 3339 with an offset, or unix time in seconds", field="expires")


def check_expiry(call: Call, *, changes: bool, now: float) -> None:
    """Raises CommandRefused for a command that must not be run now. `now` is unix time.

    On 3.1.1 nothing else tells a command that was kept for days from a fresh one, so what changes something must say
    until when it counts.
    """
    if call.expires is None:
        if not changes:
            return
        raise CommandRefused(
            "a command that changes something must say when it expires",
            field="expires",
            code="EXPIRY_REQUIRED",
            hint='add "expires": a time (RFC 3339 or unix seconds) at most 24 h ahead',
        )
    if call.expires <= now:
        raise CommandRefused(
            f"expired at {timestamp(call.expires)}; here it is {timestamp(now)}",
            field="expires",
            code="EXPIRED",
            hint="send it again with a later expiry; check both clocks",
        )
    if changes and call.expires > now + MAX_AHEAD:
        raise CommandRefused(
            f"expires at {timestamp(call.expires)}, more than 24 h after {timestamp(now)}",
            field="expires",
            code="EXPIRY_REQUIRED",
            hint="at most 24 h ahead; check both clocks",
        )


def retained_command(name: str, reply: Reply, topic: str) -> Unreadable:
    """What the sender of a retained command is told."""
    error = CommandRefused(
        f"the command {name!r} was sent retained; it is not run",
        code="RETAINED",
        hint=f"send it without the retain flag; take this one away with: mosquitto_pub -r -n -t {topic}",
    )
    return Unreadable(error, reply)


# --- what goes out ---------------------------------------------------------------------------------------------------


def encode(document: Mapping[str, Any]) -> bytes:
    """The document as it goes over the wire."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def status_document(state: str, *, boot_id: str, version: str, reason: str | None = None) -> dict[str, Any]:
    """`status`. The Will has no `ts`: it is written long before it is sent."""
    document: dict[str, Any] = {"v": 1, "state": state, "boot_id": boot_id, "version": version}
    if reason is not None:
        document["reason"] = reason
    if reason != "lost":
        document["ts"] = timestamp()
    return document


_REPORTED = ("device", "version", "boot_id", "embedded", "host", "reason", "slot", "committed", "previous")
_MOVING = ("temperature_c", "power_w")


def reported_document(status: Mapping[str, Any], desired: Mapping[str, Any], config: str) -> dict[str, Any]:
    """`reported`: what is so. `config` is the configuration's revision. Without what moves by itself (that is health),
    so that it changes only when something has happened."""
    document: dict[str, Any] = {"v": 1}
    document |= {key: status.get(key) for key in _REPORTED}
    if isinstance(slot := document["slot"], Mapping):
        document["slot"] = {key: value for key, value in slot.items() if key not in _MOVING}
    document |= {key: status.get(key) for key in ("deployment", "waiting", "last")}
    document["serving"] = {"listen": (status.get("serving") or {}).get("listen", [])}
    return document | {"desired": dict(desired), "config": {"revision": config}, "issues": status.get("issues", [])}


def settled(reported: Mapping[str, Any]) -> dict[str, Any]:
    """`reported` without the progress of deployments: if only that differs, there is no hurry to send it."""
    document = dict(reported)
    for key in ("deployment", "waiting"):
        if isinstance(deployment := document.get(key), Mapping):
            document[key] = {k: v for k, v in deployment.items() if k not in ("progress", "seconds", "phases")}
    return document


def answer_document(
    name: str, reply: Reply, *, result: Mapping[str, Any] | None = None, error: SlotdError | None = None
) -> dict[str, Any]:
    """The answer to a command, good or bad. Has neither `ts` nor `v` yet: it is kept as it is for repetitions."""
    document: dict[str, Any] = {"command": name}
    if reply.id is not None:
        document["id"] = reply.id
    if error is None:
        return document | {"ok": True, "result": dict(result or {})}
    return document | {"ok": False, "error": error_document(error)}


def error_document(error: SlotdError) -> dict[str, Any]:
    """An error as MQTT carries it: all of code, message, hint and field; retry_after and faults where there are."""
    return {"code": error.code, "message": error.message, "hint": error.hint, "field": error.field} | (
        {key: value for key, value in error.as_dict().items() if key in ("retry_after", "faults")}
    )
