"""The child that parses large messages: python -I -m agent.serving.parse_child DESCRIPTOR BYTES.

For each message on its socket (a memfd) it answers with the tensors in another one (see handover). It imports no gRPC,
has little memory, and ends when the socket does.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback

from agent.errors import InvalidInput, Oversize, SlotdError
from agent.executor import sandbox
from agent.serving import handover
from agent.serving.forms import FORMS, Form
from agent.serving.tensorproto import Parsed

_FILES = 16
_BASE_MEMORY = 256 << 20
_COPIES = 20
"""How often the largest request may lie in memory: as bytes, as protobuf (lists double as they grow), as tensors; the
numbers of JSON have ten times its bytes."""


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    most = int(sys.argv[2])
    confine(most)
    while True:
        record, descriptors, _, _ = socket.recv_fds(channel, handover.TASK.size, 1)
        if not descriptors:
            return
        request = descriptors[0]
        try:
            form, size, more = handover.TASK.unpack(record)
            data, context = os.pread(request, size, 0), os.pread(request, more, size)
            reply, answer = handover.write(_outcome(FORMS[form], data, context, most))
        finally:
            os.close(request)
        try:
            socket.send_fds(channel, [answer], [reply])
        finally:
            os.close(reply)


def confine(most: int) -> None:
    """No more rights and memory than parsing needs."""
    memory = _BASE_MEMORY + _COPIES * most
    sandbox.enter(sandbox.Limits(memory, files=_FILES), sandbox.Grants())


def _outcome(form: Form, data: bytes, context: bytes, most: int) -> Parsed | SlotdError:
    try:
        return form.read(data, most=most, context=context)
    except SlotdError as error:
        return error
    except MemoryError:
        return Oversize("the request needs more memory to parse than it may have", field="request")
    except Exception:  # our own mistake, which must not cost the next one its child
        traceback.print_exc()
        return InvalidInput("cannot be read", field="request")


if __name__ == "__main__":
    main()
