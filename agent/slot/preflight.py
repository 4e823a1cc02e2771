"""Before the slot is touched: does the new model fit this host, its clients and its load?"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from agent.config import Config
from agent.errors import ExecutorError, Refused
from agent.executor.seat import Seat
from agent.model.signature import Signature
from agent.model.spec import Model
from agent.model.wish import Wish
from agent.serving.dataplane import Dataplane
from agent.slot.arbiter import Continuity
from agent.slot.attempt import Deployment
from agent.slot.installer import prove_seat
from agent.slot.residents import Resident, Residents
from drivers.base import Driver, SlotState

QUIET_EVERY = 1.0
"""Seconds between two looks at the load with on_weak_bridge: wait_for_quiet."""


def check_slot(config: Config, wish: Wish, model: Model, state: SlotState) -> None:
    """Whether the image is for this slot, and whether somebody answers while it is reprogrammed. Raises Refused."""
    bridged = Continuity(config.swap.continuity) is Continuity.BRIDGE
    if not model.spec.has_bridge and bridged and not wish.accept_dark:
        raise Refused(
            f"{model.name} has no CPU twin, so nothing could answer while the slot is reprogrammed",
            code="NO_BRIDGE",
            hint="deploy with --accept-dark, or set swap.continuity to queue or reject",
        )
    section = model.spec.slot
    if section is not None and state.present and state.shell is not None and state.shell != section.interface:
        raise Refused(
            f"the image is for shell {section.interface}, this slot has {state.shell}",
            code="INCOMPATIBLE_BITSTREAM",
            field="model.yaml: slot.interface",
            hint="build the bitstream for this host's shell",
        )


async def preflight(
    config: Config,
    driver: Driver,
    residents: Residents,
    dataplane: Dataplane,
    deployment: Deployment,
    wish: Wish,
    model: Model,
    committed: Resident | None,
) -> Resident:
    """The new model on the CPU: it loads, answers its golden cases, fits the host's memory, its clients and the load.

    Its executor is the bridge from then on. Raises Refused, InvalidModel, ProofFailed, ExecutorError.
    """
    known = model.digest in residents.models
    resident = await residents.admit(model, idle=True)
    if committed is not None:
        check_signature(config, wish, committed, resident.signature)
    if not model.spec.has_bridge:
        return resident
    bridge = await _bridge(config, resident)
    deployment.notes["capacity_per_s"] = round(1.0 / resident.service, 1)
    if not known:
        report = await prove_seat(bridge, None, driver, config, seed=0)
        deployment.notes["preflight"] = report.as_dict()
    if committed is not None:
        await _check_load(config, dataplane, deployment, committed)
    await asyncio.to_thread(_check_memory, model, int(bridge.worker.ready.get("rss_bytes", 0)))
    return resident


async def _bridge(config: Config, resident: Resident) -> Seat:
    """The model's bridge; one that was resident before may be being restarted just now. Raises ExecutorError."""
    until = time.monotonic() + config.slot.load_timeout
    while resident.bridge is None:
        if time.monotonic() > until:
            raise ExecutorError("the model's CPU executor does not come back", code="LOAD_TIMEOUT")
        await asyncio.sleep(0.05)
    return resident.bridge


def check_signature(config: Config, wish: Wish, committed: Resident, signature: Signature | None) -> None:
    """Whether clients of the committed model could go on with this one. Raises Refused SIGNATURE_CHANGED."""
    allowed = wish.allow_signature_change
    if config.swap.allow_signature_change if allowed is None else allowed:
        return
    if committed.signature is None or signature is None:
        return
    differences = committed.signature.differences(signature)
    if differences:
        raise Refused(
            f"clients of {committed.model.name} would break: {'; '.join(differences[:4])}",
            code="SIGNATURE_CHANGED",
            hint="deploy with --allow-signature-change if the clients know",
        )


async def _check_load(config: Config, dataplane: Dataplane, deployment: Deployment, committed: Resident) -> None:
    """Whether the committed model's bridge can carry the load while the slot is away."""
    if committed.bridge is None or config.swap.continuity != "bridge":
        return
    capacity, load = 1.0 / committed.service, dataplane.load()
    deployment.notes["bridge"] = {
        "capacity_per_s": round(capacity, 1),
        "load_per_s": round(load, 1),
        "shed_per_s": round(max(0.0, load - capacity), 1),
    }
    if load <= capacity or config.swap.on_weak_bridge == "proceed":
        return
    if config.swap.on_weak_bridge == "refuse":
        raise Refused(
            f"clients send {load:.0f} requests a second, the bridge answers {capacity:.0f}",
            code="WEAK_BRIDGE",
            hint="deploy when it is quieter, or set swap.on_weak_bridge to proceed or wait_for_quiet",
        )
    deployment.notes["waits_for_quiet"] = True
    until = time.monotonic() + config.swap.quiet_timeout
    while (load := dataplane.load()) > capacity:
        if time.monotonic() > until:
            raise Refused(
                f"it did not get quiet within {config.swap.quiet_timeout:g} s: clients send {load:.0f} requests a "
                f"second, the bridge answers {capacity:.0f}",
                code="WEAK_BRIDGE",
                hint="deploy when it is quieter, raise swap.quiet_timeout, or set swap.on_weak_bridge to proceed",
            )
        await asyncio.sleep(QUIET_EVERY)
    deployment.notes["waits_for_quiet"] = False


def _check_memory(model: Model, need: int) -> None:
    """Whether the host has room for one more executor of this size."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            if available < need * 1.2:
                raise Refused(
                    f"the slot's executor of {model.name} needs {need >> 20} MiB, {available >> 20} MiB are left",
                    code="NO_MEMORY",
                    hint="use a smaller model, or give the host more memory",
                )
