"""Unmodified tritonclient over HTTP, in its own environment and process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clients.across_swaps import environment, watch

PYTHON = environment(".venv-clients/.installed")
PROGRAM = Path(__file__).with_name("triton_http_program.py")
pytestmark = [
    pytest.mark.alone,  # one host and one client for all of these, not one for each of the processes that run tests
    pytest.mark.skipif(not PYTHON, reason="there is no Python with tritonclient: make .venv-clients/.installed"),
]
ANSWER = [[1.0, 3.0, 5.0, 7.0], [9.0, 11.0, 13.0, 15.0]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return watch(PYTHON, PROGRAM, tmp_path_factory.mktemp("host"), over="http")


def test_it_finds_what_it_looks_for(seen: dict[str, Any]) -> None:
    assert [seen[name] for name in ("live", "ready", "model", "version", "other")] == [True, True, True, True, False]
    assert seen["server"] == "slotd"
    metadata = seen["metadata"]
    assert (metadata["name"], metadata["versions"]) == ("one", ["1"])
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}]


def test_it_reads_the_answer_in_each_form(seen: dict[str, Any]) -> None:
    assert {name: values for name, (values, _) in seen["forms"].items()} == dict.fromkeys(seen["forms"], ANSWER)
    assert len(seen["forms"]) == 6
    assert seen["forms"]["bytes out"][1] == "r-1"


@pytest.mark.parametrize(
    ("case", "status", "said"),
    [
        ("wrong tensor", "400", "z: the model has no such input; it has 'x'"),
        ("wrong shape", "400", "x: has shape [1, 5]"),
        ("wrong dtype", "400", "x: has dtype float64, the model takes float32"),
        ("wrong model", "404", "no model 'other' is served here"),
    ],
)
def test_it_is_told_what_is_wrong(seen: dict[str, Any], case: str, status: str, said: str) -> None:
    assert seen[case][0] == status
    assert said in seen[case][1]


def test_it_does_not_notice_swaps(seen: dict[str, Any]) -> None:
    assert seen["answers"].keys() == {"3.0", "4.0"}, "one of the two models, nothing else"
    assert sum(seen["answers"].values()) > 100
