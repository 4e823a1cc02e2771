"""The configuration: one YAML file, every field checked, every fault named by its field.

Each field says when a change of it takes effect: `Live` on a reload, `Launch` on a reload for executors that start
after it, `Restart` at the next start of slotd.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from agent.errors import InvalidConfig
from agent.model.documents import parse_yaml

DEFAULT_PATH = Path("/etc/slotd/config.yaml")
DEVICE = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
MAX_BYTES = 256 << 10
"""The longest file; one with every field explained has 8 KiB."""
MAX_FAULTS = 50
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _duration(value: object) -> object:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", value.strip())
        if not match:
            raise ValueError(f"{value!r} is not a time; write 500ms, 30s, 5m, 1h or 7d")
        return float(match[1]) * _UNITS[match[2]]
    return value


def _bytes(value: object) -> object:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+)\s*(B|KiB|MiB|GiB|TiB)?", value.strip())
        if not match:
            raise ValueError(f"{value!r} is not a size; write 4096, 64KiB, 32MiB or 4GiB")
        return int(match[1]) * _BYTES[match[2] or ""]
    return value


def _json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"has what JSON has not: {error}") from None
    return value


Seconds = Annotated[float, BeforeValidator(_duration), Field(ge=0, le=366 * 86400.0)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0, le=1 << 50)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]


class Effect(Enum):
    """When a change of a field takes effect."""

    LIVE = "now"
    LAUNCH = "new executors"
    RESTART = "restart"


T = TypeVar("T")
Live = Annotated[T, Effect.LIVE]
Launch = Annotated[T, Effect.LAUNCH]
Restart = Annotated[T, Effect.RESTART]


def _default_device() -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:64].lstrip("_.-")
    return name or "slotd"


class Section(BaseModel):
    """A part of the configuration; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SlotConfig(Section):
    driver: Restart[str] = "simulated"
    """Which driver the slot needs."""
    options: Restart[Annotated[dict[str, Any], AfterValidator(_json)]] = {}
    """The driver's own settings."""
    drain_timeout: Live[Seconds] = 5.0
    """How long requests in the slot may take to end before a swap."""
    stop_timeout: Live[Seconds] = 2.0
    """How long an executor gets after each of: asked to stop, SIGTERM, SIGKILL."""
    program_timeout: Live[Seconds] = 60.0
    """How long programming may take."""
    load_timeout: Live[Seconds] = 120.0
    """How long an executor may take to load a model."""
    prove_timeout: Live[Seconds] = 120.0
    """How long all proof cases together may take."""
    proof_interval: Live[Seconds] = 3600.0
    """How often the slot is proven again while it is idle; 0 never."""
    retry_first: Live[Seconds] = 5.0
    """Back-off before the slot is tried again after a failure; doubles up to retry_max."""
    retry_max: Live[Seconds] = 3600.0
    """The longest back-off."""


class ProbationConfig(Section):
    duration: Live[Seconds] = 30.0
    """How long a new model is watched before it is committed."""
    min_requests: Live[Count] = 20
    """How many answers from the slot it must have given; the agent adds proof cases if clients send too few."""
    max_internal_rate: Live[Share] = 0.01
    """The share of INTERNAL answers above which the new model is rolled back."""


class SwapConfig(Section):
    continuity: Live[Literal["bridge", "queue", "reject"]] = "bridge"
    """What requests get while the slot cannot answer."""
    on_weak_bridge: Live[Literal["proceed", "wait_for_quiet", "refuse"]] = "proceed"
    """What to do if the bridge could not carry the present load."""
    quiet_timeout: Live[Seconds] = 3600.0
    """How long wait_for_quiet waits before the deployment is refused."""
    allow_signature_change: Live[bool] = False
    """Whether a model with other tensor names, dtypes or shapes may be deployed."""
    min_interval: Live[Seconds] = 0.0
    """At least this long between two deployments from desired state."""
    max_tolerance: Live[Annotated[float, Field(gt=0)]] = 0.05
    """The largest tolerance an image may ask for in a golden case."""
    probation: ProbationConfig = ProbationConfig()


class GrpcConfig(Section):
    listen: Restart[str | None] = "127.0.0.1:50051"
    """TCP address, host:port; null for none. Port 0 takes a free one and says which."""
    socket: Restart[Path | None] = None
    """Unix socket; default run_dir/grpc.sock."""
    max_message: Restart[Bytes] = 32 << 20
    """The largest request or reply."""
    max_streams: Restart[Some] = 256
    """Concurrent calls on one connection."""


class HttpConfig(Section):
    listen: Restart[str | None] = "127.0.0.1:8080"
    """TCP address, host:port; null for none. While it is another's, slotd serves without HTTP and says so."""


