"""Who answers, and whose turn the slot is: every decision, no I/O, no clock.

The agent tells the arbiter what happened (an executor is ready, a phase begins, somebody cancels) and asks it what
follows. It can therefore be driven through every combination by a table or a simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from agent.errors import Cancelled, CommandRefused, Interrupted, NotFound, Refused, SlotdError, Superseded, Unavailable


class Phase(Enum):
    """The way of a deployment, in order. From DRAIN on the slot is touched."""

    RESOLVE = "resolve"
    PULL = "pull"
    VERIFY = "verify"
    UNPACK = "unpack"
    INSPECT = "inspect"
    PREFLIGHT = "preflight"
    DRAIN = "drain"
    RELEASE = "release"
    PROGRAM = "program"
    LOAD = "load"
    PROVE = "prove"
    SWITCH = "switch"
    PROBATION = "probation"
    COMMIT = "commit"

    @property
    def touches_slot(self) -> bool:
        """Whether a failure here must put the committed model back."""
        return _ORDER[self] >= _ORDER[Phase.DRAIN]

    @property
    def candidate_answers(self) -> bool:
        """Whether the new model is the one that clients get."""
        return _ORDER[self] >= _ORDER[Phase.SWITCH]


_ORDER = {phase: index for index, phase in enumerate(Phase)}


class Outcome(Enum):
    """How a deployment ended."""

    COMMITTED = "committed"
    UNCHANGED = "unchanged"
    REFUSED = "refused"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"


class HostState(Enum):
    """What the host is doing for its clients."""

    EMPTY = "empty"
    SLOT = "slot"
    BRIDGE = "bridge"
    DARK = "dark"


class Continuity(Enum):
    """What requests get during a swap."""

    BRIDGE = "bridge"
    QUEUE = "queue"
    REJECT = "reject"


class On(Enum):
    """Where an answer is computed."""

    SLOT = "slot"
    BRIDGE = "bridge"


@dataclass(frozen=True)
class Answerer:
    """The executor that new requests go to."""

    key: int
    digest: str
    on: On


@dataclass(frozen=True)
class Wait:
    """Nobody answers just now, somebody soon will."""

    reason: str


@dataclass(frozen=True)
class Refuse:
    """Nobody answers."""

    error: SlotdError


@dataclass
class _SlotExecutor:
    key: int
    digest: str
    trusted: bool = False


@dataclass
class Turn:
    """One deployment, as far as the arbiter is concerned. `digest` is None until resolved, and for `undeploy`."""

    id: str
    wish: object
    digest: str | None = None
    phase: Phase | None = None
    called_off: SlotdError | None = None
    rolling_back: bool = False
    over: bool = False
    """How it ends is decided; only what follows from that is still being done."""

    @property
    def can_be_joined(self) -> bool:
        """Whether it can still become what it was started for."""
        return self.called_off is None and not self.rolling_back and not self.over

    def __str__(self) -> str:
        where = self.phase.value if self.phase else "waiting"
        return f"{self.id} ({where}{', rolling back' if self.rolling_back else ''})"


@dataclass(frozen=True)
class Start:
    """The turn runs now."""

    turn: Turn


@dataclass(frozen=True)
class Queued:
    """The turn runs after the one in hand; `replaced` waited in its place and is superseded."""

    turn: Turn
    replaced: Turn | None


@dataclass(frozen=True)
class Joined:
    """The same thing is already being done."""

    turn: Turn


@dataclass(frozen=True)
class Ended:
    """A turn that was only waiting is over."""

    turn: Turn


@dataclass(frozen=True)
class Interrupt:
    """The running turn must be cut short at once: the slot has not been touched."""

    turn: Turn


@dataclass(frozen=True)
class AtBoundary:
    """The running turn ends in a roll-back when its present phase is over."""

    turn: Turn


class Verdict(Enum):
    """What the end of an executor means for the deployment in hand."""

    NOTHING = "nothing"
    RESTART = "restart"
    FAIL = "fail"


@dataclass
class Arbiter:
    """The state of the host. Every method is a decision; nothing here waits."""

    continuity: Continuity = Continuity.BRIDGE
    committed: str | None = None
    slot: _SlotExecutor | None = None
    bridges: dict[str, int] = field(default_factory=dict)
    """Digest to the key of the CPU executor that can answer for it."""
    restarting: set[str] = field(default_factory=set)
    """Digests whose bridge is being started."""
    running: Turn | None = None
    waiting: Turn | None = None
    stopping: bool = False
    trouble: SlotdError | None = None
    """Why the slot does not answer, outside a deployment."""
    on_change: Callable[[], None] | None = None

    def __str__(self) -> str:
        slot = f"{self.slot.digest[:19]}{'' if self.slot.trusted else ' (unproven)'}" if self.slot else "nothing"
        return f"{self.host.value}: slot has {slot}; bridges {len(self.bridges)}; turn {self.running or 'nobody'}"

    # --- who answers --------------------------------------------------------------------------------------------------

    @property
    def serving(self) -> str | None:
        """The digest that clients are answered by."""
        turn = self.running
        if turn is not None and turn.phase is not None and turn.phase.candidate_answers and not turn.rolling_back:
            return turn.digest
        return self.committed

    @property
    def swapping(self) -> bool:
        """Whether a deployment has taken the slot away from its clients."""
        turn = self.running
        return turn is not None and turn.phase is not None and turn.phase.touches_slot

    def answerer(self) -> Answerer | Wait | Refuse:
        """Where a request that is dispatched now goes."""
        if self.stopping and self.serving is None:
            return Refuse(Unavailable("slotd is stopping"))
        digest = self.serving
        if digest is None:
            return Refuse(
                Unavailable(
                    "no model is deployed on this host",
                    hint="deploy one: slotd deploy IMAGE",
                    retry_after=5.0 if self.running else None,
                )
            )
        turn = self.running
        phase = turn.phase if turn is not None and not turn.rolling_back else None
        draining = phase is not None and phase.touches_slot and not phase.candidate_answers
        if self.slot is not None and self.slot.digest == digest and self.slot.trusted and not draining:
            return Answerer(self.slot.key, digest, On.SLOT)
        if self.swapping and self.continuity is Continuity.REJECT:
            return Refuse(Unavailable("the slot is being reprogrammed", retry_after=2.0, code="SWAPPING"))
        if self.swapping and self.continuity is Continuity.QUEUE:
            return Wait("the slot is being reprogrammed")
        bridge = self.bridges.get(digest)
        if bridge is not None:
            return Answerer(bridge, digest, On.BRIDGE)
        if digest in self.restarting:
            return Wait("the model is being loaded")
        if self.swapping:
            return Refuse(Unavailable("the slot is being reprogrammed and the model has no CPU twin", retry_after=2.0))
        why = f": {self.trouble}" if self.trouble else ""
        return Refuse(Unavailable(f"the model runs neither in the slot nor on the CPU{why}", retry_after=5.0))

    @property
    def host(self) -> HostState:
        """What the host is doing for its clients."""
        if self.serving is None:
            return HostState.EMPTY
        answer = self.answerer()
        if isinstance(answer, Answerer):
            return HostState.SLOT if answer.on is On.SLOT else HostState.BRIDGE
        return HostState.DARK

    # --- executors come and go ----------------------------------------------------------------------------------------

    def bridge_starting(self, digest: str) -> None:
        """A CPU executor for `digest` is being started."""
        self.restarting.add(digest)
        self._changed()

    def bridge_ready(self, digest: str, key: int) -> None:
        """It can answer."""
        self.restarting.discard(digest)
        self.bridges[digest] = key
        self._changed()

    def bridge_gone(self, digest: str, key: int | None = None) -> None:
        """It ended (`key`), or nobody tries any more (no key)."""
        if key is None or self.bridges.get(digest) == key:
            self.bridges.pop(digest, None)
        if key is None:
            self.restarting.discard(digest)
        self._changed()

    def slot_loaded(self, digest: str, key: int) -> None:
        """A slot executor has its model loaded; it answers nobody before it is trusted."""
        self.slot = _SlotExecutor(key, digest)
        self._changed()

    def slot_trusted(self, key: int) -> None:
        """The slot has passed its proof."""
        assert self.slot is not None and self.slot.key == key, "only a loaded slot can be trusted"
        self.slot.trusted = True
        self.trouble = None
        self._changed()

    def slot_doubted(self, key: int, why: SlotdError) -> bool:
        """The slot hangs or computes wrongly: it answers nobody until proven again. False if it does not anyway."""
        if self.slot is None or self.slot.key != key or not self.slot.trusted:
            return False
        self.slot.trusted = False
        self.trouble = why
        self._changed()
        return True

    def slot_gone(self, key: int, why: SlotdError | None = None) -> bool:
        """The slot executor ended. False if another one has taken its place."""
        if self.slot is None or self.slot.key != key:
            return False
        self.slot = None
        if why is not None:
            self.trouble = why
        self._changed()
        return True

    def executor_died(self, key: int, *, tied_to_request: bool) -> Verdict:
        """What the death of the slot executor `key` means. Deaths tied to one request never count."""
        turn = self.running
        if turn is None or turn.phase is None or not turn.phase.touches_slot or turn.rolling_back:
            return Verdict.RESTART
        if turn.phase in (Phase.DRAIN, Phase.RELEASE):
            return Verdict.NOTHING
        return Verdict.RESTART if tied_to_request and turn.phase is Phase.PROBATION else Verdict.FAIL

    # --- whose turn ---------------------------------------------------------------------------------------------------

    def ask(self, turn: Turn) -> Start | Queued | Joined:
        """Somebody wants a deployment. Raises Unavailable while slotd stops."""
        if self.stopping:
            raise Unavailable("slotd is stopping; ask again when it is back", retry_after=10.0)
        for known in (self.waiting, self.running):
            if known is not None and known.wish == turn.wish and known.can_be_joined:
                return Joined(known)
            if known is not None:
                break  # only the newest wish counts: the same as the running one, but not as the waiting one, is news
        if self.running is None:
            self.running = turn
            self._changed()
            return Start(turn)
        replaced, self.waiting = self.waiting, turn
        if replaced is not None:
            replaced.called_off = Superseded(f"{turn.id} took its place")
        self._changed()
        return Queued(turn, replaced)

    def enter(self, turn: Turn, phase: Phase) -> None:
        """The next phase begins. Raises what called the turn off (Cancelled, Interrupted)."""
        assert self.running is turn, "only the running turn has phases"
        if turn.called_off is not None:
            raise turn.called_off
        turn.phase = phase
        self._changed()

    def cancel(self, turn_id: str | None, why: SlotdError | None = None) -> Ended | Interrupt | AtBoundary:
        """Call a deployment off. Raises NotFound, or CommandRefused if it is too late."""
        why = why or Cancelled("cancelled by command")
        waiting, running = self.waiting, self.running
        if waiting is not None and turn_id in (None, waiting.id):
            self.waiting = None
            waiting.called_off = why
            self._changed()
            return Ended(waiting)
        if running is None or turn_id not in (None, running.id):
            what = f"no deployment {turn_id}" if turn_id else "no deployment"
            raise NotFound(f"{what} is running or waiting", hint="slotd status shows what is")
        if running.rolling_back:
            raise CommandRefused(f"{running.id} is already going back", code="TOO_LATE")
        if running.phase is Phase.COMMIT:
            raise CommandRefused(f"{running.id} is being committed", hint="slotd rollback goes back", code="TOO_LATE")
        if running.over:
            raise CommandRefused(f"{running.id} is ending", code="TOO_LATE")
        running.called_off = running.called_off or why
        self._changed()
        if running.phase is None or not running.phase.touches_slot:
            return Interrupt(running)
        return AtBoundary(running)

    def withdraw(self, turn: Turn) -> None:
        """It could not even be written down: it waits no more."""
        if self.waiting is turn:
            self.waiting = None
            self._changed()

    def rollback_target(self, previous: str | None) -> str:
        """What `rollback` goes to when nothing is being deployed. Raises Refused."""
        if previous is None:
            raise Refused("there is no previous model on this host", hint="deploy one by name", code="NO_PREVIOUS")
        return previous

    def failed(self, turn: Turn, error: SlotdError) -> Outcome | None:
        """How a turn ends that failed with `error`; None if the committed model must be put back first."""
        assert self.running is turn, "only the running turn can fail"
        if turn.phase is not None and turn.phase.touches_slot:
            turn.rolling_back = True
            self._changed()
            return None
        turn.over = True
        if isinstance(error, Superseded):
            return Outcome.SUPERSEDED
        if isinstance(error, Cancelled):
            return Outcome.CANCELLED
        if isinstance(error, Interrupted):
            return Outcome.FAILED
        return Outcome.REFUSED if error.exit == Refused.exit else Outcome.FAILED

    def restored(self, turn: Turn, error: SlotdError, *, in_slot: bool) -> Outcome:
        """How it ends after the roll-back: cancelled, rolled back, or failed if the slot could not be won back."""
        turn.over = True
        if self.committed is None or not in_slot:
            return Outcome.CANCELLED if self.committed is None and isinstance(error, Cancelled) else Outcome.FAILED
        return Outcome.CANCELLED if isinstance(error, Cancelled) else Outcome.ROLLED_BACK

    def commit(self, turn: Turn) -> None:
        """The candidate is the committed model from now on (boot.json has been renamed)."""
        assert self.running is turn and turn.phase is Phase.COMMIT
        self.committed = turn.digest
        self._changed()

    def end(self, turn: Turn) -> Turn | None:
        """The turn is over; the one that waited runs now."""
        assert self.running is turn
        self.running, self.waiting = self.waiting, None
        self._changed()
        return self.running

    def stop(self) -> tuple[Turn | None, Turn | None]:
        """SIGTERM: nothing new starts. The running and the waiting turn, which are called off."""
        self.stopping = True
        running, waiting = self.running, self.waiting
        self.waiting = None
        for turn in (running, waiting):
            if turn is not None:
                turn.called_off = turn.called_off or Interrupted("slotd was stopped", code="STOPPED")
        self._changed()
        return running, waiting

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()
