"""A dataplane without executors: answers what it is told to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from agent.errors import InvalidInput
from agent.model.signature import DType, Signature, Tensor, TensorSpec
from agent.serving.dataplane import Request


class FakeAnswer:
    def __init__(self, outputs: dict[str, Tensor]) -> None:
        self.name, self.version, self.digest, self.served_by = "toy", 3, "sha256:" + "ab" * 32, "slot"
        self.outputs = outputs
        self.released = False

    def release(self) -> None:
        self.released = True

    def __enter__(self) -> FakeAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class FakeDataplane:
    """By default every output is an input of the same name; input `x` must be there."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: list[FakeAnswer] = []
        self.behave: Callable[[Request], Any] | None = None
        self.hold: asyncio.Event | None = None
        self.cancelled = 0
        self.answering = True
        self.on_slot = True
        self.names = ["toy"]
        spec = TensorSpec("x:0", DType.FLOAT32, (-1, 4))
        self.signature = Signature({spec.name: spec}, {spec.name: spec})
        self._callbacks: list[Callable[[], None]] = []

    async def predict(self, request: Request) -> FakeAnswer:
        self.requests.append(request)
        if self.hold is not None:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.behave is not None:
            outputs = self.behave(request)
        else:
            for name in request.inputs:
                if name.removesuffix(":0") != "x":
                    raise InvalidInput("the model has no such input; it has 'x:0'", field=name[:200])
            outputs = dict(request.inputs)
        answer = FakeAnswer(outputs)
        self.answers.append(answer)
        return answer

    def can_answer(self) -> bool:
        return self.answering

    def slot_answers(self) -> bool:
        return self.on_slot

    def served(self) -> Any:
        if not self.names:
            return None
        return SimpleNamespace(model=SimpleNamespace(name=self.names[0], version=3), signature=self.signature)

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def change(self, *, answering: bool | None = None, on_slot: bool | None = None) -> None:
        self.answering = self.answering if answering is None else answering
        self.on_slot = self.on_slot if on_slot is None else on_slot
        for callback in self._callbacks:
            callback()
