"""Runs a command as a small host's service would: `confined.py CGROUP UID COMMAND...`, started as root.

In the cgroup, without privileges, the agent last and its children first where memory runs out, and with the right to
lift children from SCHED_IDLE and to lock memory, before others, as systemd/slotd.service has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

_CLONE_NEWNS = 0x20000


def hidden(path: Path) -> Path | None:
    """The folder above (or at) `path` that others may not enter; None if they may enter all."""
    for folder in (*reversed(path.parents), path):
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


def uncover(path: Path, folder: Path) -> None:
    """In a mount namespace of our own, `folder` is an empty one that others may enter, but for `path` in it."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    aside = tempfile.mkdtemp()
    for arguments in (
        ("--make-rprivate", "/"),
        ("--bind", str(path), aside),
        ("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(folder)),
    ):
        subprocess.run(["mount", *arguments], check=True)
    path.mkdir(parents=True)
    subprocess.run(["mount", "--bind", aside, str(path)], check=True)
    subprocess.run(["umount", aside], check=True)
    os.rmdir(aside)


def main() -> None:
    cgroup, uid, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    with contextlib.suppress(PermissionError):  # in a container; children, at +500, still go first
        Path("/proc/self/oom_score_adj").write_text("-500")
    rights = []
    for limit, value, right in (
        (resource.RLIMIT_NICE, 20, "+sys_nice"),
        (resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY, "+ipc_lock"),
    ):
        try:
            resource.setrlimit(limit, (value, value))
        except ValueError:  # in a container that may not raise it: the right itself
            rights.append(right)
    capabilities = ",".join(("-all", *rights))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    python = Path(sys.base_prefix)
    if (folder := hidden(python)) is not None:
        uncover(python, folder)
    os.setpriority(os.PRIO_PROCESS, 0, -10)
    who = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    os.execvp("setpriv", ["setpriv", *who, f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}", *command])


main()
