"""Requests whose executor ended: each is tried again, alone, in a disposable executor.

A request that ends that one too is poison: only its sender gets an error, and the same bytes are refused for a while.
A trial goes on for a moment when its sender has gone, or a request with a short deadline could end one executor after
the other and never be found out; nobody gets that answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import structlog

from agent.errors import DeadlineExceeded, ExecutorDied, Poison, SlotdError
from agent.executor.client import Reply
from agent.executor.seat import Prepared, Seat
from agent.model.signature import Strings, Tensor

log = structlog.get_logger(__name__)

Sketch: TypeAlias = tuple[str, tuple[tuple[str, tuple[int, ...], int], ...]]
Spawn: TypeAlias = Callable[[Seat, bool], Awaitable[Seat]]
Discard: TypeAlias = Callable[[Seat], Awaitable[None]]

KEEP_IDLE = 5.0
"""Seconds that a disposable executor is kept for the next suspect."""
VERDICT = 5.0
"""Seconds after an executor's end in which its suspects are tried even if nobody waits for the answer any more."""
SAMPLE = 1024
"""Bytes at either end of a tensor by which most requests are told from poison."""
MAX_SUSPECTS = 100
"""Dead executors that are remembered."""
MAX_POISON = 1000
SPAWNS = 3
"""How often a disposable executor is started for one suspect."""


