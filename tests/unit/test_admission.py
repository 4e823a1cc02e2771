"""The queue, with a clock made by hand."""

from __future__ import annotations

import random

import pytest

from agent.errors import Overloaded, Unavailable
from agent.slot.admission import CUTOVER, Admission, Latencies, Place
from agent.slot.arbiter import Answerer, On, Refuse, Wait

BRIDGE = Answerer(1, "old", On.BRIDGE)
SLOT = Answerer(2, "old", On.SLOT)
NEW = Answerer(3, "new", On.SLOT)


def admission(**settings: float) -> Admission:
    made = Admission(max_queue=int(settings.get("max_queue", 512)), max_wait=settings.get("max_wait", 10.0))
    made.add(Place(1, "old", On.BRIDGE, window=2, service=0.040))
    made.add(Place(2, "old", On.SLOT, window=3, service=0.002))
    made.add(Place(3, "new", On.SLOT, window=3, service=0.002))
    return made


def test_window_and_order() -> None:
    queue = admission()
    tickets = [queue.admit(0.0, 60.0, priority, BRIDGE) for priority in (0, 0, 5, 0)]
    taken = [ticket for ticket, _ in queue.take(0.0, BRIDGE)]
    assert taken == [tickets[2], tickets[0]]
    assert list(queue.take(0.0, BRIDGE)) == []
    queue.places[1].ended(0.04, 0.04)
    assert [ticket for ticket, _ in queue.take(0.04, BRIDGE)] == [tickets[1]]


def test_what_cannot_be_answered_in_time_is_refused_at_once() -> None:
    queue = admission()

    def fill() -> None:
        for _ in range(100):
            queue.admit(0.0, 1.0, 0, BRIDGE)
            list(queue.take(0.0, BRIDGE))

    with pytest.raises(Overloaded) as refused:
        fill()
    admitted = len(queue.queue) + queue.places[1].busy
    assert 11 <= admitted <= 14, "a second holds 25 requests of 40 ms, half of that are admitted"
    assert refused.value.retry_after is not None
    assert queue.shed == 1


def test_the_lowest_priority_is_shed_first() -> None:
    queue = admission(max_queue=4)
    list(queue.take(0.0, BRIDGE))
    for _ in range(2):
        queue.admit(0.0, 60.0, 0, BRIDGE)
    assert len(list(queue.take(0.0, BRIDGE))) == 2  # what the window holds is out of reach
    low = [queue.admit(0.0, 60.0, priority, BRIDGE) for priority in (1, 0, 0, 1)]
    with pytest.raises(Overloaded):
        queue.admit(0.0, 60.0, 0, BRIDGE)
    urgent = queue.admit(0.0, 60.0, 5, BRIDGE)
    assert [ticket for ticket, _ in queue.overdue(0.0, BRIDGE)] == [low[2]]
    assert queue.queue == [urgent, low[0], low[3], low[1]]


def test_who_is_overtaken_and_left_without_time_is_told_at_once() -> None:
    queue = admission()
    for _ in range(2):
        queue.admit(0.0, 60.0, 0, BRIDGE)
    list(queue.take(0.0, BRIDGE))
    first = queue.admit(0.0, 0.25, 0, BRIDGE)
    others = [queue.admit(0.0, 60.0, 1, BRIDGE) for _ in range(3)]
    assert list(queue.overdue(0.0, BRIDGE)) == [], "six times 40 ms are 0.24 s"
    others.append(queue.admit(0.0, 60.0, 1, BRIDGE))
    assert [ticket for ticket, _ in queue.overdue(0.0, BRIDGE)] == [first]
    assert queue.queue == others


def test_without_a_queue_a_free_executor_still_takes_a_request() -> None:
    queue = admission(max_queue=0)
    for _ in range(2):
        queue.admit(0.0, 60.0, 0, BRIDGE)
        assert len(list(queue.take(0.0, BRIDGE))) == 1
    with pytest.raises(Overloaded):
        queue.admit(0.0, 60.0, 0, BRIDGE)


