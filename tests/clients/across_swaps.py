"""Runs a client's program against a slotd that swaps between two models while the program sends."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from support.host import Host

SWAPS = 4
ROOT = Path(__file__).parents[2]


def environment(mark: str) -> str:
    """The Python of the environment that make leaves this mark in once it is whole; empty if there is none."""
    path = ROOT / mark
    return str(path.parent / "bin" / "python") if path.exists() else ""


def watch(python: str, program: Path, folder: Path, *, over: str = "grpc") -> dict[str, Any]:
    """What it saw, over gRPC or HTTP.

    `one:1` (twice its input and one) is served at first; while it sends, that and `two:1` (three times) take turns,
    under names of their own.
    """
    host = Host(folder)
    for tag, scale in (("one:1", 2.0), ("two:1", 3.0)):
        host.pack(tag, scale=scale)
    with host:
        assert host.deploy("one:1")["outcome"] == "committed"
        argv = [python, "-I", str(program), host.http if over == "http" else host.address]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdin is not None and client.stdout is not None
            assert client.stdout.readline() == "ready\n"
            for swap in range(SWAPS):
                assert host.deploy("one:1" if swap % 2 else "two:1")["outcome"] == "committed"
            client.stdin.close()
            seen: dict[str, Any] = json.loads(client.stdout.readline())
    print(f"\n{program.name}: {SWAPS} swaps, {seen['answers']}")
    return seen
