"""Predict, free of any wire format: check, queue, prepare, compute, survive what breaks on the way.

A request is bound to one model when it is handed to an executor. What happens then:
- no answer from the slot in time, or the device fails: the bridge computes it too, the first answer wins;
- the executor ends with it in hand: it is tried again, alone, in a disposable executor (`trials`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import structlog

from agent.config import ServingConfig
from agent.errors import (
    DeadlineExceeded,
    ExecutorDied,
    InvalidInput,
    Poison,
    SlotdError,
    SlotError,
    Unavailable,
)
from agent.executor.client import Call, Reply
from agent.executor.seat import Prepared, Seat
from agent.model.signature import Tensor
from agent.serving.binding import OUR_FIELDS, ModelFields, bind_inputs, bind_outputs, check_model
from agent.serving.histogram import Histogram
from agent.slot.admission import Admission, Latencies, Place, Ticket
from agent.slot.arbiter import Answerer, Arbiter, HostState, On, Refuse, Wait

log = structlog.get_logger(__name__)

HANG_FLOOR = 0.05
HANG_FACTOR = 4.0
HANG_KNOWN = 32
"""Answers after which the slot's own latency is known."""
HANG_CONFIRM = 0.25
"""Seconds that two silent requests are given before the slot is suspect: a busy CPU is silent for a moment, too."""
TICK = 0.001
"""Seconds by which a timer of the loop may be early."""
HANG_UNKNOWN = 1.0
"""Seconds without an answer that count as a hang before the slot's own latency is known."""


@dataclass(slots=True)
class Request:
    """What an adapter hands in. `timeout` is in seconds from now, None for the longest allowed."""

    inputs: Mapping[str, Tensor]
    model: str = ""
    version: int | None = None
    outputs: tuple[str, ...] = ()
    timeout: float | None = None
    priority: int = 0
    size: int = 0
    fields: ModelFields = OUR_FIELDS


class Answer:
    """The outputs, views into shared memory until `release`; use it as a context manager."""

    __slots__ = ("_replies", "digest", "name", "outputs", "served_by", "version")

    def __init__(self, seat: Seat, reply: Reply, served_by: str, outputs: dict[str, Tensor]) -> None:
        self.name = seat.model.name
        self.version = seat.model.version
        self.digest = seat.model.digest
        self.served_by = served_by
        self.outputs = outputs
        self._replies = reply

    def release(self) -> None:
        """Give the memory back. The outputs must not be used afterwards."""
        self.outputs = {}
        self._replies.release()

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Retrier(Protocol):
    """What runs a request again whose executor ended (see trials)."""

    async def known(self, digest: str, inputs: Mapping[str, Tensor]) -> SlotdError | None:
        """The error for a request that is known to end every executor of a model; inputs by the model's names."""

    async def retry(
        self, seat: Seat, inputs: Mapping[str, Tensor], prepared: Prepared | None, deadline: float
    ) -> tuple[Seat, Reply]:
        """Its answer from a disposable executor; releases `prepared`. Raises Poison, DeadlineExceeded or what the
        executor said."""


@dataclass
class Counters:
    """Since the start of the agent."""

    requests: int = 0
    by_slot: int = 0
    by_bridge: int = 0
    failed: int = 0
    refused: int = 0
    invalid: int = 0
    cancelled: int = 0
    hedged: int = 0
    retried: int = 0


@dataclass(frozen=True, slots=True)
class _Bound:
    """What a request is to a model: its inputs by the model's names, the model's outputs by the client's."""

    seat: Seat
    inputs: dict[str, Tensor]
    outputs: dict[str, str]


@dataclass(frozen=True)
class Trouble:
    """Something that speaks against an executor. `kind` is slot (it hangs, its device fails) or internal."""

    kind: str
    key: int
    digest: str
    error: SlotdError


