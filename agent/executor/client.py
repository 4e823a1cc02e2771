"""The agent's side of a child process: requests go in, answers come out, and nothing that the child says is believed.

A call's memory belongs to the child until the child answers or its exit is reaped, whatever the caller does. An answer
is matched by (generation, ticket) and checked against the lease of its call; a child that breaks the rules is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import structlog

from agent.errors import (
    DeadlineExceeded,
    ExecutorDied,
    ExecutorError,
    InvalidInput,
    Overloaded,
    SlotdError,
    SlotError,
    revive,
)
from agent.executor import channel
from agent.executor.arena import ALIGN, Arena, DecodedMemory, Region
from agent.executor.call import Call, Input, Part, Reply, outputs_of
from agent.executor.channel import OVERFLOW, ChannelClosed, ChannelError, Kind, Record
from agent.executor.launch import Launch, launch_decoder, launch_model
from agent.executor.process import Exit, Process

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

_RECORDS_AT_ONCE = 32
"""How many answers are taken in one turn of the loop."""
_REAP = 5.0
"""Seconds to wait for a killed child's exit before going on without it (it is still reaped when it comes)."""
_LATE_EXIT = 1.0
"""Seconds from the end of a child's socket to telling its callers, if the exit does not come first."""
_generations = itertools.count(1)


