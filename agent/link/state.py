"""The rules of desired and reported: pure, knows no broker, no clock and no dialect.

Desired is state, not a queue. A wish is known by the hash of its section; `revision` orders documents within an
`epoch`. Whoever acts on it folds `accept` over what came in, and starts what the last memory says is `waiting`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.errors import InvalidInput, SlotdError

State = Literal["none", "waiting", "applying", "applied", "failed", "interrupted"]
RESUMED = "resume"
"""The kind of actor of a deployment that goes on where one was cut off by a restart."""
_OURS = ("desired", "boot")
"""Kinds of actors whose deployments are not an override: the wish itself, and the host coming back to what it had."""


class Section(BaseModel):
    """What should run: the part of a desired document that makes its identity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    image: Annotated[str, Field(min_length=1, max_length=1024)] | None
    """Reference of the image; null: the slot shall be empty."""
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    accept_dark: bool = False
    allow_signature_change: bool | None = None
    probation: Annotated[float, Field(ge=0, le=7 * 86400)] | None = None
    """Seconds."""

    @property
    def hash(self) -> str:
        """The identity of the wish. Fields at their default don't count, so that new fields change no old hash."""
        text = json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class Document(Section):
    """A desired document: the section, and what orders it."""

    v: Literal[1] = 1
    ts: str | None = None
    epoch: Annotated[str, Field(max_length=128)] = ""
    revision: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None

    @property
    def section(self) -> Section:
        """What makes the identity."""
        return Section.model_validate(self.model_dump(include=set(Section.model_fields)))


@dataclass(frozen=True)
class Malformed:
    """A desired document that cannot be understood."""

    error: Mapping[str, Any]


@dataclass(frozen=True)
class Withdrawn:
    """An empty desired document: no wish, keep what runs."""


Arrival = Document | Malformed | Withdrawn


def parse_desired(document: Mapping[str, Any]) -> Document:
    """A desired document, checked. Raises InvalidInput naming the field."""
    try:
        return Document.model_validate(document)
    except ValidationError as error:
        fault = error.errors()[0]
        raise InvalidInput(
            fault["msg"],
            field=".".join(["desired", *map(str, fault["loc"])]),
            hint='a desired document is {"image": "registry/name:tag", "revision": 1}',
        ) from None


@dataclass(frozen=True)
class Memory:
    """What the host knows of the wish; kept in the journal."""

    epoch: str = ""
    revision: int | None = None
    """The highest accepted in this epoch."""
    hash: str | None = None
    """None: no wish."""
    section: Mapping[str, Any] | None = None
    state: State = "none"
    task: str | None = None
    """The deployment that carries it out."""
    digest: str | None = None
    """What the wish turned out to be, once applied; None also if the wish is an empty slot."""
    error: Mapping[str, Any] | None = None
    override: Mapping[str, Any] | None = None
    refused: Mapping[str, Any] | None = None
    """The newest document that was refused, and why; until one is accepted."""
    seen: str | None = None
    """The last deployment that had ended when the wish was accepted; what is newer and not ours overrides it."""

    def as_dict(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: Any) -> Memory:
        """From the journal; what is not known any more is dropped, what is missing takes its default."""
        if not isinstance(kept, Mapping):
            return cls()
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in kept.items() if key in known})


def accept(memory: Memory, arrival: Arrival, *, last: str | None = None) -> Memory:
    """What is known after one more document; `waiting` where it is to be carried out.

    `last` is the id of the last deployment that has ended. A lower revision, a revision that was used for another wish,
    and what cannot be read are refused: the memory says so in `refused` and nothing else changes.
    """
    if isinstance(arrival, Withdrawn):
        # The numbers stay: what was refused as too old is not let in by emptying the topic.
        return Memory(epoch=memory.epoch, revision=memory.revision)
    if isinstance(arrival, Malformed):
        return replace(memory, refused={"epoch": None, "revision": None, "hash": None, "error": dict(arrival.error)})
    section = arrival.section
    refusal = _refusal(memory, arrival, section.hash)
    if refusal is not None:
        refused = {
            "epoch": arrival.epoch,
            "revision": arrival.revision,
            "hash": section.hash,
            "error": refusal.as_dict(),
        }
        return replace(memory, refused=refused)
    same_epoch = arrival.epoch == memory.epoch
    newer = arrival.revision is not None and (not same_epoch or arrival.revision != memory.revision)
    revision = arrival.revision if arrival.revision is not None or not same_epoch else memory.revision
    placed = replace(memory, epoch=arrival.epoch, revision=revision, refused=None)
    if section.hash == memory.hash and not (memory.state == "interrupted" and newer):
        return placed
    return replace(
        placed,
        hash=section.hash,
        section=section.model_dump(exclude_defaults=True) | {"image": section.image},
        state="waiting",
        task=None,
        digest=None,
        error=None,
        override=None,
        seen=last,
    )


def fold(
    memory: Memory, arrivals: Iterable[Arrival], *, last: str | None = None
) -> tuple[Memory, list[dict[str, Any]]]:
    """What is known after all that came in at once, and the wishes among it that were superseded before they could
    start (epoch, revision, hash): only the newest is carried out."""
    before, passed = memory, []
    for arrival in arrivals:
        following = accept(memory, arrival, last=last)
        if memory.state == "waiting" and memory != before and following.hash != memory.hash:
            passed.append({"epoch": memory.epoch, "revision": memory.revision, "hash": memory.hash})
        memory = following
    return memory, passed


