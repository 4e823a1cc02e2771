"""The arbiter driven through every phase by hand: nothing here waits, forks or computes."""

from __future__ import annotations

import pytest

from agent.errors import Cancelled, CommandRefused, Interrupted, NotFound, Refused, SlotError, Superseded, Unavailable
from agent.slot.arbiter import (
    Answerer,
    Arbiter,
    AtBoundary,
    Continuity,
    Ended,
    HostState,
    Interrupt,
    Joined,
    On,
    Outcome,
    Phase,
    Queued,
    Refuse,
    Start,
    Turn,
    Verdict,
    Wait,
)

OLD, NEW = "sha256:old", "sha256:new"
OLD_BRIDGE, NEW_BRIDGE, OLD_SLOT, NEW_SLOT = 1, 2, 3, 4
BEFORE = [phase for phase in Phase if not phase.touches_slot]
AFTER = [phase for phase in Phase if phase.touches_slot]


def serving(continuity: Continuity = Continuity.BRIDGE) -> Arbiter:
    """A host whose committed model answers from the slot."""
    arbiter = Arbiter(continuity=continuity, committed=OLD)
    arbiter.bridge_ready(OLD, OLD_BRIDGE)
    arbiter.slot_loaded(OLD, OLD_SLOT)
    arbiter.slot_trusted(OLD_SLOT)
    return arbiter


def deploying(phase: Phase, continuity: Continuity = Continuity.BRIDGE) -> tuple[Arbiter, Turn]:
    """A deployment of NEW that has reached `phase`, with the executors that are there by then."""
    arbiter = serving(continuity)
    turn = Turn("d-1", "image:new")
    assert isinstance(arbiter.ask(turn), Start)
    for step in Phase:
        if step is Phase.SWITCH:
            arbiter.slot_trusted(NEW_SLOT)
        arbiter.enter(turn, step)
        if step is Phase.RESOLVE:
            turn.digest = NEW
        if step is Phase.PREFLIGHT:
            arbiter.bridge_ready(NEW, NEW_BRIDGE)
        if step is Phase.RELEASE:
            arbiter.slot_gone(OLD_SLOT)
        if step is Phase.LOAD:
            arbiter.slot_loaded(NEW, NEW_SLOT)
        if step is phase:
            break
    return arbiter, turn


@pytest.mark.parametrize("phase", Phase)
def test_who_answers_in_each_phase(phase: Phase) -> None:
    arbiter, _ = deploying(phase)
    if phase in BEFORE:
        expected = Answerer(OLD_SLOT, OLD, On.SLOT)
    elif phase.candidate_answers:
        expected = Answerer(NEW_SLOT, NEW, On.SLOT)
    else:
        expected = Answerer(OLD_BRIDGE, OLD, On.BRIDGE)
    assert arbiter.answerer() == expected


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(("continuity", "kind"), [(Continuity.QUEUE, Wait), (Continuity.REJECT, Refuse)])
def test_the_other_continuities(phase: Phase, continuity: Continuity, kind: type) -> None:
    arbiter, _ = deploying(phase, continuity)
    away = phase.touches_slot and not phase.candidate_answers
    assert isinstance(arbiter.answerer(), kind if away else Answerer)


@pytest.mark.parametrize("phase", Phase)
def test_deploy_the_same_joins(phase: Phase) -> None:
    arbiter, turn = deploying(phase)
    assert arbiter.ask(Turn("d-2", "image:new")) == Joined(turn)
    assert arbiter.waiting is None


@pytest.mark.parametrize("phase", Phase)
def test_deploy_another_waits_and_the_newest_wins(phase: Phase) -> None:
    arbiter, turn = deploying(phase)
    second, third = Turn("d-2", "image:other"), Turn("d-3", "image:third")
    assert arbiter.ask(second) == Queued(second, None)
    assert arbiter.ask(third) == Queued(third, second)
    assert isinstance(second.called_off, Superseded)
    assert arbiter.running is turn
    assert arbiter.end(turn) is third
    assert arbiter.running is third
    assert arbiter.waiting is None


def test_the_same_as_running_is_news_when_another_waits() -> None:
    arbiter, _ = deploying(Phase.PULL)
    other, back = Turn("d-2", "image:other"), Turn("d-3", "image:new")
    arbiter.ask(other)
    assert arbiter.ask(back) == Queued(back, other)


