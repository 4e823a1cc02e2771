"""The proof of an executor: golden cases, and seeded inputs compared with the CPU.

Free of executors: it is given functions that run a set of inputs. A first pass runs every case once, one at a time;
a second repeats some of them two at a time and in another order, so that a device which answers with the case before,
or mixes up what it has in hand, is seen.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, TypeAlias

import numpy as np

from agent.errors import DeadlineExceeded, ExecutorError, InvalidInput, ProofFailed
from agent.model.golden import GoldenCase
from agent.model.signature import DType, Signature, Strings, Tensor
from agent.model.spec import Model
from agent.slot.compare import Difference, Expected, difference, distance
from agent.slot.samples import golden_pairs, seeded_inputs
from drivers.base import Numerics

Run: TypeAlias = Callable[[Mapping[str, Tensor]], Awaitable[Mapping[str, Tensor]]]
Target: TypeAlias = Literal["cpu", "slot"]

DISCRIMINATING = 5.0
"""Tolerances that must lie between the expected outputs of any two cases."""
REPEATED = 8
"""How many cases the second pass has at most."""
ROUGH = 0.02
"""Tolerance of a slot that is not float32 if no golden case gives one, relative to the largest expected output."""


@dataclass(frozen=True)
class ProofReport:
    """What a proof has shown. `cases` counts runs; `ratio` is the discrimination (None: nothing to tell apart)."""

    target: str
    cases: int
    golden: int
    seeded: int
    worst_error: float
    worst_ratio: float
    where: str
    ratio: float | None
    discriminating: bool
    seconds: float
    service: float
    """Seconds that one run takes, alone: the median of the first pass."""

    def as_dict(self) -> dict[str, Any]:
        """For journals and reports."""
        return {
            "target": self.target,
            "cases": self.cases,
            "golden": self.golden,
            "seeded": self.seeded,
            "worst_error": float(f"{self.worst_error:.4g}"),
            "worst_of_tolerance": round(self.worst_ratio, 4),
            "where": self.where,
            "discriminating": self.discriminating,
            "discriminating_ratio": None if self.ratio is None else round(self.ratio, 1),
            "seconds": round(self.seconds, 3),
            "service_ms": round(self.service * 1000, 3),
        }


@dataclass
class _Trial:
    name: str
    inputs: Mapping[str, Tensor]
    golden: bool
    expected: list[Expected] = field(default_factory=list)


async def prove(
    subject: Run,
    reference: Run | None,
    cases: Sequence[GoldenCase],
    signature: Signature,
    *,
    target: Target,
    numerics: Numerics,
    seed: int,
    timeout: float,
    model: Model | None = None,
    seeded_cases: int = 4,
) -> ProofReport:
    """Prove that `subject` computes the model. `reference` is the CPU, run with the driver's numerics.

    Without a reference the golden cases alone are compared; a CPU runs the seeded inputs all the same, and must not
    give NaN. `model` says which input is pictures. Raises ProofFailed (PROOF_FAILED, PROOF_NOT_DISCRIMINATING, and
    after `timeout` seconds DEVICE_HUNG for a slot, PROOF_TIMEOUT for a CPU), and what a run raises: SlotError,
    ExecutorDied.
    """
    proof = _Proof(subject, reference, cases, signature, target, numerics, model)
    try:
        async with asyncio.timeout(timeout):
            return await proof.run(seed, seeded_cases)
    except (TimeoutError, DeadlineExceeded):
        raise ProofFailed(
            f"the {_WHO[proof.asked]} did not answer {proof.at} in time; the whole proof has {timeout:g} s",
            code="DEVICE_HUNG" if proof.asked == "slot" else "PROOF_TIMEOUT",
            hint="if the model is only slow, raise slot.prove_timeout",
        ) from None


_WHO = {"slot": "slot", "cpu": "CPU"}


class _Proof:
    def __init__(
        self,
        subject: Run,
        reference: Run | None,
        cases: Sequence[GoldenCase],
        signature: Signature,
        target: Target,
        numerics: Numerics,
        model: Model | None,
    ) -> None:
        self._subject, self._reference = subject, reference
        self._cases, self._signature, self._target = cases, signature, target
        self._exact = numerics.exact or target == "cpu"
        self._image = model.spec.image if model is not None else None
        self._trials: list[_Trial] = []
        self._runs = 0
        self._times: list[float] = []
        self._worst = Difference("", 0.0, 0.0, 0.0)
        self._where = ""
        self._seen: dict[str, tuple[float, float, int]] = {}
        self.asked: Target = target
        self.at = "anything"

    async def run(self, seed: int, seeded_cases: int) -> ProofReport:
        begin = time.monotonic()
        self._trials = await self._prepare(seed, seeded_cases)
        ratio = await asyncio.to_thread(self._discrimination)
        discriminating = ratio is not None and ratio >= DISCRIMINATING
        if not discriminating and not self._exact:
            raise ProofFailed(
                "the proof cannot tell one answer from another: its expected outputs lie "
                f"{ratio or 0:.2g} tolerances apart, {DISCRIMINATING:g} are needed",
                code="PROOF_NOT_DISCRIMINATING",
                hint="pack golden cases whose outputs differ more (photographs of different things), "
                "or with a smaller tolerance",
            )
        for trial in list(self._trials):
            await self._first(trial)
        if not self._trials:
            raise ProofFailed(
                f"no case to prove the {_WHO[self._target]} with: the model takes none of the generated inputs",
                hint="add golden cases to the image",
            )
        await self._again()
        self._require_life()
        golden = sum(trial.golden for trial in self._trials)
        return ProofReport(
            target=self._target,
            cases=self._runs,
            golden=golden,
            seeded=len(self._trials) - golden,
            worst_error=self._worst.error,
            worst_ratio=self._worst.ratio,
            where=self._where,
            ratio=ratio,
            discriminating=discriminating,
            seconds=time.monotonic() - begin,
            service=statistics.median(self._times[1:] or self._times),
        )

    async def _prepare(self, seed: int, count: int) -> list[_Trial]:
        """Golden and seeded cases in turn, with all that is expected of them."""
        golden = [
            _Trial(case.name, case.inputs, True, [Expected(case.outputs, self._tolerance(case), "the golden case")])
            for case in self._cases
        ]
        if self._reference is None and self._target == "slot":
            if golden:
                return golden
            raise ProofFailed(
                "nothing to prove the slot with: the model has no CPU twin and no golden cases",
                hint="add golden cases to the image",
            )
        made = await asyncio.to_thread(seeded_inputs, self._signature, self._image, self._cases, seed=seed, count=count)
        seeded = [_Trial(f"seeded {seed}.{index}", inputs, False) for index, inputs in enumerate(made)]
        if self._reference is not None:
            pairs = golden_pairs(self._signature, self._image, self._cases)
            seeded += [_Trial(f"golden pair {index}", inputs, False) for index, inputs in enumerate(pairs)]
            seeded = [trial for trial in seeded if await self._refer(trial)]
            for trial in golden:
                await self._refer(trial)
        return _in_turn(golden, seeded)

    async def _refer(self, trial: _Trial) -> bool:
        """Add what the CPU says; False if the model does not take these inputs."""
        assert self._reference is not None
        self.asked, self.at = "cpu", f"case {trial.name}"
        try:
            outputs = await self._reference(trial.inputs)
        except (InvalidInput, ExecutorError) as error:
            if trial.golden or not _unfit(error):
                raise
            return False
        tolerance = None
        if not self._exact:
            tolerance = max((case.tolerance_slot for case in self._cases), default=None) or _rough(outputs)
        trial.expected.append(Expected(dict(outputs), tolerance, "the CPU"))
        return True

    def _tolerance(self, case: GoldenCase) -> float:
        return case.tolerance_slot if self._target == "slot" else case.tolerance_cpu

    def _discrimination(self) -> float | None:
        """The smallest distance between two golden cases; between all cases if there are not two golden ones."""
        golden = [trial.expected[0] for trial in self._trials if trial.golden]
        known = golden if len(golden) >= 2 else [trial.expected[0] for trial in self._trials if trial.expected]
        return min((distance(one, other) for one, other in combinations(known, 2)), default=None)

    async def _first(self, trial: _Trial) -> None:
        begin = time.monotonic()
        outputs = await self._ask(trial)
        if outputs is None:
            self._trials.remove(trial)
            return
        self._times.append(time.monotonic() - begin)
        await asyncio.to_thread(self._judge, trial, outputs)

    async def _again(self) -> None:
        """Neighbours in the first pass are not neighbours here."""
        some = self._trials[:REPEATED]
        half = (len(some) + 1) // 2
        for index in range(half):
            pair = [some[index], some[(index + half) % len(some)]]
            tasks = [asyncio.create_task(self._ask(trial), name=f"proof {trial.name}") for trial in pair]
            try:
                answers = await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for trial, outputs in zip(pair, answers, strict=True):
                if outputs is not None:
                    await asyncio.to_thread(self._judge, trial, outputs)

    async def _ask(self, trial: _Trial) -> Mapping[str, Tensor] | None:
        """The subject's outputs; None if nothing is expected and it does not take these inputs."""
        self.asked, self.at = self._target, f"case {trial.name}"
        try:
            outputs = await self._subject(trial.inputs)
        except (InvalidInput, ExecutorError) as error:
            if not _unfit(error):
                raise
            if not trial.expected:
                return None
            raise ProofFailed(
                f"case {trial.name}: the {_WHO[self._target]} refuses its inputs: {error}", hint=self._hint()
            ) from None
        self._runs += 1
        return outputs

    def _judge(self, trial: _Trial, outputs: Mapping[str, Tensor]) -> None:
        for name in self._signature.outputs:
            self._look(trial, name, outputs.get(name))
        for expected in trial.expected:
            found = difference(expected, outputs)
            if found.ratio > 1.0:
                raise ProofFailed(
                    f"case {trial.name}, output {found.output!r}: {found.why}, the tolerance to {expected.source} is "
                    f"{found.allowed:.3g}{self._whose(trial, outputs)}",
                    hint=self._hint(),
                )
            if not self._where or found.ratio > self._worst.ratio:
                self._worst, self._where = found, f"{trial.name}, {found.output}"

    def _look(self, trial: _Trial, name: str, output: Tensor | None) -> None:
        """What is wrong whatever is expected; and the range of what was seen."""
        if output is None:
            raise ProofFailed(f"case {trial.name}, output {name!r}: is missing", hint=self._hint())
        if isinstance(output, Strings) or output.dtype.kind != "f" or not output.size:
            return
        low, high = float(np.min(output)), float(np.max(output))
        if not np.isfinite(low) or not np.isfinite(high):
            raise ProofFailed(f"case {trial.name}, output {name!r}: holds NaN or infinity", hint=self._hint())
        before = self._seen.get(name, (low, high, 0))
        self._seen[name] = (min(before[0], low), max(before[1], high), max(before[2], output.size))

    def _require_life(self) -> None:
        """An output of several elements that were all the same number, in every run, is no computation."""
        for name, (low, high, size) in self._seen.items():
            if low == high and size > 1 and not self._vouched(name):
                raise ProofFailed(
                    f"output {name!r} was {low:g} in all elements of all {self._runs} runs",
                    hint="if the model is right, add golden cases in which this output varies",
                )

    def _vouched(self, name: str) -> bool:
        """Whether a golden case says that the output is constant."""
        for case in self._cases:
            tensor = case.outputs.get(name)
            if isinstance(tensor, np.ndarray) and bool(np.all(tensor == tensor.flat[0])):
                return True
        return False

    def _whose(self, trial: _Trial, outputs: Mapping[str, Tensor]) -> str:
        for other in self._trials:
            if other is not trial and other.expected and difference(other.expected[0], outputs).ratio <= 1.0:
                return f"; it is the answer to case {other.name}"
        return ""

    def _hint(self) -> str:
        if self._target == "slot":
            return "the accelerator computes something else than the model's graph; slotd does not serve from it"
        return "the graph in the image and its golden cases do not belong together; pack it again"


def _in_turn(golden: list[_Trial], seeded: list[_Trial]) -> list[_Trial]:
    turns = max(len(golden), len(seeded))
    return [side[turn] for turn in range(turns) for side in (golden, seeded) if turn < len(side)]


def _unfit(error: InvalidInput | ExecutorError) -> bool:
    """Whether it is the inputs that are at fault: not a death, not memory, not the device."""
    return isinstance(error, InvalidInput) or error.code == ExecutorError.code


def _rough(outputs: Mapping[str, Tensor]) -> float:
    largest = [
        float(np.max(np.abs(output.astype(np.float64)), initial=0.0))
        for output in outputs.values()
        if not isinstance(output, Strings) and DType.of(output.dtype).numpy.kind == "f"
    ]
    return ROUGH * max(largest, default=1.0)
