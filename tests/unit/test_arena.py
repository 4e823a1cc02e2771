"""Shared memory: the allocator's accounting, what is given back, and tensors as they lie there."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.executor.arena import (
    ALIGN,
    MANY,
    WARM,
    Allocator,
    Arena,
    Region,
    flatten,
    read,
    write,
)
from agent.executor.channel import ChannelError, Descriptor
from agent.model.signature import DType, Strings, Tensor, dtype_of


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000), st.integers(0, 1 << 30)), max_size=120))
def test_allocations_never_overlap_and_everything_comes_back(
    steps: list[tuple[bool, int, int]],
) -> None:
    capacity = 1 << 16
    allocator = Allocator(capacity)
    taken: dict[int, int] = {}
    for take, size, choice in steps:
        if take or not taken:
            start = allocator.allocate(size)
            room = max(ALIGN, -(-size // ALIGN) * ALIGN)
            if start is None:
                assert all(gap < room for _, gap in allocator.gaps()), "there was room"
                continue
            assert start % ALIGN == 0 and start + room <= capacity
            assert all(start + room <= other or other + length <= start for other, length in taken.items())
            taken[start] = room
        else:
            start = sorted(taken)[choice % len(taken)]
            assert allocator.free(start) == taken.pop(start)
        assert allocator.used == sum(taken.values())
        gaps = list(allocator.gaps())
        assert sum(size for _, size in gaps) == capacity - allocator.used
        assert all(a + size < b for (a, size), (b, _) in itertools.pairwise(gaps)), "neighbours not joined"
    for start in tuple(taken):
        allocator.free(start)
    assert allocator.used == 0 and list(allocator.gaps()) == [(0, capacity)]


def test_what_was_not_allocated_cannot_be_freed() -> None:
    allocator = Allocator(4096)
    start = allocator.allocate(100)
    assert start is not None
    with pytest.raises(KeyError):
        allocator.free(start + ALIGN)
    allocator.free(start)
    with pytest.raises(KeyError):
        allocator.free(start)


def test_a_lease_ends_with_its_last_holder_and_makes_room() -> None:
    arena = Arena(1 << 16)
    lease = arena.lease(1 << 16)
    assert lease is not None and arena.lease(1) is None
    told: list[int] = []
    arena.on_room = lambda: told.append(arena.used)
    lease.hold()
    lease.release()
    assert arena.used == 1 << 16 and not told
    lease.release()
    assert arena.used == 0 and told == [0]
    with pytest.raises(AssertionError):
        lease.release()
    arena.close()


def test_freed_memory_returns_to_the_host() -> None:
    arena = Arena(128 << 20)

    def resident() -> int:
        return os.fstat(arena.fd).st_blocks * 512

    leases = [arena.lease(32 << 20) for _ in range(3)]
    for lease in leases:
        assert lease is not None
        write(arena.memory, lease.offset, np.ones(32 << 20, np.uint8))
    assert resident() >= 96 << 20
    for lease in leases:
        assert lease is not None
        lease.release()
    assert arena.used == 0
    assert resident() <= WARM + (1 << 20)
    arena.close()


def test_giving_back_spares_the_neighbours() -> None:
    arena = Arena(64 << 20)
    below = arena.lease(WARM + 1000)
    middle = arena.lease((4 << 20) + 128)
    above = arena.lease(1000)
    assert below is not None and middle is not None and above is not None
    marks = np.arange(1000, dtype=np.uint8)
    write(arena.memory, below.offset + WARM, marks)
    write(arena.memory, above.offset, marks)
    write(arena.memory, middle.offset, np.ones(4 << 20, np.uint8))
    middle.release()
    for offset in (below.offset + WARM, above.offset):
        assert bytes(arena.memory[offset : offset + 1000]) == marks.tobytes()
    arena.close()


def test_nobody_can_resize_it() -> None:
    arena = Arena(1 << 20)
    for size in (0, 4096, 1 << 21):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    arena.close()


def test_tensors_outlive_a_closed_arena() -> None:
    arena = Arena(1 << 20)
    lease = arena.lease(400)
    assert lease is not None
    write(arena.memory, lease.offset, np.arange(100, dtype=np.float32))
    tensor = Region(lease, lease.offset, 400, DType.FLOAT32, (10, 10)).tensor()
    arena.close()
    lease.release()
    assert tensor.sum() == 4950 and not tensor.flags.writeable


def through(tensor: Tensor) -> Tensor:
    """A tensor after it lay in an arena."""
    arena = Arena(64 << 20)
    write(arena.memory, 128, tensor)
    return read(arena.memory, Descriptor(0, 0, dtype_of(tensor), 128, tensor.nbytes, tuple(tensor.shape)))


@pytest.mark.parametrize("dtype", [dtype for dtype in DType if dtype is not DType.STRING])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4), (1,) * 8])
def test_numbers_come_back_as_they_were(dtype: DType, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).integers(0, 100, shape).astype(dtype.numpy)
    back = through(values)
    assert isinstance(back, np.ndarray) and back.dtype == values.dtype and back.shape == values.shape
    assert np.array_equal(back, values)


def test_strided_and_foreign_byte_order_arrays_are_copied_right() -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert np.array_equal(through(values[::2, ::-3]), values[::2, ::-3])  # type: ignore[arg-type]
    assert np.array_equal(through(values.T), values.T)  # type: ignore[arg-type]
    assert np.array_equal(through(values.astype(">f4")), values)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=40))
def test_strings_come_back_as_they_were(items: list[bytes]) -> None:
    back = through(Strings((len(items),), items))
    assert isinstance(back, Strings) and list(back.items) == items and back.shape == (len(items),)
    assert flatten(Strings((len(items),), items)).tobytes() == (
        b"".join(len(item).to_bytes(4, "little") for item in items) + b"".join(items)
    )


def test_many_strings_in_pieces() -> None:
    items = [b"%d" % place for place in range(3 * MANY + 7)]
    back = through(Strings((len(items), 1), items))
    assert isinstance(back, Strings) and back.items == items
    flat = flatten(Strings((len(items), 1), items))
    assert flat.nbytes == back.nbytes


@pytest.mark.parametrize(
    ("lengths", "shape", "nbytes"),
    [
        ((1, 2), (2,), 12),  # a byte more than the lengths say
        ((0xFFFFFFFF, 0xFFFFFFFF), (2,), 11),
        ((1, 2), (3,), 11),
        ((1, 2), (1 << 40, 1 << 40), 11),
        ((1, 2), (1_000_001,), 8 << 20),
        ((), (), 3),
    ],
)
def test_string_tensors_that_lie_are_refused(lengths: tuple[int, ...], shape: tuple[int, ...], nbytes: int) -> None:
    arena = Arena(16 << 20)
    write(arena.memory, 0, np.array(lengths, np.uint32))
    with pytest.raises(ChannelError):
        read(arena.memory, Descriptor(0, 0, DType.STRING, 0, nbytes, shape))


@pytest.mark.parametrize(("shape", "nbytes"), [((5,), 16), ((1 << 40, 1 << 40), 16), ((0, 1 << 63, 1 << 63), 0)])
def test_shapes_that_lie_are_refused(shape: tuple[int, ...], nbytes: int) -> None:
    arena = Arena(1 << 16)
    with pytest.raises(ChannelError):
        read(arena.memory, Descriptor(0, 0, DType.FLOAT32, 0, nbytes, shape))
