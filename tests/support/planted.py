"""A child of slotd with foreign code in it: the real entry of its role, and then what an attacker would try.

`python -I planted.py ROLE MODE TARGETS`: MODE is `confined`, or `free` for the same child without its sandbox. What
came of each attempt is `done` or the name of an errno.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

ROLE, MODE, TARGETS = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
TGKILL = {"x86_64": 234, "aarch64": 131}[os.uname().machine]


def check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def inet() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        one.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)


def listen() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        one.bind(("127.0.0.1", 0))
        one.listen()


def admin() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.connect(TARGETS["admin"])


def key() -> None:
    with open(TARGETS["key"], "rb") as file:
        file.read()


def journal() -> None:
    with open(TARGETS["journal"], "r+b") as file:
        file.write(b"x")


def memory() -> None:
    with open(f"/proc/{TARGETS['parent']}/mem", "r+b", buffering=0) as file:
        file.seek(TARGETS["address"])
        assert file.read(6) == b"secret"


def read_memory() -> None:
    here = ctypes.create_string_buffer(6)
    ours = (ctypes.c_size_t * 2)(ctypes.addressof(here), 6)
    theirs = (ctypes.c_size_t * 2)(TARGETS["address"], 6)
    check(libc.process_vm_readv(TARGETS["parent"], ours, 1, theirs, 1, 0))
    assert here.raw == b"secret"


def trace() -> None:
    check(libc.ptrace(0x4206, TARGETS["parent"], 0, 0))  # PTRACE_SEIZE; it ends with us


def kill() -> None:
    os.kill(TARGETS["parent"], signal.SIGURG)


def kill_thread() -> None:
    check(libc.syscall(TGKILL, TARGETS["parent"], TARGETS["parent"], int(signal.SIGURG)))


def kill_by_descriptor() -> None:
    fd = os.pidfd_open(TARGETS["parent"])
    signal.pidfd_send_signal(fd, signal.SIGURG)
    os.close(fd)


def kill_by_owner() -> None:
    read, write = os.pipe()
    try:
        fcntl.fcntl(read, fcntl.F_SETOWN, TARGETS["parent"])
    finally:
        os.close(read)
        os.close(write)


def limit() -> None:
    resource.prlimit(TARGETS["parent"], resource.RLIMIT_CORE, (0, 0))


def slow_down() -> None:
    os.sched_setaffinity(TARGETS["parent"], os.sched_getaffinity(0))


def execute() -> None:
    """In a process of its own if there can be one."""
    try:
        pid = os.fork()
    except PermissionError:
        os.execv("/bin/true", ["true"])
    if pid == 0:
        try:
            os.execv("/bin/true", ["true"])
        except OSError as error:
            os._exit(error.errno)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, "")


def spawn() -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def outside() -> None:
    with open(TARGETS["outside"], "rb") as file:
        file.read()


def list_outside() -> None:
    os.listdir(os.path.dirname(TARGETS["outside"]))


def write_outside() -> None:
    with open(TARGETS["outside"] + f".{os.getpid()}", "wb") as file:
        file.write(b"x")


def chmod_outside() -> None:
    os.chmod(TARGETS["outside"], 0o644)


def own() -> None:
    with open(TARGETS["own"], "rb") as file:
        file.read()


def alter_own() -> None:
    with open(TARGETS["own"], "r+b") as file:
        file.write(b"x")


ATTEMPTS: tuple[Callable[[], None], ...] = (
    inet,
    listen,
    admin,
    key,
    journal,
    memory,
    read_memory,
    kill,
    kill_thread,
    kill_by_descriptor,
    kill_by_owner,
    limit,
    slow_down,
    execute,
    spawn,
    outside,
    list_outside,
    write_outside,
    chmod_outside,
    own,
    alter_own,
    trace,
)


def attempt() -> dict[str, str]:
    results = {}
    for one in ATTEMPTS:
        try:
            one()
            results[one.__name__] = "done"
        except OSError as error:
            results[one.__name__] = errno.errorcode[error.errno or 0]
    return results


def executor() -> int:
    from agent.executor import worker

    class Planted(worker.OneByOne):
        def __init__(self) -> None:
            self.ready = {"attempts": attempt()}

        def begin(self, job: Any) -> None:
            raise NotImplementedError

    return worker.serve(lambda _: Planted(), bring=worker.bring)


def puller() -> int:
    from agent.images import puller as module

    module.Work.run = lambda self: json.dumps(attempt())  # type: ignore[method-assign]
    return module.main()


def programmer() -> int:
    from agent.executor import programmer_child as module
    from drivers.base import SlotState

    module._do = lambda *_: SlotState(True, detail=json.dumps(attempt()))
    module.main()
    return 0


def parser() -> int:
    from agent.serving import parse_child as module

    sys.argv[1:] = TARGETS["arguments"]

    def parse(*_: Any, **__: Any) -> Any:
        print(json.dumps(attempt()), flush=True)
        os._exit(0)

    module.FORMS = (replace(module.FORMS[0], read=parse),)
    module.main()
    return 0


if MODE == "free":
    from agent.executor import sandbox

    sandbox.enter = lambda *_, **__: {}  # type: ignore[assignment]

ENTRIES = {"executor": executor, "decoder": executor, "slot": executor}
sys.exit({**ENTRIES, "puller": puller, "registry": puller, "programmer": programmer, "parser": parser}[ROLE]())
