"""The agent's side of a child process: what rooms other than the executor's use of it."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import structlog

from agent.errors import ExecutorDied, ExecutorError, InvalidInput, SlotError
from agent.executor import channel
from agent.executor.arena import Arena, DecodedMemory, Region
from agent.executor.call import Call, Input, Reply
from agent.executor.channel import ChannelClosed, ChannelError, Kind, Record
from agent.executor.launch import Launch, launch_decoder, launch_model
from agent.executor.process import Exit, Process
from agent.executor.spawn import Spawned, discard, start_new, start_worker
from agent.executor.traffic import Traffic, error_of

__all__ = [
    "Call",
    "DecodedMemory",
    "Exit",
    "Input",
    "Launch",
    "Region",
    "Reply",
    "Worker",
    "launch_decoder",
    "launch_model",
]

log = structlog.get_logger(__name__)

_REAP = 5.0
"""Seconds to wait for a killed child's exit before going on without it (it is still reaped when it comes)."""
_LATE_EXIT = 1.0
"""Seconds from the end of a child's socket to telling its callers, if the exit does not come first."""
_generations = itertools.count(1)


class Worker:
    """One child process. Made by `start`; belongs to the loop that started it."""

    def __init__(self, launch: Launch, spawned: Spawned) -> None:
        """Raises OSError, and the child is discarded."""
        self.generation = next(_generations)
        self.role = launch.role
        self.ready: Mapping[str, Any] = MappingProxyType({})
        self.alive = False
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[Exit] = self._loop.create_future()
        self._ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._stopping = False
        self._fault: str | None = None
        first = 1 if launch.output is None else 2
        try:
            maps = {os.fstat(fd).st_ino: number for number, fd in enumerate(launch.maps, first)}
            self.arena = Arena(launch.arena)
        except BaseException:
            discard(spawned)
            raise
        self._socket = spawned.channel
        try:
            self._process = Process(spawned, role=launch.role, idle=launch.idle, on_exit=self._reaped)
        except BaseException:
            self.arena.close()
            raise
        self.pid = self._process.pid
        self._traffic = Traffic(
            self._socket,
            self.generation,
            self.arena,
            launch.output,
            maps,
            on_document=self._told,
            on_fault=self._violated,
            on_closed=self._hang_up,
        )

    @classmethod
    async def start(cls, launch: Launch, *, timeout: float) -> Worker:
        """A child that is ready. The child is reaped on failure and on cancellation.

        Raises ExecutorError (what the child reports: MODEL_INVALID, NO_RUNTIME, OUT_OF_MEMORY …, or LOAD_TIMEOUT), or
        ExecutorDied with its last words.
        """
        try:
            ahead = launch.hello.get("kind") == "model"
            worker = cls(launch, await (start_worker if ahead else start_new)(launch.argv))
        except OSError as error:
            raise ExecutorError(f"the {launch.role} child cannot be started: {error}") from error
        try:
            worker._greet(launch)
            async with asyncio.timeout(timeout):
                document = await worker._ready
        except BaseException as error:
            worker._hang_up()
            await asyncio.wait({worker._gone}, timeout=_REAP)
            if isinstance(error, TimeoutError):
                raise ExecutorError(
                    f"the {launch.role} child was not ready within {timeout:g} s", code="LOAD_TIMEOUT"
                ) from None
            raise
        worker.ready = MappingProxyType(document)
        worker.alive = worker._socket.fileno() >= 0
        return worker

    @property
    def died(self) -> asyncio.Future[Exit]:
        """Resolved, never with an exception, when the child's exit was reaped. Each caller gets one of its own."""
        return asyncio.shield(self._gone)

    @property
    def in_flight(self) -> int:
        """Calls that were not answered yet, cancelled ones included."""
        return len(self._traffic)

    def submit(self, inputs: Sequence[tuple[int, Input]], *, deadline_ns: int, reserve: Sequence[int] = ()) -> Call:
        """Hand a request over; never blocks. Inputs must not change until it ends.

        `inputs` are (index in the child's list, tensor or a region of a decoder); `reserve` is the room in bytes for
        each output, by default what the last answers took. Raises ExecutorDied, InvalidInput for what no child takes,
        Overloaded for what can never fit.
        """
        if not self.alive:
            raise ExecutorDied(f"the {self.role} child {self.pid} is not running")
        if len(inputs) > channel.MAX_TENSORS or len(reserve) > channel.MAX_TENSORS:
            raise InvalidInput(f"more than {channel.MAX_TENSORS} tensors")
        return self._traffic.submit(inputs, deadline_ns, reserve)

    def normal_priority(self) -> None:
        """From now on it runs like everybody else (it was started with `idle`)."""
        self._process.schedule(os.SCHED_OTHER)

    def signal(self, number: int) -> None:
        """Send the child a signal."""
        self._process.signal(number)

    # --- the beginning ----------------------------------------------------------------------------------------------

    def _greet(self, launch: Launch) -> None:
        shared = [(self.arena.fd, self.arena.capacity, True)]
        if launch.output is not None:
            shared.append((launch.output.fd, launch.output.capacity, True))
        opened: list[int] = []
        try:
            for fd in launch.maps:
                # Opened anew, so that the descriptor which the child gets cannot be mapped for writing.
                opened.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
                shared.append((opened[-1], os.fstat(fd).st_size, False))
            document = {
                "role": launch.role,
                "memory": launch.memory,
                "grants": launch.grants.as_dict(),
                "arenas": [{"bytes": size, "writable": writable} for _, size, writable in shared],
                "hello": launch.hello,
            }
            record = Record(Kind.HELLO, self.generation, fds=len(shared))
            data, extra = channel.pack_document(record, document)
            opened += extra
            channel.send(self._socket, data, [fd for fd, _, _ in shared] + extra)
        except ChannelClosed:
            pass  # it died at once; its exit tells more
        except (OSError, ChannelError) as error:
            raise ExecutorError(f"the {launch.role} child could not be told what to do: {error}") from error
        finally:
            channel.close_all(opened)

    def _told(self, record: Record, fds: Sequence[int]) -> None:
        """READY, or why it is not."""
        if self._ready.done() or record.kind not in (Kind.READY, Kind.FAILED):
            raise ChannelError(f"{record.kind.name} that nobody waits for")
        document = channel.read_document(record, fds)
        if record.kind is Kind.READY:
            self._ready.set_result(document)
        else:
            self._ready.set_exception(error_of(document))

    # --- the end ----------------------------------------------------------------------------------------------------

    async def stop(self, *, grace: float) -> None:
        """End the child: ask, SIGTERM, SIGKILL, each with `grace` seconds; what it has in hand it may finish.

        Returns when its exit was reaped. Raises SlotError DEVICE_STUCK if it will not die.
        """
        self.alive = False
        self._stopping = True
        self._traffic.refuse(self._death)
        self._traffic.say(Kind.STOP)
        for number in (signal.SIGTERM, signal.SIGKILL, None):
            await asyncio.wait({self._gone}, timeout=grace)
            if self._gone.done():
                return
            if number is not None:
                self._process.signal(number)
        raise SlotError(
            f"the {self.role} child {self.pid} does not end, even by SIGKILL",
            code="DEVICE_STUCK",
            hint="a driver holds it in the kernel; the host needs a power cycle",
        )

    def _violated(self, fault: str) -> None:
        """The child broke the rules: it is killed, and whoever waits for it is told at once."""
        if self._fault is None:
            self._fault = fault
            log.error("child_broke_the_rules", role=self.role, pid=self.pid, generation=self.generation, fault=fault)
        self._hang_up()
        self._fail_all()

    def _hang_up(self) -> None:
        """Nothing more is sent or read; the child is killed. Its memory is given back when it was reaped."""
        self.alive = False
        self._traffic.close()
        if self._process.exit is None:
            if not self._stopping or self._fault is not None:
                self._process.signal(signal.SIGKILL)  # else it is on its way out, and `stop` sees to it
            self._loop.call_later(_LATE_EXIT, self._fail_all)

    def _reaped(self) -> None:
        """The exit is known. What the child had answered before still counts."""
        exit_ = self._process.exit
        assert exit_ is not None
        self._traffic.drain()
        self._hang_up()
        self._fail_all()
        self._traffic.bury()
        self.arena.close()
        log.info("child_ended", role=self.role, pid=self.pid, generation=self.generation, exit=str(exit_))
        self._gone.set_result(exit_)

    def _fail_all(self) -> None:
        if not self._ready.done():
            self._ready.set_exception(self._death())
            self._ready.exception()
        self._traffic.fail_all(self._death)

    def _death(self) -> ExecutorError:
        exit_ = self._process.exit
        who = f"the {self.role} child {self.pid}"
        if self._fault is not None:
            return ExecutorDied(f"{who} broke the rules of the channel and was ended: {self._fault}")
        if exit_ is None:
            return ExecutorDied(f"{who} {'is being stopped' if self._stopping else 'closed its channel'}")
        words = exit_.stderr.strip().rsplit("\n", 1)[-1]
        if not self._ready.done() and ("bad_alloc" in words or "MemoryError" in words):
            return ExecutorError(f"{who} ran out of memory: {words}", code="OUT_OF_MEMORY")
        return ExecutorDied(f"{who} ended ({exit_})" + (f": {words}" if words else ""))
