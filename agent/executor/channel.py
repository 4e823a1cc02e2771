"""The channel between the agent and a child: records of fixed size over a SOCK_SEQPACKET socketpair.

One record is one datagram: a header, `tensors` + `reserves` descriptors, then `text` bytes of JSON. Its length must be
exactly what its header says. Tensor data never goes through the socket: a descriptor says where it lies in shared
memory. Both sides use this module; the parent believes nothing that it has not checked here or against its own lease.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from agent.model.signature import DType

MAX_TENSORS = 32
MAX_RANK = 8
MAX_TEXT = 60 * 1024
MAX_DOCUMENT = 8 << 20
"""The largest JSON document; above MAX_TEXT it goes in a sealed memfd."""
MAX_FDS = 20
OVERFLOW = 0xFFFF
"""The arena number of a one-off memfd."""

HEADER = struct.Struct("<4sBBBBIIQqQQ")
DESCRIPTOR = struct.Struct("<HHBBHQQ8Q")
MAX_RECORD = HEADER.size + 2 * MAX_TENSORS * DESCRIPTOR.size + MAX_TEXT
_MAGIC = b"SLT1"
_PADDING = tuple((0,) * (MAX_RANK - rank) for rank in range(MAX_RANK + 1))
_CUT = int(socket.MSG_TRUNC) | int(socket.MSG_CTRUNC)
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * 4)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Kind(IntEnum):
    """What a record is. HELLO, RUN and STOP go to the child, the others come from it."""

    HELLO = 1
    RUN = 2
    STOP = 3
    READY = 4
    DONE = 5
    FAILED = 6
    """A call (or, with ticket 0, the load) failed; the text is the error."""


class ChannelError(Exception):
    """The other side broke the rules of the channel."""


class ChannelClosed(Exception):
    """The other side has gone."""


class Descriptor(NamedTuple):
    """Where a tensor lies: `offset` and `nbytes` in arena `arena`; and what it is.

    `number` is the place in the child's list of inputs or outputs. A reserve has no shape.
    """

    number: int
    arena: int
    dtype: DType
    offset: int
    nbytes: int
    shape: tuple[int, ...] = ()


@dataclass(slots=True)
class Record:
    """One record. `ticket` and `generation` match answers to calls; times are nanoseconds of the monotonic clock."""

    kind: Kind
    generation: int = 0
    ticket: int = 0
    deadline_ns: int = 0
    queue_ns: int = 0
    run_ns: int = 0
    tensors: Sequence[Descriptor] = ()
    reserves: Sequence[Descriptor] = ()
    text: bytes = b""
    fds: int = 0


_KINDS = {int(kind): kind for kind in Kind}
_DTYPES = tuple(DType)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_ITEMSIZE: dict[DType, int] = {dtype: dtype.numpy.itemsize for dtype in DType if dtype is not DType.STRING}


def itemsize(dtype: DType) -> int:
    """Bytes of one element; KeyError for STRING."""
    return _ITEMSIZE[dtype]


def pack(record: Record) -> bytes:
    """The datagram of a record. Raises ChannelError for one that is too large."""
    tensors, reserves, text = record.tensors, record.reserves, record.text
    count, more = len(tensors), len(reserves)
    if count > MAX_TENSORS or more > MAX_TENSORS or len(text) > MAX_TEXT:
        raise ChannelError("the record is too large")
    data = bytearray(HEADER.size + (count + more) * DESCRIPTOR.size)
    HEADER.pack_into(
        data,
        0,
        _MAGIC,
        record.kind,
        count,
        more,
        record.fds,
        record.generation,
        len(text),
        record.ticket,
        record.deadline_ns,
        record.queue_ns,
        record.run_ns,
    )
    at = HEADER.size
    for group in (tensors, reserves):
        for number, arena, dtype, offset, nbytes, shape in group:
            rank = len(shape)
            padding = _PADDING[rank]
            DESCRIPTOR.pack_into(data, at, number, arena, _CODES[dtype], rank, 0, offset, nbytes, *shape, *padding)
            at += DESCRIPTOR.size
    return bytes(data) + text


def unpack(data: bytes | bytearray, size: int | None = None) -> Record:
    """The record in the first `size` bytes (default: all). Raises ChannelError for what `pack` would not have made."""
    if size is None:
        size = len(data)
    if size < HEADER.size:
        raise ChannelError(f"a record of {size} bytes")
    magic, kind, tensors, reserves, fds, generation, text, ticket, deadline, queue_ns, run_ns = HEADER.unpack_from(data)
    known = _KINDS.get(kind)
    if magic != _MAGIC or known is None:
        raise ChannelError("a record without its mark, or of unknown kind")
    if tensors > MAX_TENSORS or reserves > MAX_TENSORS or fds > MAX_FDS or text > MAX_TEXT:
        raise ChannelError("a record with counts out of bounds")
    middle = HEADER.size + tensors * DESCRIPTOR.size
    end = middle + reserves * DESCRIPTOR.size
    if size != end + text:
        raise ChannelError(f"a record of {size} bytes that should have {end + text}")
    return Record(
        known,
        generation,
        ticket,
        deadline,
        queue_ns,
        run_ns,
        _descriptors(data, HEADER.size, middle),
        _descriptors(data, middle, end),
        bytes(data[end:size]) if text else b"",
        fds,
    )


def _descriptors(data: bytes | bytearray, at: int, end: int) -> list[Descriptor]:
    found = []
    while at < end:
        fields = DESCRIPTOR.unpack_from(data, at)
        number, arena, code, rank, zero, offset, nbytes = fields[:7]
        if code >= len(_DTYPES) or rank > MAX_RANK or zero or fields[7 + rank :] != _PADDING[rank]:
            raise ChannelError("a tensor with a malformed dtype, rank or shape")
        found.append(Descriptor(number, arena, _DTYPES[code], offset, nbytes, fields[7 : 7 + rank]))
        at += DESCRIPTOR.size
    return found


# --- the socket ------------------------------------------------------------------------------------------------------


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """One datagram. Raises BlockingIOError as the socket is set, ChannelClosed if the other side has gone."""
    try:
        if fds:
            sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        else:
            sock.send(data)
    except (BrokenPipeError, ConnectionResetError):
        raise ChannelClosed from None


class Receiver:
    """The reading side of a socket, with a buffer of its own."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray(MAX_RECORD)

    def receive(self) -> tuple[Record, list[int]]:
        """One record and the descriptors that came with it, which are the caller's to close.

        Raises ChannelClosed at the end, ChannelError (with every descriptor closed) for a malformed record or too many
        descriptors, BlockingIOError as the socket is set.
        """
        try:
            size, ancillary, flags, _ = self._sock.recvmsg_into((self._buffer,), _ANCILLARY, _CLOEXEC)
        except ConnectionResetError:
            raise ChannelClosed from None
        fds = _received(ancillary) if ancillary else []
        try:
            if flags & _CUT:
                raise ChannelError("a record that is too long, or with too many descriptors")
            if not size:
                raise ChannelClosed
            record = unpack(self._buffer, size)
            if record.fds != len(fds):
                raise ChannelError(f"a record with {len(fds)} descriptors that says {record.fds}")
        except BaseException:
            close_all(fds)
            raise
        return record, fds


