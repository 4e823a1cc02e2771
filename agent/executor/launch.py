"""What a child is started with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent.config import Config
from agent.executor.arena import DecodedMemory
from agent.executor.plan import plan_of
from agent.model.spec import Model


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
    argv: tuple[str, ...] = (sys.executable, "-I", "-m", "agent.executor.worker")
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
    return Launch(role, hello, arena=config.executor.arena, memory=config.executor.memory, idle=idle, maps=tuple(maps))


def launch_decoder(
    config: Config, model: Model, memory: DecodedMemory, *, role: str = "decoder", idle: bool = False
) -> Launch:
    """A decoder for a model that starts with an image stage; pictures go to `memory`."""
    image = model.spec.image
    if image is None:
        raise ValueError(f"{model.name} has no image stage")
    return Launch(
        role,
        {"kind": "decoder", "image": image.model_dump(mode="json", by_alias=True)},
        arena=config.executor.arena,
        memory=config.executor.memory,
        idle=idle,
        output=memory,
    )
