"""A model in an executor: its stages one after the other, on the CPU or around the slot."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.errors import InvalidInput, InvalidModel, SlotError
from agent.executor.child import Job
from agent.executor.graph import read_graph
from agent.executor.plan import Graph, Plan, read_plan
from agent.executor.sessions import Session, open_session
from agent.model.signature import DType, Signature, Strings, Tensor, TensorSpec, dtype_of
from drivers import make
from drivers.base import Completion, Compute, Runtime, SlotStage, Wanted

CPU_DEPTH = 2
"""One runs, one waits in the channel."""
GRACE = 5.0
"""Seconds beyond the call timeout in which a runtime may still say itself what is wrong."""


@dataclass
class Stage:
    """One graph in place. `takes` and `makes`: (the graph's name, the pipeline's name). No session: the slot has it."""

    graph: Graph
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    session: Session | None

    def __post_init__(self) -> None:
        self.takes = _names(self.graph, "inputs", self.graph.inputs, self.inputs)
        self.makes = _names(self.graph, "outputs", self.graph.outputs, self.outputs)

    def run(self, values: dict[str, Tensor]) -> None:
        """On the CPU; the outputs are added to `values`."""
        assert self.session is not None
        self.add(self.session.run({name: values[ours] for name, ours in self.takes}), values)

    def add(self, outputs: Mapping[str, Tensor], values: dict[str, Tensor]) -> None:
        """The outputs, by the graph's names, under the pipeline's."""
        for name, ours in self.makes:
            values[ours] = outputs[name]


@dataclass
class _Away:
    """A job whose slot stage is being computed."""

    job: Job
    values: dict[str, Tensor]
    since: float


class ModelHandler:
    """Runs a model's pipeline, from the stage after the image stage on."""

    def __init__(self, hello: dict[str, Any]) -> None:
        """Raises InvalidModel naming file or field, DriverError, ExecutorError."""
        started = time.monotonic()
        plan = read_plan(hello["plan"])
        self._folder = Path(hello["folder"])
        self._timeout: float = hello["call_timeout"]
        self._threads: int = hello["threads"]
        on_slot = hello["target"] == "slot"
        self._stages = [self._open(graph, slot=on_slot and graph.on == "slot") for graph in plan.graphs]
        self._slot = next((place for place, stage in enumerate(self._stages) if stage.session is None), None)
        self.signature, self._inputs = checked(plan, self._stages)
        self._outputs = list(self.signature.outputs)
        self._away: dict[int, _Away] = {}
        self._back: deque[tuple[_Away, Completion]] = deque()
        self._runtime: Runtime | None = None
        self._depth = CPU_DEPTH
        if self._slot is not None:
            self._runtime = self._open_runtime(hello["driver"], plan)
            self._depth = self._runtime.depth
        self._load_s = time.monotonic() - started

    def _open(self, graph: Graph, *, slot: bool) -> Stage:
        if slot:
            inputs, outputs = read_graph(self._folder / graph.file)
            for spec in (*inputs, *outputs):
                if spec.dtype is DType.STRING:
                    raise InvalidModel(f"{spec.name!r} is of strings, which a slot cannot compute", field=graph.file)
            return Stage(graph, inputs, outputs, None)
        if graph.cpu is None:
            raise InvalidModel("has no CPU twin", field=f"model.yaml: {graph.field}.cpu")
        session = open_session(self._folder / graph.cpu, threads=self._threads, call_timeout=self._timeout)
        return Stage(graph, session.inputs, session.outputs, session)

    def _open_runtime(self, driver: dict[str, Any], plan: Plan) -> Runtime:
        assert self._slot is not None
        stage = self._stages[self._slot]
        path = self._folder / stage.graph.file

        def compute() -> Compute:
            return open_session(path, threads=self._threads, call_timeout=self._timeout).compute

        wanted = Wanted()
        if plan.slot is not None:
            with (self._folder / plan.slot["bitstream"]).open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            wanted = Wanted(plan.slot["interface"], plan.slot["accelerator"], sha256)
        names = (tuple(spec.name for spec in stage.inputs), tuple(spec.name for spec in stage.outputs))
        return make(driver["name"], driver["options"]).open_runtime(
            wanted, [SlotStage(self._slot, path, *names, compute)]
        )

    # --- what a Handler is -------------------------------------------------------------------------------------------

    @property
    def ready(self) -> dict[str, Any]:
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1])
        return {
            "signature": self.signature.as_dict(),
            "executor_inputs": self._inputs,
            "output_names": self._outputs,
            "depth": self._depth,
            "load_s": round(self._load_s, 3),
            "rss_bytes": resident * os.sysconf("SC_PAGE_SIZE"),
        }

    @property
    def depth(self) -> int:
        return self._depth

    def pending(self) -> int:
        return len(self._away) + len(self._back)

    def begin(self, job: Job) -> None:
        """CPU: run and answer. Slot: run up to the slot's stage and submit that."""
        values: dict[str, Tensor] = {}
        for place, name in enumerate(self._inputs):
            if place not in job.inputs:
                raise InvalidInput("is missing", field=name)
            values[name] = job.inputs[place]
        job.start()
        for stage in self._stages[: self._slot]:
            stage.run(values)
        if self._slot is None or self._runtime is None:
            job.answer([values[name] for name in self._outputs])
            return
        numbers = _numbers(self._stages[self._slot], values)
        self._away[job.ticket] = _Away(job, values, time.monotonic())
        try:
            self._runtime.submit(job.ticket, self._slot, numbers)
        except BaseException:
            del self._away[job.ticket]
            raise

    def fileno(self) -> int | None:
        return None if self._runtime is None else self._runtime.fileno()

    def advance(self) -> bool:
        """Take what the slot has finished; run the stages after it for one of them, and answer."""
        assert self._runtime is not None and self._slot is not None
        for completion in self._runtime.completions():
            away = self._away.pop(completion.ticket, None)
            if away is None:
                raise RuntimeError(f"the runtime completed ticket {completion.ticket}, which it does not have")
            self._back.append((away, completion))
        if self._back:
            away, completion = self._back.popleft()
            try:
                self._finish(away, completion)
            except Exception as error:  # it is this job's failure; the child goes on
                away.job.fail(error)
        return bool(self._back)

    def overdue(self) -> float | None:
        """Seconds until the oldest submission has taken longer than any may; None if there is none."""
        if not self._away:
            return None
        return min(away.since for away in self._away.values()) + self._timeout + GRACE - time.monotonic()

    def _finish(self, away: _Away, completion: Completion) -> None:
        assert self._slot is not None
        if completion.error is not None:
            raise completion.error
        stage = self._stages[self._slot]
        for spec in stage.outputs:
            array = completion.outputs.get(spec.name)
            if array is None or array.dtype != spec.dtype.numpy:
                kind = "nothing" if array is None else array.dtype
                raise SlotError(f"the slot made {kind} for {spec.name!r}, which is {spec.dtype.value}")
        stage.add(completion.outputs, away.values)
        for after in self._stages[self._slot + 1 :]:
            after.run(away.values)
        away.job.answer([away.values[name] for name in self._outputs])

    def close(self) -> None:
        if self._runtime is not None:
            self._runtime.close()


