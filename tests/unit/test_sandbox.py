"""The filter of system calls, run by hand for both machines; grants; what must be so before a child enters."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import textwrap

import pytest

from agent.executor.sandbox import Grants, calls, landlock, seccomp
from agent.executor.sandbox.seccomp import ALLOW, KILL, MACHINES, Machine, program

PID = 4711
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
OPEN, READ, FUTEX, MMAP = {0: 257, 1: 56}, {0: 0, 1: 63}, {0: 202, 1: 98}, {0: 9, 1: 222}
MEMFD, SENDMSG, RECVMSG, LANDLOCK = {0: 319, 1: 279}, {0: 46, 1: 211}, {0: 47, 1: 212}, {0: 446, 1: 446}
THREAD_FLAGS = 0x3D0F00  # as glibc starts a thread
FORK_FLAGS = 0x1200011

machines = pytest.mark.parametrize("here", MACHINES.values(), ids=MACHINES)


class Filter:
    """Classic BPF as the kernel runs it."""

    def __init__(self, here: Machine, grants: Grants = Grants(), *, signals: bool = True) -> None:
        self.here = here
        self.steps = list(struct.iter_unpack("=HBBI", program(here, grants, PID, signals=signals)))

    def __call__(self, number: int, *arguments: int, audit: int | None = None) -> int:
        padded = [value & 0xFFFFFFFFFFFFFFFF for value in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
        data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, self.here.audit if audit is None else audit, 0, *padded)
        at, value = 0, 0
        while True:
            code, yes, no, k = self.steps[at]
            at += 1
            if code == 0x06:
                return k
            if code == 0x20:
                (value,) = struct.unpack_from("<I", data, k)
            elif code == 0x54:
                value &= k
            else:
                true = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
                at += yes if true else no

    def named(self, table: dict[str, tuple[int | None, int | None]], name: str, *arguments: int) -> int:
        number = table[name][self.here.column]
        assert number is not None
        return self(number, *arguments)


def numbers(table: dict[str, tuple[int | None, int | None]], here: Machine) -> list[int]:
    return [pair[here.column] for pair in table.values() if pair[here.column] is not None]  # type: ignore[misc]


@machines
def test_what_every_child_needs_is_allowed(here: Machine) -> None:
    run = Filter(here)
    for call in (OPEN, READ, FUTEX, MMAP, MEMFD, SENDMSG, RECVMSG, LANDLOCK):
        assert run(call[here.column]) == ALLOW
    assert run.named(calls.CLONE, "clone", THREAD_FLAGS) == ALLOW
    for name in calls.SIGNALS:
        assert run.named(calls.SIGNALS, name, PID) == ALLOW
    for name in calls.ITSELF:
        assert run.named(calls.ITSELF, name, 0) == run.named(calls.ITSELF, name, PID) == ALLOW
    assert run.named(calls.ITSELF_BY_KIND, "setpriority", 0, 0) == ALLOW
    assert run.named(calls.ITSELF_BY_KIND, "ioprio_set", 1, PID) == ALLOW
    assert run.named(calls.FCNTL, "fcntl", 3, 2) == ALLOW and run.named(calls.IOCTL, "ioctl", 3, 0x5413) == ALLOW


@machines
@pytest.mark.parametrize(
    "grants", [Grants(), Grants(network=True), Grants(unix=True, execute=("/bin/true",), write=("/x",))]
)
def test_what_no_child_may_is_refused_whatever_was_granted(here: Machine, grants: Grants) -> None:
    run = Filter(here, grants)
    for number in (*numbers(calls.DENIED, here), *numbers(calls.SOCKETS, here)):
        assert run(number) == EPERM
    assert run.named(calls.CLONE3, "clone3") == ENOSYS
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80):
        assert run.named(calls.CLONE, "clone", flag | THREAD_FLAGS) == EPERM
        assert run.named(calls.CLONE, "clone", flag | FORK_FLAGS) == EPERM
    for name in calls.ITSELF:
        assert run.named(calls.ITSELF, name, PID + 1) == EPERM
    assert run.named(calls.ITSELF_BY_KIND, "setpriority", 0, PID - 1) == EPERM
    assert run.named(calls.ITSELF_BY_KIND, "setpriority", 2, 0) == EPERM  # all of a user's
    assert run.named(calls.ITSELF_BY_KIND, "ioprio_set", 3, 0) == EPERM
    for command in (8, 10, 15):
        assert run.named(calls.FCNTL, "fcntl", 3, command) == EPERM
        assert run.named(calls.FCNTL, "fcntl", 3, command | 1 << 32) == EPERM  # the kernel reads the lower half
    for request in (0x5412, 0x541C, 0x8901, 0x8902):
        assert run.named(calls.IOCTL, "ioctl", 3, request) == EPERM


@machines
def test_others_are_not_signalled(here: Machine) -> None:
    run = Filter(here)
    for name in calls.SIGNALS:
        for pid in (1, PID + 1, 0, -1, -PID):
            assert run.named(calls.SIGNALS, name, pid) == EPERM


@machines
def test_other_machines_and_newer_calls(here: Machine) -> None:
    run = Filter(here)
    for audit in (0x40000003, 0x40000028, 0, *(one.audit for one in MACHINES.values() if one is not here)):
        assert run(READ[here.column], audit=audit) == KILL
    assert run(calls.LAST + 1) == ENOSYS and run(0x3FFFFFFF) == ENOSYS
    refused = EPERM if here.x32 else ENOSYS
    assert run(0x40000000 | READ[here.column]) == run(0xFFFFFFFF) == refused


@machines
def test_sockets_are_of_the_families_that_were_granted(here: Machine) -> None:
    unix, inet, inet6, netlink, packet = 1, 2, 10, 16, 17
    stream, dgram, raw, cloexec = 1, 2, 3, 0o2000000
    allowed = {
        Grants(): set(),
        Grants(network=True): {inet, inet6},
        Grants(unix=True): {unix},
        Grants(network=True, unix=True): {inet, inet6, unix},
    }
    for grants, families in allowed.items():
        run = Filter(here, grants)
        for family in (unix, inet, inet6, netlink, packet, 40):
            wanted = ALLOW if family in families else EPERM
            assert run.named(calls.SOCKET, "socket", family, stream | cloexec) == wanted
            assert run.named(calls.SOCKET, "socket", family, dgram) == wanted
            assert run.named(calls.SOCKET, "socket", family, raw) == EPERM
        assert run.named(calls.CONNECT, "connect") == (ALLOW if families else EPERM)


@machines
def test_programs_are_started_only_where_that_was_granted(here: Machine) -> None:
    run = Filter(here)
    for number in numbers(calls.PROGRAMS, here):
        assert run(number) == EPERM
    assert run.named(calls.CLONE, "clone", FORK_FLAGS) == run.named(calls.CLONE, "clone", 0x4111) == EPERM
    may = Filter(here, Grants(execute=("/bin/true",)))
    for number in numbers(calls.PROGRAMS, here):
        assert may(number) == ALLOW
    assert may.named(calls.CLONE, "clone", FORK_FLAGS) == ALLOW
    assert may.named(calls.SIGNALS, "kill", PID + 1) == ALLOW  # Landlock keeps it in the sandbox
    assert Filter(here, Grants(execute=("/x",)), signals=False).named(calls.SIGNALS, "kill", PID + 1) == EPERM


def test_no_call_is_in_two_rules_and_all_jumps_fit() -> None:
    tables = (
        calls.DENIED,
        calls.SOCKETS,
        calls.SOCKET,
        calls.CONNECT,
        calls.PROGRAMS,
        calls.CLONE,
        calls.CLONE3,
        calls.SIGNALS,
        calls.ITSELF,
        calls.ITSELF_BY_KIND,
        calls.FCNTL,
        calls.IOCTL,
    )
    for here in MACHINES.values():
        every = [number for table in tables for number in numbers(table, here)]
        assert len(every) == len(set(every)) and max(every) <= calls.LAST
        assert len(Filter(here).steps) < 4096
    assert seccomp.machine() is MACHINES[os.uname().machine]


def test_grants_come_back_from_json() -> None:
    grants = Grants(("/a",), ("/b",), ("/dev/c",), ("/bin/d",), network=True, unix=True, capabilities=None)
    assert Grants.parse(json.loads(json.dumps(grants.as_dict()))) == grants
    assert Grants.parse(json.loads(json.dumps(Grants().as_dict()))) == Grants()


def test_a_checkout_is_not_opened_as_a_whole() -> None:
    """An editable installation has it on sys.path; the packages alone are readable."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = [os.path.realpath(path) for path, _ in landlock._rules(Grants())]
    assert root not in paths and "/" not in paths and "/usr" not in paths and "/etc" not in paths
    assert {os.path.join(root, "agent"), os.path.join(root, "drivers")} <= set(paths)