class Worker:
    """One child process. Made by `start`; belongs to the loop that started it."""

    def __init__(self, launch: Launch) -> None:
        self.generation = next(_generations)
        self.role = launch.role
        self.ready: Mapping[str, Any] = MappingProxyType({})
        self.alive = False
        self.arena = Arena(launch.arena)
        self._loop = asyncio.get_running_loop()
        self._output = launch.output
        self._arenas = [self.arena] if launch.output is None else [self.arena, launch.output]
        self._maps = {os.fstat(fd).st_ino: number for number, fd in enumerate(launch.maps, len(self._arenas))}
        self._gone: asyncio.Future[Exit] = self._loop.create_future()
        self._ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._tickets = itertools.count(1)
        self._flight: dict[int, Call] = {}
        self._queue: deque[Call] = deque()
        self._preparing: set[Call] = set()
        self._unsent: deque[tuple[int, bytes]] = deque()
        self._typical: list[int] = []
        self._pumping = False
        self._stopping = False
        self._fault: str | None = None
        self._socket, theirs = channel.pair()
        self._receiver = channel.Receiver(self._socket)
        try:
            self._process = Process(launch.argv, theirs, role=launch.role, idle=launch.idle, on_exit=self._reaped)
        except BaseException:
            self._socket.close()
            self.arena.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._loop.add_reader(self._socket.fileno(), self._readable)

    @classmethod
    async def start(cls, launch: Launch, *, timeout: float) -> Worker:
        """A child that is ready. The child is reaped on failure and on cancellation.

        Raises ExecutorError (what the child reports: MODEL_INVALID, NO_RUNTIME, OUT_OF_MEMORY …, or LOAD_TIMEOUT), or
        ExecutorDied with its last words.
        """
        try:
            worker = cls(launch)
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
        return len(self._flight) + len(self._queue) + len(self._preparing)

    def normal_priority(self) -> None:
        """From now on it runs like everybody else (it was started with `idle`)."""
        self._process.schedule(os.SCHED_OTHER)

    def signal(self, number: int) -> None:
        """Send the child a signal."""
        self._process.signal(number)

    # --- requests ---------------------------------------------------------------------------------------------------

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
        call = Call(
            self._loop.create_future(),
            [Part(number, tensor, self._maps) for number, tensor in inputs],
            [tensor.lease for _, tensor in inputs if isinstance(tensor, Region)],
            [max(0, nbytes + ALIGN - 1) & -ALIGN for nbytes in (reserve or self._typical)],
            deadline_ns,
            self._forget,
        )
        if not call.measure():
            self._preparing.add(call)
            flattening = self._loop.run_in_executor(None, call.flatten)
            flattening.add_done_callback(lambda done: self._flattened(call, done))
            return call
        try:
            self._admit(call)
        except Overloaded:
            call.release()
            raise
        return call

    def _flattened(self, call: Call, done: asyncio.Future[None]) -> None:
        self._preparing.discard(call)
        try:
            done.result()
            self._require_alive()
            call.measure()
            self._admit(call)
        except Exception as error:  # the caller's, whatever it is: MemoryError, Overloaded, ExecutorDied
            call.release()
            call.fail(error)

    def _require_alive(self) -> None:
        if not self.alive:
            raise self._death()

    def _admit(self, call: Call) -> None:
        output, capacity = self._output, self.arena.capacity
        if output is None and call.size + call.space > capacity:
            call.room, call.space = [], 0  # the outputs come back in a memfd of their own
        if call.size > capacity or (output is not None and call.space > output.capacity):
            raise Overloaded(
                f"the request needs {call.size + call.space} bytes of shared memory, there are {capacity}",
                hint="send less at once, or raise executor.arena",
            )
        if self._queue or not self._place(call):
            self._queue.append(call)

    def _place(self, call: Call) -> bool:
        """Give the call its memory and send it; False if there is no room now."""
        output = self._output
        lease = self.arena.lease(call.size if output is not None else call.size + call.space)
        if lease is None:
            self.arena.on_room = self._pump_soon
            return False
        number, offset = 0, lease.offset + call.size
        if output is not None:
            call.pictures = output.lease(call.space)
            if call.pictures is None:
                lease.release()
                output.on_room = self._pump_soon
                return False
            number, offset = 1, call.pictures.offset
        ticket = next(self._tickets)
        self._flight[ticket] = call
        tensors = call.settle(lease, number, offset)
        data = channel.pack(
            Record(Kind.RUN, self.generation, ticket, call.deadline_ns, tensors=tensors, reserves=call.reserves)
        )
        if call.heavy:
            copying = self._loop.run_in_executor(None, call.copy, self.arena.memory)
            copying.add_done_callback(lambda done: self._copied(ticket, data, done))
        else:
            call.copy(self.arena.memory)
            self._send(ticket, data)
        return True

    def _copied(self, ticket: int, data: bytes, done: asyncio.Future[None]) -> None:
        error = done.exception()
        call = self._flight.get(ticket)
        if call is None:
            return  # the child was reaped meanwhile
        if error is not None:
            del self._flight[ticket]
            call.release()
            call.fail(ExecutorError(f"the request could not be copied: {error}"))
        elif not self._unsend(ticket):
            self._send(ticket, data)

    def _unsend(self, ticket: int) -> bool:
        """Drop a call that was cancelled before it was sent."""
        call = self._flight.get(ticket)
        if call is None or not call.result.done():
            return False
        del self._flight[ticket]
        call.release()
        self._pump_soon()
        return True

    def _send(self, ticket: int, data: bytes) -> None:
        if self._unsent or not self._sent(ticket, data):
            if not self._unsent and self._socket.fileno() >= 0:
                self._loop.add_writer(self._socket.fileno(), self._writable)
            self._unsent.append((ticket, data))

    def _sent(self, ticket: int, data: bytes) -> bool:
        """Whether that record is dealt with."""
        call = self._flight.get(ticket)
        try:
            if call is not None:
                call.sent = True
            if self._socket.fileno() >= 0:
                channel.send(self._socket, data)
        except BlockingIOError:
            if call is not None:
                call.sent = False
            return False
        except ChannelClosed:
            self._hang_up()
        except OSError as error:
            self._violated(f"its socket takes nothing any more: {error}")
        return True

    def _writable(self) -> None:
        while self._unsent:
            ticket, data = self._unsent[0]
            if not self._unsend(ticket) and not self._sent(ticket, data):
                return
            if self._unsent:
                self._unsent.popleft()
        if self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket.fileno())

    def _forget(self, call: Call) -> None:
        """A cancelled call that waits for room needs none any more."""
        if call.lease is None and call not in self._preparing:
            try:
                self._queue.remove(call)
            except ValueError:
                return
            call.release()
            self._pump_soon()

    def _pump_soon(self) -> None:
        if self._queue and not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        while self._queue and self.alive:
            call = self._queue[0]
            if not call.result.done():
                if call.deadline_ns <= time.monotonic_ns():
                    call.fail(DeadlineExceeded("the deadline passed while the request waited for shared memory"))
                elif self._place(call):
                    self._queue.popleft()
                    continue
                else:
                    return
            self._queue.popleft()
            call.release()

    # --- answers ----------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        for _ in range(_RECORDS_AT_ONCE):
            if not self._take() or not self._flight:
                return

    def _take(self) -> bool:
        """Deal with one record; False if there is none."""
        if self._socket.fileno() < 0:
            return False
        try:
            record, fds = self._receiver.receive()
        except BlockingIOError:
            return False
        except ChannelClosed:
            self._hang_up()
            return False
        except (ChannelError, OSError) as error:
            self._violated(str(error))
            return False
        try:
            self._heed(record, fds)
        except ChannelError as error:
            self._violated(str(error))
        finally:
            channel.close_all(fds)
        return True

    def _heed(self, record: Record, fds: Sequence[int]) -> None:
        if record.generation != self.generation:
            raise ChannelError(f"an answer of generation {record.generation}")
        if record.ticket == 0 and record.kind in (Kind.READY, Kind.FAILED) and not self._ready.done():
            document = channel.read_document(record, fds)
            if record.kind is Kind.READY:
                self._ready.set_result(document)
            else:
                self._ready.set_exception(_error(document))
            return
        call = self._flight.get(record.ticket)
        if call is None or not call.sent:
            raise ChannelError(f"{record.kind.name} for ticket {record.ticket}, which is not in its hands")
        if record.kind is Kind.FAILED:
            error = _error(channel.read_document(record, fds))
            self._answered(record.ticket, call)
            call.release()
            call.fail(error)
        elif record.kind is Kind.DONE:
            memories = [arena.memory for arena in self._arenas]
            outputs = outputs_of(call, record, fds, memories, self.arena.capacity)
            self._answered(record.ticket, call)
            if isinstance(outputs, list):
                self._deliver(call, record, outputs)
            else:
                reading = self._loop.run_in_executor(None, outputs)
                reading.add_done_callback(lambda done: self._read(call, record, done))
        else:
            raise ChannelError(f"a record of kind {record.kind.name}")

    def _answered(self, ticket: int, call: Call) -> None:
        del self._flight[ticket]
        self._pump_soon()

    def _read(self, call: Call, record: Record, done: asyncio.Future[list[Any]]) -> None:
        error = done.exception()
        if error is None:
            self._deliver(call, record, done.result())
            return
        call.release()
        if isinstance(error, ChannelError):
            self._violated(str(error))
            call.fail(self._death())
        else:
            call.fail(ExecutorError(f"the answer could not be read: {error}"))

    def _deliver(self, call: Call, record: Record, outputs: list[Any]) -> None:
        lease = call.pictures or call.lease
        if len(call.room) < len(record.tensors) or any(tensor.arena == OVERFLOW for tensor in record.tensors):
            self._learn(record)
        if call.result.done():
            call.release()
            return
        call.release(keep=lease)
        timings = {"queue_ns": record.queue_ns, "run_ns": record.run_ns}
        call.result.set_result(Reply(outputs, timings, list(record.tensors), lease, self._loop))

    def _learn(self, record: Record) -> None:
        """What an answer took that did not fit its reserve is reserved for the next by default."""
        most = self.arena.capacity // 8
        self._typical = [min(tensor.nbytes, most) for tensor in record.tensors]

    # --- the beginning and the end ----------------------------------------------------------------------------------

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

    async def stop(self, *, grace: float) -> None:
        """End the child: ask, SIGTERM, SIGKILL, each with `grace` seconds; what it has in hand it may finish.

        Returns when its exit was reaped. Raises SlotError DEVICE_STUCK if it will not die.
        """
        self.alive = False
        self._stopping = True
        self._drop_queue(ExecutorDied(f"the {self.role} child {self.pid} is being stopped"))
        self._send(0, channel.pack(Record(Kind.STOP, self.generation)))
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
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
        self._unsent.clear()
        if self._process.exit is None:
            if not self._stopping or self._fault is not None:
                self._process.signal(signal.SIGKILL)  # else it is on its way out, and `stop` sees to it
            self._loop.call_later(_LATE_EXIT, self._fail_all)

    def _reaped(self) -> None:
        """The exit is known. What the child had answered before still counts."""
        for _ in range(len(self._flight) + 1):
            if not self._take():
                break
        self._hang_up()
        self._fail_all()
        for call in self._flight.values():
            call.release()
        self._flight.clear()
        self.arena.close()
        exit_ = self._process.exit
        assert exit_ is not None
        log.info("child_ended", role=self.role, pid=self.pid, generation=self.generation, exit=str(exit_))
        if not self._gone.done():
            self._gone.set_result(exit_)

    def _fail_all(self) -> None:
        if not self._ready.done():
            self._ready.set_exception(self._death())
            self._ready.exception()
        for call in self._flight.values():
            call.fail(self._death())
        self._drop_queue(self._death())

    def _drop_queue(self, error: ExecutorError) -> None:
        for call in self._queue:
            call.fail(error)
            call.release()
        self._queue.clear()

    def _death(self) -> ExecutorError:
        exit_ = self._process.exit
        who = f"the {self.role} child {self.pid}"
        if self._fault is not None:
            return ExecutorDied(f"{who} broke the rules of the channel and was ended: {self._fault}")
        if exit_ is None:
            return ExecutorDied(f"{who} closed its channel")
        words = exit_.stderr.strip().rsplit("\n", 1)[-1]
        if not self._ready.done() and ("bad_alloc" in words or "MemoryError" in words):
            return ExecutorError(f"{who} ran out of memory: {words}", code="OUT_OF_MEMORY")
        return ExecutorDied(f"{who} ended ({exit_})" + (f": {words}" if words else ""))


def _error(document: dict[str, Any]) -> SlotdError:
    """What a child says went wrong; only plain words are taken from it."""
    plain: dict[str, Any] = {
        key: document[key] for key in ("code", "message", "hint", "field") if isinstance(document.get(key), str)
    }
    retry = document.get("retry_after")
    if isinstance(retry, int | float) and 0 <= retry < 86400:
        plain["retry_after"] = retry
    return revive(plain)