class TlsConfig(Section):
    certificate: Restart[Path | None] = None
    """The server's certificate and what is between it and its CA, in PEM; null: TCP is in the clear, on loopback."""
    key: Restart[Path | None] = None
    """The certificate's key, which nobody else may read."""
    client_ca: Restart[Path | None] = None
    """CAs of which clients over TCP must have a certificate; null: they need none."""

    @model_validator(mode="after")
    def _whole(self) -> TlsConfig:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs a certificate and a key")
        return self


class ServingConfig(Section):
    grpc: GrpcConfig = GrpcConfig()
    http: HttpConfig = HttpConfig()
    tls: TlsConfig = TlsConfig()
    keys: Restart[Path | None] = None
    """A file with the keys of which clients over TCP must send one (slotd keys); null: they need none."""
    max_deadline: Live[Seconds] = 60.0
    """The deadline of a request that brings none, and the longest that counts."""
    max_queue: Live[Count] = 512
    """How many requests may wait; more than 1,024 need a start with that many."""
    max_wait: Live[Seconds] = 10.0
    """How much work, in seconds, may wait for an executor."""
    lame_duck: Live[Seconds] = 1.0
    """At a stop: how long health says NOT_SERVING before the servers close."""
    grace: Live[Seconds] = 5.0
    """At a stop: how long requests in flight get."""
    poison_memory: Live[Seconds] = 600.0
    """How long a request that ended every executor is refused at once."""


class ExecutorConfig(Section):
    threads: Launch[Count] = 0
    """Threads of one executor for the CPU; 0: one for each core."""
    decoders: Launch[Count] = 0
    """Processes that decode pictures; 0: cores - 1, at least 1."""
    memory: Launch[Bytes] = 4 << 30
    """Private memory that one executor may use."""
    arena: Launch[Bytes] = 256 << 20
    """Shared memory for requests in one executor; only what is used is taken."""
    call_timeout: Launch[Seconds] = 60.0
    """The longest that one run may take before the executor is ended."""


class ImagesConfig(Section):
    layouts: Live[list[Path]] = []
    """OCI layout folders that are looked into before any registry."""
    insecure_registries: Live[list[str]] = []
    """Registries (host:port) that are spoken to in plain HTTP."""
    credentials: Live[Path | None] = None
    """A docker config.json."""
    platform: Live[str] = "linux/amd64"
    """Which entry of an index is taken."""
    max_image: Live[Bytes] = 16 << 30
    """The largest image, compressed or unpacked."""
    max_files: Live[Some] = 10_000
    """The most files in an image."""
    keep_free: Live[Bytes] = 256 << 20
    """Disk space that a pull must leave."""
    timeout: Live[Seconds] = 60.0
    """How long a registry may be silent."""
    retries: Live[Count] = 5
    """How often a pull is tried again after a passing fault."""


class LinkConfig(Section):
    enabled: Live[bool] = True
    """Whether there is a link at all."""
    host: Live[str] = "127.0.0.1"
    port: Live[Annotated[int, Field(ge=0, le=65535)]] = 1883
    protocol: Live[Literal["5", "3.1.1"]] = "5"
    """The MQTT version."""
    username: Live[str | None] = None
    password_file: Live[Path | None] = None
    """A file that holds the password; one line."""
    keep_alive: Live[Seconds] = 60.0
    session_expiry: Live[Seconds] = 7 * 86400.0
    will_delay: Live[Seconds] = 0.0
    health_interval: Live[Seconds] = 60.0
    """How often the health document is sent."""
    reply_allow: Live[list[str]] = ["slotd/+/res/#"]
    """Topic filters that a reply may go to."""
    backoff_first: Live[Seconds] = 1.0
    backoff_max: Live[Seconds] = 300.0
    backlog_rate: Live[Annotated[float, Field(gt=0)]] = 50.0
    """Stored events sent for each second after a reconnect."""
    outbox_events: Live[Annotated[int, Field(ge=10)]] = 10_000
    """How many events are kept for a broker that is away."""


class LogConfig(Section):
    level: Live[Literal["debug", "info", "warning", "error"]] = "info"
    format: Live[Literal["json", "console", "auto"]] = "auto"
    """auto: console on a terminal, else JSON."""


