"""What the clients saw, judged. Every answer is one model's by its values, and that is the one which it names.

Times are seconds of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agent.cli.demo.pictures import TOLERANCE

SHOWN = 5
"""Different errors that are told."""


class Answered(NamedTuple):
    """One request: who asked, when, and what came back. `distances` are largest errors against each model."""

    client: int
    picture: int
    began: float
    ended: float
    served_by: str
    digest: str
    distances: list[float]
    error: str | None


@dataclass(frozen=True)
class Model:
    """One of the two."""

    name: str
    tag: str
    digest: str


@dataclass(frozen=True)
class Swap:
    """A deployment that was committed: when it was asked for, when it had ended, and its document."""

    model: Model
    asked: float
    ended: float
    document: Mapping[str, Any]

    @property
    def phases(self) -> dict[str, float]:
        """Seconds in each phase."""
        return {str(phase["phase"]): float(phase["seconds"]) for phase in self.document.get("phases") or []}


@dataclass(frozen=True)
class Latency:
    """How long requests took, in milliseconds; None where there was none."""

    count: int
    p50: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True)
class Around:
    """What clients saw of one swap. It lasts from the command to the first answer of the new model."""

    swap: Swap
    before: Latency
    during: Latency
    after: Latency
    by_slot: int
    by_bridge: int
    failed: int
    wrong: int
    """All four while it lasted."""


@dataclass
class Result:
    """The demo's figures; `problems` is empty if all went well."""

    clients: int
    pictures: int
    requests: int = 0
    seconds: float = 0.0
    failed: int = 0
    wrong: int = 0
    stale: int = 0
    by_slot: int = 0
    by_bridge: int = 0
    latency: Latency = Latency(0, None, None, None)
    first: Swap | None = None
    swaps: list[Around] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    classified: dict[str, Any] = field(default_factory=dict)
    log_tail: str = ""
    took: float = 0.0


def judge(
    answers: Iterable[Answered],
    deployments: Sequence[Swap],
    models: Sequence[Model],
    *,
    clients: int,
    pictures: int,
    wanted: int,
) -> Result:
    """The figures. The first of `deployments` is the one before the load."""
    told = sorted(answers, key=lambda answer: answer.ended)
    result = Result(clients, pictures, requests=len(told), first=deployments[0])
    if told:
        result.seconds = told[-1].ended - min(answer.began for answer in told)
    good = [answer for answer in told if answer.error is None]
    result.failed = len(told) - len(good)
    wrong = {id(answer) for answer in good if not _right(answer, models)}
    result.wrong = len(wrong)
    result.stale = _stale(good, deployments)
    served = Counter(answer.served_by for answer in good)
    result.by_slot, result.by_bridge = served["slot"], served["bridge"]
    result.latency = latency(good)
    result.errors = dict(Counter(answer.error for answer in told if answer.error is not None).most_common(SHOWN))
    result.swaps = _around(told, deployments, wrong)
    result.problems = list(_problems(result, len(good), wanted))
    return result


def _right(answer: Answered, models: Sequence[Model]) -> bool:
    """Whether it is the answer of exactly one model, and that the one it names."""
    near = [model.digest for model, error in zip(models, answer.distances, strict=False) if error <= TOLERANCE]
    return near == [answer.digest] and len(answer.distances) == len(models)


def _stale(good: Sequence[Answered], deployments: Sequence[Swap]) -> int:
    """Answers of a model after its successor had answered on the same channel, or had been committed."""
    order = [swap.model.digest for swap in deployments]
    reached: dict[int, int] = {}
    stale = 0
    for answer in good:
        committed = max((number for number, swap in enumerate(deployments) if swap.ended <= answer.began), default=0)
        at = max(reached.get(answer.client, 0), committed)
        ahead = (
            number
            for number in range(at, len(order))
            if order[number] == answer.digest and deployments[number].asked <= answer.ended
        )
        found = next(ahead, None)
        if found is None:
            stale += 1
        else:
            reached[answer.client] = found
    return stale


def _around(told: Sequence[Answered], deployments: Sequence[Swap], wrong: set[int]) -> list[Around]:
    """The time of each swap, and that between it and its neighbours."""
    swaps = deployments[1:]
    switched = [-math.inf, *(_switched(told, swap) for swap in swaps)]
    asked = [*(swap.asked for swap in swaps), math.inf]
    found = []
    for number, swap in enumerate(swaps):
        during = _between(told, asked[number], switched[number + 1])
        served = Counter(answer.served_by for answer in during)
        found.append(
            Around(
                swap,
                before=latency(_between(told, switched[number], asked[number])),
                during=latency(during),
                after=latency(_between(told, switched[number + 1], asked[number + 1])),
                by_slot=served["slot"],
                by_bridge=served["bridge"],
                failed=sum(answer.error is not None for answer in during),
                wrong=sum(id(answer) in wrong for answer in during),
            )
        )
    return found


def _switched(told: Sequence[Answered], swap: Swap) -> float:
    """When the new model's first answer came."""
    new = (a.ended for a in told if a.error is None and a.digest == swap.model.digest and a.ended >= swap.asked)
    return next(new, swap.ended)


def _between(told: Sequence[Answered], start: float, end: float) -> list[Answered]:
    return [answer for answer in told if start <= answer.ended < end]


def latency(answers: Iterable[Answered]) -> Latency:
    """Of those that were answered."""
    times = sorted((answer.ended - answer.began) * 1000 for answer in answers if answer.error is None)

    def quantile(share: float) -> float | None:
        return times[min(len(times) - 1, math.ceil(share * len(times)) - 1)] if times else None

    return Latency(len(times), quantile(0.5), quantile(0.99), times[-1] if times else None)


def _problems(result: Result, good: int, wanted: int) -> Iterable[str]:
    if result.failed:
        yield f"{result.failed} requests failed, most with: {next(iter(result.errors))}"
    if result.wrong:
        yield f"{result.wrong} answers were not those of the model that they name"
    if result.stale:
        yield f"{result.stale} answers came from a model that had been replaced"
    if result.by_slot + result.by_bridge != good:
        yield f"{good - result.by_slot - result.by_bridge} answers do not say who gave them"
    if good < wanted:
        yield f"only {good} of {wanted} requests were answered"
