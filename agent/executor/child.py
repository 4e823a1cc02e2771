"""The child's side of the channel: `serve` takes requests, checks their deadlines, and has a `Handler` answer them.

A child ends when its channel does.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from agent.errors import DeadlineExceeded, ExecutorError, SlotdError
from agent.executor import channel, sandbox
from agent.executor.arena import aligned, read, view, write
from agent.executor.channel import OVERFLOW, ChannelClosed, ChannelError, Descriptor, Kind, Record
from agent.model.signature import DType, Tensor, dtype_of
from drivers.base import DriverError

CHANNEL = 3
_MAX_MESSAGE = 4000
_TRIES = 100


class Job:
    """One request in the child. Exactly one of `answer` and `fail` must be called; inputs are good until then."""

    __slots__ = ("_child", "_placed", "_received", "_record", "_started", "inputs")

    def __init__(self, child: _Child, record: Record) -> None:
        self._child = child
        self._record = record
        self._received = self._started = time.monotonic_ns()
        self._placed: dict[int, npt.NDArray[np.generic]] = {}
        self.inputs: dict[int, Tensor] = {
            place.number: read(child.memories[place.arena], place) for place in record.tensors
        }

    @property
    def ticket(self) -> int:
        return self._record.ticket

    def start(self) -> None:
        """The computation begins now. Raises DeadlineExceeded if it is too late for that."""
        self._started = self.on_time()

    def on_time(self) -> int:
        """The monotonic clock in nanoseconds. Raises DeadlineExceeded if the deadline has passed."""
        now = time.monotonic_ns()
        if now >= self._record.deadline_ns:
            raise DeadlineExceeded("the deadline passed before the request was run")
        return now

    def room(self, index: int, dtype: DType, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
        """An array to compute output `index` into: in shared memory if it was reserved and fits."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * channel.itemsize(dtype)
        if index < len(self._record.reserves) and nbytes <= self._record.reserves[index].nbytes:
            place = self._record.reserves[index]
            array = view(self._child.memories[place.arena], dtype, shape, place.offset)
            self._placed[index] = array
            return array
        return np.empty(shape, dtype.numpy)

    def answer(self, outputs: Sequence[Tensor]) -> None:
        """Send the outputs, in the order of the model's outputs."""
        done = time.monotonic_ns()
        record = self._record
        tensors: list[Descriptor] = []
        late: list[tuple[int, Tensor]] = []
        size = 0
        for index, tensor in enumerate(outputs):
            dtype, nbytes, shape = dtype_of(tensor), tensor.nbytes, tuple(tensor.shape)
            if index < len(record.reserves) and nbytes <= record.reserves[index].nbytes:
                place = record.reserves[index]
                if self._placed.get(index) is not tensor:
                    write(self._child.memories[place.arena], place.offset, tensor)
                tensors.append(Descriptor(index, place.arena, dtype, place.offset, nbytes, shape))
            else:
                tensors.append(Descriptor(index, OVERFLOW, dtype, size, nbytes, shape))
                late.append((size, tensor))
                size += aligned(nbytes)
        fds = [_overflow(late, max(size, mmap.PAGESIZE))] if late else []
        try:
            reply = Record(
                Kind.DONE,
                record.generation,
                record.ticket,
                queue_ns=self._started - self._received,
                run_ns=done - self._started,
                tensors=tensors,
                fds=len(fds),
            )
            self._child.send(channel.pack(reply), fds)
        finally:
            channel.close_all(fds)

    def fail(self, error: BaseException) -> None:
        """Tell what went wrong."""
        self._child.fail(self._record.ticket, error)


class Handler(Protocol):
    """What a child does with requests. Everything happens in one thread."""

    @property
    def ready(self) -> dict[str, Any]:
        """The READY document."""

    @property
    def depth(self) -> int:
        """How many jobs it takes before one must end; 1 if `begin` answers before it returns."""

    def begin(self, job: Job) -> None:
        """Start a job; what it raises is the job's failure."""

    def fileno(self) -> int | None:
        """A descriptor that polls readable when `advance` has work; None if there never is any."""

    def advance(self) -> bool:
        """End at most one job that is under way; whether there may be more to do at once."""

    def pending(self) -> int:
        """How many jobs were begun and not answered."""

    def overdue(self) -> float | None:
        """Seconds until what is under way has taken too long, so that the child must end; None if nothing is."""

    def close(self) -> None:
        """Let go of everything."""


class OneByOne:
    """The rest of a Handler whose `begin` answers before it returns."""

    @property
    def depth(self) -> int:
        return 1

    def fileno(self) -> int | None:
        return None

    def advance(self) -> bool:
        return False

    def pending(self) -> int:
        return 0

    def overdue(self) -> float | None:
        return None

    def close(self) -> None:
        pass


