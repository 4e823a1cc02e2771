"""How far the children are confined on this host, for `status`, `doctor` and the issue `sandbox`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from agent.executor.client import Worker
from agent.executor.sandbox import is_withheld, probe
from drivers.base import Driver

Document = dict[str, Any]

PIECES = {
    "landlock": (
        "the kernel has no Landlock: children are kept from other files by file permissions alone",
        "boot a kernel from 5.19 on with `landlock` among its security modules (/sys/kernel/security/lsm)",
    ),
    "seccomp": (
        "the kernel has no filters of system calls for this machine: children may open sockets and start programs",
        "use a kernel with CONFIG_SECCOMP_FILTER, on x86-64 or arm64",
    ),
}
"""What it means that a piece is lacking, and what helps."""


class Confinement:
    """What the kernel gives, asked once, and what each child says that it has."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._kernel = probe()

    def describe(self, workers: Iterable[Worker]) -> Document:
        """The `sandbox` block of the status: `lacks` is of the kernel or of any child; `granted` is the driver's."""
        children = [
            {"role": worker.role, "pid": worker.pid, **_of(worker)} for worker in workers if "sandbox" in worker.ready
        ]
        lacks = {name for one in (self._kernel, *children) for name in one["lacks"]}
        return {
            "landlock": self._kernel["landlock"],
            "seccomp": self._kernel["seccomp"],
            "lacks": sorted(lacks),
            "children": children,
            "granted": granted(self._driver),
        }


def _of(worker: Worker) -> Document:
    found = worker.ready["sandbox"]
    return {"landlock": found["landlock"], "seccomp": found["seccomp"], "lacks": found["lacks"]}


def granted(driver: Driver) -> Document:
    """What the driver's children get beyond the others; only what is not empty."""
    needs = {
        name: [str(path) for path in value] if isinstance(value, tuple) else value
        for name, value in asdict(driver.needs).items()
    }
    return {name: value for name, value in needs.items() if value}


def trouble(lacks: Iterable[str]) -> tuple[str, str] | None:
    """(message, hint) of the issue `sandbox`; None if nothing is lacking."""
    pieces = [PIECES[name] for name in lacks]
    return ("; ".join(text for text, _ in pieces), "; ".join(hint for _, hint in pieces)) if pieces else None


def examine(sandbox: Mapping[str, Any]) -> Document:
    """What `doctor` answers: `ok`, and the checks one by one (`id`, `ok`, `message`, `hint`)."""
    checks = kernel_checks(sandbox)
    checks.append(
        _check(
            "memory",
            is_withheld(),
            "slotd's own memory is closed to its user's other processes",
            "other processes of slotd's user may read its memory",
            "start it with `slotd run`",
        )
    )
    for name, value in sandbox["granted"].items():
        shown = ", ".join(value) if isinstance(value, list) else f"{value} bytes"
        checks.append(_check(f"driver-{name.replace('_', '-')}", True, f"granted to the slot's children: {shown}"))
    return {"ok": all(one["ok"] for one in checks), "checks": checks, "sandbox": dict(sandbox)}


def kernel_checks(sandbox: Mapping[str, Any]) -> list[Document]:
    """The checks that need no daemon; `sandbox` is what `probe` or `describe` gave."""
    return [
        _check(name, name not in sandbox["lacks"], there, *PIECES[name])
        for name, there in (
            ("landlock", f"files are closed to children, but for those of their task (Landlock {sandbox['landlock']})"),
            ("seccomp", "sockets, programs, signals and other processes are closed to children (filtered calls)"),
        )
    ]


def _check(id: str, ok: bool, there: str, missing: str = "", hint: str | None = None) -> Document:
    return {"id": id, "ok": ok, "message": there if ok else missing, "hint": None if ok else hint}