@dataclass
class Dataplane:
    """Answers requests from the executors that are seated; the arbiter says from which."""

    arbiter: Arbiter
    admission: Admission
    config: ServingConfig
    retrier: Retrier | None = None
    clock: Callable[[], float] = time.monotonic
    seats: dict[int, Seat] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    latencies: Latencies = field(default_factory=lambda: Latencies(2048))
    times: Histogram = field(default_factory=Histogram)
    _waiters: dict[Ticket, asyncio.Future[Place]] = field(default_factory=dict)
    _listeners: list[Callable[[], None]] = field(default_factory=list)
    _troubles: list[Callable[[Trouble], None]] = field(default_factory=list)
    _silent: dict[int, set[Call]] = field(default_factory=dict)
    _faults: dict[int, int] = field(default_factory=dict)
    _last: object = None
    _hold: asyncio.TimerHandle | None = None
    _arrivals: float = 0.0
    _arrived: float = 0.0

    def reconfigure(self, config: ServingConfig) -> None:
        """Another configuration is in force, for requests from now on."""
        self.config = config
        self.admission.max_queue = config.max_queue
        self.admission.max_wait = config.max_wait

    # --- for those who seat executors ---------------------------------------------------------------------------------

    def seat(self, seat: Seat, *, on: On, service: float) -> None:
        """An executor may be given requests when the arbiter says so. `service` is its seconds for one request."""
        self.seats[seat.key] = seat
        self.admission.add(Place(seat.key, seat.model.digest, on, seat.window, service))

    def unseat(self, key: int) -> None:
        """No more requests for it; those in its hands end as they end."""
        self.seats.pop(key, None)
        self.admission.remove(key)
        self._silent.pop(key, None)
        self._faults.pop(key, None)
        self.pump()

    def busy(self, key: int) -> int:
        """Requests in an executor's hands."""
        place = self.admission.places.get(key)
        return place.busy if place else 0

    def load(self) -> float:
        """Requests for each second, lately."""
        idle = self.clock() - self._arrived
        return self._arrivals if idle < 1 else self._arrivals / (1 + idle)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Called when who answers has changed."""
        self._listeners.append(callback)

    def on_trouble(self, callback: Callable[[Trouble], None]) -> Callable[[], None]:
        """Called for each trouble; returns what ends that."""
        self._troubles.append(callback)
        return lambda: self._troubles.remove(callback)

    def changed(self) -> None:
        """The arbiter's state has changed: serve, shed and tell accordingly."""
        answerer = self.arbiter.answerer()
        told = (type(answerer), answerer if isinstance(answerer, Answerer) else None)
        if told != self._last:
            self._last = told
            self._shed(answerer)
            for callback in self._listeners:
                callback()
        self.pump()

    def _shed(self, answerer: Answerer | Wait | Refuse) -> None:
        for ticket, error in self.admission.overdue(self.clock(), answerer):
            waiter = self._waiters.get(ticket)
            if waiter is not None and not waiter.done():
                waiter.set_exception(error)

    # --- what adapters ask --------------------------------------------------------------------------------------------

    def can_answer(self) -> bool:
        """Whether a request that comes now can be answered."""
        return not self.arbiter.stopping and not isinstance(self.arbiter.answerer(), Refuse)

    def slot_answers(self) -> bool:
        """Whether it would be answered by the slot."""
        return not self.arbiter.stopping and self.arbiter.host is HostState.SLOT

    def served(self) -> Seat | None:
        """An executor of the model that answers."""
        digest = self.arbiter.serving
        return next((seat for seat in self.seats.values() if seat.model.digest == digest), None)

    async def predict(self, request: Request) -> Answer:
        """The answer to one request. Raises SlotdError; a cancelled call leaves nothing behind."""
        self.counters.requests += 1
        started = self._arrive()
        try:
            answer = await self._predict(request, started)
        except asyncio.CancelledError:
            self.counters.cancelled += 1
            raise
        except InvalidInput:
            self.counters.invalid += 1
            raise
        except SlotdError as error:
            if error.grpc in ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "NOT_FOUND"):
                self.counters.refused += 1
            else:
                self.counters.failed += 1
            raise
        if answer.served_by == On.SLOT.value:
            self.counters.by_slot += 1
        else:
            self.counters.by_bridge += 1
        took = self.clock() - started
        self.latencies.add(took)
        self.times.add(took)
        return answer

    # --- the way of one request ---------------------------------------------------------------------------------------

    async def _predict(self, request: Request, now: float) -> Answer:
        timeout = (
            self.config.max_deadline if request.timeout is None else min(request.timeout, self.config.max_deadline)
        )
        if timeout <= 0:
            raise DeadlineExceeded("the deadline was over when the request came")
        deadline = now + timeout
        answerer = self.arbiter.answerer()
        bound: _Bound | None = None
        if isinstance(answerer, Answerer) and answerer.key in self.seats:
            bound = await self._checked(request, self.seats[answerer.key])
        while True:
            answerer = self.arbiter.answerer()
            ticket = self.admission.admit(now, deadline, request.priority, answerer)
            if ticket is not self.admission.queue[-1]:
                self._shed(answerer)
            answer = await self._compute(request, bound, await self._turn(ticket), deadline)
            if answer is not None:
                return answer
            # Its executor was taken away, which is no fault of the request's: from the start, in the same time.
            now = self.clock()
            if now >= deadline:
                raise DeadlineExceeded("the deadline passed during a swap")

    async def _turn(self, ticket: Ticket) -> Place:
        """Waits for an executor to be free. The place that comes back is counted busy."""
        waiter: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._waiters[ticket] = waiter
        try:
            self.pump()
            if not waiter.done():
                await _done(waiter, ticket.deadline - self.clock())
            if not waiter.done():
                raise DeadlineExceeded("the deadline passed while the request waited; it was not run")
            return waiter.result()
        except BaseException:
            self.admission.withdraw(ticket)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._ended(waiter.result(), None)
            raise
        finally:
            del self._waiters[ticket]

    async def _compute(self, request: Request, bound: _Bound | None, place: Place, deadline: float) -> Answer | None:
        """None if the executor was taken away from it. Owns one unit of `place.busy`, and gives it back when the
        executor is done with it. `bound` is what the request was found to be before it waited."""
        seat = self.seats.get(place.key)
        if seat is None:  # it ended between the hand-over and now
            self._ended(place, None)
            return None
        owned = True
        prepared: Prepared | None = None
        try:
            bound = await self._checked(request, seat, bound)
            inputs = bound.inputs
            try:
                prepared = await seat.prepare(inputs, _ns(deadline))
                started = self.clock()
                call = self._submit(seat, prepared, deadline)
                if call is None:
                    return None
                owned = False
                call.ended.add_done_callback(lambda _: self._ended(place, self._latency(call, started)))
                served, reply = await self._race(call, seat, place, prepared, deadline)
            except ExecutorDied:
                if seat.retired:
                    return None
                if self.retrier is None:
                    raise
                if owned:
                    owned = False
                    self._ended(place, None)
                self.counters.retried += 1
                handed, prepared = prepared, None
                served, reply = await self.retrier.retry(seat, inputs, handed, deadline)
        except SlotdError as error:
            # What one request did speaks against that request alone.
            if error.grpc == "INTERNAL" and not isinstance(error, Poison):
                self._trouble("internal", seat, error)
            raise
        finally:
            if prepared is not None:
                prepared.release()
            if owned:
                self._ended(place, None)
        outputs = {name: reply.outputs[served.outputs.index(own)] for name, own in bound.outputs.items()}
        return Answer(served, reply, served.on, outputs)

    def _submit(self, seat: Seat, prepared: Prepared, deadline: float) -> Call | None:
        """None if the executor has ended: it has not seen this request, which is therefore under no suspicion."""
        try:
            return seat.submit(prepared, _ns(deadline))
        except ExecutorDied:
            self.unseat(seat.key)
            return None

    async def _race(
        self, call: Call, seat: Seat, place: Place, prepared: Prepared, deadline: float
    ) -> tuple[Seat, Reply]:
        """The first answer: of the slot, or of the bridge if the slot is silent for too long or fails."""
        rival: tuple[Seat, Call] | None = None
        suspect_at: float | None = None
        try:
            if seat.on == On.SLOT.value:
                patience = _patience(place)
                suspect_at = self.clock() + patience
                await _done(call.result, min(patience, deadline - self.clock()))
                if self._device_failed(call, seat) or (
                    not call.result.done() and self.clock() >= suspect_at - TICK
                ):  # what cannot wait so long is not computed twice
                    rival = self._hedge(seat, prepared, deadline)
            if rival is None:
                await _done(call.result, deadline - self.clock())
                if call.result.done():
                    return seat, call.result.result()
                raise DeadlineExceeded("the deadline passed while the model ran")
            return await self._first(call, seat, *rival, deadline)
        finally:  # also if it was cancelled: the client's own timer may be quicker than ours
            if suspect_at is not None and not call.ended.done():
                self._await_end(call, seat, suspect_at)
            call.cancel()
            if rival is not None:
                rival[1].cancel()

    async def _first(self, call: Call, seat: Seat, bridge: Seat, rival: Call, deadline: float) -> tuple[Seat, Reply]:
        waiting = {call.result, rival.result}
        while waiting and (left := deadline - self.clock()) > 0:
            done, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if call.result in done and call.result.exception() is None:
                return seat, call.result.result()
            if rival.result in done:
                error = rival.result.exception()
                # An answer, the model's own refusal, or a death, which makes it a suspect: the slot may be silent for
                # ever. What else is wrong with the bridge says nothing about the slot's answer.
                if error is None or isinstance(error, InvalidInput | ExecutorDied):
                    return bridge, rival.result.result()
        if waiting:
            raise DeadlineExceeded("the deadline passed while the model ran")
        return seat, call.result.result()

    def _device_failed(self, call: Call, seat: Seat) -> bool:
        """Whether the slot has answered with a fault of its own; two in a row make it suspect."""
        error = call.result.exception() if call.result.done() else None
        if not isinstance(error, SlotError):
            if call.result.done() and error is None:
                self._faults.pop(seat.key, None)
            return False
        if self.seats.get(seat.key) is seat:
            self._faults[seat.key] = self._faults.get(seat.key, 0) + 1
            if self._faults[seat.key] >= 2:
                self._trouble("slot", seat, error)
        return True

    def _hedge(self, seat: Seat, prepared: Prepared, deadline: float) -> tuple[Seat, Call] | None:
        """The same request on the bridge of the same model, if there is time for that."""
        place = self.admission.bridge_of(seat.model.digest)
        if place is None or place.key not in self.seats:
            return None
        if self.clock() + (place.latencies.quantile(0.99) or place.service) >= deadline:
            return None
        bridge = self.seats[place.key]
        try:
            call = bridge.submit(prepared, _ns(deadline))
        except SlotdError as error:
            log.warning("hedge_failed", error=str(error))
            return None
        self.counters.hedged += 1
        started = self.clock()
        place.started(started)
        call.ended.add_done_callback(lambda _: self._ended(place, self._latency(call, started)))
        return bridge, call

    def _await_end(self, call: Call, seat: Seat, suspect_at: float) -> None:
        """Others have answered, or the deadline has come. The slot hangs only if it stays silent until `suspect_at`: a
        client with a short deadline must not bring a healthy slot into doubt."""

        def look() -> None:
            if not call.ended.done() and self.seats.get(seat.key) is seat:
                self._hung(seat, call)

        left = suspect_at - self.clock()
        if left <= 0:
            look()
        else:
            asyncio.get_running_loop().call_later(left, look)

    def _hung(self, seat: Seat, call: Call) -> None:
        """The slot is silent; two requests that stay unanswered make it suspect."""
        silent = self._silent.setdefault(seat.key, set())
        silent.add(call)
        call.ended.add_done_callback(lambda _: silent.discard(call))
        if len(silent) >= 2:
            asyncio.get_running_loop().call_later(HANG_CONFIRM, self._confirm_hang, seat, frozenset(silent))

    def _confirm_hang(self, seat: Seat, silent: frozenset[Call]) -> None:
        if self.seats.get(seat.key) is seat and len(silent & self._silent.get(seat.key, set())) >= 2:
            error = Unavailable("the slot left two requests in a row unanswered", code="DEVICE_HUNG")
            self._trouble("slot", seat, error)

    def _trouble(self, kind: str, seat: Seat, error: SlotdError) -> None:
        for callback in tuple(self._troubles):
            callback(Trouble(kind, seat.key, seat.model.digest, error))

    async def _checked(self, request: Request, seat: Seat, before: _Bound | None = None) -> _Bound:
        """Its tensors by the model's names. Raises NotFound, InvalidInput, Poison.

        What was found `before` holds for the same model; but what others sent meanwhile may have made it poison.
        """
        same = before is not None and before.seat.model is seat.model and before.seat.signature is seat.signature
        bound = before if before is not None and same else self._bind(request, seat)
        if self.retrier is not None:
            known = await self.retrier.known(seat.model.digest, bound.inputs)
            if known is not None:
                raise known
        return bound

    def _bind(self, request: Request, seat: Seat) -> _Bound:
        check_model(seat.model, request.model, request.version, request.fields)
        outputs = bind_outputs(seat.signature, request.outputs)
        return _Bound(seat, bind_inputs(seat.signature, request.inputs), outputs)

    # --- turns --------------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Hand over what may be handed over."""
        now = self.clock()
        answerer: Answerer | Wait | Refuse = self.arbiter.answerer()
        for ticket, place in self.admission.take(now, answerer):
            waiter = self._waiters.get(ticket)
            if waiter is None or waiter.done():
                self._ended(place, None)
                continue
            waiter.set_result(place)
        if self.admission.queue and self._hold is None and self.admission.held(now):
            self._hold = asyncio.get_running_loop().call_later(0.05, self._held)

    def _held(self) -> None:
        self._hold = None
        self.pump()

    def _ended(self, place: Place, latency: float | None) -> None:
        place.ended(self.clock(), latency)
        if self.admission.queue:
            self.pump()

    def _latency(self, call: Call, started: float) -> float | None:
        good = call.result.done() and not call.result.cancelled() and call.result.exception() is None
        return self.clock() - started if good else None

    def _arrive(self) -> float:
        now = self.clock()
        gap = now - self._arrived
        if self._arrived and gap > 0:
            weight = min(1.0, gap)  # an average over about a second
            self._arrivals += (1 / gap - self._arrivals) * weight
        self._arrived = now
        return now


async def _done(future: asyncio.Future[Any], seconds: float) -> None:
    """Waits until it is done, for so long at most; neither raises its exception nor cancels it.

    `asyncio.wait` for one future, without its sets and checks: every request waits twice.
    """
    if future.done():
        return
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not woken.done():
            woken.set_result(None)

    timer = loop.call_later(max(0.0, seconds), wake)
    future.add_done_callback(wake)
    try:
        await woken
    finally:
        timer.cancel()
        future.remove_done_callback(wake)


def _patience(place: Place) -> float:
    """Seconds after which a slot that has not answered is silent."""
    p99 = place.latencies.quantile(0.99)
    if p99 is None or place.answered < HANG_KNOWN:
        return max(HANG_UNKNOWN, HANG_FACTOR * (p99 or 0.0))
    return max(HANG_FLOOR, HANG_FACTOR * p99)


def _ns(deadline: float) -> int:
    return int(deadline * 1e9)
