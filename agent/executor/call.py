"""One request to a child and its answer, as the agent sees them."""

from __future__ import annotations

import asyncio
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeAlias

from agent.errors import InvalidInput
from agent.executor.arena import ALIGN, MANY, MAX_ELEMENTS, Lease, Region, flatten, long, read, write
from agent.executor.channel import MAX_RANK, OVERFLOW, ChannelError, Descriptor, Record, sealed_size
from agent.model.signature import DType, Strings, Tensor

Input: TypeAlias = Tensor | Region
_MILLISECONDS = 4 << 20
"""Bytes from which a copy is left to a thread."""


class Part:
    """One input on its way. `source` is None for a region, which stays where it is; `nbytes` is -1 until counted."""

    __slots__ = ("arena", "dtype", "nbytes", "number", "offset", "shape", "source")

    def __init__(self, number: int, tensor: Input, maps: Mapping[int, int]) -> None:
        """`maps` are the arenas (by inode) that the child sees. Raises InvalidInput for what no child can take."""
        self.number = number
        self.arena = self.offset = 0
        self.source: Tensor | None = None
        self.shape: tuple[int, ...] = tensor.shape
        if isinstance(tensor, Region):
            arena = maps.get(tensor.arena.inode)
            if arena is not None:
                self.dtype, self.nbytes = tensor.dtype, tensor.nbytes
                self.arena, self.offset = arena, tensor.offset
                return
            tensor = tensor.tensor()
        self.source = tensor
        if len(self.shape) > MAX_RANK:
            raise InvalidInput(f"a tensor has {len(self.shape)} dimensions, at most {MAX_RANK} are possible")
        if isinstance(tensor, Strings):
            if len(tensor.items) > MAX_ELEMENTS:
                raise InvalidInput(f"a tensor has {len(tensor.items)} strings, at most {MAX_ELEMENTS} are possible")
            self.dtype = DType.STRING
            self.nbytes = -1 if long(tensor) else tensor.nbytes
            return
        try:
            self.dtype = DType.of(tensor.dtype)
        except ValueError:
            raise InvalidInput(f"tensors of {tensor.dtype} are not known") from None
        self.nbytes = tensor.nbytes

    def flatten(self) -> None:
        """In a thread: count and join a long list of strings."""
        assert isinstance(self.source, Strings)
        self.source = flatten(self.source)
        self.nbytes = self.source.nbytes


class Call:
    """One request in a child's hands."""

    __slots__ = (
        "_forget",
        "deadline_ns",
        "descriptors",
        "ended",
        "held",
        "lease",
        "measured",
        "parts",
        "pictures",
        "reserves",
        "result",
        "room",
        "sent",
        "size",
        "space",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        inputs: Sequence[tuple[int, Input]],
        maps: Mapping[int, int],
        reserve: Sequence[int],
        deadline_ns: int,
        forget: Callable[[Call], None],
    ) -> None:
        """`maps` are the arenas (by inode) that the child sees, `reserve` is in bytes. Raises InvalidInput."""
        self.parts = [Part(number, tensor, maps) for number, tensor in inputs]
        self.room = [nbytes + ALIGN - 1 & -ALIGN if nbytes > 0 else 0 for nbytes in reserve]
        self.space = sum(self.room)
        """Bytes that the outputs may take."""
        self.size = 0
        """Bytes that the inputs take in the arena."""
        self.measured = self.measure()
        """Whether `size` is known; else `flatten` first, in a thread."""
        self.result: asyncio.Future[Reply] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        """Resolved when the child is done with it or will never see it: for a cancelled call that is later."""
        self.deadline_ns = deadline_ns
        self.sent = False
        self.descriptors: list[Descriptor] = []
        self.reserves: list[Descriptor] = []
        self.lease: Lease | None = None
        """Of the inputs; of the outputs too, unless they go to a decoder's memory."""
        self.pictures: Lease | None = None
        """Of outputs in a decoder's memory."""
        self.held = [tensor.lease for _, tensor in inputs if isinstance(tensor, Region)]
        for lease in self.held:
            lease.hold()
        self._forget = forget

    def cancel(self) -> None:
        """The caller wants no answer any more. Its memory stays leased until the child has answered or was reaped."""
        if not self.result.done():
            self.result.cancel()
            self._forget(self)

    def fail(self, error: Exception) -> None:
        """Tell the caller, if there still is one."""
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # a caller that has just gone is no fault to be logged

    def measure(self) -> bool:
        """Add up the inputs; False if there are strings to be counted first."""
        size = 0
        for part in self.parts:
            if part.nbytes < 0:
                return False
            if part.arena == 0:
                size += part.nbytes + ALIGN - 1 & -ALIGN
        self.size = size
        return True

    def flatten(self) -> None:
        """In a thread: count and join long lists of strings."""
        for part in self.parts:
            if part.nbytes < 0:
                part.flatten()
        self.measured = self.measure()

    def settle(self, lease: Lease, arena: int, offset: int) -> None:
        """Give each input its place in the lease, and each output its reserve from `offset` on in `arena`."""
        self.lease = lease
        at = lease.offset
        for part in self.parts:
            if part.arena == 0:
                part.offset = at
                at += part.nbytes + ALIGN - 1 & -ALIGN
            self.descriptors.append(
                Descriptor(part.number, part.arena, part.dtype, part.offset, part.nbytes, part.shape)
            )
        for number, nbytes in enumerate(self.room):
            self.reserves.append(Descriptor(number, arena, DType.UINT8, offset, nbytes))
            offset += nbytes

    @property
    def heavy(self) -> bool:
        """Whether copying it takes a thread."""
        return self.size > _MILLISECONDS

    def copy(self, memory: mmap.mmap) -> None:
        """Put all inputs into the arena."""
        for part in self.parts:
            if part.source is not None:
                write(memory, part.offset, part.source)

    def release(self, *, keep: Lease | None = None) -> None:
        """Give all memory back but `keep`. Idempotent."""
        lease, pictures, held = self.lease, self.pictures, self.held
        self.lease = self.pictures = None
        self.held = []
        self.parts = []
        if not self.ended.done():
            self.ended.set_result(None)
        if lease is not None and lease is not keep:
            lease.release()
        if pictures is not None and pictures is not keep:
            pictures.release()
        for other in held:
            other.release()


