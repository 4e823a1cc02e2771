"""Requests and answers over one channel, as the agent sees them: nothing that the child says is believed.

A call's memory belongs to the child until the child answers or its exit is reaped, whatever the caller does. An answer
is matched by (generation, ticket) and checked against the lease of its call.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent.errors import DeadlineExceeded, ExecutorError, Overloaded, SlotdError, revive
from agent.executor import channel
from agent.executor.arena import Arena
from agent.executor.call import Call, Input, Reply, outputs_of
from agent.executor.channel import OVERFLOW, ChannelClosed, ChannelError, Kind, Record
from agent.model.signature import Tensor

_RECORDS_AT_ONCE = 32
"""How many answers are taken in one turn of the loop."""


class Traffic:
    """The agent's end of a channel. `on_fault` hears that the child broke the rules, `on_closed` that it hung up."""

    def __init__(
        self,
        sock: socket.socket,
        generation: int,
        arena: Arena,
        output: Arena | None,
        maps: Mapping[int, int],
        *,
        on_document: Callable[[Record, Sequence[int]], None],
        on_fault: Callable[[str], None],
        on_closed: Callable[[], None],
    ) -> None:
        """`output` is where outputs go if not into `arena`; `maps` are the other arenas that the child sees, by inode.

        `on_document` gets what comes with ticket 0: READY, or why the child is not.
        """
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._receiver = channel.Receiver(sock)
        self._generation = generation
        self._arena, self._output, self._maps = arena, output, maps
        self._arenas = [arena] if output is None else [arena, output]
        self._on_document, self._on_fault, self._on_closed = on_document, on_fault, on_closed
        self._tickets = itertools.count(1)
        self._flight: dict[int, Call] = {}
        self._queue: deque[Call] = deque()
        self._preparing: set[Call] = set()
        self._unsent: deque[tuple[int, bytes]] = deque()
        self._typical: list[int] = []
        self._pumping = False
        self._open = True
        self._refusal: Callable[[], ExecutorError] | None = None
        self._loop.add_reader(sock.fileno(), self._readable)

    def __len__(self) -> int:
        """Calls that were not answered yet, cancelled ones included."""
        return len(self._flight) + len(self._queue) + len(self._preparing)

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, inputs: Sequence[tuple[int, Input]], deadline_ns: int, reserve: Sequence[int]) -> Call:
        """See Worker.submit."""
        call = Call(self._loop, inputs, self._maps, reserve or self._typical, deadline_ns, self._forget)
        if call.measured:
            self._admit(call)
        else:
            self._preparing.add(call)
            flattening = self._loop.run_in_executor(None, call.flatten)
            flattening.add_done_callback(lambda done: self._flattened(call, done))
        return call

    def _flattened(self, call: Call, done: asyncio.Future[None]) -> None:
        self._preparing.discard(call)
        try:
            done.result()
            if self._refusal is not None:
                raise self._refusal()
            self._admit(call)
        except Exception as error:  # the caller's, whatever it is: MemoryError, Overloaded, ExecutorDied
            call.release()
            call.fail(error)

    def _admit(self, call: Call) -> None:
        output, capacity = self._output, self._arena.capacity
        if output is None and call.size + call.space > capacity:
            call.room, call.space = [], 0  # the outputs come back in a memfd of their own
        if call.size > capacity or (output is not None and call.space > output.capacity):
            call.release()
            raise Overloaded(
                f"the request needs {call.size + call.space} bytes of shared memory, there are {capacity}",
                hint="send less at once, or raise executor.arena",
            )
        if self._queue or not self._place(call):
            self._queue.append(call)

    def _place(self, call: Call) -> bool:
        """Give the call its memory and send it; False if there is no room now."""
        output = self._output
        lease = self._arena.lease(call.size if output is not None else call.size + call.space)
        if lease is None:
            self._arena.on_room = self._pump_soon
            return False
        if output is None:
            call.settle(lease, 0, lease.offset + call.size)
        else:
            pictures = output.lease(call.space)
            if pictures is None:
                lease.release()
                output.on_room = self._pump_soon
                return False
            call.pictures = pictures
            call.settle(lease, 1, pictures.offset)
        ticket = next(self._tickets)
        self._flight[ticket] = call
        data = channel.pack(
            Record(
                Kind.RUN, self._generation, ticket, call.deadline_ns, tensors=call.descriptors, reserves=call.reserves
            )
        )
        if call.heavy:
            copying = self._loop.run_in_executor(None, call.copy, self._arena.memory)
            copying.add_done_callback(lambda done: self._copied(ticket, data, done))
        else:
            call.copy(self._arena.memory)
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

    def say(self, kind: Kind) -> None:
        """A record without content, after all that waits to be sent."""
        self._send(0, channel.pack(Record(kind, self._generation)))

    def _send(self, ticket: int, data: bytes) -> None:
        if self._unsent or not self._sent(ticket, data):
            if not self._unsent and self._open:
                self._loop.add_writer(self._socket.fileno(), self._writable)
            self._unsent.append((ticket, data))

    def _sent(self, ticket: int, data: bytes) -> bool:
        """Whether that record is dealt with; False if it must wait."""
        if not self._open:
            return True
        try:
            channel.send(self._socket, data)
        except BlockingIOError:
            return False
        except ChannelClosed:
            self._on_closed()
        except OSError as error:
            self._on_fault(f"its socket takes nothing any more: {error}")
        else:
            call = self._flight.get(ticket)
            if call is not None:
                call.sent = True
        return True

    def _writable(self) -> None:
        while self._unsent:
            ticket, data = self._unsent[0]
            if not self._unsend(ticket) and not self._sent(ticket, data):
                return
            if self._unsent:
                self._unsent.popleft()
        if self._open:
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
        while self._queue and self._open:
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

    def drain(self) -> None:
        """Take what was answered before the child's end."""
        for _ in range(len(self._flight) + 1):
            if not self._take():
                return

    def _take(self) -> bool:
        """Deal with one record; False if there is none."""
        if not self._open:
            return False
        try:
            record, fds = self._receiver.receive()
        except BlockingIOError:
            return False
        except ChannelClosed:
            self._on_closed()
            return False
        except (ChannelError, OSError) as error:
            self._on_fault(str(error))
            return False
        try:
            self._heed(record, fds)
        except ChannelError as error:
            self._on_fault(str(error))
        finally:
            if fds:
                channel.close_all(fds)
        return True

    def _heed(self, record: Record, fds: Sequence[int]) -> None:
        if record.generation != self._generation:
            raise ChannelError(f"an answer of generation {record.generation}")
        ticket = record.ticket
        if ticket == 0:
            self._on_document(record, fds)
            return
        call = self._flight.get(ticket)
        if call is None or not call.sent:
            raise ChannelError(f"{record.kind.name} for ticket {ticket}, which is not in its hands")
        if record.kind is Kind.DONE:
            memories = [arena.memory for arena in self._arenas]
            outputs = outputs_of(call, record, fds, memories, self._arena.capacity)
            del self._flight[ticket]
            if isinstance(outputs, list):
                self._deliver(call, record, outputs)
            else:
                reading = self._loop.run_in_executor(None, outputs)
                reading.add_done_callback(lambda done: self._read(call, record, done))
        elif record.kind is Kind.FAILED:
            error = error_of(channel.read_document(record, fds))
            del self._flight[ticket]
            call.release()
            call.fail(error)
        else:
            raise ChannelError(f"a record of kind {record.kind.name}")
        if self._queue:
            self._pump_soon()

    def _read(self, call: Call, record: Record, done: asyncio.Future[list[Tensor]]) -> None:
        error = done.exception()
        if error is None:
            self._deliver(call, record, done.result())
            return
        call.release()
        if isinstance(error, ChannelError):
            self._on_fault(str(error))
            call.fail(self._refusal() if self._refusal is not None else error)
        else:
            call.fail(ExecutorError(f"the answer could not be read: {error}"))

    def _deliver(self, call: Call, record: Record, outputs: list[Tensor]) -> None:
        for tensor in record.tensors:
            if tensor.arena == OVERFLOW:  # what did not fit its reserve is reserved for the next by default
                most = self._arena.capacity // 8
                self._typical = [min(tensor.nbytes, most) for tensor in record.tensors]
                break
        if call.result.done():
            call.release()
            return
        lease = call.pictures or call.lease
        call.release(keep=lease)
        call.result.set_result(Reply(outputs, record, lease, self._loop))

    # --- the end ----------------------------------------------------------------------------------------------------

    def refuse(self, death: Callable[[], ExecutorError]) -> None:
        """Nothing waits for room any more; `death` makes the error for each."""
        self._refusal = death
        for call in self._queue:
            call.fail(death())
            call.release()
        self._queue.clear()

    def close(self) -> None:
        """Nothing is sent or read any more. Leases stay until `bury`. Idempotent."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._unsent.clear()

    def fail_all(self, death: Callable[[], ExecutorError]) -> None:
        """Tell all callers."""
        self.refuse(death)
        for call in (*self._flight.values(), *self._preparing):
            call.fail(death())

    def bury(self) -> None:
        """The child was reaped: it can neither read nor write any more, and all memory comes back."""
        for call in self._flight.values():
            call.release()
        self._flight.clear()


def error_of(document: dict[str, Any]) -> SlotdError:
    """What a child says went wrong; only plain words are taken from it."""
    plain: dict[str, Any] = {
        key: document[key] for key in ("code", "message", "hint", "field") if isinstance(document.get(key), str)
    }
    retry = document.get("retry_after")
    if isinstance(retry, int | float) and 0 <= retry < 86400:
        plain["retry_after"] = retry
    return revive(plain)