@pytest.mark.parametrize("phase", Phase)
def test_cancel(phase: Phase) -> None:
    arbiter, turn = deploying(phase)
    if phase is Phase.COMMIT:
        with pytest.raises(CommandRefused) as refused:
            arbiter.cancel(None)
        assert refused.value.code == "TOO_LATE"
        return
    decision = arbiter.cancel("d-1")
    assert decision == (AtBoundary(turn) if phase.touches_slot else Interrupt(turn))
    with pytest.raises(Cancelled):
        arbiter.enter(turn, Phase.COMMIT)
    error = turn.called_off
    assert error is not None
    outcome = arbiter.failed(turn, error)
    if phase.touches_slot:
        assert outcome is None
        assert arbiter.serving == OLD, "a roll-back serves the committed model at once"
        assert arbiter.restored(turn, error, in_slot=True) is Outcome.CANCELLED
        with pytest.raises(CommandRefused):
            arbiter.cancel("d-1")
    else:
        assert outcome is Outcome.CANCELLED
    arbiter.end(turn)
    assert arbiter.committed == OLD


@pytest.mark.parametrize("phase", BEFORE)
def test_what_is_ending_is_neither_called_off_nor_joined(phase: Phase) -> None:
    arbiter, turn = deploying(phase)
    arbiter.failed(turn, SlotError("no"))
    with pytest.raises(CommandRefused) as refused:
        arbiter.cancel(None)
    assert refused.value.code == "TOO_LATE"
    assert turn.called_off is None
    again = Turn("d-2", "image:new")
    assert arbiter.ask(again) == Queued(again, None)


def test_withdraw() -> None:
    arbiter, turn = deploying(Phase.PULL)
    waiting = Turn("d-2", "image:other")
    arbiter.ask(waiting)
    arbiter.withdraw(Turn("d-3", "image:third"))
    assert arbiter.waiting is waiting
    arbiter.withdraw(waiting)
    assert arbiter.waiting is None
    assert arbiter.running is turn


def test_cancel_of_one_that_waits_or_is_unknown() -> None:
    arbiter, turn = deploying(Phase.PROBATION)
    waiting = Turn("d-2", "image:other")
    arbiter.ask(waiting)
    assert arbiter.cancel("d-2") == Ended(waiting)
    assert arbiter.running is turn
    with pytest.raises(NotFound):
        arbiter.cancel("d-9")
    with pytest.raises(NotFound):
        Arbiter().cancel(None)


@pytest.mark.parametrize("phase", Phase)
def test_failure(phase: Phase) -> None:
    arbiter, turn = deploying(phase)
    error = SlotError("no", code="PROGRAM_FAILED")
    outcome = arbiter.failed(turn, error)
    if phase in BEFORE:
        assert outcome is Outcome.FAILED
        assert arbiter.answerer() == Answerer(OLD_SLOT, OLD, On.SLOT)
        return
    assert outcome is None
    assert turn.rolling_back
    answer = arbiter.answerer()
    assert isinstance(answer, Answerer)
    assert answer.digest == OLD
    arbiter.slot_loaded(OLD, 9)
    arbiter.slot_trusted(9)
    assert arbiter.answerer() == Answerer(9, OLD, On.SLOT)
    assert arbiter.restored(turn, error, in_slot=True) is Outcome.ROLLED_BACK
    assert arbiter.restored(turn, error, in_slot=False) is Outcome.FAILED


def test_a_refusal_before_the_slot_is_touched() -> None:
    arbiter, turn = deploying(Phase.PREFLIGHT)
    assert arbiter.failed(turn, Refused("other shapes", code="SIGNATURE_CHANGED")) is Outcome.REFUSED


