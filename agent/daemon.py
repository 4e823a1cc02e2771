"""The daemon: the only place where the parts are put together, started and stopped, in this order.

lock · boot.json · journal · the committed model on the CPU · servers · READY · link · the slot · what was cut off
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import uvloop

from agent import __version__
from agent.config import Config
from agent.errors import InvalidConfig, SlotdError, StorageError
from agent.executor.sandbox import withhold_memory
from agent.executor.spawn import drop_early
from agent.health import confinement
from agent.health.document import timestamp
from agent.health.issues import Issues
from agent.images.source import ImageSource
from agent.journal.database import Journal
from agent.journal.lock import take_lock
from agent.journal.outbox import Outbox
from agent.logs import configure as configure_logs
from agent.memory import keep_code, take_turns
from agent.reload.source import Loaded
from agent.service import Watchdog, keep_waiting, notify_ready, notify_status, notify_stopping
from agent.serving.dataplane import Dataplane
from agent.serving.trials import Trials
from agent.slot.admission import Admission
from agent.slot.arbiter import Arbiter, Continuity
from agent.slot.deployment import Deployments
from agent.slot.installer import Installer
from agent.slot.recovery import Recovery
from agent.slot.residents import Residents
from agent.storage import BootRecords, Storage, load_committed
from agent.upgrade import TakenBack, read_taken_back
from agent.upgrade import report as report_taken_back
from drivers import make

if TYPE_CHECKING:
    from agent.host import SlotHost
    from agent.link.keeper import LinkKeeper

log = structlog.get_logger(__name__)

START_BOUND = 600.0
"""Seconds for which systemd is asked to wait for READY, as long as the loop runs."""
STOP_BOUND = 30.0
"""Seconds after which a stop that has not ended is ended all the same."""
HEALTH_EVERY = 5.0
STATUS_EVERY = 0.5
"""Seconds after which a change of the state is told to systemd."""
MAX_TOLD = 1000
"""How many events wait for a disk that fails."""
RETRY_TOLD = 1.0
STOPPED = "stopped"
"""Journal key: when the last slotd stopped answering."""


class Tasks:
    """Owns the background tasks: one that fails ends the daemon, with its error."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Starts it."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("background_task_failed", task=task.get_name(), exc_info=error)
        if not self.failed.done():
            self.failed.set_exception(error)

    async def close(self) -> None:
        """Ends them all."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.failed.done():
            self.failed.exception()  # whoever wanted to know has asked


class Teller:
    """Events from anywhere, into the outbox, in order, without making anybody wait for the disk.

    While the disk fails they wait here; of more than MAX_TOLD the newest are counted, and the count is told.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._queue: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue(MAX_TOLD)
        self._lost = 0

    def tell(self, kind: str, document: dict[str, Any]) -> None:
        """An event for the fleet."""
        try:
            self._queue.put_nowait((kind, {"ts": timestamp(time.time()), **document}))
        except asyncio.QueueFull:
            self._lost += 1

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            kind, document = await self._queue.get()
            try:
                while not await self._append(kind, document):  # noqa: ASYNC110  # a disk has no event
                    await asyncio.sleep(RETRY_TOLD)
                if self._lost and await self._append("events_lost", {"count": self._lost}):
                    self._lost = 0
            finally:
                self._queue.task_done()

    async def _append(self, kind: str, document: dict[str, Any]) -> bool:
        try:
            await self._outbox.append(kind, document)
        except StorageError as error:
            log.warning("event_waits", kind=kind, error=str(error))
            return False
        except SlotdError as error:
            log.error("event_lost", kind=kind, error=str(error))
        return True

    async def flush(self, timeout: float) -> None:
        """Waits until all of them are stored."""
        try:
            async with asyncio.timeout(timeout):
                await self._queue.join()
        except TimeoutError:
            log.warning("events_not_stored", count=self._queue.qsize())


