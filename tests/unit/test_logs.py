"""What is written, and what never is."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hpack
import pytest
import structlog

from agent import logs
from agent.config import LogConfig
from agent.scope import scope


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def _json(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_one_event_is_one_json_line_from_us_and_from_libraries() -> None:
    out = io.StringIO()
    logs.configure(LogConfig(), stream=out)
    structlog.get_logger("agent.slot").info("programmed", seconds=0.25, digest="sha256:ab")
    logging.getLogger("somebody").warning("slow: %s", "two\nlines")
    ours, theirs = _json(out)
    assert {key: ours[key] for key in ("event", "level", "logger", "seconds", "digest")} == {
        "event": "programmed",
        "level": "info",
        "logger": "agent.slot",
        "seconds": 0.25,
        "digest": "sha256:ab",
    }
    assert ours["timestamp"].endswith("Z")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("slow: two\nlines", "warning", "somebody")


def test_levels() -> None:
    out = io.StringIO()
    logs.configure(LogConfig(level="warning"), stream=out)
    structlog.get_logger("a").info("no")
    structlog.get_logger("a").warning("yes")
    logging.getLogger("httpx").info("no")
    logging.getLogger("httpx").warning("yes")
    assert [event["event"] for event in _json(out)] == ["yes", "yes"]


def test_console_is_for_people() -> None:
    out = io.StringIO()
    logs.configure(LogConfig(format="console"), stream=out)
    structlog.get_logger("a").info("programmed", seconds=1)
    assert "programmed" in out.getvalue()
    assert "seconds=1" in out.getvalue()
    assert "\x1b" not in out.getvalue(), "no colours where it is not a terminal"


@pytest.mark.parametrize("form", ["json", "console"])
def test_secrets_are_never_written(form: str) -> None:
    out = io.StringIO()
    logs.configure(LogConfig(format=form), stream=out)
    log = structlog.get_logger("a")
    log.info(
        "connect to https://me:hunter2@registry/v2",
        password="hunter2",
        api_key="hunter2",
        headers={"Authorization": "Bearer hunter2", "accept": ["Basic aHVudGVyMg==", b"password=hunter2"]},
        fault=RuntimeError("GET /x?sig=hunter2&st=1"),
        token=b"hunter2",
        key=["hunter2"],
    )
    try:
        raise RuntimeError("SharedAccessKey=hunter2;HostName=x")
    except RuntimeError:
        log.exception("failed")
    logging.getLogger("library").error("-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----")
    assert "hunter2" not in out.getvalue()
    assert "aHVudGVyMg==" not in out.getvalue()
    assert "RuntimeError" in out.getvalue()


def test_what_is_no_secret_stays() -> None:
    out = io.StringIO()
    logs.configure(LogConfig(), stream=out)
    structlog.get_logger("a").info(
        "bearer of news", password_file="/etc/slotd/password", tokens=3, key="k", digest=None
    )
    (event,) = _json(out)
    assert (event["event"], event["password_file"], event["tokens"], event["digest"]) == (
        "bearer of news",
        "/etc/slotd/password",
        3,
        None,
    )


def test_lines_carry_the_ids_in_force() -> None:
    out = io.StringIO()
    logs.configure(LogConfig(), stream=out)
    with scope(deployment="d-1", request="r-1"):
        structlog.get_logger("agent.slot").info("drain")
        logging.getLogger("somebody").warning("slow")
        structlog.get_logger("agent.slot").info("another", deployment="d-2")
    structlog.get_logger("agent.slot").info("later")
    ours, theirs, another, later = _json(out)
    for line in (ours, theirs):
        assert (line["deployment"], line["request"]) == ("d-1", "r-1")
    assert another["deployment"] == "d-2"
    assert "deployment" not in later


def test_the_journal_is_told_the_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "stream").open("w+") as out:
        found = os.fstat(out.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        logs.configure(LogConfig(level="debug"), stream=out)
        log = structlog.get_logger("agent.slot")
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr(log, level)("said")
        try:
            raise ValueError("two\nlines")
        except ValueError:
            log.exception("fault")
        out.seek(0)
        lines = out.read().splitlines()
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<2>", "<3>"]
    assert all(json.loads(line[3:])["logger"] == "agent.slot" for line in lines)
    assert "two" in json.loads(lines[-1][3:])["exception"]


def test_a_file_beside_the_journal_is_told_no_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:12345678")
    with (tmp_path / "stream").open("w+") as out:
        logs.configure(LogConfig(), stream=out)
        structlog.get_logger("agent.slot").info("said")
        out.seek(0)
        assert out.read().startswith("{")


def test_a_key_is_in_no_log_whatever_its_level() -> None:
    """hpack tells of every header at DEBUG, keys included."""
    block = hpack.Encoder().encode([("authorization", "Bearer opensesame")])
    stream = io.StringIO()
    logs.configure(LogConfig(level="debug", format="json"), stream=stream)
    logging.getLogger("test").debug("it is on")
    assert hpack.Decoder().decode(block) == [("authorization", "Bearer opensesame")]
    assert "it is on" in stream.getvalue()
    assert "opensesame" not in stream.getvalue() and "authorization" not in stream.getvalue()