class Reply:
    """A child's answer: `outputs` in the child's order, read-only views into shared memory until `release`.

    `timings`: nanoseconds in the child, waiting (`queue_ns`) and running (`run_ns`).
    """

    __slots__ = ("_lease", "_loop", "_record", "outputs")

    def __init__(
        self, outputs: list[Tensor], record: Record, lease: Lease | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.outputs = outputs
        self._record = record
        self._lease = lease
        self._loop = loop

    @property
    def timings(self) -> dict[str, int]:
        return {"queue_ns": self._record.queue_ns, "run_ns": self._record.run_ns}

    @property
    def regions(self) -> list[Input]:
        """The outputs for handing on without a copy; what has no region (strings, overflow) is the tensor itself."""
        lease = self._lease
        if lease is None:
            raise ValueError("the reply was released")
        return [
            tensor
            if isinstance(tensor, Strings) or place.arena == OVERFLOW
            else Region(lease, place.offset, place.nbytes, place.dtype, place.shape)
            for tensor, place in zip(self.outputs, self._record.tensors, strict=True)
        ]

    def release(self) -> None:
        """Give the memory back; the outputs must not be used any more. Idempotent."""
        lease, self._lease = self._lease, None
        self.outputs = []
        if lease is not None:
            lease.release()

    def __enter__(self) -> Reply:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        # A caller that was cancelled in the very turn in which its answer came never sees it.
        lease, self._lease = self._lease, None
        if lease is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lease.release)


def outputs_of(
    call: Call, record: Record, fds: Sequence[int], memories: Sequence[mmap.mmap], limit: int
) -> list[Tensor] | Callable[[], list[Tensor]]:
    """The outputs in an answer, once it is sure that they stay inside what the call was given; strings are copied.

    `limit` bounds the memfd that came with it, in bytes. Raises ChannelError. Where copying takes long, a function that
    does it, for a thread; it can raise ChannelError too.
    """
    extra = _map(fds, limit) if fds else None
    if record.reserves:
        raise ChannelError("an answer that reserves memory")
    reserves, room = call.reserves, len(call.reserves)
    sources: list[memoryview | mmap.mmap] = []
    slow = False
    for place, (number, arena, dtype, offset, nbytes, shape) in enumerate(record.tensors):
        if number != place:
            raise ChannelError("an answer with its outputs out of order")
        if arena == OVERFLOW:
            if extra is None or offset % ALIGN or offset + nbytes > len(extra):
                raise ChannelError(f"output {place} lies outside its memfd")
            sources.append(extra)
        elif place >= room:
            raise ChannelError(f"output {place} lies where nothing was reserved")
        else:
            reserve = reserves[place]
            if arena != reserve.arena or offset != reserve.offset or nbytes > reserve.nbytes:
                raise ChannelError(f"output {place} lies outside its lease")
            sources.append(memoryview(memories[arena]).toreadonly())
        if dtype is DType.STRING:
            count = math.prod(shape)
            if count > MAX_ELEMENTS:
                raise ChannelError(f"{count} strings in one tensor")
            slow = slow or nbytes > _MILLISECONDS or count > MANY
    if slow:
        return lambda: list(map(read, sources, record.tensors))
    return list(map(read, sources, record.tensors))


def _map(fds: Sequence[int], limit: int) -> mmap.mmap:
    if len(fds) > 1:
        raise ChannelError(f"an answer with {len(fds)} descriptors")
    size = sealed_size(fds[0], limit)
    try:
        return mmap.mmap(fds[0], size, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise ChannelError(f"a memfd that cannot be mapped: {error}") from None
