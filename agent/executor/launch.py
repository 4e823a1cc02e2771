"""What a child is started with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.config import Config
from agent.executor.arena import DecodedMemory
from agent.executor.needs import grants_of
from agent.executor.plan import plan_of
from agent.executor.sandbox import Grants
from agent.executor.sandbox.grants import DAC_READ_SEARCH
from agent.executor.spawn import WORKER
from agent.model.spec import Model
from drivers import make


@dataclass(frozen=True)
class Launch:
    """How to start a child. Sizes in bytes."""

    role: str
    """A label for names and logs: slot, bridge, preflight, disposable, decoder."""
    hello: dict[str, Any]
    """What the child is told first."""
    arena: int
    """Shared memory for its requests."""
    memory: int
    """Private memory that it may use (RLIMIT_DATA)."""
    grants: Grants = field(default_factory=Grants)
    """What it may use of the host."""
    argv: tuple[str, ...] = WORKER
    idle: bool = False
    """Start it at SCHED_IDLE; `Worker.normal_priority` lifts it."""
    maps: Sequence[int] = ()
    """Descriptors of decoders' memories, which the child maps read-only."""
    output: DecodedMemory | None = None
    """Where its outputs go instead of its own arena; for a decoder."""


def launch_model(
    config: Config,
    model: Model,
    target: str,
    *,
    role: str,
    maps: Sequence[int] = (),
    idle: bool = False,
) -> Launch:
    """An executor for a model; `target` is `slot` or `cpu`. `maps` are the fds of its decoders' DecodedMemory."""
    hello = {
        "kind": "model",
        "target": target,
        "folder": str(model.folder),
        "plan": plan_of(model.spec),
        "driver": {"name": config.slot.driver, "options": config.driver_options} if target == "slot" else None,
        "threads": config.threads,
        "call_timeout": config.executor.call_timeout,
    }
    grants = Grants(read=(str(model.folder),), capabilities=(DAC_READ_SEARCH,))
    memory = config.executor.memory
    if target == "slot":
        needs = make(config.slot.driver, config.driver_options).needs
        grants = grants_of(needs, read=grants.read)
        memory += needs.address_space
    return Launch(role, hello, config.executor.arena, memory, grants, idle=idle, maps=tuple(maps))


def launch_decoder(
    config: Config, model: Model, memory: DecodedMemory, *, role: str = "decoder", idle: bool = False
) -> Launch:
    """A decoder for a model that starts with an image stage; pictures go to `memory`."""
    image = model.spec.image
    if image is None:
        raise ValueError(f"{model.name} has no image stage")
    return Launch(
        role,
        {
            "kind": "decoder",
            "image": image.model_dump(mode="json", by_alias=True),
            "call_timeout": config.executor.call_timeout,
        },
        arena=config.executor.arena,
        memory=config.executor.memory,
        idle=idle,
        output=memory,
    )
