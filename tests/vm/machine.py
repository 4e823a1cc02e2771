"""A machine for tests: real systemd as PID 1 in fresh namespaces, on an overlay in memory of this host's `/`.

Nothing reaches the host: its own mounts, processes, network (with `lo` alone), host name, IPC and control groups, a
`/dev` of its own, `/sys` and `/proc/sys` read-only. Needs root. What the units of the host would start is not started.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PREFIX = "slotd-vm-"
BOOT = Path(__file__).with_name("boot.sh")
SYSTEMD = Path("/lib/systemd/systemd")
NAMESPACES = ("-m", "-p", "-u", "-i", "-n", "-C")


class Machine:
    """Booted by `with`; stopped, in order or by force, at its end."""

    def __init__(self, *, binds: Mapping[Path, str] | None = None, size: str = "6g") -> None:
        """`binds`: folders of the host that are seen inside, read-only, at the path given. `size`: of all written."""
        self.binds = dict(binds or {})
        self.size = size
        self.pid = 0
        self._folder = Path()
        self._groups: list[Path] = []
        self._unshare: subprocess.Popen[bytes] | None = None

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, *, timeout: float = 60) -> Machine:
        """Boots; returns when multi-user.target is reached."""
        if os.geteuid() != 0 or not SYSTEMD.exists():
            raise RuntimeError("a machine needs root and the Debian package systemd: make test-vm")
        _clear_stale()
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._groups = _make_groups(f"{PREFIX}{os.getpid()}-{self._folder.name.removeprefix(PREFIX)}")
        binds = [part for source, target in self.binds.items() for part in (str(source), target)]
        join = "; ".join(f"echo $$ > {shlex.quote(str(group / 'cgroup.procs'))}" for group in self._groups)
        boot = ["sh", str(BOOT), str(self._folder), self.size, *binds]
        unshare = shlex.join(["unshare", *NAMESPACES, "-f", "--kill-child", "--propagation", "private", *boot])
        with (self._folder / "console").open("wb") as console:
            self._unshare = subprocess.Popen(
                # dies with this process, and systemd with it
                ["setpriv", "--pdeathsig", "KILL", "sh", "-ec", f"{join}; exec {unshare}"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        try:
            self._await_boot(time.monotonic() + timeout)
        except BaseException:
            self.stop(timeout=2)
            raise
        return self

    def _await_boot(self, until: float) -> None:
        assert self._unshare is not None
        unshare = self._unshare.pid
        while time.monotonic() < until:
            if self._unshare.poll() is not None:
                raise AssertionError(f"the machine ended as it booted:\n{self.console()}")
            with contextlib.suppress(OSError, ValueError, IndexError):
                self.pid = int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])
                booted = Path(f"/proc/{self.pid}/comm").read_text() == "systemd\n"
                if booted and Path(f"/proc/{self.pid}/root/run/systemd/private").exists():
                    break
            time.sleep(0.02)
        state = "?"
        while time.monotonic() < until:
            state = self.systemctl("is-system-running", check=False).strip()
            if state == "running":
                self.systemctl("log-target", "journal")  # what systemd says from now on is of interest to tests
                return
            if state == "degraded":
                break
            time.sleep(0.05)
        units = self.systemctl("list-units", "--failed", "--plain", check=False)
        jobs = self.systemctl("list-jobs", check=False)
        raise AssertionError(f"the machine is {state}:\n{units}\n{jobs}\n{self.console()}")

    def stop(self, *, timeout: float = 30) -> float:
        """Powers off, killing what has not ended within `timeout`; leaves nothing. The seconds that it took."""
        start = time.monotonic()
        if self._unshare is not None:
            if self._unshare.poll() is None and self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGRTMIN + 4)
            try:
                self._unshare.wait(timeout)
            except subprocess.TimeoutExpired:
                self._unshare.kill()
                self._unshare.wait()
        took = time.monotonic() - start
        self.pid, self._unshare = 0, None
        _remove_groups(self._groups)
        self._groups = []
        shutil.rmtree(self._folder, ignore_errors=True)
        return took

    def __enter__(self) -> Machine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def console(self) -> str:
        """What the boot and systemd itself said."""
        return (self._folder / "console").read_text(errors="replace")

    # --- inside -------------------------------------------------------------------------------------------------------

    def enter(self, command: Sequence[str], *, user: str | None = None) -> list[str]:
        """The argument list that runs `command` inside, as root or as `user` with that user's groups."""
        as_user = ["runuser", "-u", user, "--"] if user else []
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        clean = ["env", "-i", path, "LANG=C.UTF-8", "HOME=/root", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0"]
        return ["nsenter", "-t", str(self.pid), *NAMESPACES, "-r", "-w", *clean, *as_user, *command]

    def run(
        self,
        command: str | Sequence[str],
        *,
        check: bool = True,
        timeout: float = 60,
        stdin: bytes | None = None,
        user: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command inside (text: by `sh -ec`). Raises AssertionError with its output if it fails and `check`."""
        argv = ["sh", "-ec", command] if isinstance(command, str) else list(command)
        done = subprocess.run(
            self.enter(argv, user=user),
            input=b"" if stdin is None else stdin,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check and done.returncode != 0:
            raise AssertionError(f"{shlex.join(argv)} ended with {done.returncode}:\n{out}\n{err}")
        return subprocess.CompletedProcess(argv, done.returncode, out, err)

    def systemctl(self, *arguments: str, check: bool = True, timeout: float = 120) -> str:
        """`systemctl --no-pager` inside; its output."""
        return self.run(["systemctl", "--no-pager", *arguments], check=check, timeout=timeout).stdout

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", unit, f"--property={name}", "--value").strip()

    def journal(self, unit: str | None = None) -> list[dict[str, Any]]:
        """Entries of the journal (of one unit), oldest first; every field as journalctl prints it in JSON."""
        self.run(["journalctl", "--sync"], check=False)
        only = ["-u", unit] if unit else []
        lines = self.run(["journalctl", "-o", "json", "--all", "--no-pager", *only]).stdout.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def messages(self, unit: str | None = None, *, last: int = 60) -> str:
        """The end of the journal as people read it."""
        only = ["-u", unit] if unit else []
        return self.run(["journalctl", "-n", str(last), "--no-pager", *only], check=False).stdout

    def until(self, condition: Callable[[], Any], *, timeout: float = 30, unit: str | None = None) -> Any:
        """The first true value of `condition`; raises AssertionError with the journal of `unit`."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            value = condition()
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"it did not come true:\n{self.messages(unit)}")

    # --- files --------------------------------------------------------------------------------------------------------

    def path(self, inside: str) -> Path:
        """Where the host sees a path of the machine, e.g. to connect to a socket. Mind absolute symbolic links."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def write(self, inside: str, data: bytes | str, *, mode: int = 0o644, owner: str = "root:root") -> None:
        """A file inside, with its folders."""
        raw = data.encode() if isinstance(data, str) else data
        target = shlex.quote(inside)
        self.run(
            f'mkdir -p "$(dirname {target})"; cat > {target}; chown {owner} {target}; chmod {mode:o} {target}',
            stdin=raw,
        )

    def read(self, inside: str) -> bytes:
        """A file inside."""
        return subprocess.run(self.enter(["cat", inside]), capture_output=True, check=True, timeout=60).stdout

    def copy(self, source: Path, inside: str, *, owner: str = "root:root") -> None:
        """A file or a folder of the host to the path `inside`."""
        target = shlex.quote(inside)
        if not source.is_dir():
            self.write(inside, source.read_bytes(), mode=source.stat().st_mode & 0o777, owner=owner)
            return
        tar = ["tar", "-C", str(source), "-c", "--exclude=__pycache__", "."]
        packed = subprocess.run(tar, capture_output=True, check=True).stdout
        self.run(f"mkdir -p {target}; tar -C {target} -x --no-same-owner; chown -R {owner} {target}", stdin=packed)


@contextlib.contextmanager
def machine(**settings: Any) -> Iterator[Machine]:
    """A booted machine."""
    with Machine(**settings) as booted:
        yield booted


# --- control groups: one of its own in every hierarchy, so that a private namespace shows nothing else ----------------


def _hierarchies() -> list[Path]:
    """This process's own group in every mounted hierarchy."""
    mounts: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split()[:3]
        if kind not in ("cgroup", "cgroup2") or left.split()[3] != "/":
            continue
        place = Path(left.split()[4])
        if kind == "cgroup2":
            mounts.setdefault("", place)
        for option in options.split(",") if kind == "cgroup" else ():
            mounts.setdefault(option, place)
    found: dict[Path, None] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        mount = mounts.get(controllers) or mounts.get(controllers.split(",")[0])
        if mount is not None:
            found[mount / group.lstrip("/")] = None
    return list(found)


def _make_groups(name: str) -> list[Path]:
    groups = []
    for own in _hierarchies():
        group = own / name
        group.mkdir()
        for setting in ("cpuset.cpus", "cpuset.mems"):  # empty in a new group of version 1, which then admits nobody
            if (group / setting).exists() and not (group / setting).read_text().strip():
                (group / setting).write_text((own / setting).read_text())
        groups.append(group)
    return groups


def _remove_groups(groups: Sequence[Path], *, timeout: float = 5) -> None:
    until = time.monotonic() + timeout
    for group in groups:
        for folder, _, _ in os.walk(group, topdown=False):
            while True:
                try:
                    os.rmdir(folder)
                except FileNotFoundError:
                    break
                except OSError:  # its processes are dead but not yet gone
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.02)
                else:
                    break


def _clear_stale() -> None:
    """Groups and folders left by a test run that was killed."""
    for own in _hierarchies():
        for group in own.glob(f"{PREFIX}*"):
            owner = group.name.removeprefix(PREFIX).split("-")[0]
            if not Path(f"/proc/{owner}").exists():
                with contextlib.suppress(OSError):
                    _remove_groups([group], timeout=1)
