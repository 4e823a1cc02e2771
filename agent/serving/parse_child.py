"""The child that parses large messages: python -I -m agent.serving.parse_child DESCRIPTOR BYTES.

For each message on its socket (a memfd) it answers with the tensors in another one (see handover). It imports no gRPC,
has little memory, and ends when the socket does.
"""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import sys

from agent.errors import Overloaded, SlotdError
from agent.serving import handover
from agent.serving.tensorproto import Parsed, read_request

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_BASE_MEMORY = 256 << 20
_COPIES = 10
"""How often the largest request may lie in memory: as bytes, as protobuf (lists double as they grow), as tensors."""


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    most = int(sys.argv[2])
    confine(most)
    while True:
        record, descriptors, _, _ = socket.recv_fds(channel, handover.RECORD.size, 1)
        if not descriptors:
            return
        request = descriptors[0]
        try:
            _, size = handover.RECORD.unpack(record)
            reply, answer = handover.write(_outcome(os.pread(request, size, 0), most))
        finally:
            os.close(request)
        try:
            socket.send_fds(channel, [answer], [reply])
        finally:
            os.close(reply)


def confine(most: int) -> None:
    """No more rights and memory than parsing needs."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for option, value in ((_PR_SET_DUMPABLE, 0), (_PR_SET_NO_NEW_PRIVS, 1)):
        if prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    memory = _BASE_MEMORY + _COPIES * most
    for limit, value in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(limit, (value, value))


def _outcome(data: bytes, most: int) -> Parsed | SlotdError:
    try:
        return read_request(data, most=most)
    except SlotdError as error:
        return error
    except MemoryError:
        return Overloaded("the request needs more memory to parse than it may have", field="request")


if __name__ == "__main__":
    main()
