"""Clients' keys: the file, which of them are good, and the command that makes them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agent.cli.verbs import app
from agent.errors import InvalidConfig, Unauthenticated
from agent.health.issues import Issues
from agent.serving.keys import Keys, fingerprint, read_keys

ONE, TWO, THREE = ("a" * 24, "b-._~+/=" * 4, "c" * 256)
PREDICT = "/tensorflow.serving.PredictionService/Predict"


def write(path: Path, *lines: str, mode: int = 0o640) -> Path:
    beside = path.with_name("beside")
    beside.write_text("".join(f"{line}\n" for line in lines))
    beside.chmod(mode)
    beside.rename(path)
    return path


def run(*arguments: object, code: int = 0, **more: Any) -> Any:
    done = CliRunner().invoke(app, ["keys", *map(str, arguments)], **more)
    assert done.exit_code == code, (done.output, done.exception)
    return done


def is_good(keys: Keys, *sent: str, path: str = PREDICT) -> bool:
    try:
        keys.check(path, tuple(("authorization", one) for one in sent))
    except Unauthenticated as error:
        refusal = error
    else:
        return True
    assert refusal.field == "authorization"
    assert not any(one in str(refusal) for one in sent if len(one) > 10)
    return False


def test_a_file_with_comments_and_blank_lines(tmp_path: Path) -> None:
    assert read_keys(write(tmp_path / "keys", "# newest first", "", f"  {ONE} ", TWO)) == (ONE, TWO)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "0 keys"),
        ((ONE, TWO, THREE), "3 keys"),
        (("short",), "line 1"),
        (("# x", "d" * 257), "line 2"),
        (("with a blank in the middle of it",), "line 1"),
        (("é" * 30,), "no text"),
        (("a" * 5000,), "larger"),
    ],
)
def test_files_that_are_none(tmp_path: Path, lines: tuple[str, ...], said: str) -> None:
    path = write(tmp_path / "keys", *lines)
    with pytest.raises(InvalidConfig) as caught:
        read_keys(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert caught.value.field == "serving.keys" and caught.value.hint
    assert not any(line in f"{caught.value} {caught.value.hint}" for line in lines if len(line) > 4)


def test_a_file_that_everybody_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="open to everybody"):
        read_keys(write(tmp_path / "keys", ONE, mode=0o644))


async def test_who_is_let_in(tmp_path: Path) -> None:
    keys = Keys(write(tmp_path / "keys", ONE, TWO), Issues())
    await keys.load()
    for good in (f"Bearer {ONE}", f"bearer {TWO}", ONE, f"  Bearer   {ONE}  "):
        assert is_good(keys, good), good
    for wrong in ("", "Bearer", f"Bearer {THREE}", f"Basic {ONE}", ONE[:-1], f"{ONE}x", f"Bearer {ONE} {TWO}x", "é"):
        assert not is_good(keys, wrong), wrong
    assert not is_good(keys)
    assert not is_good(keys, f"Bearer {ONE}", f"Bearer {ONE}")
    assert is_good(keys, path="/grpc.health.v1.Health/Check")
    assert not is_good(keys, path="/grpc.health.v1.HealthX/Check")


async def test_without_a_good_file_nobody_is(tmp_path: Path) -> None:
    issues = Issues()
    keys = Keys(tmp_path / "keys", issues)
    await keys.load()
    assert not is_good(keys, f"Bearer {ONE}") and not is_good(keys, "")
    (issue,) = issues.list()
    assert (issue["id"], issue["severity"]) == ("serving-keys", "error")
    assert "over TCP are refused" in issue["message"] and "slotd keys --rotate" in str(issue["hint"])
    write(tmp_path / "keys", ONE)
    await keys.refresh()
    assert is_good(keys, ONE) and not issues.list()


async def test_another_file_while_it_runs(tmp_path: Path) -> None:
    issues = Issues()
    path = write(tmp_path / "keys", ONE)
    keys = Keys(path, issues)
    await keys.load()
    write(path, TWO, ONE)
    await keys.refresh()
    assert is_good(keys, ONE) and is_good(keys, TWO)
    write(path, THREE, TWO)
    await keys.refresh()
    assert [is_good(keys, one) for one in (ONE, TWO, THREE)] == [False, True, True]
    for spoil in (lambda: write(path, "nonsense"), path.unlink):
        spoil()
        await keys.refresh()
        assert [is_good(keys, one) for one in (ONE, TWO, THREE)] == [False, True, True], "as before"
        assert "stay good" in issues.list()[0]["message"]
    write(path, ONE)
    await keys.refresh()
    assert [is_good(keys, one) for one in (ONE, TWO, THREE)] == [True, False, False]
    assert not issues.list()


def test_the_command_makes_and_replaces_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first = json.loads(run("--file", path, "--rotate", "--json").stdout)
    assert read_keys(path) == (first["key"],)
    assert path.stat().st_mode & 0o777 == 0o640
    second = json.loads(run("--file", path, "--rotate", "--json").stdout)
    third = run("--file", path, "--rotate").stdout
    keys = read_keys(path)
    assert len(keys) == 2 and keys[1] == second["key"] and keys[0] in third
    assert first["key"] not in path.read_text()
    shown = run("--file", path).stdout
    assert fingerprint(keys[0]) in shown and fingerprint(keys[1]) in shown
    assert keys[0] not in shown and keys[1] not in shown
    assert json.loads(run("--file", path, "--json").stdout)["key"] is None
    os.chmod(path, 0o600)
    run("--file", path, "--rotate")
    assert path.stat().st_mode & 0o777 == 0o600, "as it was"


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("device: d\nembedded: true\n")
    done = CliRunner().invoke(app, ["keys", "--config", str(config)])
    assert done.exit_code == 65 and "serving.keys" in done.output
    config.write_text(f"device: d\nembedded: true\nserving: {{keys: {tmp_path / 'keys'}}}\n")
    run("--config", config, "--rotate")
    assert len(read_keys(tmp_path / "keys")) == 1


def test_a_pipe_does_not_keep_anybody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys", 0o640)
    with pytest.raises(InvalidConfig, match="is no file"):
        read_keys(tmp_path / "keys")
