"""Logging: structlog for us, the standard library's loggers through the same pipe, secrets never.

One event a line on standard error: JSON under a service manager, columns on a terminal. What looks like a secret is
replaced before anything is written, by the name of its field or by its form inside a text.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import structlog

from agent.config import LogConfig

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
# Libraries that tell every step at INFO; their warnings still come through.
_QUIET = ("amqtt", "transitions", "passlib", "httpx", "httpcore", "grpc", "asyncio", "watchdog", "PIL")


def configure(config: LogConfig, *, stream: TextIO | None = None) -> None:
    """Set up logging for the process; called once, before anything is logged. Writes to standard error."""
    out = stream or sys.stderr
    console = config.format == "console" or (config.format == "auto" and out.isatty())
    level = logging.getLevelNamesMapping()[config.level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
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
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.NOTSET if level == logging.DEBUG else logging.WARNING)
    logging.captureWarnings(capture=True)


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
