"""The queue in front of the executors: who may wait, who goes next, who is refused at once. No I/O, no clock."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from agent.errors import Overloaded, SlotdError
from agent.slot.arbiter import Answerer, On, Refuse, Wait

SAFETY = 0.5
"""A request is admitted if the work ahead of it fits into this share of its time: a CPU may be slowed by others."""
CUTOVER = 1.0
"""Seconds that the new model waits at most for answers of the old one that are under way."""


class Latencies:
    """The last few hundred latencies in seconds, and what they say."""

    def __init__(self, size: int = 256) -> None:
        self._window: deque[float] = deque(maxlen=size)
        self._sorted: list[float] | None = None

    def add(self, seconds: float) -> None:
        self._window.append(seconds)
        if len(self._window) % 16 == 0:
            self._sorted = None

    def quantile(self, share: float) -> float | None:
        """None before the first latency."""
        if not self._window:
            return None
        if self._sorted is None:
            self._sorted = sorted(self._window)
        return self._sorted[min(len(self._sorted) - 1, math.ceil(share * len(self._sorted)) - 1)]


@dataclass
class Place:
    """One executor as the queue sees it. `service` is seconds from one answer to the next while it is busy."""

    key: int
    digest: str
    on: On
    window: int
    service: float
    busy: int = 0
    answered: int = 0
    _last: float = 0.0
    latencies: Latencies = field(default_factory=Latencies)

    @property
    def capacity(self) -> float:
        """Answers for each second."""
        return 1.0 / self.service if self.service > 0 else math.inf

    def started(self, now: float) -> None:
        """A request was handed over."""
        if self.busy == 0:
            self._last = now
        self.busy += 1

    def ended(self, now: float, latency: float | None) -> None:
        """It is answered; `latency` None if that says nothing about the speed (an error, a cancellation)."""
        self.busy -= 1
        assert self.busy >= 0
        if latency is not None:
            self.answered += 1
            self.latencies.add(latency)
            sample = min(latency, now - self._last)
            self.service += (sample - self.service) * max(0.1, 1.0 / (self.answered + 1))
        self._last = now

    def __str__(self) -> str:
        return f"{self.on.value} {self.key}: {self.busy}/{self.window} busy, {self.capacity:.0f}/s"


@dataclass(eq=False)
class Ticket:
    """A request that waits. Times are in seconds of the monotonic clock; a higher priority goes first."""

    deadline: float
    priority: int
    arrived: float
    number: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return (-self.priority, self.number)


class Admission:
    """Decides with the clock that is handed to it."""

    def __init__(self, *, max_queue: int, max_wait: float) -> None:
        self.max_queue = max_queue
        self.max_wait = max_wait
        self.places: dict[int, Place] = {}
        self.queue: list[Ticket] = []
        self.shed = 0
        self._count = 0
        self._serving: str | None = None
        self._hold_until = 0.0

    def __str__(self) -> str:
        return f"{len(self.queue)} queued; " + "; ".join(map(str, self.places.values()))

    def add(self, place: Place) -> None:
        """An executor is there."""
        self.places[place.key] = place

    def remove(self, key: int) -> None:
        """It is gone; what it had in hand is the caller's."""
        self.places.pop(key, None)

    @property
    def in_flight(self) -> int:
        return sum(place.busy for place in self.places.values())

    def wait_of(self, answerer: Answerer, ahead: int) -> float:
        """Seconds until a request with `ahead` others queued before it would be answered."""
        place = self.places[answerer.key]
        return (place.busy + ahead + 1) * place.service

    def admit(self, now: float, deadline: float, priority: int, answerer: Answerer | Wait | Refuse) -> Ticket:
        """A place in the queue. Raises Overloaded (with retry_after) or what `answerer` refuses with.

        One that overtakes others may leave them no time: the caller asks `overdue` then.
        """
        if isinstance(answerer, Refuse):
            raise answerer.error
        self._count += 1
        ticket = Ticket(deadline, priority, now, self._count)
        position = bisect.bisect(self.queue, ticket.order, key=lambda waiting: waiting.order)
        free = False
        if isinstance(answerer, Answerer) and answerer.key in self.places:
            place = self.places[answerer.key]
            need = self.wait_of(answerer, position)
            have = min(self.max_wait, deadline - now)
            free = place.busy + position < place.window
            if need > have * SAFETY and not free:
                self.shed += 1
                raise Overloaded(
                    f"the {place.on.value} answers {place.capacity:.1f} requests a second and has "
                    f"{place.busy + position} ahead",
                    hint="send less, or give the request more time",
                    retry_after=round(max(0.001, need - have * SAFETY), 3),
                )
        if len(self.queue) >= self.max_queue and position == len(self.queue) and not free:
            self.shed += 1
            raise Overloaded(f"{len(self.queue)} requests are waiting already", retry_after=0.5)
        self.queue.insert(position, ticket)
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """The caller does not wait any more."""
        if ticket in self.queue:
            self.queue.remove(ticket)

    def overdue(self, now: float, answerer: Answerer | Wait | Refuse) -> Iterator[tuple[Ticket, SlotdError]]:
        """Those that can't be answered in time any more: somebody slower answers now, or nobody, or more urgent
        requests have come."""
        if isinstance(answerer, Refuse):
            gone, self.queue = self.queue, []
            for ticket in gone:
                yield ticket, answerer.error
            return
        while len(self.queue) > self.max_queue:
            self.shed += 1
            yield self.queue.pop(), Overloaded("more urgent requests have taken all places", retry_after=0.5)
        if isinstance(answerer, Wait) or answerer.key not in self.places:
            return
        place, kept = self.places[answerer.key], 0
        for ticket in tuple(self.queue):
            need = (place.busy + kept + 1) * place.service
            if place.busy + kept >= place.window and need > min(
                self.max_wait + ticket.arrived - now, ticket.deadline - now
            ):
                self.queue.remove(ticket)
                self.shed += 1
                yield ticket, Overloaded("what answers now cannot answer this one in time any more", retry_after=0.5)
            else:
                kept += 1

    def take(self, now: float, answerer: Answerer | Wait | Refuse) -> Iterable[tuple[Ticket, Place]]:
        """Those that may be handed over now, best first.

        After a change of model the new one starts when the old one's answers are out, so that nobody who has seen the
        new model is answered by the old one afterwards.
        """
        if not isinstance(answerer, Answerer) or answerer.key not in self.places:
            return
        if answerer.digest != self._serving:
            self._serving, self._hold_until = answerer.digest, now + CUTOVER
        if self.held(now):
            return
        place = self.places[answerer.key]
        while self.queue and place.busy < place.window:
            ticket = self.queue.pop(0)
            place.started(now)
            yield ticket, place

    def held(self, now: float) -> bool:
        """Whether the new model still waits for the old one's answers."""
        return now < self._hold_until and any(
            place.busy for place in self.places.values() if place.digest != self._serving
        )

    def bridge_of(self, digest: str) -> Place | None:
        """The CPU executor of a model."""
        return next((p for p in self.places.values() if p.digest == digest and p.on is On.BRIDGE), None)