@pytest.mark.parametrize("phase", Phase)
def test_stop(phase: Phase) -> None:
    arbiter, turn = deploying(phase)
    waiting = Turn("d-2", "image:other")
    arbiter.ask(waiting)
    assert arbiter.stop() == (turn, waiting)
    assert isinstance(turn.called_off, Interrupted)
    assert arbiter.waiting is None
    assert isinstance(arbiter.answerer(), Answerer), "requests in flight are still answered"
    with pytest.raises(Unavailable):
        arbiter.ask(Turn("d-3", "image:third"))


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("tied", [False, True])
def test_death_of_the_slot_executor(phase: Phase, tied: bool) -> None:
    arbiter, turn = deploying(phase)
    key = arbiter.slot.key if arbiter.slot else OLD_SLOT
    arbiter.slot_gone(key, SlotError("gone"))
    verdict = arbiter.executor_died(key, tied_to_request=tied)
    if phase in BEFORE:
        assert verdict is Verdict.RESTART
        assert arbiter.answerer() == Answerer(OLD_BRIDGE, OLD, On.BRIDGE)
    elif phase in (Phase.DRAIN, Phase.RELEASE):
        assert verdict is Verdict.NOTHING
    elif phase is Phase.PROBATION and tied:
        assert verdict is Verdict.RESTART
    else:
        assert verdict is Verdict.FAIL
    if phase.candidate_answers:
        assert arbiter.answerer() == Answerer(NEW_BRIDGE, NEW, On.BRIDGE)
    turn.rolling_back = True
    assert arbiter.executor_died(key, tied_to_request=False) is Verdict.RESTART


@pytest.mark.parametrize("phase", Phase)
def test_death_of_the_bridge(phase: Phase) -> None:
    arbiter, _ = deploying(phase)
    before = arbiter.answerer()
    assert isinstance(before, Answerer)
    digest = before.digest
    arbiter.bridge_starting(digest)
    arbiter.bridge_gone(digest, OLD_BRIDGE if digest == OLD else NEW_BRIDGE)
    after = arbiter.answerer()
    assert after == before if before.on is On.SLOT else isinstance(after, Wait)


def test_commit_and_the_next_turn() -> None:
    arbiter, turn = deploying(Phase.COMMIT)
    arbiter.commit(turn)
    assert arbiter.end(turn) is None
    assert arbiter.committed == NEW
    assert arbiter.answerer() == Answerer(NEW_SLOT, NEW, On.SLOT)


def test_host_states() -> None:
    arbiter = Arbiter()
    assert arbiter.host is HostState.EMPTY
    arbiter.committed = OLD
    assert arbiter.host is HostState.DARK
    arbiter.bridge_ready(OLD, OLD_BRIDGE)
    assert arbiter.host is HostState.BRIDGE
    arbiter.slot_loaded(OLD, OLD_SLOT)
    assert arbiter.host is HostState.BRIDGE, "loaded is not trusted"
    arbiter.slot_trusted(OLD_SLOT)
    assert arbiter.host is HostState.SLOT
    assert arbiter.slot_doubted(OLD_SLOT, SlotError("hangs", code="DEVICE_HUNG"))
    assert arbiter.host is HostState.BRIDGE
    assert not arbiter.slot_doubted(99, SlotError("x"))
    assert not arbiter.slot_doubted(OLD_SLOT, SlotError("again")), "told once"


def test_first_deployment_that_fails_leaves_empty() -> None:
    arbiter = Arbiter()
    turn = Turn("d-1", "image:new")
    arbiter.ask(turn)
    turn.digest = NEW
    for phase in (Phase.PREFLIGHT, Phase.DRAIN, Phase.PROGRAM):
        arbiter.enter(turn, phase)
    error = SlotError("no", code="PROGRAM_FAILED")
    assert arbiter.failed(turn, error) is None
    assert arbiter.restored(turn, error, in_slot=False) is Outcome.FAILED
    arbiter.end(turn)
    assert arbiter.host is HostState.EMPTY
    answer = arbiter.answerer()
    assert isinstance(answer, Refuse)
    assert answer.error.hint


def test_rollback_needs_a_previous_model() -> None:
    arbiter = serving()
    assert arbiter.rollback_target(NEW) == NEW
    with pytest.raises(Refused) as refused:
        arbiter.rollback_target(None)
    assert refused.value.code == "NO_PREVIOUS"


def test_every_change_is_told() -> None:
    told = []
    arbiter = Arbiter(on_change=lambda: told.append(arbiter.host))
    arbiter.committed = OLD
    arbiter.bridge_ready(OLD, OLD_BRIDGE)
    arbiter.slot_loaded(OLD, OLD_SLOT)
    arbiter.slot_trusted(OLD_SLOT)
    assert told[-1] is HostState.SLOT
    assert str(arbiter).startswith("slot: slot has sha256:old")
