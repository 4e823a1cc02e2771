"""The table of commands: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import agent.commands.table
from agent.commands.builtin import build_table
from agent.commands.table import Actor, Arguments, Command, Table
from agent.errors import InvalidInput, NotFound, SlotdError, Unavailable
from agent.model.wish import Wish
from support.fake_host import FakeHost

ME = Actor("local", "uid 0 (root)")
DIGEST = "sha256:" + "a" * 64


class Host(FakeHost):
    """Notes the wish and who had it."""

    def __init__(self) -> None:
        super().__init__()
        self.wishes: list[tuple[Wish, Actor]] = []

    async def deploy(self, wish: Wish, actor: Any) -> dict[str, Any]:
        self.wishes.append((wish, actor))
        return {"task": "d-1", "outcome": None}


async def test_the_commands_that_every_slotd_has() -> None:
    table = build_table(Host())
    assert [(command.name, command.changes) for command in table] == [
        ("ping", False),
        ("status", False),
        ("doctor", False),
        ("deploy", True),
        ("undeploy", True),
        ("rollback", True),
        ("cancel", True),
        ("reload", True),
        ("task", False),
    ]
    assert all(command.help.endswith(".") for command in table)
    assert "deploy" in table
    assert "deplyo" not in table


async def test_each_asks_the_host() -> None:
    host = Host()
    table = build_table(host)
    answer = await table.run("ping", {}, ME)
    assert answer["pong"] is True
    assert answer["device"] == host.document["device"]
    assert answer["version"] == host.document["version"]
    assert await table.run("status", {}, ME) == host.document
    assert (await table.run("doctor", {}, ME))["checks"]
    for name in ("undeploy", "rollback", "cancel"):
        assert (await table.run(name, {}, ME))["task"] == "d-1"
    await table.run("cancel", {"task": "d-1"}, ME)
    assert (await table.run("task", {"task": "d-1"}, ME))["id"] == "d-1"
    asked = [entry for entry in host.asked if entry[0] not in ("status", "doctor")]
    assert asked == [("undeploy", None), ("rollback", None), ("cancel", None), ("cancel", "d-1"), ("task", "d-1")]


async def test_a_deployment_becomes_a_wish() -> None:
    host = Host()
    table = build_table(host)
    await table.run("deploy", {"image": "registry:5000/resnet50:3"}, ME)
    await table.run(
        "deploy",
        {
            "image": "oci:/layout:3",
            "digest": DIGEST,
            "force": True,
            "allow_signature_change": False,
            "accept_dark": True,
            "probation": "5m",
        },
        ME,
    )
    await table.run("deploy", {"image": "a/b", "probation": 3}, ME)
    assert host.wishes == [
        (Wish("registry:5000/resnet50:3"), ME),
        (
            Wish("oci:/layout:3", DIGEST, force=True, accept_dark=True, allow_signature_change=False, probation=300.0),
            ME,
        ),
        (Wish("a/b", probation=3.0), ME),
    ]


@pytest.mark.parametrize(
    ("arguments", "field", "message"),
    [
        ({}, "image", "is missing"),
        ({"image": None}, "image", "string"),
        ({"image": ""}, "image", "at least 1"),
        ({"image": "a b"}, "image", "pattern"),
        ({"image": "a\n"}, "image", "pattern"),
        ({"image": "größe"}, "image", "pattern"),
        ({"image": "x" * 1025}, "image", "at most 1024"),
        ({"image": "a", "digest": "abc"}, "digest", "pattern"),
        ({"image": "a", "force": "yes"}, "force", "boolean"),
        ({"image": "a", "force": 1}, "force", "boolean"),
        ({"image": "a", "probation": "soon"}, "probation", "is not a time"),
        ({"image": "a", "probation": -1}, "probation", "greater than or equal"),
        ({"image": "a", "probation": float("nan")}, "probation", ""),
        ({"image": "a", "probation": True}, "probation", ""),
        ({"image": "a", "imag": 1}, "imag", "is no argument of this command"),
        ({"force": 3}, "image", "is missing (and 1 more)"),
        ({"image": "a", 3: 4}, "3", ""),
    ],
)
async def test_wrong_arguments_are_named_and_nothing_is_done(
    arguments: dict[Any, Any], field: str, message: str
) -> None:
    host = Host()
    with pytest.raises(InvalidInput) as caught:
        await build_table(host).run("deploy", arguments, ME)
    assert caught.value.field == field
    assert message in caught.value.message
    assert caught.value.hint
    assert host.wishes == []


async def test_hints_name_what_is_near() -> None:
    table = build_table(Host())
    with pytest.raises(NotFound) as missing:
        await table.run("deplyo", {}, ME)
    assert missing.value.field == "command"
    assert missing.value.hint == "did you mean deploy or undeploy?"
    with pytest.raises(NotFound) as far:
        await table.run("\x1b[31m" + "zzzz" * 1000, {}, ME)
    assert "ping, status" in str(far.value.hint)
    assert len(far.value.message) < 200
    assert "\x1b" not in far.value.message
    with pytest.raises(InvalidInput) as typo:
        await table.run("deploy", {"image": "a", "forse": True}, ME)
    assert typo.value.hint == "did you mean force?"
    with pytest.raises(InvalidInput) as none:
        await table.run("ping", {"x": 1}, ME)
    assert none.value.hint == "ping takes no arguments"
    with pytest.raises(InvalidInput) as list_:
        await table.run("ping", [1], ME)  # type: ignore[arg-type]
    assert list_.value.field == "arguments"


async def test_errors_of_the_host_go_through_others_lose_their_details() -> None:
    table = Table()

    async def known(_: Any, actor: Actor) -> dict[str, Any]:
        raise Unavailable("not now", hint="later")

    async def unknown(_: Any, actor: Actor) -> dict[str, Any]:
        raise RuntimeError("the password is 1234")

    table.add(Command("known", "x", Arguments, False, known))
    table.add(Command("unknown", "x", Arguments, False, unknown))
    with pytest.raises(Unavailable, match="not now"):
        await table.run("known", {}, ME)
    with pytest.raises(SlotdError) as caught:
        await table.run("unknown", {}, ME)
    assert caught.value.code == "INTERNAL"
    assert "1234" not in str(caught.value.as_dict())
    with pytest.raises(ValueError, match="already"):
        table.add(Command("known", "x", Arguments, False, known))


def test_every_argument_is_explained() -> None:
    for command in build_table(Host()):
        schema = command.schema()
        assert schema["additionalProperties"] is False
        for name, field in schema.get("properties", {}).items():
            assert field.get("description"), (command.name, name)
    deploy = next(command for command in build_table(Host()) if command.name == "deploy")
    assert deploy.schema()["required"] == ["image"]


def test_the_table_knows_no_wire_format() -> None:
    tree = ast.parse(Path(agent.commands.table.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported.isdisjoint({"json", "socket", "asyncio", "aiomqtt", "grpc"})
    assert issubclass(Arguments, BaseModel)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_names = st.sampled_from(["image", "digest", "force", "task", "probation", "accept_dark"]) | st.text(max_size=10)


@given(
    name=st.sampled_from(["ping", "status", "deploy", "undeploy", "rollback", "cancel", "task"]) | st.text(max_size=20),
    arguments=st.dictionaries(_names, _values, max_size=4),
)
async def test_whatever_comes_is_run_or_refused_with_a_typed_error(name: str, arguments: dict[str, Any]) -> None:
    host = Host()
    error = None
    try:
        await build_table(host).run(name, arguments, ME)
    except SlotdError as refused:
        error = refused
    if error is not None:
        assert error.code in ("NOT_FOUND", "INVALID_ARGUMENT")
        assert error.hint or name == "task"
        assert not host.wishes


def test_actors() -> None:
    assert str(Actor("mqtt", "ops")) == "mqtt: ops"
    assert str(Actor("boot", "")) == "boot"
