"""A memory limit as systemd would set it: a cgroup of our own, version 1 or 2. Needs root."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


class MemoryGroup:
    """Use it as a context manager; what still runs in it is killed at the end. Raises OSError without root."""

    def __init__(self, limit: int) -> None:
        """`limit` in bytes, page cache included."""
        first = Path("/sys/fs/cgroup/memory")
        self._old = first.is_dir()
        root = first if self._old else Path("/sys/fs/cgroup")
        self.path = root / f"slotd-test-{os.getpid()}-{time.monotonic_ns()}"
        self.limit = limit

    def __enter__(self) -> MemoryGroup:
        if not self._old:
            (self.path.parent / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir()
        self._file("memory.limit_in_bytes", "memory.max").write_text(str(self.limit))
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(100):
            pids = (self.path / "cgroup.procs").read_text().split()
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if not pids:
                break
            time.sleep(0.05)
        self.path.rmdir()

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        text = self._file("memory.oom_control", "memory.events").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))

    @property
    def used(self) -> int:
        """Bytes."""
        return int(self._file("memory.usage_in_bytes", "memory.current").read_text())

    @property
    def most(self) -> int:
        """Bytes used at the highest; the page cache fills what it may."""
        return int(self._file("memory.max_usage_in_bytes", "memory.peak").read_text())

    def _file(self, old: str, new: str) -> Path:
        return self.path / (old if self._old else new)
