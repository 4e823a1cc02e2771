"""The commands that every host has."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from agent.commands.host import Host
from agent.commands.table import Actor, Arguments, Command, Table
from agent.model.wish import Wish


class Nothing(Arguments):
    """No arguments."""


class DeployArguments(Arguments):
    """What `deploy` takes."""

    image: str = Field(min_length=1, max_length=1024, description="registry/name:tag, name@sha256:… or oci:FOLDER:tag")
    digest: str | None = Field(
        None, pattern=r"^sha256:[0-9a-f]{64}$", description="the manifest digest that the image must have"
    )
    force: bool = Field(False, description="also if it is the model in force, or was cut off before")
    accept_dark: bool = Field(False, description="take a model without a CPU twin: nothing answers during the swap")
    allow_signature_change: bool | None = Field(
        None, description="take other tensor names, dtypes or shapes; default: as the config says"
    )
    probation: float | None = Field(
        None, ge=0, le=86400, description="seconds of probation; default: as the config says"
    )


class TaskArguments(Arguments):
    """What `task` takes."""

    task: str = Field(
        min_length=1, max_length=128, description="the id that deploy, undeploy or rollback answered with"
    )


class CancelArguments(Arguments):
    """What `cancel` takes."""

    task: str | None = Field(
        None, min_length=1, max_length=128, description="the task; default: the one that waits, else the one that runs"
    )


def build_table(host: Host) -> Table:
    """The table over a host."""

    async def ping(_: Nothing, __: Actor) -> dict[str, Any]:
        status = host.status()
        return {"pong": True, **{key: status[key] for key in ("device", "version", "uptime_s")}}

    async def status(_: Nothing, __: Actor) -> dict[str, Any]:
        return host.status()

    async def deploy(arguments: DeployArguments, actor: Actor) -> dict[str, Any]:
        wish = Wish(
            arguments.image,
            digest=arguments.digest,
            force=arguments.force,
            accept_dark=arguments.accept_dark,
            allow_signature_change=arguments.allow_signature_change,
            probation=arguments.probation,
        )
        return await host.deploy(wish, actor)

    async def undeploy(_: Nothing, actor: Actor) -> dict[str, Any]:
        return await host.undeploy(actor)

    async def rollback(_: Nothing, actor: Actor) -> dict[str, Any]:
        return await host.rollback(actor)

    async def cancel(arguments: CancelArguments, actor: Actor) -> dict[str, Any]:
        return await host.cancel(arguments.task, actor)

    async def task(arguments: TaskArguments, _: Actor) -> dict[str, Any]:
        return await host.task(arguments.task)

    table = Table()
    for command in (
        Command("ping", "Say that you are there.", Nothing, False, ping),
        Command("status", "Tell the whole state of the host.", Nothing, False, status),
        Command("deploy", "Put an image's model into the slot; answers with a task.", DeployArguments, True, deploy),
        Command("undeploy", "Serve nothing any more; answers with a task.", Nothing, True, undeploy),
        Command("rollback", "Call off the deployment in hand, or go to the previous model.", Nothing, True, rollback),
        Command("cancel", "Call a deployment off.", CancelArguments, True, cancel),
        Command("task", "Tell how a task stands.", TaskArguments, False, task),
    ):
        table.add(command)
    return table