def checked(plan: Plan, stages: Sequence[Stage]) -> tuple[Signature, list[str]]:
    """(the signature, the executor's inputs) after model.yaml and graphs were compared. Raises InvalidModel."""
    takes = plan.executor_inputs
    if takes is None:
        first = stages[0]
        takes = {ours: _renamed(spec, ours) for (_, ours), spec in zip(first.takes, first.inputs, strict=True)}
    known = dict(takes)
    unused = set(takes)
    for stage in stages:
        for (name, ours), spec in zip(stage.takes, stage.inputs, strict=True):
            if ours not in known:
                raise InvalidModel(
                    f"the graph takes {name!r}, and neither an input nor a stage before it is called {ours!r}",
                    field=f"model.yaml: {stage.graph.field}",
                    hint="map it with `inputs: {graph's name: pipeline's name}`",
                )
            _same(known[ours], spec, f"model.yaml: {stage.graph.field}", "the graph takes")
            unused.discard(ours)
        for (_, ours), spec in zip(stage.makes, stage.outputs, strict=True):
            known[ours] = _renamed(spec, ours)
    if unused:
        raise InvalidModel("no graph takes this input", field=f"model.yaml: inputs.{min(unused)}")
    if plan.signature is None:
        last = stages[-1]
        outputs = {ours: _renamed(spec, ours) for (_, ours), spec in zip(last.makes, last.outputs, strict=True)}
        return Signature(takes, outputs), list(takes)
    for name, spec in plan.signature.outputs.items():
        if name not in known or name in takes:
            raise InvalidModel(
                "no graph makes this output",
                field=f"model.yaml: outputs.{name}",
                hint=f"the graphs make {', '.join(sorted(set(known) - set(takes))[:8])}",
            )
        _same(spec, known[name], f"model.yaml: outputs.{name}", "the graph makes")
    return plan.signature, list(takes)


def _numbers(stage: Stage, values: Mapping[str, Tensor]) -> dict[str, npt.NDArray[np.generic]]:
    """What a slot's stage takes. Raises InvalidInput for what its graph does not, before a device sees it."""
    numbers: dict[str, npt.NDArray[np.generic]] = {}
    for (name, ours), spec in zip(stage.takes, stage.inputs, strict=True):
        tensor = values[ours]
        if isinstance(tensor, Strings) or tensor.dtype != spec.dtype.numpy:
            raise InvalidInput(f"is {dtype_of(tensor).value}, the slot takes {spec.dtype.value}", field=ours)
        if spec.shape and not spec.accepts(tensor.shape):
            raise InvalidInput(f"has shape {list(tensor.shape)}, the slot takes {list(spec.shape)}", field=ours)
        numbers[name] = tensor
    return numbers


def _names(graph: Graph, side: str, renames: dict[str, str], specs: Sequence[TensorSpec]) -> list[tuple[str, str]]:
    names = [spec.name for spec in specs]
    for name in renames:
        if name not in names:
            raise InvalidModel(
                f"{graph.file} has no {name!r}, it has {', '.join(names[:8])}",
                field=f"model.yaml: {graph.field}.{side}",
            )
    return [(name, renames.get(name, name)) for name in names]


def _renamed(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, spec.dtype, spec.shape)


def _same(ours: TensorSpec, graph: TensorSpec, field: str, verb: str) -> None:
    """A graph that gives no shape takes any; -1 on either side is left to the run."""
    fits = not graph.shape or (
        len(ours.shape) == len(graph.shape)
        and all(-1 in (one, other) or one == other for one, other in zip(ours.shape, graph.shape, strict=True))
    )
    if ours.dtype is not graph.dtype or not fits:
        raise InvalidModel(f"{ours} is declared, {verb} {graph}", field=field)