def test_a_short_deadline_on_an_idle_executor_is_tried() -> None:
    queue = admission()
    queue.admit(0.0, 0.045, 0, BRIDGE)
    assert len(list(queue.take(0.0, BRIDGE))) == 1


def test_a_slower_answerer_sheds_what_it_cannot_do() -> None:
    queue = admission()
    for _ in range(200):
        queue.admit(0.0, 1.0, 0, SLOT)
    shed = list(queue.overdue(0.0, BRIDGE))
    assert len(queue.queue) == pytest.approx(25, abs=2)
    assert all(isinstance(error, Overloaded) for _, error in shed)


def test_wait_and_refuse() -> None:
    queue = admission(max_queue=3)
    wait = Wait("programming")
    for _ in range(3):
        queue.admit(0.0, 1.0, 0, wait)
    assert list(queue.take(0.0, wait)) == []
    with pytest.raises(Overloaded):
        queue.admit(0.0, 1.0, 0, wait)
    refuse = Refuse(Unavailable("no model"))
    with pytest.raises(Unavailable):
        queue.admit(0.0, 1.0, 0, refuse)
    assert len(list(queue.overdue(0.0, refuse))) == 3
    assert queue.queue == []


def test_the_new_model_waits_for_the_old_ones_answers() -> None:
    queue = admission()
    queue.admit(0.0, 60.0, 0, BRIDGE)
    list(queue.take(0.0, BRIDGE))
    queue.admit(0.01, 60.0, 0, NEW)
    assert list(queue.take(0.01, NEW)) == []
    assert queue.held(0.01)
    queue.places[1].ended(0.04, 0.04)
    assert len(list(queue.take(0.04, NEW))) == 1


def test_but_not_for_ever() -> None:
    queue = admission()
    queue.admit(0.0, 60.0, 0, BRIDGE)
    list(queue.take(0.0, BRIDGE))
    queue.admit(0.01, 60.0, 0, NEW)
    assert list(queue.take(0.01, NEW)) == []
    assert len(list(queue.take(0.02 + CUTOVER, NEW))) == 1


def test_withdrawn_tickets_free_their_place() -> None:
    queue = admission(max_queue=1)
    ticket = queue.admit(0.0, 1.0, 0, Wait("x"))
    queue.withdraw(ticket)
    queue.withdraw(ticket)
    queue.admit(0.0, 1.0, 0, Wait("x"))


def test_latencies() -> None:
    latencies = Latencies()
    assert latencies.quantile(0.99) is None
    for value in range(100):
        latencies.add(value / 100)
    assert latencies.quantile(0.5) == pytest.approx(0.49, abs=0.1)
    assert latencies.quantile(0.99) == pytest.approx(0.98, abs=0.1)


@pytest.mark.parametrize("load", [0.8, 3.0])
def test_open_loop_at_a_share_of_capacity(load: float) -> None:
    """A simulated serial bridge: nothing admitted is late, and the excess is refused."""
    rng = random.Random(7)
    queue = Admission(max_queue=512, max_wait=10.0)
    place = Place(1, "old", On.BRIDGE, window=2, service=0.040)
    queue.add(place)
    now, free_at, late, done, refused = 0.0, 0.0, 0, 0, 0
    running: list[tuple[float, float, float]] = []  # end, start, deadline
    arrivals = []
    while now < 60:
        now += rng.expovariate(load * 25)
        arrivals.append(now)
    for at in arrivals:
        while running and running[0][0] <= at:
            end, start, deadline = running.pop(0)
            place.ended(end, end - start)
            done, late = done + 1, late + (end > deadline)
            for ticket, _ in queue.take(end, BRIDGE):
                free_at = max(free_at, end) + rng.uniform(0.034, 0.046)
                running.append((free_at, end, ticket.deadline))
        try:
            queue.admit(at, at + 1.0, 0, BRIDGE)
        except Overloaded:
            refused += 1
        for ticket, _ in queue.take(at, BRIDGE):
            free_at = max(free_at, at) + rng.uniform(0.034, 0.046)
            running.append((free_at, at, ticket.deadline))
    assert late == 0
    if load < 1:
        assert refused <= len(arrivals) * 0.001
    else:
        assert done >= 0.9 * 25 * 60
