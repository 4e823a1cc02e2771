"""The slotd command, as people and scripts meet it; the daemon's side is the real admin socket over a fake host."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import agent
from agent.cli import live, output, status
from agent.cli.verbs import app
from agent.errors import Refused, Unavailable
from agent.slot.arbiter import Phase
from support.fake_host import MODEL, Admin, deployment_document, status_document
from support.loops import Loop

ROOT = Path(__file__).parents[2]
PHASES = [phase.value for phase in Phase]
EXAMPLE = ROOT / "config.example.yaml"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLOTD_CONFIG", "SLOTD_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture
def admin(loop: Loop, tmp_path: Path) -> Iterator[Admin]:
    admin = Admin(loop, tmp_path / "admin.sock").start()
    yield admin
    admin.close()


def cli(*arguments: object, **more: Any) -> Any:
    """Runs it in this process: .exit_code, .stdout, .stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **more)


def start(*arguments: object, **more: Any) -> subprocess.Popen[str]:
    """Starts it as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "agent", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what is in its background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,
    )


def rendered(what: Any, width: int = 100) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    out.print(what)
    return out.file.getvalue()


# --- about -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["deploy", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from agent.cli import main; sys.argv = ['slotd', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: print('\\nEND', end.code, *sorted(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT)
    code, *modules = done.stdout.split("\nEND ")[1].split()
    assert code in ("0", "None")
    heavy = {"agent.config", "grpc", "onnxruntime", "numpy", "google.protobuf", "yaml", "aiomqtt", "asyncio", "sqlite3"}
    assert heavy.isdisjoint(modules)


def test_help_names_every_verb() -> None:
    verbs = (
        "run",
        "check",
        "status",
        "deploy",
        "undeploy",
        "rollback",
        "cancel",
        "task",
        "predict",
        "commands",
        "version",
    )
    text = cli("--help").stdout
    for verb in verbs:
        assert f"│ {verb} " in text
        assert cli(verb, "--help").exit_code == 0


def test_version() -> None:
    assert cli("version").stdout == cli("--version").stdout == f"slotd {agent.__version__}\n"
    assert json.loads(cli("version", "--json").stdout)["slotd"] == agent.__version__


def test_commands_need_no_daemon() -> None:
    text = cli("commands").stdout
    described = {command["name"]: command for command in json.loads(cli("commands", "--json").stdout)}
    assert {"ping", "status", "deploy", "undeploy", "rollback", "cancel", "task"} <= set(described)
    for name, command in described.items():
        assert name in text
        assert command["help"]
    assert described["deploy"]["changes"]
    assert not described["status"]["changes"]
    assert "image" in described["deploy"]["arguments"]["required"]
    assert "image: string" in text


@pytest.mark.parametrize("arguments", [["fly"], ["deploy"], ["deploy", "a", "--sideways"], ["task"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = cli(*arguments)
    assert done.exit_code == 2
    assert "Usage: slotd" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unforeseen_fault_shows_no_traceback(tmp_path: Path) -> None:
    program = (
        "import sys, agent.cli.connect as c\n"
        "def broken(*_): raise RuntimeError('wires crossed')\n"
        "c.admin_socket = broken\n"
        "from agent.cli import main; sys.argv = ['slotd', 'status']; main()\n"
    )
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 70
    assert done.stderr.startswith("error: an unforeseen fault: RuntimeError: wires crossed\nhint: ")
    loud = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "SLOTD_TRACEBACK": "1"})
    assert "Traceback" in loud.stderr


# --- run, check ------------------------------------------------------------------------------------------------------


def test_check_says_what_run_would_do() -> None:
    done = cli("check", "--config", EXAMPLE)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert {line.split("  ")[0] for line in lines} >= {"device", "slot", "swap", "probation", "gRPC", "images", "link"}
    values = {line[: len("probation   ")].strip(): line[len("probation   ") :] for line in lines}
    assert values["slot"].startswith("simulated (a simulation)")
    assert values["gRPC"].startswith("127.0.0.1:50051, unix:/run/slotd/grpc.sock")
    assert json.loads(cli("check", "--json", env={"SLOTD_CONFIG": str(EXAMPLE)}).stdout)["config"]["device"] == "edge-1"


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("slot: {driver: simulated}", "embedded: true"),
        ("embedded: true\ncolour: red", "colour"),
        ("embedded: true\nslot: {program_timeout: soon}", "slot.program_timeout"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_configuration_ends_with_78(verb: str, text: str | None, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    done = cli(verb, "--config", path)
    assert done.exit_code == 78
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {path}")
    assert complaint in done.stderr
    assert "\nhint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_check_knows_the_drivers(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("slot: {driver: quantum}")
    done = cli("check", "--config", path, "--json")
    assert done.exit_code == 78
    assert "there is no driver 'quantum'" in done.stderr
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["field"]) == ("CONFIG_INVALID", f"{path}: slot")


def test_embedded_without_a_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("agent.config.DEFAULT_PATH", tmp_path / "config.yaml")
    assert cli("check").exit_code == 78
    done = cli("check", "--embedded")
    assert done.exit_code == 0
    assert "a broker inside slotd" in done.stdout


# --- finding the daemon ----------------------------------------------------------------------------------------------


def test_no_daemon(tmp_path: Path) -> None:
    done = cli("status", "--socket", tmp_path / "admin.sock")
    assert done.exit_code == 69
    assert str(tmp_path / "admin.sock") in done.stderr
    assert "\nhint: " in done.stderr


def test_the_socket_comes_from_the_configuration(admin: Admin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"run_dir: {tmp_path}\nslot: {{driver: simulated}}")
    assert cli("status", "--config", path).exit_code == 0
    assert cli("status", env={"SLOTD_CONFIG": str(path)}).exit_code == 0
    monkeypatch.setattr("agent.config.DEFAULT_PATH", path)
    assert cli("status").exit_code == 0
    path.write_text("nonsense: true")
    monkeypatch.setattr("agent.cli.connect.DEFAULT_SOCKET", admin.path)
    assert cli("status").exit_code == 0, "what nobody named may be broken: the daemon may run with an older one"
    assert cli("status", "--config", path).exit_code == 78


# --- status ----------------------------------------------------------------------------------------------------------


def test_status_json_is_the_document(admin: Admin) -> None:
    done = cli("status", "--json", "--socket", admin.path)
    assert done.exit_code == 0
    assert json.loads(done.stdout) == admin.host.document


def test_status_page(admin: Admin) -> None:
    done = cli("status", "--socket", admin.path)
    text = done.stdout
    for part in (
        "edge-1",
        "slotd 0.1.0 · up 3 h 12 min · pid 4321 · embedded",
        "slot: the committed model answers from the slot",
        "simulated · a simulation · 45 °C · 22 W · executor 4400 · proven",
        "shell 9926ab6d6c925a68aabca7d84c545738",
        "resnet50 3 · sha256:ab12ab12ab12",
        "registry:5000/resnet50:3",
        "d-1 · resnet50 3 · committed · 1 min 15 s · by local uid 1000 (me)",
        "1,234,567 requests · 2 failed · 3 refused",
        "1,234,000 by slot · 562 by bridge · 4 in flight · 0 queued",
        "p50 4.1 ms · p99 9.9 ms · capacity 240.5/s",
        "not connected · 127.0.0.1:1883 · 17 events wait · the oldest for 1 min 05 s",
        "warning clock · the clock is not synchronised",
        "hint: start a time service",
    ):
        assert part in text
    starts = {len(line) - len(line[11:].lstrip()) for line in text.splitlines()}
    assert len(starts) == 1, "the second column lines up"


def test_status_of_a_host_in_trouble() -> None:
    text = rendered(
        status.page(
            status_document(
                host="bridge",
                reason={"code": "PROOF_FAILED", "message": "case 3 is off by 0.2", "hint": "reset the card"},
                deployment=deployment_document(None),
                slot={"driver": "dfl", "present": False},
                previous=None,
                issues=[],
                link={"enabled": False},
            )
        )
    )
    for part in (
        "bridge: the committed model answers from the CPU",
        "PROOF_FAILED: case 3 is off by 0.2",
        "hint: reset the card",
        "d-1 · resnet50 3 · in probation",
        "dfl · absent · no executor · not proven",
        "previous     —",
        "issues       none",
        "link         none",
    ):
        assert part in text


def test_status_of_a_fresh_host_needs_nothing_more() -> None:
    text = rendered(status.page({"device": "a", "version": "1", "host": "empty"}))
    assert "empty: no model is committed" in text


def test_a_name_from_outside_does_not_command_the_terminal() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J[red]x\n\r\u202e"
    document = status_document(
        committed={**MODEL, "name": evil, "reference": evil},
        reason={"code": evil, "message": evil, "hint": evil, "field": evil},
        issues=[{"id": evil, "severity": evil, "message": evil, "hint": evil}],
        last=deployment_document("failed", error={"code": "X", "message": evil}, actor=evil, phase=evil),
    )
    text = rendered(status.page(document)) + rendered(live.ending(document["last"]))
    assert set(text) - {"\n"} == {letter for letter in text if letter.isprintable()}
    assert "[red]x" in text


# --- deploy and its like ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        ("committed", 0),
        ("unchanged", 0),
        ("refused", 65),
        ("failed", 69),
        ("rolled_back", 69),
        ("cancelled", 75),
        ("superseded", 75),
    ],
)
def test_exit_codes(outcome: str, code: int, admin: Admin) -> None:
    error = None if code == 0 else {"code": "PROOF_FAILED", "message": "case 3 is off", "hint": "look at the card"}
    admin.host.watched.append(deployment_document(outcome, error=error))
    admin.host.watched.pop(1)
    done = cli("deploy", "registry:5000/resnet50:3", "--socket", admin.path)
    assert done.exit_code == code
    assert f"{outcome.replace('_', ' ')} · resnet50 3 · sha256:ab12ab12ab12 · 1 min 15 s" in done.stdout
    assert "pull       12 s\n" in done.stdout
    if error:
        assert "PROOF_FAILED: case 3 is off\nhint: look at the card\n" in done.stdout
    as_json = cli("deploy", "registry:5000/resnet50:3", "--json", "--socket", admin.path)
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout) == admin.host.watched[-1]


def test_deploy_passes_everything_on(admin: Admin) -> None:
    done = cli(
        *("deploy", "oci:/images:a", "--force", "--accept-dark", "--allow-signature-change"),
        *("--probation", "1.5m", "--no-wait", "--socket", admin.path),
    )
    assert (done.exit_code, done.stdout) == (0, "d-1\n")
    cli("deploy", "a:1", "--no-wait", "--socket", admin.path, "--probation", "2.5")
    cli("deploy", "a:1", "--no-wait", "--socket", admin.path)
    (_, full), (_, seconds), (_, bare) = admin.host.asked
    assert full == {
        "reference": "oci:/images:a",
        "digest": None,
        "force": True,
        "accept_dark": True,
        "allow_signature_change": True,
        "probation": 90.0,
    }
    assert seconds["probation"] == 2.5
    cli("deploy", "oci:images:a@sha256:0", "--no-wait", "--socket", admin.path)
    assert admin.host.asked[-1][1]["reference"] == f"oci:{Path.cwd()}/images:a@sha256:0"
    assert (bare["allow_signature_change"], bare["probation"], bare["force"]) == (None, None, False)


@pytest.mark.parametrize("time_", ["soon", "-5", "5 parsecs", "1.2.3", ""])
def test_a_time_that_is_none(time_: str, admin: Admin) -> None:
    done = cli("deploy", "a:1", "--socket", admin.path, f"--probation={time_}")
    assert done.exit_code == 65
    assert done.stderr.startswith("error: --probation: ")
    assert admin.host.asked == []


def test_what_the_daemon_refuses_is_told_as_it_said_it(admin: Admin) -> None:
    admin.host.fault = Refused("the disk is full", hint="slotd gc", field="image")
    done = cli("deploy", "a:1", "--json", "--socket", admin.path)
    assert done.exit_code == 65
    assert done.stderr == "error: image: the disk is full\nhint: slotd gc\n"
    assert json.loads(done.stdout) == {"error": admin.host.fault.as_dict()}
    admin.host.fault = Unavailable("slotd is stopping")
    assert cli("status", "--socket", admin.path).exit_code == 69


@pytest.mark.parametrize("verb", ["undeploy", "rollback"])
def test_undeploy_and_rollback_wait_as_deploy_does(verb: str, admin: Admin) -> None:
    done = cli(verb, "--socket", admin.path)
    assert done.exit_code == 0
    assert "committed" in done.stdout
    assert cli(verb, "--no-wait", "--socket", admin.path).stdout == "d-1\n"
    assert json.loads(cli(verb, "--no-wait", "--json", "--socket", admin.path).stdout)["task"] == "d-1"
    assert [what for what, _ in admin.host.asked] == [verb] * 3


def test_cancel(admin: Admin) -> None:
    assert "called off d-1" in cli("cancel", "--socket", admin.path).stdout
    assert cli("cancel", "d-1", "--json", "--socket", admin.path).exit_code == 0
    assert admin.host.asked == [("cancel", None), ("cancel", "d-1")]


def test_task(admin: Admin) -> None:
    done = cli("task", "d-1", "--socket", admin.path)
    assert done.exit_code == 0
    assert "✓  pull" in done.stdout
    assert "committed · resnet50 3" in done.stdout
    assert json.loads(cli("task", "d-1", "--json", "--socket", admin.path).stdout) == admin.host.watched[-1]
    followed = cli("task", "d-1", "--watch", "--socket", admin.path)
    assert followed.exit_code == 0
    for more in ([], ["--watch"]):
        missing = cli("task", "d-9", *more, "--socket", admin.path)
        assert missing.exit_code == 66
        assert "there is no task 'd-9'" in missing.stderr


def test_ctrl_c_leaves_the_deployment_running(admin: Admin) -> None:
    admin.host.watched = [deployment_document(None)]
    admin.host.hold = True
    process = start("deploy", "a:1", "--socket", admin.path)
    assert admin.host.watching.wait(20)
    while not process.stdout.readline().startswith("program"):  # type: ignore[union-attr]
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "The deployment goes on. Watch it: slotd task d-1 --watch. Call it off: slotd cancel d-1" in err
    assert "Traceback" not in out + err
    assert [what for what, _ in admin.host.asked] == ["deploy"]


def test_the_daemon_goes_away_meanwhile(admin: Admin) -> None:
    admin.host.watched = [deployment_document(None)]
    admin.host.hold = True
    process = start("deploy", "a:1", "--socket", admin.path)
    assert admin.host.watching.wait(20)
    admin.close()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 69
    assert "d-1" in err
    assert "hint: " in err
    assert "slotd task d-1" in err


# --- the live view ---------------------------------------------------------------------------------------------------


def _rows(outcome: str | None, *names: str, kind: str = "deploy") -> dict[str, str]:
    phases = [{"phase": name, "seconds": 1.0} for name in names]
    document = deployment_document(outcome, phases=phases, kind=kind)
    return {phase: state for state, phase, _ in live.rows(document)}


def test_every_phase_is_shown_in_its_place() -> None:
    shown = _rows(None, "resolve", "preflight", "drain")
    assert list(shown) == PHASES
    assert [phase for phase, state in shown.items() if state == "done"] == ["resolve", "preflight"]
    assert [phase for phase, state in shown.items() if state == "skipped"] == ["pull", "verify", "unpack", "inspect"]
    assert shown["drain"] == "running"
    assert set(list(shown.values())[PHASES.index("release") :]) == {"pending"}
    assert set(_rows("committed", *PHASES).values()) == {"done"}
    assert set(_rows(None).values()) == {"pending"}


def test_what_failed_is_marked() -> None:
    assert _rows("refused", "resolve", "preflight")["preflight"] == "failed"
    assert list(_rows("refused", "resolve"))[-1] == "resolve", "nothing is pending after the end"
    shown = _rows("rolled_back", "resolve", "drain", "program", "roll_back")
    assert (shown["program"], shown["roll_back"], list(shown)[-1]) == ("failed", "done", "roll_back")
    shown = _rows(None, "resolve", "drain", "program", "roll_back")
    assert (shown["roll_back"], list(shown)[-1]) == ("running", "roll_back")
    assert set(_rows("committed", "drain", "release", kind="undeploy")) == {"drain", "release"}


def test_live_view_on_a_terminal() -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, highlight=False, markup=False)
    pulling = deployment_document(
        None,
        phases=[{"phase": "resolve", "seconds": 0.1}, {"phase": "pull", "seconds": 2.0}],
        progress={"bytes": 50 << 20, "total": 100 << 20},
    )
    unknown = {**pulling, "progress": {"bytes": 1000, "total": 0}}
    final = deployment_document("rolled_back", error={"code": "DEVICE_HUNG", "message": "no answer", "hint": "reset"})
    assert live.show([pulling, unknown, final], out) is final
    text = out.file.getvalue()
    assert "✗  probation" in text
    assert "DEVICE_HUNG: no answer" in text
    assert "hint: reset" in text
    view = live.View()
    view.update(pulling)
    assert "━" in rendered(view)
    assert "50.0 MiB of 100.0 MiB" in rendered(view)
    view.update(unknown)
    assert "1000 B" in rendered(view)


def test_running_time_goes_on_between_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    view = live.View()
    view.update(deployment_document(None, phases=[{"phase": "program", "seconds": 2.0}]))
    later = time.monotonic() + 60
    monkeypatch.setattr("time.monotonic", lambda: later)
    assert "1 min 02 s" in rendered(view)


def test_nothing_to_show() -> None:
    assert live.show([], Console(file=io.StringIO())) is None
    assert live.show([], Console(file=io.StringIO(), force_terminal=True)) is None


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (output.seconds(None), "—"),
        (output.seconds(0.004), "4 ms"),
        (output.seconds(0.12), "0.1 s"),
        (output.seconds(9.94), "9.9 s"),
        (output.seconds(9.96), "10 s"),
        (output.seconds(59.6), "1 min 00 s"),
        (output.seconds(7_500), "2 h 05 min"),
        (output.seconds(400_000), "4 d 15 h"),
        (output.size(None), "—"),
        (output.size(1023), "1023 B"),
        (output.size(1536), "1.5 KiB"),
        (output.size(5 << 40), "5.0 TiB"),
        (output.count(1234567), "1,234,567"),
        (output.count(0.25), "0.2"),
        (output.count(None), "—"),
        (output.digest(None), "—"),
        (output.digest("sha256:" + "0" * 64), "sha256:000000000000"),
        (output.ago("2001-02-03T04:05:06"), output.ago("2001-02-03T04:05:06Z")),
        (output.ago("yesterday"), "yesterday"),
        (output.ago("2100-01-01T00:00:00Z"), "now"),
        (output.ago(None), "—"),
    ],
)
def test_figures(shown: str, text: str) -> None:
    assert shown == text
