"""The messages that carry requests, one for each protocol: how each is read, and what makes it slow to read.

The parts' costs are for `parse.is_light`: which fields hold parts of their own, and which take time for each of their
bytes (a list of numbers becomes Python's, a name is looked at). What is in neither is copied as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from agent.serving.canonical import read_canonical
from agent.serving.infer import read_infer, read_plain_infer
from agent.serving.jsonrequests import SMALL, read_infer_json, read_plain_infer_json, read_predict_json
from agent.serving.tensorproto import Parsed, read_request

T = TypeVar("T")


class _Read(Protocol):
    def __call__(self, data: bytes | memoryview, *, most: int, context: bytes = ...) -> Parsed: ...


class _ReadPlain(Protocol):
    def __call__(self, data: bytes | memoryview, *, most: int, context: bytes = ...) -> Parsed | None: ...


@dataclass(frozen=True)
class Part:
    """A message inside of a request, by field numbers."""

    nested: Mapping[int, Part]
    costly: Mapping[int, int]
    """Units for each byte."""


@dataclass(frozen=True)
class Form:
    """`read` takes everything; `plain` what clients really send, in place, and None for the rest."""

    number: int
    """By which the child that parses knows it."""
    read: _Read
    plain: _ReadPlain
    parts: Part | None
    small: int = 64 << 10
    """Bytes that are parsed at once whatever they hold; beyond, it depends on `parts`, or None: nothing is."""


def _alone(read: Callable[..., T]) -> Callable[..., T]:
    """For a message that needs no context."""
    return lambda data, *, most, context=b"": read(data, most=most)


_TENSOR = Part({}, {2: 4, 7: 1, 10: 1, 11: 1, 13: 1, 16: 1, 17: 1})
PREDICT = Form(0, _alone(read_request), _alone(read_canonical), Part({2: Part({2: _TENSOR}, {})}, {1: 4}))
"""tensorflow.serving.PredictRequest."""

_CONTENTS = Part({}, dict.fromkeys(range(1, 6), 1))
_INPUT = Part({5: _CONTENTS}, {3: 4, 4: 4})
INFER = Form(1, _alone(read_infer), _alone(read_plain_infer), Part({5: _INPUT}, {4: 4, 6: 4}))
"""inference.ModelInferRequest."""

PREDICT_JSON = Form(2, read_predict_json, lambda data, *, most, context=b"": None, None, SMALL)
"""A body of TensorFlow Serving's REST; its context is `predict_context`."""

INFER_JSON = Form(3, read_infer_json, read_plain_infer_json, None, SMALL)
"""A body of KServe's REST; its context is `infer_context`."""

FORMS = (PREDICT, INFER, PREDICT_JSON, INFER_JSON)