class Config(Section):
    """Everything that can be set. `config.example.yaml` has each field with its default."""

    device: Restart[Annotated[str, Field(pattern=DEVICE)]] = Field(default_factory=_default_device)
    """The name of this host on the broker; default: the host name."""
    state_dir: Restart[Path] = Path("/var/lib/slotd")
    """What must survive: the store, the models, boot.json, the journal."""
    run_dir: Restart[Path] = Path("/run/slotd")
    """Sockets and locks."""
    embedded: Restart[bool] = False
    """Allows the simulated slot, and a broker inside the process when link.host is empty."""
    slot: SlotConfig = SlotConfig()
    swap: SwapConfig = SwapConfig()
    serving: ServingConfig = ServingConfig()
    executor: ExecutorConfig = ExecutorConfig()
    images: ImagesConfig = ImagesConfig()
    link: LinkConfig = LinkConfig()
    log: LogConfig = LogConfig()

    @property
    def driver_options(self) -> dict[str, Any]:
        """What the driver is made with: its options, and for a simulated slot the folder where its card lives."""
        if self.slot.driver == "simulated":
            return {"device": str(self.state_dir / "simulated-slot"), **self.slot.options}
        return dict(self.slot.options)

    @property
    def threads(self) -> int:
        """Threads of one executor."""
        return self.executor.threads or os.cpu_count() or 1

    @property
    def decoder_count(self) -> int:
        """Processes that decode pictures."""
        return self.executor.decoders or max(1, (os.cpu_count() or 1) - 1)

    @model_validator(mode="after")
    def _honest(self) -> Config:
        wrong = []
        if self.slot.driver == "simulated" and not self.embedded:
            wrong.append("slot.driver is simulated: say `embedded: true` if that is meant")
        if self.link.enabled and not self.link.host and not self.embedded:
            wrong.append("link.host is empty: say `embedded: true` for a broker inside slotd")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _effect(field: FieldInfo) -> Effect:
    (effect,) = (one for one in field.metadata if isinstance(one, Effect))  # each field says it, once
    return effect


EFFECTS = {name: _effect(field) for name, field in _leaves(Config)}
"""When a change of each field takes effect, by its path (`slot.load_timeout`), in the order of the file."""


def parse_config(text: bytes | str, *, where: str = "config", embedded: bool = False) -> Config:
    """A configuration from YAML. Raises InvalidConfig with every field at fault, each with `where` before it."""
    try:
        document = parse_yaml(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InvalidConfig(f"is not YAML: {' '.join(str(error).split())}", field=where) from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise InvalidConfig("must be a mapping of sections", field=where)
    if embedded:
        document = {**document, "embedded": True}
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise invalid([_fault(one) for one in error.errors(include_url=False, include_input=False)], where) from None


def invalid(faults: list[tuple[str, str]], where: str) -> InvalidConfig:
    """The error for fields at fault, of which there is at least one; of more than fifty the last say only how many."""
    if len(faults) > MAX_FAULTS:
        faults = [*faults[:MAX_FAULTS], ("", f"{len(faults) - MAX_FAULTS} more faults")]
    named = [(f"{where}: {field}" if field else where, message[:500]) for field, message in faults]
    (field, message), *more = named
    return InvalidConfig(
        f"{message} (and {len(more)} more)" if more else message,
        field=field,
        faults=named,
        hint="config.example.yaml explains every field",
    )


def _fault(error: Any) -> tuple[str, str]:
    field = ".".join(str(part) for part in error["loc"])[:200]
    message = "there is no such field" if error["type"] == "extra_forbidden" else str(error["msg"])
    return field, message.removeprefix("Value error, ")


@dataclass(frozen=True)
class ConfigFile:
    """A valid one as it was read."""

    path: Path
    text: str
    config: Config

    @property
    def sha256(self) -> str:
        """Of its text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: Path) -> str:
    """A configuration file's text. Raises InvalidConfig if there is none that could be a configuration."""
    where = str(path)
    try:
        # Not blocking: what is there may be a pipe.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidConfig("is not a plain file", field=where)
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidConfig(
            f"cannot be read: {error.strerror}", field=where, hint="copy config.example.yaml there, or pass --config"
        ) from None
    if len(content) > MAX_BYTES:
        raise InvalidConfig(f"is longer than {MAX_BYTES >> 10} KiB", field=where)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"is not text in UTF-8 (byte {error.start})", field=where) from None


def read_file(path: Path, *, embedded: bool = False) -> ConfigFile:
    """The configuration in a file, with its text. Raises InvalidConfig with every field at fault."""
    text = read_text(path)
    if not text.strip():
        raise InvalidConfig("is empty", field=str(path), hint="write {} if every default is meant")
    return ConfigFile(path, text, parse_config(text, where=str(path), embedded=embedded))


def read_config(path: Path, *, embedded: bool = False) -> Config:
    """The configuration in a file. Raises InvalidConfig."""
    return read_file(path, embedded=embedded).config
