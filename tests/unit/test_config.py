"""The configuration: the example is complete and true, faults are named by their field."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from agent.config import EFFECTS, Config, Effect, parse_config, read_config
from agent.errors import InvalidConfig

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "config.example.yaml"
# What the example must not leave at its default to be valid anywhere: the host's name, and the word for a simulation.
OWN = {"device", "embedded"}


def _fields(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _written(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(field, line from 0) of every field in the example; a mapping without fields is a value."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _written(value, f"{prefix}{key.value}.")
        else:
            yield f"{prefix}{key.value}", key.start_mark.line


def test_example_is_valid_as_it_stands() -> None:
    config = read_config(EXAMPLE)
    assert config.embedded
    assert config.slot.driver == "simulated"


def test_example_has_every_field_with_its_default() -> None:
    written = dict(_written(yaml.compose(EXAMPLE.read_text())))
    defaults = dict(_fields(Config(embedded=True)))
    assert list(written) == list(defaults), "the same fields in the same order as agent.config"
    values = dict(_fields(read_config(EXAMPLE)))
    assert {name: value for name, value in values.items() if name not in OWN} == {
        name: value for name, value in defaults.items() if name not in OWN
    }


def test_example_explains_every_field() -> None:
    lines = EXAMPLE.read_text().splitlines()
    bare = []
    for field, line in _written(yaml.compose("\n".join(lines))):
        above = lines[line - 1].strip()
        if not (above.startswith("#") and len(above) > 10):
            bare.append(field)
    assert bare == []


def test_example_says_when_a_change_takes_effect() -> None:
    """Of each field that does not take effect at once, in the last words of its comment."""
    lines = EXAMPLE.read_text().splitlines()
    said = {}
    for field, line in _written(yaml.compose("\n".join(lines))):
        mark = re.search(r" \[([a-z ]+)\]$", lines[line - 1])
        said[field] = mark[1] if mark else Effect.LIVE.value
    assert said == {field: effect.value for field, effect in EFFECTS.items()}


def test_nothing_is_needed() -> None:
    assert parse_config("embedded: true") == Config(embedded=True)
    assert parse_config("", embedded=True) == Config(embedded=True)


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ("slot: [", "test", "is not YAML"),
        ("a: &x 1\nb: *x", "test", "aliases"),
        ("\0", "test", "is not YAML"),
        (b"\xff\xfe\xff", "test", "is not YAML"),
        ("[" * 5000, "test", "is not YAML"),
        ("- 1", "test", "must be a mapping"),
        ("embedded: true\ncolour: red", "test: colour", "no such field"),
        ("embedded: true\nslot: {programm_timeout: 3s}", "test: slot.programm_timeout", "no such field"),
        ("embedded: true\nslot: {program_timeout: soon}", "test: slot.program_timeout", "is not a time"),
        ("embedded: true\nslot: {program_timeout: -1}", "test: slot.program_timeout", "greater than or equal to 0"),
        ("embedded: true\nexecutor: {memory: 4 potatoes}", "test: executor.memory", "is not a size"),
        ("embedded: true\nswap: {continuity: magic}", "test: swap.continuity", "'bridge', 'queue' or 'reject'"),
        ("embedded: true\nswap: {probation: {max_internal_rate: 2}}", "test: swap.probation.max_internal_rate", "1"),
        ("embedded: true\ndevice: a/b", "test: device", "pattern"),
        ("embedded: true\nlink: {port: 70000}", "test: link.port", "65535"),
        ("slot: {driver: simulated}", "test", "embedded: true"),
        ("slot: {driver: other}\nlink: {host: ''}", "test", "embedded: true"),
        ("device: {}\nembedded: 7", "test: device", "and 1 more"),
    ],
)
def test_faults_are_named(text: str | bytes, field: str, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_config(text, where="test")
    assert caught.value.field == field
    assert message in caught.value.message
    assert caught.value.exit == 78


def test_units() -> None:
    config = parse_config(
        "embedded: true\n"
        "slot: {program_timeout: 500ms, drain_timeout: 1.5m, load_timeout: 2h, retry_first: 7, retry_max: 7d}\n"
        "executor: {arena: 1KiB, memory: 3GiB}\n"
        "serving: {grpc: {max_message: '77'}}\n"
    )
    slot = config.slot
    assert (slot.program_timeout, slot.drain_timeout, slot.load_timeout) == (0.5, 90.0, 7200.0)
    assert (slot.retry_first, slot.retry_max) == (7.0, 604800.0)
    assert (config.executor.arena, config.executor.memory, config.serving.grpc.max_message) == (1024, 3 << 30, 77)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="cannot be read: No such file") as caught:
        read_config(tmp_path / "config.yaml")
    assert caught.value.field == str(tmp_path / "config.yaml")
    assert "config.example.yaml" in str(caught.value.hint)


def test_a_configuration_does_not_change() -> None:
    config = Config(embedded=True)
    with pytest.raises(ValueError, match="frozen"):
        config.device = "other"


def test_the_configuration_is_read_without_numpy() -> None:
    """A start waits for it: the committed model's files are hashed as soon as it is known where they lie."""
    program = "import sys, agent.reload.source, agent.images.early; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