class Daemon:
    """One slotd. `run` returns the exit code."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.config = loaded.config
        """As it was at the start; the Reloader knows what is in force."""
        self.boot_id = _boot_id()
        self.stop_asked = asyncio.Event()
        self.ready = asyncio.Event()
        self.hung_up = asyncio.Event()
        self.host: SlotHost | None = None
        self.taken_back: TakenBack | None = None

    async def run(self) -> int:
        """Until SIGTERM or a fault. Raises InvalidConfig, Conflict, StorageError before anything is served."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGHUP, self.hung_up.set)
        asked = asyncio.create_task(self.stop_asked.wait(), name="stop-asked")
        fault: BaseException | None = None
        async with AsyncExitStack() as stack:
            waiting = asyncio.create_task(keep_waiting(START_BOUND), name="more-time-to-start")
            start = asyncio.create_task(self._start(stack), name="start")
            await asyncio.wait((start, asked), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if start.done():
                failed = start.result().failed
                await asyncio.wait((asked, failed), return_when=asyncio.FIRST_COMPLETED)
                fault = failed.exception() if failed.done() else None
            asked.cancel()
            notify_stopping()
            log.info("stopping", fault=str(fault) if fault else None, ready=self.ready.is_set())
            bound = loop.call_later(STOP_BOUND, _too_long)
            waiting = asyncio.create_task(keep_waiting(STOP_BOUND), name="more-time-to-stop")
            await _end(start)  # only what it has come to is taken down again
        bound.cancel()
        waiting.cancel()
        log.info("stopped")
        if isinstance(fault, SlotdError):
            return fault.exit
        return 0 if fault is None else 70

    async def _start(self, stack: AsyncExitStack) -> Tasks:
        """Starts everything; what is pushed on `stack` is the order of the stop, last first."""
        config = self.config
        await asyncio.to_thread(_make_folders, config)
        lock = take_lock(config.state_dir / "slotd.lock")
        stack.callback(lock.release)

        issues = Issues()
        boots = BootRecords(config.state_dir, issues)
        boot = await boots.read()
        journal = await Journal.open(config.state_dir, self.boot_id)
        stack.push_async_callback(journal.close)
        boot = await boots.compare(boot, journal)
        outbox = Outbox(journal, max_events=config.link.outbox_events)
        teller = Teller(outbox)
        tasks = Tasks()
        stack.push_async_callback(tasks.close)
        tasks.spawn(teller.run(), "teller")
        stack.push_async_callback(teller.flush, 2.0)
        issues.on_event = teller.tell
        self.taken_back = await asyncio.to_thread(read_taken_back)
        if self.taken_back is not None:
            await report_taken_back(self.taken_back, issues, journal, teller.tell)

        try:
            driver = make(config.slot.driver, config.driver_options)
        except ValueError as error:
            raise InvalidConfig(str(error), field="slot.driver") from None

        arbiter = Arbiter(continuity=Continuity(config.swap.continuity))
        admission = Admission(max_queue=config.serving.max_queue, max_wait=config.serving.max_wait)
        dataplane = Dataplane(arbiter, admission, config.serving)
        arbiter.on_change = dataplane.changed
        residents = Residents(config, arbiter, dataplane, tasks.spawn)
        stack.push_async_callback(residents.close)
        trials = Trials(residents.spawn_disposable, residents.discard_disposable, memory=config.serving.poison_memory)
        dataplane.retrier = trials
        stack.push_async_callback(trials.close)
        installer = Installer(config, driver, arbiter, dataplane, journal, self.boot_id)
        stack.push_async_callback(installer.close)
        recovery = Recovery(config, arbiter, installer, residents, dataplane, teller.tell)
        installer.on_death.append(lambda _seat, _error: recovery.wake(now=False))
        dataplane.on_trouble(recovery.doubt)
        images = ImageSource(config)
        storage = Storage(config.state_dir, config.images.keep_free, issues, boots, journal, images)
        await storage.open_store()
        deployments = Deployments(
            config,
            config.state_dir,
            boot,
            arbiter,
            dataplane,
            residents,
            installer,
            recovery,
            trials,
            images,
            journal,
            teller.tell,
            self.boot_id,
        )
        deployments.books.doubt = boots.doubt
        await deployments.open()
        arbiter.committed = boot.committed.digest if boot.committed else None

        load = partial(load_committed, deployments, images, residents, arbiter, issues)
        recovery.load_committed = partial(load, mend=True)
        if boot.committed is not None:
            notify_status(f"loading {boot.committed.name} {boot.committed.version}")
        # A repair may take long, and the ports open first.
        await asyncio.gather(load(mend=False), asyncio.to_thread(_bring_the_server))
        from agent.serving.listen import GrpcServer

        server = GrpcServer(config.serving, config.run_dir, dataplane, issues)
        listen = await server.start()
        stack.push_async_callback(server.stop)
        listening = time.clock_gettime(time.CLOCK_BOOTTIME)
        await asyncio.to_thread(_bring_the_rest)
        await asyncio.to_thread(drop_early)  # there was nothing to load
        from agent.commands.admin import AdminServer
        from agent.commands.builtin import build_table
        from agent.health.metrics import exposition
        from agent.host import SlotHost
        from agent.link.keeper import LinkKeeper
        from agent.link.mqtt import Link
        from agent.reload.reloader import Reloader

        host = self.host = SlotHost(
            config, self.boot_id, arbiter, dataplane, installer, recovery, deployments, issues.list
        )
        table = build_table(host)
        admin = AdminServer(config.run_dir / "admin.sock", table, host)
        host.listen = listen
        await server.open_http(
            lambda: exposition(host.status(), dataplane.times, server.statuses),
            lambda address: listen.insert(len(listen) - 1, address),
        )
        stack.push_async_callback(self._note_stop, journal)
        await admin.start()
        stack.push_async_callback(admin.close)
        stack.push_async_callback(deployments.stop)
        link = host.link = LinkKeeper(
            config, lambda now: Link(now, table, host, journal, outbox, issues, self.boot_id), issues
        )
        arbiter.on_change = _both(dataplane.changed, link.changed)
        tasks.spawn(link.run(), "link")
        stack.push_async_callback(link.close, 3.0)

        def apply(now: Config) -> None:
            """Another configuration is in force: every part that goes by it hears of it, in this order."""
            configure_logs(now.log)
            outbox.reconfigure(now.link.outbox_events)
            storage.keep_free = now.images.keep_free
            images.reconfigure(now)
            residents.reconfigure(now)
            trials.reconfigure(now.serving.poison_memory)
            installer.reconfigure(now)
            recovery.reconfigure(now)
            deployments.reconfigure(now)
            server.reconfigure(now.serving)
            dataplane.reconfigure(now.serving)
            arbiter.continuity = Continuity(now.swap.continuity)
            dataplane.changed()
            link.reconfigure(now)

        reloader = host.reloader = Reloader(self.loaded, apply, issues, teller.tell, self.hung_up)

        host.restart_gap = await _gap(journal, listening)
        # What is there now stays. Collections need not look at it again, which stops the loop for tens of milliseconds.
        gc.freeze()
        gc.enable()
        notify_ready()
        tasks.spawn(Watchdog().run(), "watchdog")
        tasks.spawn(self._tell_status(host), "status-line")
        tasks.spawn(self._sample(host, issues, link), "samples")
        for work, name in (
            (recovery.run(), "recovery"),
            (recovery.self_test(), "self-test"),
            (storage.run(deployments, arbiter, residents, recovery), "storage"),
            (deployments.resume(), "resume"),
            (reloader.run(), "config"),
        ):  # they hold the slot, so they end before anything that they need is taken away
            stack.push_async_callback(_end, tasks.spawn(work, name))
        stack.push_async_callback(server.lame_duck)  # first of all: nobody is sent here any more
        log.info("ready", version=__version__, listen=host.listen, host=arbiter.host.value, pid=os.getpid())
        self.ready.set()
        recovery.wake()
        return tasks

    async def _note_stop(self, journal: Journal) -> None:
        """The servers close now: the one gap begins, unless this start has not ended it."""
        if not self.ready.is_set():
            return
        at = time.clock_gettime(time.CLOCK_BOOTTIME)
        try:
            await journal.put(STOPPED, {"boot_id": self.boot_id, "at": at})
        except SlotdError as error:
            log.warning("stop_not_journaled", error=str(error))

    async def _tell_status(self, host: SlotHost) -> None:
        """The line in `systemctl status`."""
        told = ""
        while True:
            text = host.line() if self.taken_back is None else f"{host.line()}; {self.taken_back.text}"
            if text != told and notify_status(text):
                told = text
            await asyncio.sleep(STATUS_EVERY)

    async def _sample(self, host: SlotHost, issues: Issues, link: LinkKeeper) -> None:
        """The slot's sensors, and what the state means for the operator."""
        while True:
            host.health = await host.installer.read_health()
            if not host.installer.lock.locked():
                host.installer.state = await host.installer.probe()
            state, running = host.arbiter.host.value, host.deployments.running
            if host.health.tripped:
                issues.raise_(
                    "slot-temperature", "critical", "the slot is too hot and has tripped", "check the cooling"
                )
            else:
                issues.clear("slot-temperature")
            lacking = confinement.trouble(host.sandbox()["lacks"])
            if lacking is not None:
                issues.raise_("sandbox", "warning", *lacking)
            else:
                issues.clear("sandbox")
            trouble = host.arbiter.trouble
            if trouble is not None and state in ("bridge", "dark") and running is None:
                issues.raise_("slot", "critical", str(trouble), trouble.hint or "slotd goes on trying")
            elif state == "slot":
                issues.clear("slot")
            link.changed()
            await asyncio.sleep(HEALTH_EVERY)

    def _signalled(self) -> None:
        if self.stop_asked.is_set():
            log.error("second_signal", hint="ending at once")
            os._exit(75)
        self.stop_asked.set()


def run(loaded: Loaded) -> int:
    """One daemon in a loop of its own, until it is told to stop; the exit code. Raises what `Daemon.run` does."""
    withhold_memory()  # its keys and its clients' data are not for its children
    take_turns()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Daemon(loaded).run())


