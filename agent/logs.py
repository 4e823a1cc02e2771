"""Logging: structlog for us, the standard library's loggers through the same pipe, secrets never.

One event a line on standard error: JSON under a service manager, columns on a terminal. Where the journal reads, a
line begins with its priority, as sd-daemon(3) has it. What looks like a secret is replaced before anything is written,
by the name of its field or by its form inside a text.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import structlog

from agent.config import LogConfig
from agent.scope import ids

HIDDEN = "***"
_NAMES = re.compile(
    r"pass(word|wd|phrase)|secret|token|authorization|credential|cookie|private.?key|api.?key|access.?key|^(key|sas|auth)$",
    re.IGNORECASE,
)
_FORMS = (
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{4,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"(://[^/\s:@]*):[^/\s@]+@"), rf"\1:{HIDDEN}@"),
    (re.compile(r"\b(sig|SharedAccessKey|password|passwd|token)=[^\s&;,'\"]+", re.IGNORECASE), rf"\1={HIDDEN}"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
)
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
# Libraries that tell every step, some with the keys in it; their warnings still come through.
_QUIET = ("amqtt", "transitions", "passlib", "httpx", "httpcore", "hpack", "grpc", "asyncio", "watchdog", "PIL")


def configure(config: LogConfig, *, stream: TextIO | None = None) -> None:
    """Set up logging for the process; called once, before anything is logged. Writes to standard error."""
    out = stream or sys.stderr
    console = config.format == "console" or (config.format == "auto" and out.isatty())
    level = logging.getLevelNamesMapping()[config.level.upper()]
    journal = not console and goes_to_journal(out)
    shared: list[Any] = [
        add_ids,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        redact,
    ]
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=out.isatty(), sort_keys=False)
        if console
        else structlog.processors.JSONRenderer(default=str, ensure_ascii=False)
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    formatter = _Prioritised if journal else structlog.stdlib.ProcessorFormatter
    handler.setFormatter(
        formatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]  # at once: other threads log meanwhile
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)


class _Prioritised(structlog.stdlib.ProcessorFormatter):
    """Lines with the priority of their level in front."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return f"<{priority}>{super().format(record)}"


def goes_to_journal(stream: TextIO) -> bool:
    """Whether a stream is the one that systemd has connected to the journal (JOURNAL_STREAM, systemd.exec(5))."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def add_ids(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    """structlog processor: the deployment and the request that the line belongs to, unless it names another."""
    return {**ids(), **event}


def redact(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    """structlog processor: the event without secrets, at any depth."""
    # `_record` and the like are structlog's own and never written.
    return {key: value if key.startswith("_") else _clean(key, value) for key, value in event.items()}


def _clean(name: str, value: Any) -> Any:
    if isinstance(value, bool | int | float | None):
        return value
    if _NAMES.search(name) and not name.endswith(("_file", "_path")):
        return HIDDEN
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        for form, instead in _FORMS:
            value = form.sub(instead, value)
        return value
    if isinstance(value, Mapping):
        return {str(key): _clean(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean("", item) for item in value]
    return _clean("", str(value))
