"""What /proc says of a process and its children."""

from __future__ import annotations

import time
from pathlib import Path


def descendants(pid: int) -> set[int]:
    """All processes below one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found: set[int] = set()
    left = [pid]
    while left:
        for child in children.get(left.pop(), []):
            if child not in found:
                found.add(child)
                left.append(child)
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run."""
    return {pid for pid in pids if _state(pid) not in ("", "Z", "X")}


def gone(pids: set[int], *, within: float = 0.0) -> bool:
    """Whether none of them runs, at the latest after so many seconds."""
    end = time.monotonic() + within
    while alive(pids):
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def holdings(pid: int) -> dict[str, int]:
    """Descriptors, memfds among them, mapped memfds, threads, children, and resident memory in KiB."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except OSError:
            continue  # closed meanwhile
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {
        "descriptors": len(links),
        "memfds": sum(link.startswith("/memfd:") for link in links),
        "mapped_memfds": sum("/memfd:" in line for line in maps.splitlines()),
        "threads": int(fields["Threads"]),
        "children": len(descendants(pid)),
        "rss_kib": int(fields["VmRSS"].split()[0]),
    }


def memory(pid: int) -> dict[str, int]:
    """KiB: resident, its share of what it shares with others, and shared memory that it has mapped."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in (rollup + status).splitlines() if ":" in line)
    return {
        "rss_kib": int(fields["VmRSS"].split()[0]),
        "pss_kib": int(fields["Pss"].split()[0]),
        "shared_kib": int(fields["RssShmem"].split()[0]),
    }
