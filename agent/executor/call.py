"""One request to a child and its answer, as the agent sees them."""

from __future__ import annotations

import asyncio
import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeAlias

from agent.errors import InvalidInput
from agent.executor.arena import MAX_ELEMENTS, Lease, Region, aligned, flatten, long, read, write
from agent.executor.channel import MAX_RANK, OVERFLOW, ChannelError, Descriptor, Record, sealed_size
from agent.model.signature import DType, Strings, Tensor, dtype_of

Input: TypeAlias = Tensor | Region
_MILLISECONDS = 4 << 20
"""Bytes from which a copy is left to a thread."""


@dataclass(slots=True)
class Part:
    """One input on its way. `source` is None for a region, which stays where it is."""

    index: int
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    source: Tensor | None
    arena: int = 0
    offset: int = 0

    @classmethod
    def of(cls, index: int, tensor: Input, maps: dict[int, int]) -> Part:
        """`maps` are the arenas (by inode) that the child sees. Raises InvalidInput for what no child can take."""
        if isinstance(tensor, Region):
            number = maps.get(tensor.arena.inode)
            if number is not None:
                return cls(index, tensor.dtype, tensor.shape, tensor.nbytes, None, number, tensor.offset)
            tensor = tensor.tensor()
        if len(tensor.shape) > MAX_RANK:
            raise InvalidInput(f"a tensor has {len(tensor.shape)} dimensions, at most {MAX_RANK} are possible")
        if isinstance(tensor, Strings):
            if len(tensor.items) > MAX_ELEMENTS:
                raise InvalidInput(f"a tensor has {len(tensor.items)} strings, at most {MAX_ELEMENTS} are possible")
            nbytes = -1 if long(tensor) else tensor.nbytes
            return cls(index, DType.STRING, tuple(tensor.shape), nbytes, tensor)
        try:
            return cls(index, dtype_of(tensor), tensor.shape, tensor.nbytes, tensor)
        except ValueError:
            raise InvalidInput(f"tensors of {tensor.dtype} are not known") from None

    def flatten(self) -> None:
        """In a thread: count and join a long list of strings."""
        assert isinstance(self.source, Strings)
        self.source = flatten(self.source)
        self.nbytes = self.source.nbytes

    def copy(self, memory: mmap.mmap) -> None:
        """Put the data where the child will look for it."""
        if self.source is not None:
            write(memory, self.offset, self.source)
            self.source = None

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(self.index, self.arena, self.dtype, self.offset, self.nbytes, self.shape)


class Call:
    """One request in a child's hands."""

    __slots__ = (
        "_forget",
        "deadline_ns",
        "ended",
        "held",
        "lease",
        "parts",
        "pictures",
        "reserves",
        "result",
        "room",
        "sent",
    )

    def __init__(
        self,
        result: asyncio.Future[Reply],
        parts: list[Part],
        held: Sequence[Lease],
        room: list[int],
        deadline_ns: int,
        forget: Callable[[Call], None],
    ) -> None:
        self.result = result
        self.ended: asyncio.Future[None] = result.get_loop().create_future()
        """Resolved when the child is done with it or will never see it: for a cancelled call that is later."""
        self.parts = parts
        self.room = room
        """Bytes to reserve for each output."""
        self.reserves: list[Descriptor] = []
        self.deadline_ns = deadline_ns
        self.sent = False
        self.lease: Lease | None = None
        """Of the inputs; of the outputs too, unless they go to a decoder's memory."""
        self.pictures: Lease | None = None
        """Of outputs in a decoder's memory."""
        self.held = list(held)
        for lease in held:
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

    @property
    def size(self) -> int:
        """Bytes that the inputs take in the arena."""
        return sum(aligned(part.nbytes) for part in self.parts if part.arena == 0)

    def settle(self) -> None:
        """Give each input its place in the lease."""
        assert self.lease is not None
        offset = self.lease.offset
        for part in self.parts:
            if part.arena == 0:
                part.offset = offset
                offset += aligned(part.nbytes)

    @property
    def heavy(self) -> bool:
        """Whether copying it takes a thread."""
        return sum(part.nbytes for part in self.parts if part.source is not None) > _MILLISECONDS

    def copy(self, memory: mmap.mmap) -> None:
        """Put all inputs into the arena."""
        for part in self.parts:
            part.copy(memory)

    def release(self, *, keep: Lease | None = None) -> None:
        """Give all memory back but `keep`. Idempotent."""
        leases = (self.lease, self.pictures, *self.held)
        self.lease = self.pictures = None
        self.held = []
        self.parts = []
        if not self.ended.done():
            self.ended.set_result(None)
        for lease in leases:
            if lease is not None and lease is not keep:
                lease.release()


@dataclass(eq=False)
class Reply:
    """A child's answer: `outputs` in the child's order, read-only views into shared memory until `release`.

    `timings`: nanoseconds in the child, waiting (`queue_ns`) and running (`run_ns`).
    """

    outputs: list[Tensor]
    timings: dict[str, int]
    _placed: list[Descriptor] = field(repr=False)
    _lease: Lease | None = field(repr=False)
    _loop: asyncio.AbstractEventLoop = field(repr=False)

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
            for tensor, place in zip(self.outputs, self._placed, strict=True)
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


def check(call: Call, record: Record, fds: Sequence[int], limit: int) -> mmap.mmap | None:
    """Whether an answer stays inside what its call was given; the memfd it came with, mapped.

    `limit` bounds that memfd, in bytes. Raises ChannelError.
    """
    extra: mmap.mmap | None = None
    if len(fds) > 1:
        raise ChannelError(f"an answer with {len(fds)} descriptors")
    if fds:
        size = sealed_size(fds[0], limit)
        try:
            extra = mmap.mmap(fds[0], size, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise ChannelError(f"a memfd that cannot be mapped: {error}") from None
    if record.reserves:
        raise ChannelError("an answer that reserves memory")
    for index, tensor in enumerate(record.tensors):
        if tensor.number != index:
            raise ChannelError("an answer with its outputs out of order")
        if tensor.arena == OVERFLOW:
            if extra is None or tensor.offset % 64 or tensor.offset + tensor.nbytes > len(extra):
                raise ChannelError(f"output {index} lies outside its memfd")
        elif index >= len(call.reserves):
            raise ChannelError(f"output {index} lies where nothing was reserved")
        else:
            reserve = call.reserves[index]
            if (tensor.arena, tensor.offset) != (reserve.arena, reserve.offset) or tensor.nbytes > reserve.nbytes:
                raise ChannelError(f"output {index} lies outside its lease")
    return extra


def outputs_of(record: Record, memories: Sequence[mmap.mmap], extra: mmap.mmap | None) -> list[Tensor]:
    """The outputs of a checked answer: views, or copies of strings. Raises ChannelError if sizes do not agree."""
    return [
        read(memoryview(extra if tensor.arena == OVERFLOW and extra else memories[tensor.arena]).toreadonly(), tensor)
        for tensor in record.tensors
    ]


def takes_long(record: Record) -> bool:
    """Whether `outputs_of` needs a thread: strings are copied one by one."""
    return any(
        tensor.dtype is DType.STRING and (math.prod(tensor.shape) > 16_384 or tensor.nbytes > _MILLISECONDS)
        for tensor in record.tensors
    )
