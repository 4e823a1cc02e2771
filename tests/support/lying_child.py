"""A child that breaks the rules of the channel, each time in the way that its hello names."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

from agent.executor import channel, sandbox
from agent.executor.channel import OVERFLOW, Descriptor, Kind, Receiver, Record, pack
from agent.model.signature import DType

Lie = Callable[["Liar", Record], None]
LIES: dict[str, Lie] = {}


class Liar:
    """The child's end, without any of its manners."""

    def __init__(self) -> None:
        sandbox.isolate_descriptors(3)
        self.sock = socket.socket(fileno=3)
        self.receiver = Receiver(self.sock)
        record, fds = self.receiver.receive()
        self.generation = record.generation
        self.hello = channel.read_document(record, fds)["hello"]
        self.arena = fds[0]

    def send(self, record: Record, fds: tuple[int, ...] = ()) -> None:
        channel.send(self.sock, pack(record), fds)

    def done(
        self,
        run: Record,
        *tensors: Descriptor,
        fds: tuple[int, ...] = (),
        said: int | None = None,
        ticket: int | None = None,
        generation: int | None = None,
    ) -> None:
        """An answer, with whatever is given put wrong."""
        self.send(
            Record(
                Kind.DONE,
                run.generation if generation is None else generation,
                run.ticket if ticket is None else ticket,
                tensors=tensors,
                fds=len(fds) if said is None else said,
            ),
            fds,
        )

    def serve(self) -> None:
        if self.hello["lie"] == "silent":
            self.receiver.receive()  # never ready
        if self.hello["lie"] == "ready that is no JSON":
            self.send(Record(Kind.READY, self.generation, text=b"{"))
        self.send(Record(Kind.READY, self.generation, text=b'{"kind": "liar"}'))
        while True:
            record, _ = self.receiver.receive()
            if record.kind is Kind.STOP:
                return
            LIES[self.hello["lie"]](self, record)


def lie(function: Lie) -> Lie:
    LIES[function.__name__] = function
    return function


def good(run: Record, nbytes: int = 16) -> Descriptor:
    """What the first output should look like."""
    place = run.reserves[0]
    return Descriptor(0, place.arena, DType.UINT8, place.offset, nbytes, (nbytes,))


@lie
def wrong_offset(liar: Liar, run: Record) -> None:
    liar.done(run, good(run)._replace(offset=run.reserves[0].offset + 64))


@lie
def offset_beyond_everything(liar: Liar, run: Record) -> None:
    liar.done(run, good(run)._replace(offset=1 << 62))


@lie
def another_arena(liar: Liar, run: Record) -> None:
    liar.done(run, good(run)._replace(arena=1))


@lie
def longer_than_its_lease(liar: Liar, run: Record) -> None:
    size = run.reserves[0].nbytes + 64
    liar.done(run, good(run, size))


@lie
def size_that_is_not_its_shape(liar: Liar, run: Record) -> None:
    liar.done(run, good(run)._replace(shape=(17,)))


@lie
def shape_that_overflows(liar: Liar, run: Record) -> None:
    liar.done(run, good(run)._replace(shape=(1 << 32, 1 << 32, 1 << 32)))


@lie
def empty_shape_that_overflows(liar: Liar, run: Record) -> None:
    liar.done(run, good(run, 0)._replace(shape=(0, 1 << 63, 1 << 63)))


@lie
def nothing_reserved(liar: Liar, run: Record) -> None:
    liar.done(run, good(run), *(good(run)._replace(number=place) for place in range(1, len(run.reserves) + 1)))


@lie
def out_of_order(liar: Liar, run: Record) -> None:
    liar.done(run, good(run)._replace(number=1))


@lie
def string_lengths_that_lie(liar: Liar, run: Record) -> None:
    place = run.reserves[0]
    os.pwrite(liar.arena, b"\xff\xff\xff\xff" * 4, place.offset)
    liar.done(run, good(run)._replace(dtype=DType.STRING, shape=(4,)))


@lie
def strings_without_number(liar: Liar, run: Record) -> None:
    liar.done(run, good(run)._replace(dtype=DType.STRING, shape=(1 << 40,)))


@lie
def double_reply(liar: Liar, run: Record) -> None:
    liar.done(run, good(run))
    liar.done(run, good(run))


