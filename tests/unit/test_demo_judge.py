"""How the demo judges what its clients saw."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from agent.cli.demo.judge import Answered, Model, Result, Swap, judge, latency
from agent.cli.demo.report import document, show
from agent.slot.arbiter import Phase

A, B = Model("model-a", "model-a:1", "sha256:a"), Model("model-b", "model-b:1", "sha256:b")
RIGHT = {A: [1e-6, 0.4], B: [0.4, 1e-6]}


def swap(model: Model, asked: float, ended: float) -> Swap:
    phases = [{"phase": phase.value, "seconds": 0.1} for phase in Phase]
    return Swap(model, asked, ended, {"id": "d-1", "outcome": "committed", "seconds": 1.4, "phases": phases})


ORDER = [swap(A, 0, 1), swap(B, 10, 16), swap(A, 20, 26)]


def answer(ended: float, model: Model, *, client: int = 0, took: float = 0.1, **fields: Any) -> Answered:
    one = Answered(client, 0, ended - took, ended, "slot", model.digest, RIGHT[model], None)
    return one._replace(**fields)


def judged(*answers: Answered, wanted: int = 0) -> Result:
    return judge(answers, ORDER, (A, B), clients=2, pictures=8, wanted=wanted)


GOOD = (
    *(answer(second, A) for second in (2, 5, 9)),
    answer(11, A, served_by="bridge"),
    answer(13, A, served_by="bridge", took=0.5),
    *(answer(second, B) for second in (14, 18)),
    answer(22, B, served_by="bridge"),
    answer(24, A),
)


def test_all_is_well() -> None:
    result = judged(*GOOD, wanted=9)
    assert result.problems == []
    assert (result.requests, result.failed, result.wrong, result.stale) == (9, 0, 0, 0)
    assert (result.by_slot, result.by_bridge) == (6, 3)
    first, second = result.swaps
    assert [first.before.count, first.during.count, first.after.count] == [3, 2, 2]
    assert [second.before.count, second.during.count, second.after.count] == [2, 1, 1]
    assert (first.by_slot, first.by_bridge) == (0, 2)
    assert first.during.max == pytest.approx(500)


@pytest.mark.parametrize(
    "fields",
    [
        {"distances": RIGHT[B]},  # the other model's answer
        {"distances": [0.3, 0.3]},  # nobody's
        {"distances": [0.0, 0.0]},  # anybody's
        {"distances": []},  # not of that shape
        {"distances": [float("nan"), 0.4]},
        {"digest": "", "distances": RIGHT[A]},  # it does not say whose
    ],
)
def test_a_wrong_answer(fields: dict[str, Any]) -> None:
    result = judged(*GOOD, answer(9.5, A, **fields))
    assert result.wrong == 1
    assert any("not those of the model that they name" in problem for problem in result.problems)


def test_a_failure() -> None:
    result = judged(*GOOD, answer(12, A, digest="", served_by="", distances=[], error="UNAVAILABLE: no"))
    assert (result.failed, result.wrong, result.swaps[0].failed) == (1, 0, 1)
    assert result.problems == ["1 requests failed, most with: UNAVAILABLE: no"]


def test_an_old_answer_after_a_new_one() -> None:
    assert judged(*GOOD, answer(14.5, A)).stale == 1
    assert judged(*GOOD, answer(14.5, A, client=1)).stale == 0  # this channel has not seen the new one
    assert judged(*GOOD, answer(17, A, client=1)).stale == 1  # but now it is committed
    assert judged(*GOOD, answer(16.2, A, client=1, took=0.5)).stale == 0  # sent before that
    assert judged(*GOOD, answer(5, B)).stale == 1  # nobody asked for it yet


def test_nobody_says_who_served() -> None:
    assert judged(*GOOD, answer(9.5, A, served_by="")).problems == ["1 answers do not say who gave them"]


def test_too_few() -> None:
    assert judged(*GOOD, wanted=10).problems == ["only 9 of 10 requests were answered"]
    assert judged(wanted=1).requests == 0


def test_quantiles() -> None:
    assert latency([]).p50 is None
    found = latency(answer(10, A, took=number / 1000) for number in range(1, 101))
    assert (found.count, round(found.p50 or 0), round(found.p99 or 0), round(found.max or 0)) == (100, 50, 99, 100)


def test_figures_are_shown() -> None:
    result = judged(*GOOD, answer(9.5, A, distances=RIGHT[B]))
    out = Console(file=io.StringIO(), width=80)
    show(result, out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines()[:20])) <= 80
    assert "…" not in text
    for shown in ("1: b", "100/500", "probation", "1 answers were not those", "10 requests"):
        assert shown in text
    told = json.loads(json.dumps(document(result)))
    assert (told["ok"], told["wrong"], len(told["swaps"])) == (False, 1, 2)
    assert told["swaps"][0]["phases"]["prove"] == 0.1
