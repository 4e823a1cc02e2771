"""The configuration: one YAML file, every field checked, every fault named by its field."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from agent.errors import InvalidConfig
from agent.model.spec import explain, parse_yaml

DEFAULT_PATH = Path("/etc/slotd/config.yaml")
DEVICE = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
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


Seconds = Annotated[float, BeforeValidator(_duration), Field(ge=0, le=366 * 86400.0)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0, le=1 << 50)]
Share = Annotated[float, Field(ge=0, le=1)]


def _default_device() -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:64].lstrip("_.-")
    return name or "slotd"


class Section(BaseModel):
    """A part of the configuration; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SlotConfig(Section):
    driver: str = "simulated"
    """Which driver the slot needs."""
    options: dict[str, Any] = {}
    """The driver's own settings."""
    drain_timeout: Seconds = 5.0
    """How long requests in the slot may take to end before a swap."""
    stop_timeout: Seconds = 2.0
    """How long an executor gets after each of: asked to stop, SIGTERM, SIGKILL."""
    program_timeout: Seconds = 60.0
    """How long programming may take."""
    load_timeout: Seconds = 120.0
    """How long an executor may take to load a model."""
    prove_timeout: Seconds = 120.0
    """How long all proof cases together may take."""
    proof_interval: Seconds = 3600.0
    """How often the slot is proven again while it is idle; 0 never."""
    retry_first: Seconds = 5.0
    """Back-off before the slot is tried again after a failure; doubles up to retry_max."""
    retry_max: Seconds = 3600.0
    """The longest back-off."""


class ProbationConfig(Section):
    duration: Seconds = 30.0
    """How long a new model is watched before it is committed."""
    min_requests: Annotated[int, Field(ge=0)] = 20
    """How many answers from the slot it must have given; the agent adds proof cases if clients send too few."""
    max_internal_rate: Share = 0.01
    """The share of INTERNAL answers above which the new model is rolled back."""


class SwapConfig(Section):
    continuity: Literal["bridge", "queue", "reject"] = "bridge"
    """What requests get while the slot cannot answer."""
    on_weak_bridge: Literal["proceed", "wait_for_quiet", "refuse"] = "proceed"
    """What to do if the bridge could not carry the present load."""
    quiet_timeout: Seconds = 3600.0
    """How long wait_for_quiet waits before the deployment is refused."""
    allow_signature_change: bool = False
    """Whether a model with other tensor names, dtypes or shapes may be deployed."""
    min_interval: Seconds = 0.0
    """At least this long between two deployments from desired state."""
    max_tolerance: Annotated[float, Field(gt=0)] = 0.05
    """The largest tolerance an image may ask for in a golden case."""
    probation: ProbationConfig = ProbationConfig()


class GrpcConfig(Section):
    listen: str | None = "127.0.0.1:50051"
    """TCP address, host:port; null for none. Port 0 takes a free one and says which."""
    socket: Path | None = None
    """Unix socket; default run_dir/grpc.sock."""
    max_message: Bytes = 32 << 20
    """The largest request or reply."""
    max_streams: Annotated[int, Field(ge=1)] = 256
    """Concurrent calls on one connection."""


class ServingConfig(Section):
    grpc: GrpcConfig = GrpcConfig()
    max_deadline: Seconds = 60.0
    """The deadline of a request that brings none, and the longest that counts."""
    max_queue: Annotated[int, Field(ge=0)] = 512
    """How many requests may wait."""
    max_wait: Seconds = 10.0
    """How much work, in seconds, may wait for an executor."""
    lame_duck: Seconds = 1.0
    """At a stop: how long health says NOT_SERVING before the servers close."""
    grace: Seconds = 5.0
    """At a stop: how long requests in flight get."""
    poison_memory: Seconds = 600.0
    """How long a request that ended every executor is refused at once."""


class ExecutorConfig(Section):
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads of one executor for the CPU; 0: one for each core."""
    decoders: Annotated[int, Field(ge=0)] = 0
    """Processes that decode pictures; 0: cores - 1, at least 1."""
    memory: Bytes = 4 << 30
    """Private memory that one executor may use."""
    arena: Bytes = 256 << 20
    """Shared memory for requests in one executor; only what is used is taken."""
    call_timeout: Seconds = 60.0
    """The longest that one run may take before the executor is ended."""


class ImagesConfig(Section):
    layouts: list[Path] = []
    """OCI layout folders that are looked into before any registry."""
    insecure_registries: list[str] = []
    """Registries (host:port) that are spoken to in plain HTTP."""
    credentials: Path | None = None
    """A docker config.json."""
    platform: str = "linux/amd64"
    """Which entry of an index is taken."""
    max_image: Bytes = 16 << 30
    """The largest image, compressed or unpacked."""
    max_files: Annotated[int, Field(ge=1)] = 10_000
    """The most files in an image."""
    keep_free: Bytes = 256 << 20
    """Disk space that a pull must leave."""
    timeout: Seconds = 60.0
    """How long a registry may be silent."""
    retries: Annotated[int, Field(ge=0)] = 5
    """How often a pull is tried again after a passing fault."""


class LinkConfig(Section):
    enabled: bool = True
    """Whether there is a link at all."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 1883
    protocol: Literal["5", "3.1.1"] = "5"
    """The MQTT version."""
    username: str | None = None
    password_file: Path | None = None
    """A file that holds the password; one line."""
    keep_alive: Seconds = 60.0
    session_expiry: Seconds = 7 * 86400.0
    will_delay: Seconds = 0.0
    health_interval: Seconds = 60.0
    """How often the health document is sent."""
    reply_allow: list[str] = ["slotd/+/res/#"]
    """Topic filters that a reply may go to."""
    backoff_first: Seconds = 1.0
    backoff_max: Seconds = 300.0
    backlog_rate: Annotated[float, Field(gt=0)] = 50.0
    """Stored events sent for each second after a reconnect."""
    outbox_events: Annotated[int, Field(ge=10)] = 10_000
    """How many events are kept for a broker that is away."""


class LogConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console", "auto"] = "auto"
    """auto: console on a terminal, else JSON."""


class Config(Section):
    """Everything that can be set. `config.example.yaml` has each field with its default."""

    device: Annotated[str, Field(pattern=DEVICE)] = Field(default_factory=_default_device)
    """The name of this host on the broker; default: the host name."""
    state_dir: Path = Path("/var/lib/slotd")
    """What must survive: the store, the models, boot.json, the journal."""
    run_dir: Path = Path("/run/slotd")
    """Sockets and locks."""
    embedded: bool = False
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
        if self.slot.driver == "simulated" and not self.embedded:
            raise ValueError("slot.driver is simulated: say `embedded: true` if that is meant")
        if self.link.enabled and not self.link.host and not self.embedded:
            raise ValueError("link.host is empty: say `embedded: true` for a broker inside slotd")
        return self


def parse_config(text: bytes | str, *, where: str = "config", embedded: bool = False) -> Config:
    """A configuration from YAML. Raises InvalidConfig naming the first field at fault."""
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
        field, message = explain(error)
        raise InvalidConfig(
            message,
            field=f"{where}: {field}" if field else where,
            hint="config.example.yaml explains every field",
        ) from None


def read_config(path: Path, *, embedded: bool = False) -> Config:
    """The configuration in a file. Raises InvalidConfig."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InvalidConfig(
            f"cannot be read: {error.strerror}",
            field=str(path),
            hint="copy config.example.yaml there, or pass --config",
        ) from None
    return parse_config(text, where=str(path), embedded=embedded)