@lie
def unknown_ticket(liar: Liar, run: Record) -> None:
    liar.done(run, good(run), ticket=run.ticket + 1000)


@lie
def ticket_zero(liar: Liar, run: Record) -> None:
    liar.done(run, good(run), ticket=0)


@lie
def another_generation(liar: Liar, run: Record) -> None:
    liar.done(run, good(run), generation=run.generation + 1)


@lie
def ready_again(liar: Liar, run: Record) -> None:
    liar.send(Record(Kind.READY, run.generation, text=b"{}"))


@lie
def the_parents_own_words(liar: Liar, run: Record) -> None:
    liar.send(Record(Kind.RUN, run.generation, run.ticket))


@lie
def reserves_of_its_own(liar: Liar, run: Record) -> None:
    liar.send(Record(Kind.DONE, run.generation, run.ticket, tensors=[good(run)], reserves=[good(run)]))


@lie
def garbage(liar: Liar, run: Record) -> None:
    liar.sock.send(os.urandom(200))


@lie
def a_record_cut_short(liar: Liar, run: Record) -> None:
    liar.sock.send(pack(Record(Kind.DONE, run.generation, run.ticket, tensors=[good(run)]))[:-1])


@lie
def a_record_too_long(liar: Liar, run: Record) -> None:
    liar.sock.send(pack(Record(Kind.DONE, run.generation, run.ticket)) + bytes(100_000))


@lie
def an_empty_datagram(liar: Liar, run: Record) -> None:
    liar.sock.send(b"")


@lie
def a_flood(liar: Liar, run: Record) -> None:
    for _ in range(100_000):
        liar.done(run, good(run))


@lie
def an_error_that_is_no_json(liar: Liar, run: Record) -> None:
    liar.send(Record(Kind.FAILED, run.generation, run.ticket, text=b"[" * 50_000))


@lie
def an_error_of_wrong_types(liar: Liar, run: Record) -> None:
    liar.send(Record(Kind.FAILED, run.generation, run.ticket, text=b'["no object"]'))


@lie
def a_memfd_that_can_shrink(liar: Liar, run: Record) -> None:
    fd = os.memfd_create("lie", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    liar.done(run, good(run)._replace(arena=OVERFLOW, offset=0), fds=(fd,))


@lie
def a_memfd_too_short(liar: Liar, run: Record) -> None:
    fd = channel.sealed_memfd("lie", 4096)
    liar.done(run, good(run, 8192)._replace(arena=OVERFLOW, offset=0), fds=(fd,))


@lie
def a_memfd_too_large(liar: Liar, run: Record) -> None:
    fd = channel.sealed_memfd("lie", 1 << 40)
    liar.done(run, good(run)._replace(arena=OVERFLOW, offset=0), fds=(fd,))


@lie
def an_empty_memfd(liar: Liar, run: Record) -> None:
    fd = channel.sealed_memfd("lie", 0)
    liar.done(run, good(run, 0)._replace(arena=OVERFLOW, offset=0), fds=(fd,))


@lie
def no_memfd_at_all(liar: Liar, run: Record) -> None:
    liar.done(run, good(run)._replace(arena=OVERFLOW, offset=0))


@lie
def a_pipe_for_a_memfd(liar: Liar, run: Record) -> None:
    liar.done(run, good(run)._replace(arena=OVERFLOW, offset=0), fds=(os.pipe()[0],))


@lie
def too_many_descriptors(liar: Liar, run: Record) -> None:
    liar.done(run, good(run), fds=(liar.arena,) * 60, said=20)


@lie
def two_memfds(liar: Liar, run: Record) -> None:
    liar.done(run, good(run), fds=(liar.arena, liar.arena))


@lie
def descriptors_unannounced(liar: Liar, run: Record) -> None:
    liar.done(run, good(run), fds=(liar.arena,), said=0)


@lie
def descriptors_missing(liar: Liar, run: Record) -> None:
    liar.done(run, good(run), said=1)


@lie
def truncates_the_arena(liar: Liar, run: Record) -> None:
    """Cannot be done; whoever managed to would answer, and the parent's next look would be its last."""
    for size in (0, 4096, 1 << 40):
        try:
            os.ftruncate(liar.arena, size)
        except PermissionError:
            continue
        liar.done(run, good(run))
        return
    os._exit(7)


def main() -> int:
    Liar().serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
