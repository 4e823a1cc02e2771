"""What is written, and what never is."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from agent import logs
from agent.config import LogConfig


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
