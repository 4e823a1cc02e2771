"""Records: what one side packs the other unpacks, and nothing else is believed."""

from __future__ import annotations

import os
import random
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.executor import channel
from agent.executor.channel import (
    MAX_TEXT,
    ChannelClosed,
    ChannelError,
    Descriptor,
    Kind,
    Receiver,
    Record,
    pack,
    unpack,
)
from agent.executor.spawn import pair
from agent.model.signature import DType

descriptors = st.lists(
    st.builds(
        Descriptor,
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
        st.sampled_from(DType),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, (1 << 64) - 1),
        st.lists(st.integers(0, (1 << 64) - 1), max_size=8).map(tuple),
    ),
    max_size=32,
)
u64 = st.integers(0, (1 << 64) - 1)
records = st.builds(
    Record,
    st.sampled_from(Kind),
    st.integers(0, (1 << 32) - 1),
    u64,
    st.integers(-(1 << 63), (1 << 63) - 1),
    u64,
    u64,
    descriptors,
    descriptors,
    st.binary(max_size=500),
)
RECORD = Record(
    Kind.DONE,
    7,
    9,
    tensors=[Descriptor(0, 0, DType.FLOAT32, 64, 16, (2, 2)), Descriptor(1, 0, DType.STRING, 128, 9, (1,))],
    text=b"words",
)


@pytest.fixture
def ends() -> tuple[socket.socket, socket.socket]:
    ours, theirs = pair()
    return ours, theirs


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@settings(max_examples=200, deadline=None)
@given(records)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    assert unpack(pack(record)) == record


def test_whatever_is_not_a_record_is_refused() -> None:
    good = pack(RECORD)
    chance = random.Random(1)
    for size in range(len(good)):
        with pytest.raises(ChannelError):
            unpack(good[:size])
    with pytest.raises(ChannelError):
        unpack(good + b"\0")
    for _ in range(20_000):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        try:
            record = unpack(bytes(bad))
        except ChannelError:
            continue
        assert pack(record) == bad  # whatever passes means exactly what it says


def test_too_much_for_a_record() -> None:
    for record in (
        Record(Kind.RUN, tensors=[Descriptor(0, 0, DType.UINT8, 0, 0)] * 33),
        Record(Kind.FAILED, text=bytes(MAX_TEXT + 1)),
    ):
        with pytest.raises(ChannelError):
            pack(record)


def test_descriptors_travel_with_their_record(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    before = open_files()
    fd = channel.sealed_memfd("test", 4096)
    channel.send(theirs, pack(Record(Kind.DONE, fds=1)), [fd])
    record, fds = Receiver(ours).receive()
    assert record.fds == 1 and channel.sealed_size(fds[0], 1 << 20) == 4096
    assert not os.get_inheritable(fds[0])
    channel.close_all([fd, *fds])
    assert open_files() == before


@pytest.mark.parametrize(("sent", "said"), [(2, 1), (1, 0), (0, 1), (60, 20), (60, 60)])
def test_other_descriptors_than_announced_are_closed(
    ends: tuple[socket.socket, socket.socket], sent: int, said: int
) -> None:
    ours, theirs = ends
    before = open_files()
    data = bytearray(pack(Record(Kind.DONE)))
    data[7] = said
    channel.send(theirs, bytes(data), [0] * sent)
    with pytest.raises(ChannelError):
        Receiver(ours).receive()
    assert open_files() == before


def test_the_end_of_the_other_side(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    receiver = Receiver(ours)
    with pytest.raises(BlockingIOError):
        receiver.receive()
    theirs.send(b"")
    with pytest.raises(ChannelClosed):
        receiver.receive()
    theirs.send(bytes(100_000))
    with pytest.raises(ChannelError):
        receiver.receive()
    theirs.close()
    with pytest.raises(ChannelClosed):
        receiver.receive()
    with pytest.raises(ChannelClosed):
        channel.send(ours, b"x")


@pytest.mark.parametrize("size", [0, 100, MAX_TEXT * 2])
def test_documents_of_any_size(ends: tuple[socket.socket, socket.socket], size: int) -> None:
    ours, theirs = ends
    data, fds = channel.pack_document(Record(Kind.READY, fds=0), {"text": "x" * size})
    channel.send(theirs, data, fds)
    channel.close_all(fds)
    record, received = Receiver(ours).receive()
    assert len(received) == (size > MAX_TEXT)
    assert channel.read_document(record, received) == {"text": "x" * size}
    channel.close_all(received)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"[" * 50_000, b"\xff"])
def test_documents_that_are_none(text: bytes) -> None:
    with pytest.raises(ChannelError):
        channel.read_document(Record(Kind.READY, text=text), [])


def test_only_a_memfd_that_stays_as_long_as_it_is_will_do() -> None:
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 4096)
    for fd in (loose, os.open(os.devnull, os.O_RDONLY), os.pipe()[0]):
        with pytest.raises(ChannelError):
            channel.sealed_size(fd, 1 << 20)
        os.close(fd)
    large = channel.sealed_memfd("large", 1 << 30)
    with pytest.raises(ChannelError):
        channel.sealed_size(large, 1 << 20)
    os.close(large)