class _Child:
    """The child's end of the channel."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._receiver = channel.Receiver(sock)
        self.generation = 0
        self.memories: list[mmap.mmap] = []

    def greet(self) -> dict[str, Any]:
        """What the agent says first, once the shared memory is mapped: `hello`, `memory` in bytes, `grants`."""
        record, fds = self._receiver.receive()
        try:
            if record.kind is not Kind.HELLO:
                raise ChannelError(f"{record.kind.name} in the place of HELLO")
            self.generation = record.generation
            document = channel.read_document(record, fds)
            for fd, arena in zip(fds, document["arenas"], strict=False):
                protection = mmap.PROT_READ | (mmap.PROT_WRITE if arena["writable"] else 0)
                self.memories.append(mmap.mmap(fd, arena["bytes"], prot=protection))
        finally:
            channel.close_all(fds)
        return document

    def receive(self) -> Job | None:
        """The next request; None when the child is to end."""
        while True:
            record, fds = self._receiver.receive()
            channel.close_all(fds)
            if record.kind is Kind.STOP:
                return None
            if record.kind is not Kind.RUN:
                raise ChannelError(f"{record.kind.name} in the place of RUN")
            try:
                return Job(self, record)
            except Exception as error:  # a request that does not even fit into memory ends alone
                self.fail(record.ticket, error)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Waits while the agent does not read."""
        for tried in range(_TRIES):
            try:
                channel.send(self._sock, data, fds)
                return
            except OSError:  # ETOOMANYREFS, ENOBUFS: other children's descriptors are under way
                if tried == _TRIES - 1:
                    raise
                time.sleep(0.01)

    def tell(self, kind: Kind, ticket: int, document: dict[str, Any]) -> None:
        """A record with a document."""
        data, fds = channel.pack_document(Record(kind, self.generation, ticket), document)
        try:
            self.send(data, fds)
        finally:
            channel.close_all(fds)

    def fail(self, ticket: int, error: BaseException) -> None:
        """FAILED with what went wrong."""
        self.tell(Kind.FAILED, ticket, explain(error))

    def fileno(self) -> int:
        return self._sock.fileno()


def explain(error: BaseException) -> dict[str, Any]:
    """Any exception as an error document; what nobody foresaw also goes to the log, with its trace."""
    if isinstance(error, DriverError):
        error = SlotdError(error.message, hint=error.hint, code=error.code)
    elif isinstance(error, MemoryError):
        error = ExecutorError(
            "there is not enough memory for it",
            code="OUT_OF_MEMORY",
            hint="executor.memory limits what a child may use",
        )
    elif not isinstance(error, SlotdError):
        traceback.print_exception(error)
        error = ExecutorError(f"{type(error).__name__}: {error}")
    document = error.as_dict()
    return {key: value[:_MAX_MESSAGE] if isinstance(value, str) else value for key, value in document.items()}


def serve(
    load: Callable[[dict[str, Any]], Handler],
    *,
    bring: Callable[[dict[str, Any]], None] = lambda _: None,
    sock: socket.socket | None = None,
) -> int:
    """A child's whole life; the exit code. `load` makes the handler from the agent's hello, or raises.

    Without `sock`, the channel is standard input, and the process is confined before `load` is called. `bring` is
    called before that, with the hello, to import what `load` will need; it reads nothing else and starts no thread.
    """
    confined = sock is None
    if sock is None:
        sandbox.isolate_descriptors(CHANNEL)
        sock = socket.socket(fileno=CHANNEL)
    child = _Child(sock)
    try:
        document = child.greet()
        hello, confinement = document["hello"], {}
        try:
            bring(hello)
            if confined:
                limits, grants = sandbox.Limits(document["memory"]), sandbox.Grants.parse(document["grants"])
                confinement = {"sandbox": sandbox.enter(limits, grants)}
            handler = load(hello)
        except Exception as error:  # whatever it is, the agent must hear why this child is useless
            child.fail(0, error)
            return 1
        try:
            child.tell(Kind.READY, 0, {**handler.ready, **confinement})
            _work(child, handler)
        finally:
            handler.close()
    except ChannelClosed:
        return 0  # the agent has gone, or wants nothing more
    return 0


def _work(child: _Child, handler: Handler) -> None:
    other = handler.fileno()
    if other is None:
        while (job := child.receive()) is not None:
            _begin(handler, job)
        return
    both = select.poll()
    both.register(child.fileno(), select.POLLIN)
    both.register(other, select.POLLIN)
    busy = select.poll()
    busy.register(other, select.POLLIN)
    more, stopping = False, False
    while not stopping or handler.pending():
        full = stopping or handler.pending() >= handler.depth
        left = 0.0 if more else handler.overdue()
        events = dict((busy if full else both).poll(None if left is None else max(0.0, left * 1000)))
        if not events and not more and left is not None and left <= 0:
            raise TimeoutError("the slot did not answer in the time that one run may take")
        # The device first gets its next piece of work, then what it has finished is seen to.
        if child.fileno() in events:
            job = child.receive()
            if job is None:
                stopping = True
            else:
                _begin(handler, job)
        more = handler.advance() if more or other in events else False


def _begin(handler: Handler, job: Job) -> None:
    try:
        handler.begin(job)
    except (ChannelClosed, ChannelError):
        raise
    except Exception as error:  # it is this job's failure; the child goes on
        job.fail(error)


def _overflow(tensors: Sequence[tuple[int, Tensor]], size: int) -> int:
    """A sealed memfd of its own for outputs that were not expected to be so large."""
    fd = channel.sealed_memfd("slotd-outputs", size)
    try:
        with mmap.mmap(fd, size) as memory:
            for offset, tensor in tensors:
                write(memory, offset, tensor)
    except BaseException:
        os.close(fd)
        raise
    return fd