def _bring_the_server() -> None:
    """Imports what a model can be loaded without, beside its being loaded."""
    import agent.serving.listen  # noqa: F401


def _bring_the_rest() -> None:
    """Imports what clients can be answered without."""
    from PIL import Image, ImageDraw  # noqa: F401

    import agent.commands.admin
    import agent.commands.builtin
    import agent.health.metrics
    import agent.host
    import agent.link.mqtt
    import agent.reload.reloader
    import agent.serving.http.server  # noqa: F401

    Image.preinit()  # else the first proof loads it, from the disk, while clients wait for Python's lock
    keep_code()


def _make_folders(config: Config) -> None:
    for folder, mode in ((config.state_dir, 0o700), (config.run_dir, 0o755)):
        try:
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidConfig(
                f"{folder} cannot be made: {error.strerror}", field="state_dir / run_dir", hint="choose another folder"
            ) from None


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait((task,))


async def _gap(journal: Journal, now: float) -> float | None:
    """Seconds for which no slotd of this boot answered, until `now`; None if that is not known."""
    try:
        stopped = await journal.get(STOPPED)
        if not isinstance(stopped, dict) or stopped.get("boot_id") != journal.boot_id:
            return None
        await journal.put(STOPPED, None)
    except SlotdError as error:  # a full disk is no reason not to serve
        log.warning("gap_unknown", error=str(error))
        return None
    return round(now - float(stopped["at"]), 3)


def _boot_id() -> str:
    """The kernel's: what was programmed in this boot is still there."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(uuid.uuid4())


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


def _too_long() -> None:
    log.critical("stop_took_too_long", at=time.time())
    os._exit(75)
