"""Unmodified stubs of tensorflow-serving-api, with TensorFlow itself, in their own environment and process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clients.across_swaps import environment, watch

PYTHON = environment(".venv-tensorflow/.serving")
PROGRAM = Path(__file__).with_name("tfserving_program.py")
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(
        not PYTHON,
        reason="there is no Python with tensorflow-serving-api: make test-clients",
    ),
]
ANSWER = [[1.0, 3.0, 5.0, 7.0], [9.0, 11.0, 13.0, 15.0]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return watch(PYTHON, PROGRAM, tmp_path_factory.mktemp("host"))


def test_it_reads_the_answer(seen: dict[str, Any]) -> None:
    assert seen["tensor"] == ANSWER
    assert seen["float_val"] == [*ANSWER[0], *ANSWER[1]]
    assert seen["model"] == ["one", 1, "serving_default"]


def test_it_reads_the_signature_and_the_status(seen: dict[str, Any]) -> None:
    assert seen["inputs"] == {"x": [1, [-1, 4]]}
    assert seen["method"] == "tensorflow/serving/predict"
    assert seen["status"] == [1, "AVAILABLE"]


@pytest.mark.parametrize(
    ("case", "code", "said"),
    [
        ("wrong tensor", "INVALID_ARGUMENT", "z: the model has no such input; it has 'x'"),
        ("wrong model", "NOT_FOUND", "no model 'other' is served here"),
        ("reload", "UNIMPLEMENTED", "models are not changed by clients"),
    ],
)
def test_it_is_told_what_is_wrong(seen: dict[str, Any], case: str, code: str, said: str) -> None:
    assert seen[case][0] == code
    assert said in seen[case][1]


def test_it_does_not_notice_swaps(seen: dict[str, Any]) -> None:
    assert seen["answers"].keys() == {"3.0", "4.0"}, "one of the two models, nothing else"
    assert sum(seen["answers"].values()) > 100