def _received(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) // fds.itemsize * fds.itemsize])
    return list(fds)


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


# --- documents and memfds --------------------------------------------------------------------------------------------


def sealed_memfd(name: str, size: int) -> int:
    """A memfd of `size` bytes that nobody can make shorter or longer."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sealed_size(fd: int, limit: int) -> int:
    """The size of a memfd that can never get shorter. Raises ChannelError for any other file, or a larger one."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError as error:
        raise ChannelError(f"a descriptor that is no memfd: {error.strerror}") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ChannelError("a memfd that can be truncated")
    if size > limit:
        raise ChannelError(f"a memfd of {size} bytes, above the limit of {limit}")
    return size


def pack_document(record: Record, document: Any) -> tuple[bytes, list[int]]:
    """`record` carrying a JSON document; the descriptors (none or one memfd) are to be sent with it, then closed."""
    text = json.dumps(document, separators=(",", ":")).encode()
    if len(text) <= MAX_TEXT:
        record.text = text
        return pack(record), []
    if len(text) > MAX_DOCUMENT:
        raise ChannelError(f"a document of {len(text)} bytes")
    fd = sealed_memfd("slotd-document", len(text))
    try:
        os.pwrite(fd, text, 0)
        record.fds += 1
        return pack(record), [fd]
    except BaseException:
        os.close(fd)
        raise


def read_document(record: Record, fds: Sequence[int]) -> dict[str, Any]:
    """The JSON object that came with a record, in its text or in its last descriptor. Raises ChannelError."""
    text = record.text
    if not text and fds:
        text = os.pread(fds[-1], sealed_size(fds[-1], MAX_DOCUMENT), 0)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise ChannelError("a document that is not JSON") from None
    if not isinstance(document, dict):
        raise ChannelError("a document that is not an object")
    return document
