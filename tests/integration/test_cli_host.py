"""`slotd run` and the other verbs against each other, as an operator types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from support.host import Host

ROOT = Path(__file__).parents[2]


class Shell:
    """A host that is run by `slotd run`, and `slotd` on its configuration."""

    def __init__(self, folder: Path) -> None:
        self.host = Host(folder)
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(self.host.config))
        self.log = folder / "run.log"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self.log.open("w") as log:  # not a pipe: nobody reads it meanwhile
            self.process = self.popen("run", stderr=log)
        until = time.monotonic() + 60
        while self("status").returncode != 0:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, "it was not ready"

    def popen(self, *arguments: object, stderr: Any = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "agent", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "SLOTD_CONFIG": str(self.config)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        process = self.popen(*arguments)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--json").stdout)


@pytest.fixture
def slotd(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    if shell.process is not None and shell.process.poll() is None:
        shell.process.kill()
        shell.process.communicate()


def test_a_day_of_a_host(slotd: Shell, tmp_path: Path) -> None:
    first, second = slotd.host.pack("a:1", scale=2.0), slotd.host.pack("b:1", scale=3.0)
    slotd.start()
    status = slotd.json("status")
    assert (status["host"], status["committed"]) == ("empty", None)

    done = slotd("deploy", f"oci:{slotd.host.layout}:a:1")
    assert done.returncode == 0, done.stdout + done.stderr
    for phase in ("resolve", "pull", "unpack", "preflight", "drain", "program", "load", "prove", "probation", "commit"):
        assert f"\n{phase} " in f"\n{done.stdout}"
    assert slotd("deploy", "a:1").stdout.splitlines()[-1].startswith("unchanged · a 1 · ")

    address = slotd.json("status")["serving"]["listen"][-1]
    np.save(tmp_path / "x.npy", np.ones((1, 4), np.float32))
    ask = ("predict", "--input", f"x={tmp_path / 'x.npy'}", "--address", address, "--top", "0")
    reply = slotd.json(*ask)
    assert reply["outputs"]["y"]["values"] == [[3.0] * 4]
    assert (reply["model"]["digest"], reply["served_by"]) == (first, "slot")

    task = slotd("deploy", "b:1", "--no-wait").stdout.strip()
    assert slotd("task", task, "--watch").returncode == 0
    assert slotd.json(*ask)["outputs"]["y"]["values"] == [[4.0] * 4]
    assert slotd.json("task", task)["digest"] == second
    text = slotd("status").stdout
    assert "slot: the committed model answers from the slot" in text
    assert text.index("committed   b 1") < text.index("previous    a 1")

    assert slotd("rollback").returncode == 0
    assert slotd.json(*ask)["model"]["digest"] == first
    assert slotd("undeploy").returncode == 0
    assert slotd(*ask).returncode == 69

    assert slotd.process is not None
    slotd.process.send_signal(signal.SIGTERM)
    assert slotd.process.wait(30) == 0, slotd.log.read_text()
    assert {json.loads(line)["level"] for line in slotd.log.read_text().splitlines()} <= {"debug", "info", "warning"}
    assert slotd("status").returncode == 69


def test_what_fails_says_why(slotd: Shell) -> None:
    slotd.host.pack("a:1")
    slotd.start()
    missing = slotd("deploy", "nothing:1")
    assert missing.returncode == 69
    assert "NOT_FOUND: " in missing.stdout
    slotd.host.inject({"at": "program", "kind": "error", "count": None})
    broken = slotd("deploy", "a:1")
    assert broken.returncode == 69
    assert "PROGRAM_FAILED: " in broken.stdout
    assert slotd.json("status")["host"] == "empty"


def test_a_second_daemon_is_refused_naming_the_first(slotd: Shell) -> None:
    slotd.start()
    assert slotd.process is not None
    second = slotd("run")
    assert second.returncode == 73
    error = second.stderr.splitlines()[-2:]
    assert error[0].startswith("error: ")
    assert str(slotd.process.pid) in error[0]
    assert slotd("status").returncode == 0