@dataclass
class _Suspects:
    """The requests that one dead executor had in hand."""

    open: int = 0
    poison: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class Trials:
    """`spawn` starts a disposable seat for the model of the one that died (True: with a decoder of its own)."""

    def __init__(
        self, spawn: Spawn, discard: Discard, *, memory: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._spawn = spawn
        self._discard = discard
        self._memory = memory
        self._clock = clock
        self._poison: dict[Sketch, dict[bytes, float]] = {}
        """Until when a request is refused: by what is quickly seen of it, then by all of its bytes."""
        self._trials: set[asyncio.Task[tuple[Seat, Reply]]] = set()
        self._suspects: dict[int, _Suspects] = {}
        self._turn = asyncio.Lock()
        self._spare: Seat | None = None
        self._reaper: asyncio.Task[None] | None = None
        self.tried = 0
        self.found = 0

    def reconfigure(self, memory: float) -> None:
        """For how many seconds a request is refused that is found out from now on."""
        self._memory = memory

    async def known(self, digest: str, inputs: Mapping[str, Tensor]) -> SlotdError | None:
        """The error for bytes that ended two executors of this model lately; None for all others."""
        if not self._poison:
            return None
        found = self._poison.get(_sketch(digest, inputs))
        if found is None:
            return None
        until = found.get(await asyncio.to_thread(_fingerprint, inputs))
        if until is None or until < self._clock():
            return None
        return Poison(
            "this request has ended every executor that ran it and is not run again",
            hint="send other input, or report the model to whoever made it",
            retry_after=round(until - self._clock(), 1),
        )

    async def retry(
        self, seat: Seat, inputs: Mapping[str, Tensor], prepared: Prepared | None, deadline: float
    ) -> tuple[Seat, Reply]:
        """The answer of a disposable executor. Raises Poison, DeadlineExceeded, or what the model says of the request.

        `prepared` is released here; None: the decoder died, so a disposable one decodes again.
        """
        self.tried += 1
        trial = asyncio.create_task(self._trial(seat, inputs, prepared, deadline), name="trial")
        self._trials.add(trial)
        trial.add_done_callback(self._trials.discard)
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock())):
                return await asyncio.shield(trial)
        except TimeoutError:
            raise _too_late() from None
        finally:
            if not trial.done():
                trial.add_done_callback(_throw_away)

    async def _trial(
        self, seat: Seat, inputs: Mapping[str, Tensor], prepared: Prepared | None, deadline: float
    ) -> tuple[Seat, Reply]:
        suspects = self._suspects_of(seat)
        suspects.open += 1
        suspects.settled.clear()
        until = max(deadline, self._clock() + VERDICT)
        try:
            async with asyncio.timeout(until - self._clock()), self._turn:
                return await self._try(seat, inputs, prepared, until)
        except TimeoutError:
            raise _too_late() from None
        except Poison:
            suspects.poison += 1
            self.found += 1
            await self._remember(seat.model.digest, inputs)
            raise
        finally:
            if prepared is not None:
                prepared.release()
            suspects.open -= 1
            if suspects.open == 0:
                suspects.settled.set()

    def _suspects_of(self, seat: Seat) -> _Suspects:
        """Those that had to do with its end. It lives if it was a decoder or a bridge beside it that ended."""
        if seat.worker.alive:
            return _Suspects()
        if len(self._suspects) >= MAX_SUSPECTS and seat.key not in self._suspects:
            self._suspects = {key: one for key, one in self._suspects.items() if one.open}
        return self._suspects.setdefault(seat.key, _Suspects())

    async def verdict(self, key: int, *, timeout: float = 30.0) -> bool:
        """Whether the death of executor `key` was the doing of one request; waits for the trials of all suspects."""
        await asyncio.sleep(0.05)  # the requests hear of the death in this very moment, too
        suspects = self._suspects.get(key)
        if suspects is None:
            return False
        try:
            async with asyncio.timeout(timeout):
                while suspects.open:
                    await suspects.settled.wait()
        except TimeoutError:
            log.warning("trials_undecided", executor=key, open=suspects.open)
        return suspects.poison > 0

    async def close(self) -> None:
        """Ends the trials and the disposable executor."""
        for trial in self._trials:
            trial.cancel()
        await asyncio.gather(*self._trials, return_exceptions=True)
        async with self._turn:
            if self._reaper is not None:
                self._reaper.cancel()
                await asyncio.wait((self._reaper,))
            await self._drop()

    async def _try(
        self, seat: Seat, inputs: Mapping[str, Tensor], prepared: Prepared | None, deadline: float
    ) -> tuple[Seat, Reply]:
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        spare = self._spare
        if spare is None or not _fits(spare, seat, decodes=prepared is None):
            await self._drop()
            spare = self._spare = await self._fresh(seat, decodes=prepared is None)
        own: Prepared | None = None
        clean = False
        try:
            if prepared is None:
                prepared = own = await spare.prepare(inputs, int(deadline * 1e9))
            call = spare.submit(prepared, int(deadline * 1e9))
            try:
                reply = await asyncio.shield(call.result)
            finally:
                call.cancel()
            clean = True
        except ExecutorDied as error:
            log.error("poison_request", model=seat.model.name, digest=seat.model.digest, error=str(error))
            raise Poison(
                "this request ended two executors; it is not tried again",
                hint="send other input, or report the model to whoever made it",
            ) from None
        except SlotdError:
            clean = True  # an ordered refusal
            raise
        finally:
            if own is not None:
                own.release()
            if clean:
                self._reaper = asyncio.create_task(self._reap(), name="trials-reaper")
            else:
                await asyncio.shield(self._drop())
        return spare, reply

    async def _fresh(self, seat: Seat, *, decodes: bool) -> Seat:
        """A disposable executor; one that ends while it loads has not seen the request, so there is another."""
        for _ in range(SPAWNS - 1):
            try:
                return await self._spawn(seat, decodes)
            except ExecutorDied as error:
                log.warning("disposable_died_at_load", model=seat.model.name, error=str(error))
        return await self._spawn(seat, decodes)

    async def _reap(self) -> None:
        await asyncio.sleep(KEEP_IDLE)
        async with self._turn:
            self._reaper = None
            await self._drop()

    async def _drop(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.retired = True
            try:
                await self._discard(spare)
            except SlotdError as error:  # it is nobody's fault who waits for his turn
                log.error("disposable_stuck", model=spare.model.name, error=str(error))

    async def _remember(self, digest: str, inputs: Mapping[str, Tensor]) -> None:
        fingerprint = await asyncio.to_thread(_fingerprint, inputs)
        now = self._clock()
        kept = {
            sketch: left
            for sketch, found in self._poison.items()
            if (left := {key: until for key, until in found.items() if until >= now})
        }
        while sum(map(len, kept.values())) >= MAX_POISON:
            kept.pop(next(iter(kept)))
        kept.setdefault(_sketch(digest, inputs), {})[fingerprint] = now + self._memory
        self._poison = kept


def _too_late() -> SlotdError:
    return DeadlineExceeded("the executor ended and the deadline passed before another could answer")


def _throw_away(trial: asyncio.Task[tuple[Seat, Reply]]) -> None:
    """Its sender has gone; what there was to learn from it has been learnt."""
    if not trial.cancelled() and trial.exception() is None:
        trial.result()[1].release()


def _fits(spare: Seat, seat: Seat, *, decodes: bool) -> bool:
    """Whether the disposable executor that is there will do for a suspect of `seat`."""
    if spare.model.digest != seat.model.digest or not spare.worker.alive:
        return False
    own = spare.decoders is not seat.decoders
    return own == decodes and (not own or all(worker.alive for worker in spare.decoders.workers))


def _sketch(digest: str, inputs: Mapping[str, Tensor]) -> Sketch:
    """Cheap, the same for the same request, and hardly ever the same for another."""
    return digest, tuple(sorted((name, tuple(tensor.shape), _sample(tensor)) for name, tensor in inputs.items()))


def _sample(tensor: Tensor) -> int:
    if not isinstance(tensor, Strings):
        return zlib.crc32(tensor.flat[-SAMPLE:].tobytes(), zlib.crc32(tensor.flat[:SAMPLE].tobytes()))
    if not tensor.items:
        return 0
    first, last = tensor.items[0], tensor.items[-1]
    return zlib.crc32(last[-SAMPLE:], zlib.crc32(first[:SAMPLE], len(first)))


def _fingerprint(inputs: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(inputs.items()):
        digest.update(repr((name, tuple(tensor.shape))).encode())
        if isinstance(tensor, Strings):
            for item in tensor.items:
                digest.update(len(item).to_bytes(8, "little") + item)
        else:
            digest.update(tensor.dtype.str.encode())
            digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return digest.digest()
