"""Shared memory for tensors: a sealed memfd, an allocator with exact accounting, and the layout of tensors in it."""

from __future__ import annotations

import math
import mmap
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from agent.executor.channel import ChannelError, Descriptor, itemsize, sealed_memfd
from agent.model.signature import DType, Strings, Tensor

MAX_ELEMENTS = 1_000_000
"""The most strings in one tensor."""
ALIGN = 64
WARM = 16 << 20
"""What lies below is kept when it is freed (it is used again at once); pages above go back to the host."""
_GIVE_BACK = 256 << 10
MANY = 16_384
"""How many strings are dealt with in about a millisecond."""
_LENGTH = np.dtype("<u4")


def aligned(size: int) -> int:
    """`size` rounded up, so that what follows is aligned for any element."""
    return (size + ALIGN - 1) & -ALIGN


class Allocator:
    """First fit over [0, capacity), with neighbours joined when they are freed. Knows every allocation's size."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._starts = [0]
        self._sizes = [capacity]
        self._taken: dict[int, int] = {}

    def allocate(self, size: int) -> int | None:
        """The offset of `size` bytes (at least ALIGN, rounded up), None if no gap is large enough now."""
        size = max(ALIGN, aligned(size))
        for place, gap in enumerate(self._sizes):
            if gap >= size:
                start = self._starts[place]
                if gap == size:
                    del self._starts[place], self._sizes[place]
                else:
                    self._starts[place] = start + size
                    self._sizes[place] = gap - size
                self._taken[start] = size
                self.used += size
                return start
        return None

    def free(self, start: int) -> int:
        """Give back what `allocate` gave; how many bytes it was. KeyError for anything else."""
        size = self._taken.pop(start)
        self.used -= size
        place = bisect_left(self._starts, start)
        follows = place > 0 and self._starts[place - 1] + self._sizes[place - 1] == start
        leads = place < len(self._starts) and start + size == self._starts[place]
        if follows and leads:
            self._sizes[place - 1] += size + self._sizes[place]
            del self._starts[place], self._sizes[place]
        elif follows:
            self._sizes[place - 1] += size
        elif leads:
            self._starts[place] = start
            self._sizes[place] += size
        else:
            self._starts.insert(place, start)
            self._sizes.insert(place, size)
        return size

    def gaps(self) -> Iterator[tuple[int, int]]:
        """(offset, size) of what is free, in order."""
        return zip(self._starts, self._sizes, strict=True)


class Lease:
    """A part of an arena that is in use. Given back when the last holder lets go."""

    __slots__ = ("arena", "holds", "nbytes", "offset")

    def __init__(self, arena: Arena, offset: int, nbytes: int) -> None:
        self.arena, self.offset, self.nbytes, self.holds = arena, offset, nbytes, 1

    def hold(self) -> None:
        """One more holder."""
        assert self.holds > 0, "a lease that was given back cannot be held"
        self.holds += 1

    def release(self) -> None:
        """One holder fewer."""
        self.holds -= 1
        assert self.holds >= 0, "a lease was given back twice"
        if self.holds == 0:
            self.arena._free(self)


class Arena:
    """A memfd sealed against shrinking and growing, mapped here, with the allocator that only the parent has."""

    def __init__(self, capacity: int, *, name: str = "slotd-arena") -> None:
        """`capacity` in bytes, rounded up to whole pages; memory is only taken where something was written."""
        self.capacity = max(1, -(-capacity // mmap.PAGESIZE)) * mmap.PAGESIZE
        self.fd = sealed_memfd(name, self.capacity)
        try:
            self.inode = os.fstat(self.fd).st_ino
            self._map: mmap.mmap | None = mmap.mmap(self.fd, self.capacity)
        except BaseException:
            os.close(self.fd)
            raise
        self._allocator = Allocator(self.capacity)
        self.on_room: Callable[[], None] | None = None
        """Called once, the next time that something is given back."""

    @property
    def memory(self) -> mmap.mmap:
        """The whole of it, writable. ValueError once closed."""
        if self._map is None:
            raise ValueError("the arena is closed")
        return self._map

    @property
    def used(self) -> int:
        """Bytes leased; 0 when idle."""
        return self._allocator.used

    def lease(self, nbytes: int) -> Lease | None:
        """Room for `nbytes`; None if there is none now."""
        offset = self._allocator.allocate(nbytes)
        return None if offset is None else Lease(self, offset, nbytes)

    def _free(self, lease: Lease) -> None:
        size = self._allocator.free(lease.offset)
        end = lease.offset + size
        start = -(-max(lease.offset, WARM) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if end - start >= _GIVE_BACK and self._map is not None:
            # Pages shared with a neighbour stay; the rest returns to the host (a hole in the memfd, read as zeros).
            self._map.madvise(mmap.MADV_REMOVE, start, end - start)
        if self.on_room is not None:
            waiting, self.on_room = self.on_room, None
            waiting()

    def close(self) -> None:
        """Let go of descriptor and memory; tensors that look into it keep it mapped. Idempotent."""
        if self._map is not None:
            self._map = None
            os.close(self.fd)


class DecodedMemory(Arena):
    """Where one decoder puts its pictures; executors map it read-only. Outlives a decoder that died and was reaped."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, name="slotd-pictures")


