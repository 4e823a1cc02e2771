"""The demo from its first step to its last, and everything put away after it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.text import Text

from agent.cli.demo.child import child
from agent.cli.demo.embedded import DEVICE, Embedded, Ends
from agent.cli.demo.judge import Model, Result, Swap, judge
from agent.cli.demo.load import Load, load
from agent.cli.demo.operator import Operator, operator
from agent.cli.demo.pictures import PORTRAIT, check_picture, picture_path
from agent.cli.demo.report import classes
from agent.cli.demo.steps import Step, Steps
from agent.cli.output import seconds, size
from agent.errors import DeadlineExceeded, InvalidInput, SlotdError, revive
from agent.slot.arbiter import Phase

T = TypeVar("T")
_PREDICT = 60.0
_CAUSE = 0.5
_LOAD = 300.0
_PHASES = [phase.value for phase in Phase]


REMOVING = 5.0
"""Seconds in which a folder must be gone: children of a slotd that was killed write into it for a moment more."""


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    keep: bool = False
    image: Path | None = None
    folder: Path | None = None
    seconds_each: float = 2.0
    clients: int = 8
    requests: int = 2000
    swaps: int = 4


@dataclass(frozen=True)
class Left:
    """What is left running."""

    ends: Ends
    folder: Path
    picture: Path
    models: tuple[Model, ...]
    device: str = DEVICE


class Demo:
    """One run of it. Afterwards it has a `result`, or the `signal` that ended it."""

    def __init__(self, options: Options, steps: Steps) -> None:
        self.options = options
        self.steps = steps
        self.result: Result | None = None
        self.left: Left | None = None
        self.signal: int | None = None
        self._began = time.monotonic()

    async def run(self) -> None:
        """Everything. Raises SlotdError, with nothing left behind but what was asked for."""
        playing = asyncio.create_task(self._run(), name="demo")

        def signalled(number: int) -> None:
            if self.signal is None:  # more of them change nothing: the end is bounded
                self.signal = number
                playing.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, signalled, number)
        try:
            await playing
        except asyncio.CancelledError:
            if self.signal is None:
                raise

    async def _run(self) -> None:
        if self.options.image is not None:
            await asyncio.to_thread(check_picture, self.options.image)
        folder = await asyncio.to_thread(_make_folder, self.options.folder)
        self.steps.headline("slotd: one slot, two models, and no request lost between them", f"working in {folder}")
        host = Embedded(folder)
        try:
            await self._play(folder, host)
        except SlotdError:
            self._show_tail(host.tail())
            raise
        finally:
            if self.left is None:
                await self._put_away(folder, host)

    async def _put_away(self, folder: Path, host: Embedded) -> None:
        try:
            if host.started:
                with self.steps.step("Stop slotd") as step:
                    code = await host.stop()
                    step.detail = "in order" if code == 0 else Text(f"it ended with {code}", "red")
                if code != 0 and self.result is not None:
                    self.result.problems.append(f"slotd ended with {code}")
        finally:  # also when the terminal is gone and nothing can be printed
            await host.stop()
            if self.options.folder is None:
                await asyncio.to_thread(_remove, folder)

    def _show_tail(self, text: str) -> None:
        if text:
            self.steps.out.print(Text("\nthe end of slotd's log:", "bold"))
            self.steps.out.print(Text(text, "dim"), soft_wrap=True)
            self.steps.out.print()

    # --- the steps ----------------------------------------------------------------------------------------------------

    async def _play(self, folder: Path, host: Embedded) -> None:
        with self.steps.step("Build two models as images") as step:
            built = await self._build(folder, step)
        models = tuple(Model(**model) for model in built["models"])
        with self.steps.step("Start slotd") as step:
            ends = await host.start()
            step.detail = ends.ports
        picture = self.options.image or picture_path(folder, PORTRAIT)
        result = await _beside(self._on(ends, folder, models, picture, int(built["pictures"])), host.ended())
        result.took = time.monotonic() - self._began
        result.log_tail = host.tail() if result.problems else ""
        self.result = result
        if self.options.keep:
            self.left = Left(ends, folder, picture.resolve(), models)

    async def _build(self, folder: Path, step: Step) -> dict[str, Any]:
        """Models, images, pictures and what is expected of them, made in another process."""
        done: dict[str, Any] = {}
        fault: SlotdError | None = None
        async with child("the build", ("-m", "agent.cli.demo.build", str(folder)), folder) as building:
            try:
                async for document in building.documents():
                    step.detail = document.get("progress", step.detail)
                    done = document.get("done", done)
                    fault = revive(document["error"]) if "error" in document else fault
            except SlotdError:
                if fault is None:
                    raise
        if fault is not None:
            raise fault
        step.detail = f"{size(done['bytes'])} in an OCI layout"
        return done

    async def _on(self, ends: Ends, folder: Path, models: tuple[Model, ...], picture: Path, pictures: int) -> Result:
        """What is done with a slotd that runs."""
        async with AsyncExitStack() as stack:
            far = await stack.enter_async_context(operator(ends.broker, DEVICE))
            with self.steps.step(f"Deploy {models[0].name}") as step:
                deployments = [await _deploy(far, models[0], step)]
                step.detail = f"{deployments[0].document['outcome']}, by an MQTT command"
            with self.steps.step(f"Classify {picture.name}") as step:
                classified = await _predict(ends.address, picture)
                step.detail = f"over gRPC, by the {classified['served_by']}, in {classified['ms']:.0f} ms"
            self.steps.beneath(classes(classified))
            clients = await stack.enter_async_context(load(folder, ends.address, self.options.clients))
            deployments += await _beside(self._swap(far, models, clients), asyncio.shield(clients.reading))
            await clients.end()
        result = judge(
            clients.answers,
            deployments,
            models,
            clients=self.options.clients,
            pictures=pictures,
            wanted=self.options.requests,
        )
        result.classified = classified
        return result

    async def _swap(self, far: Operator, models: tuple[Model, ...], clients: Load) -> list[Swap]:
        """To and fro under load, with some time in between, until there were enough requests."""
        options, swaps = self.options, []
        with self.steps.step(f"{options.clients} clients start to ask") as step:
            step.live = lambda: Text(str(clients))
            await clients.reach(options.clients * 4, _LOAD)
            await asyncio.sleep(options.seconds_each)
        for number in range(1, options.swaps + 1):
            model = models[number % len(models)]
            with self.steps.step(f"Swap to {model.name}") as step:
                swap = await _deploy(far, model, step, clients)
                took = seconds(swap.document["seconds"])
                step.live = lambda took=took: Text(f"after {took} · {clients}")
                step.share = None
                await asyncio.sleep(options.seconds_each)
            swaps.append(swap)
        if len(clients.answers) < options.requests:
            with self.steps.step(f"Go on to {options.requests:,} requests") as step:
                step.live = lambda: Text(str(clients))
                await clients.reach(options.requests, _LOAD)
        return swaps


async def _deploy(far: Operator, model: Model, step: Step, clients: Load | None = None) -> Swap:
    """One deployment, shown as it goes."""
    phase = ""

    def changed(document: Any) -> None:
        nonlocal phase
        phase = str(document.get("phase") or "")
        if phase in _PHASES:
            step.share = (_PHASES.index(phase) + 1) / len(_PHASES)

    def shown() -> Text:
        return Text.assemble((f"{phase:<10}", "cyan"), f" {clients}" if clients is not None else "")

    step.share, step.live = 0.0, shown
    asked = time.monotonic()
    document = await far.deploy(model.tag, changed)
    if document["digest"] != model.digest:
        raise SlotdError(f"{model.tag} was deployed as {document['digest']}; it is {model.digest}")
    step.live = None
    return Swap(model, asked, time.monotonic(), document)


async def _predict(address: str, picture: Path) -> dict[str, Any]:
    """What `slotd predict` says of a picture, as a process of its own."""
    arguments = ("-m", "agent", "predict", "--image", str(picture), "--address", address, "--json")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_PREDICT):
            said, complained = await process.communicate()
    except TimeoutError:
        raise DeadlineExceeded(f"slotd predict took more than {_PREDICT:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise SlotdError(
            f"slotd predict ended with {process.returncode}: {complained.decode(errors='replace').strip()}"
        )
    found: dict[str, Any] = json.loads(said)
    return found


async def _beside(work: Coroutine[Any, Any, T], guard: Awaitable[None]) -> T:
    """The work's result, unless the guard, which should never end, raises first, or just after the work failed."""
    working, guarding = asyncio.ensure_future(work), asyncio.ensure_future(guard)
    try:
        await asyncio.wait((working, guarding), return_when=asyncio.FIRST_COMPLETED)
        if working.done() and not working.cancelled() and working.exception() is not None:
            await asyncio.wait((guarding,), timeout=_CAUSE)  # it may know why
        if guarding.done():
            await guarding
        return await working
    finally:
        for task in (working, guarding):
            task.cancel()
        await asyncio.gather(working, guarding, return_exceptions=True)


def _make_folder(wanted: Path | None) -> Path:
    """An empty folder. Raises InvalidInput."""
    try:
        if wanted is None:
            return Path(tempfile.mkdtemp(prefix="slotd-demo-"))
        wanted.mkdir(parents=True, exist_ok=True)
        if os.listdir(wanted):
            raise InvalidInput("is not empty", field=str(wanted), hint="give --folder a new one")
    except OSError as error:
        raise InvalidInput(
            f"cannot be used: {error.strerror}",
            field=str(wanted or tempfile.gettempdir()),
            hint="give another --folder",
        ) from None
    return wanted.resolve()


def _remove(folder: Path) -> None:
    until = time.monotonic() + REMOVING
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