def _refusal(memory: Memory, arrival: Document, found: str) -> SlotdError | None:
    if arrival.epoch != memory.epoch or arrival.revision is None or memory.revision is None:
        return None
    if arrival.revision < memory.revision:
        return InvalidInput(
            f"revision {arrival.revision} is older than {memory.revision}, which is in force",
            field="desired.revision",
            code="REVISION_TOO_LOW",
            hint="publish with a higher revision, or begin a new epoch",
        )
    if arrival.revision == memory.revision and memory.hash not in (None, found):
        return InvalidInput(
            f"revision {arrival.revision} was already used for another wish",
            field="desired.revision",
            code="REVISION_REUSED",
            hint="publish with a higher revision",
        )
    return None


def started(memory: Memory, task: str | None) -> Memory:
    """The wish is being carried out by this deployment."""
    return replace(memory, state="applying", task=task, error=None)


def ended(memory: Memory, outcome: str, *, digest: str | None = None, error: Mapping[str, Any] | None = None) -> Memory:
    """The deployment that carried out the wish is over. It is tried again only for another hash; an interrupted one
    also for another revision."""
    if outcome in ("committed", "unchanged"):
        return replace(memory, state="applied", digest=digest, error=None)
    told = dict(error) if error else {"code": outcome.upper(), "message": f"the deployment ended {outcome}"}
    state: State = "interrupted" if told.get("code") == "INTERRUPTED" else "failed"
    return replace(memory, state=state, digest=None, error=told)


def observe(memory: Memory, status: Mapping[str, Any]) -> Memory:
    """The memory brought up to date with the host's status: the end of its own deployment, and overrides."""
    if memory.hash is None:
        return memory
    if memory.state in ("applying", "interrupted"):
        found = find(memory, status)
        if found is not None and (memory.state == "applying" or found["id"] != memory.task):
            memory = started(memory, found["id"])
            if found.get("outcome") is None:
                return memory
            memory = over(memory, found, status)
        elif memory.state == "applying":
            return memory
    if memory.state == "waiting":
        return memory
    if in_sync(memory, status):
        return replace(memory, override=None) if memory.override else memory
    last = status.get("last") or {}
    if (
        last.get("outcome") != "committed"
        or _kind(last) in _OURS
        or last.get("id") in (None, memory.task, memory.seen)
        or (memory.override or {}).get("task") == last.get("id")
    ):
        return memory
    override = {
        "by": _actor(last),
        "since": last.get("started"),
        "reason": f"{last.get('kind') or 'deploy'} {last.get('reference') or ''}".strip(),
        "task": last.get("id"),
    }
    return replace(memory, override=override)


def over(memory: Memory, deployment: Mapping[str, Any], status: Mapping[str, Any]) -> Memory:
    """The memory after the deployment that carried out the wish, from that deployment's document."""
    digest = None
    if (memory.section or {}).get("image") is not None:
        digest = deployment.get("digest") or (status.get("committed") or {}).get("digest")
    return ended(memory, str(deployment["outcome"]), digest=digest, error=deployment.get("error"))


def find(memory: Memory, status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The deployment that carries out the wish, where the status has it: the one that a restart put in its place, or
    the one with its id; without an id (the agent was cut off before it knew it) the one for the same image."""
    deployments: list[Mapping[str, Any]] = [status[key] for key in ("waiting", "deployment", "last") if status.get(key)]
    image = (memory.section or {}).get("image")
    kinds = (RESUMED,) if memory.task is not None else (RESUMED, "desired")
    for deployment in deployments:
        fits = _kind(deployment) in kinds and deployment.get("reference") == image
        if fits and deployment.get("id") not in (None, memory.seen):
            return deployment
    if memory.task is None:
        return None
    return next((deployment for deployment in deployments if deployment.get("id") == memory.task), None)


def _actor(deployment: Mapping[str, Any]) -> str:
    return str(deployment.get("actor") or "")


def _kind(deployment: Mapping[str, Any]) -> str:
    """`desired` of "desired: revision 7", `resume` of "resume of d-1"."""
    return _actor(deployment).partition(" ")[0].rstrip(":")


def in_sync(memory: Memory, status: Mapping[str, Any]) -> bool:
    """Whether what is committed is what was wished."""
    committed = (status.get("committed") or {}).get("digest")
    return memory.state == "applied" and memory.digest == committed


def desired_section(memory: Memory, status: Mapping[str, Any]) -> dict[str, Any]:
    """The wish as it stands in `reported`."""
    if memory.hash is None:
        return {
            "epoch": memory.epoch,
            "revision": memory.revision,
            "hash": None,
            "state": "none",
            "refused": memory.refused,
        }
    return {
        "epoch": memory.epoch,
        "revision": memory.revision,
        "hash": memory.hash,
        "image": (memory.section or {}).get("image"),
        "digest": memory.digest,
        "state": memory.state,
        "in_sync": in_sync(memory, status),
        "error": memory.error,
        "override": memory.override,
        "refused": memory.refused,
    }