@dataclass(frozen=True, slots=True)
class Region:
    """A numeric tensor that lies in an arena. Can be given to an executor that maps it, without a copy."""

    lease: Lease
    offset: int
    nbytes: int
    dtype: DType
    shape: tuple[int, ...]

    @property
    def arena(self) -> Arena:
        return self.lease.arena

    def tensor(self) -> npt.NDArray[np.generic]:
        """A read-only view; good as long as the lease is held."""
        return view(memoryview(self.arena.memory).toreadonly(), self.dtype, self.shape, self.offset)


# --- tensors in memory -----------------------------------------------------------------------------------------------


def view(memory: memoryview | mmap.mmap, dtype: DType, shape: tuple[int, ...], offset: int) -> npt.NDArray[np.generic]:
    """A numeric tensor in place; writable if the memory is."""
    return np.ndarray(shape, dtype.numpy, memory, offset)


def long(tensor: Strings) -> bool:
    """Whether even counting its bytes takes more than about a millisecond; `flatten` it in a thread first."""
    return len(tensor.items) > MANY


def flatten(tensor: Strings) -> npt.NDArray[np.uint8]:
    """A string tensor as it lies in an arena. Done in pieces, so that other threads run in between."""
    lengths: list[bytes] = []
    data: list[bytes] = []
    for start in range(0, len(tensor.items), MANY):
        part = tensor.items[start : start + MANY]
        lengths.append(np.fromiter(map(len, part), _LENGTH, len(part)).tobytes())
        data.append(b"".join(part))
    return np.frombuffer(b"".join(lengths + data), np.uint8)


def write(memory: memoryview | mmap.mmap, offset: int, tensor: Tensor) -> None:
    """Copy a tensor to its place. Other threads run while numpy copies; slice assignment would hold them up."""
    if not isinstance(tensor, Strings):
        np.copyto(view(memory, DType.of(tensor.dtype), tensor.shape, offset), tensor)
        return
    items = tensor.items
    lengths = np.fromiter(map(len, items), _LENGTH, len(items))
    np.ndarray(lengths.shape, _LENGTH, memory, offset)[:] = lengths
    data = items[0] if len(items) == 1 else b"".join(items)
    target = np.ndarray((len(data),), np.uint8, memory, offset + lengths.nbytes)
    np.copyto(target, np.frombuffer(data, np.uint8))


def read(memory: memoryview | mmap.mmap, descriptor: Descriptor) -> Tensor:
    """The tensor that a descriptor (whose offset and nbytes lie inside `memory`) describes.

    Numbers are a view, strings are copied. Raises ChannelError if shape, lengths and size do not agree.
    """
    _, _, dtype, offset, nbytes, shape = descriptor
    if dtype is DType.STRING:
        return _read_strings(memory, descriptor)
    if nbytes != math.prod(shape) * itemsize(dtype):
        raise ChannelError(f"{nbytes} bytes for {dtype.value} {list(shape)}")
    try:
        return np.ndarray(shape, dtype.numpy, memory, offset)
    except (ValueError, OverflowError):  # an empty tensor with a dimension that numpy cannot count
        raise ChannelError(f"a tensor of shape {list(shape)}") from None


def _read_strings(memory: memoryview | mmap.mmap, descriptor: Descriptor) -> Strings:
    count = math.prod(descriptor.shape)
    if count > MAX_ELEMENTS:
        raise ChannelError(f"{count} strings in one tensor")
    if 4 * count > descriptor.nbytes:
        raise ChannelError(f"{descriptor.nbytes} bytes for {count} strings")
    # Copied before they are checked: the other side could still change what lies in shared memory.
    lengths = np.ndarray((count,), _LENGTH, memory, descriptor.offset).copy()
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if count else 0
    if 4 * count + total != descriptor.nbytes:
        raise ChannelError(f"{descriptor.nbytes} bytes for {count} strings of {total} bytes together")
    data = np.ndarray((total,), np.uint8, memory, descriptor.offset + 4 * count).tobytes()
    items: list[bytes] = []
    start = 0
    for first in range(0, count, MANY):
        for end in ends[first : first + MANY].tolist():
            items.append(data[start:end])
            start = end
    return Strings(descriptor.shape, items)
