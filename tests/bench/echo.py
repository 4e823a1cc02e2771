"""The agent's p50 over that of a bare `grpc.aio` server which takes and gives the same bytes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import onnx
from onnx import helper
from pairs import Noise, Result, alternate, quantile

from support.graphs import FLOAT, save
from support.host import PREDICT, Host, request_bytes
from support.tfs_client import CHANNEL_OPTIONS

FLOATS = 150_528
"""602,112 bytes: one picture of 224 x 224 x 3."""
CALLS = 200
LIMIT = 1.7


def run(folder: Path, pairs: int, noise: Noise) -> list[Result]:
    """With a large answer (the picture comes back), and with a small one (1,000 scores)."""
    results = []
    with idle_host(folder, latency=0.0) as host:
        data = request_bytes(np.random.default_rng(1).standard_normal((1, FLOATS), np.float32))
        for tag, told in (("same:1", "602,112 bytes back"), ("scores:1", "4,000 bytes back")):
            done = host.deploy(tag, allow_signature_change=True)
            assert done["outcome"] == "committed", done
            host.until_host("slot")
            with channel(host.address) as ours:
                size = len(ours(data))
            reply = size if tag == "scores:1" else 0
            with (
                bare(reply) as plain,
                bare(reply, "tuned") as tuned,
                channel(host.address) as ours,
                channel(plain) as theirs,
                channel(tuned) as better,
            ):
                agent, others = partial(p50, ours, data), (partial(p50, theirs, data), partial(p50, better, data))
                ratio, own, other = alternate(agent, others[0], pairs, noise)
                hard, _, best = alternate(agent, others[1], pairs, noise)
            details = {
                "agent p50, ms": str(own),
                "bare grpc.aio p50, ms": str(other),
                "over the same server with uvloop and the agent's allocator": f"{hard} ({best.median:.3f} ms)",
            }
            results.append(Result(f"agent p50 / bare grpc.aio, {told}", ratio, LIMIT, details=details))
    return results


@contextmanager
def idle_host(folder: Path, *, latency: float) -> Iterator[Host]:
    """A whole daemon with a slot that takes `latency` seconds, and two models that are no work: same:1, scores:1."""
    settings = {"options": {"device": str(folder / "card"), "latency": latency, "program_time": 0.0}}
    with Host(folder, slot=settings, swap={"probation": {"duration": "0s", "min_requests": 0}}) as host:
        for name, kept in (("same", FLOATS), ("scores", 1000)):
            graph = folder / f"{name}.onnx"
            if kept == FLOATS:
                nodes, constants = [helper.make_node("Identity", ["x"], ["y"])], {}
            else:
                nodes = [helper.make_node("Slice", ["x", "from", "to", "axis"], ["y"])]
                constants = {"from": np.array([0]), "to": np.array([kept]), "axis": np.array([1])}
            save(graph, nodes, [("x", FLOAT, [None, FLOATS])], [("y", FLOAT, [None, kept])], constants)
            document = {
                "inputs": {"x": {"dtype": "float32", "shape": [-1, FLOATS]}},
                "outputs": {"y": {"dtype": "float32", "shape": [-1, kept]}},
            }
            host.pack(f"{name}:1", graph=onnx.load(graph), golden=False, spec=document)
        yield host


@contextmanager
def bare(size: int, *how: str) -> Iterator[str]:
    """The address of a bare server in a process of its own."""
    script = Path(__file__).with_name("bare_echo.py")
    server = subprocess.Popen([sys.executable, str(script), str(size), *how], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield f"127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.kill()
        server.wait()


@contextmanager
def channel(address: str) -> Iterator[grpc.UnaryUnaryMultiCallable]:
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as opened:
        call = opened.unary_unary(PREDICT)
        yield call


def p50(call: grpc.UnaryUnaryMultiCallable, data: bytes) -> float:
    """Milliseconds, one client that waits for each answer."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call(data)
        times.append(time.perf_counter() - start)
    return quantile(times, 0.5) * 1e3
