"""The commands that every slotd has."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from agent.commands.host import Host
from agent.commands.table import Actor, Arguments, Command, Table
from agent.config import Seconds
from agent.model.wish import Wish

Task = Annotated[str, Field(min_length=1, max_length=128)]


class Nothing(Arguments):
    """No arguments."""


class Deploy(Arguments):
    """A wish."""

    image: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[!-~]+$")]
    """The image: host:port/name:tag, or oci:/folder:tag."""
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """The manifest digest that it must have."""
    force: bool = False
    """Deploy also what is in force already, or was cut off before."""
    allow_signature_change: bool | None = None
    """Whether the tensors may differ from the committed model's; default: as configured."""
    accept_dark: bool = False
    """Deploy a model that cannot be answered from the CPU while the slot is down."""
    probation: Seconds | None = None
    """How long the model is watched before it is committed (30s, 5m or seconds); default: as configured."""


class Cancel(Arguments):
    """Which one."""

    task: Task | None = None
    """The deployment's id; default: the one that waits, else the one that runs."""


class OneTask(Arguments):
    """Which one."""

    task: Task
    """The deployment's id."""


def build_table(host: Host) -> Table:
    """The commands over a host. The host is not touched until one is run."""

    async def ping(_: Nothing, actor: Actor) -> dict[str, Any]:
        status = host.status()
        return {"pong": True, **{key: status.get(key) for key in ("device", "version", "uptime_s")}}

    async def status(_: Nothing, actor: Actor) -> dict[str, Any]:
        return host.status()

    async def doctor(_: Nothing, actor: Actor) -> dict[str, Any]:
        return host.doctor()

    async def deploy(wanted: Deploy, actor: Actor) -> dict[str, Any]:
        fields = wanted.model_dump(exclude={"image"})
        return await host.deploy(Wish(reference=wanted.image, **fields), actor)

    async def undeploy(_: Nothing, actor: Actor) -> dict[str, Any]:
        return await host.undeploy(actor)

    async def rollback(_: Nothing, actor: Actor) -> dict[str, Any]:
        return await host.rollback(actor)

    async def cancel(which: Cancel, actor: Actor) -> dict[str, Any]:
        return await host.cancel(which.task, actor)

    async def reload(_: Nothing, actor: Actor) -> dict[str, Any]:
        return await host.reload(actor)

    async def task(which: OneTask, actor: Actor) -> dict[str, Any]:
        return await host.task(which.task)

    table = Table()
    for name, changes, arguments, run, text in (
        ("ping", False, Nothing, ping, "Answers at once, with the device's name and version."),
        ("status", False, Nothing, status, "The whole state of the host."),
        ("doctor", False, Nothing, doctor, "Whether the host has what slotd needs, and what its children may use."),
        ("deploy", True, Deploy, deploy, "Makes an image the model in the slot; answers with a task id."),
        ("undeploy", True, Nothing, undeploy, "Takes the model out of the slot; the host boots empty."),
        ("rollback", True, Nothing, rollback, "Calls off the deployment in hand, or goes back to the previous model."),
        ("cancel", True, Cancel, cancel, "Calls off a deployment."),
        ("reload", True, Nothing, reload, "Reads the configuration again and says what has changed."),
        ("task", False, OneTask, task, "How a deployment stands, or how it ended."),
    ):
        table.add(Command(name, text, arguments, changes, run))
    return table