ENTER = "from agent.executor.sandbox import Grants, Limits, enter\n"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-c", ENTER + textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_thread_that_is_there_already_keeps_a_child_out() -> None:
    """It would stay outside, and within reach of everything inside."""
    code = """
        import threading
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        try:
            enter(Limits(1 << 30), Grants())
        except RuntimeError as error:
            print(error)
        """
    assert run(code) == "2 threads were started before the sandbox was entered"


def test_inside_threads_start_and_processes_do_not() -> None:
    code = """
        import os, threading, time
        enter(Limits(1 << 30), Grants())
        seen = []
        thread = threading.Thread(target=lambda: seen.append(open("/proc/self/statm").read()))
        thread.start()
        thread.join()
        try:
            os.fork()
        except PermissionError:
            seen.append("no fork")
        try:
            os.kill(os.getpid(), 0)
        finally:
            print(len(seen), seen[-1], time.localtime().tm_year > 2000)
        """
    assert run(code) == "2 no fork True"


def test_granted_programs_start_and_stay_inside(tmp_path) -> None:
    """What one of them starts or reads is confined as the child itself is."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    code = f"""
        import subprocess
        enter(Limits(1 << 30), Grants(execute=("/bin/cat", "/usr/bin/cat")))
        print(subprocess.run(["/bin/cat", "/proc/self/comm"], capture_output=True).returncode, end=" ")
        print(subprocess.run(["/bin/cat", {str(secret)!r}], capture_output=True).returncode, end=" ")
        try:
            subprocess.run(["/bin/true"])
        except PermissionError as error:
            print(error.errno)
        """
    assert run(code) == "1 1 13"


def test_a_folder_that_is_written_is_made_and_moves_work_in_it(tmp_path) -> None:
    folder, gone = tmp_path / "card", tmp_path / "removed" / "card"
    code = f"""
        import os
        enter(Limits(1 << 30), Grants(write=({str(folder)!r}, {str(gone)!r})))
        os.chdir({str(folder)!r})
        os.mkdir("a"); os.mkdir("b")
        open("a/x", "w").write("1")
        os.rename("a/x", "b/x")
        os.link("b/x", "a/y")
        os.unlink("b/x"); os.rmdir("b")
        print(open("a/y").read())
        """
    assert run(code) == "1"
    assert not gone.parent.exists()


def test_a_file_that_was_replaced_is_told_from_one_that_is_not_there(tmp_path) -> None:
    """As a resolv.conf that the network's manager writes anew while an image is pulled."""
    granted, missing = tmp_path / "resolv.conf", tmp_path / "gai.conf"
    granted.write_text("old")
    code = f"""
        import sys
        from agent.executor.sandbox import withdrawn
        paths = [{str(missing)!r}, {str(granted)!r}]
        enter(Limits(1 << 30), Grants(read=tuple(paths)))
        print(withdrawn(paths), flush=True)
        sys.stdin.readline()
        print(withdrawn(paths), flush=True)
        """
    child = subprocess.Popen(
        [sys.executable, "-I", "-c", ENTER + textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline().strip() == "None"
        new = tmp_path / "new"
        new.write_text("new")
        new.replace(granted)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline().strip() == str(granted)
