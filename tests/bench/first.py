"""From the start of the agent to its first answer, over what bare ONNX Runtime takes to load the model and run it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
from pairs import Noise, Result, alternate

from support.host import PREDICT, Host, request_bytes
from support.networks import INPUT, SIDE, put_folder, write_network
from support.tfs_client import CHANNEL_OPTIONS

LIMIT = 2.5


def run(folder: Path, pairs: int, noise: Noise) -> list[Result]:
    """ResNet-50, committed before. The bare process has the same file and as many threads."""
    host = Host(folder)
    model = write_network(folder / "resnet50", "resnet50")
    digest = put_folder(model, host.layout, "resnet50:1")
    data = request_bytes(np.random.default_rng(1).standard_normal((1, 3, SIDE, SIDE), np.float32), INPUT)
    served = []
    with host:
        done = host.deploy("resnet50:1", timeout=120)
        assert done["outcome"] == "committed", done
        assert host.stop() == 0

        def ours() -> float:
            argv = [sys.executable, "-m", "agent", "run", "--config", str(folder / "config.yaml")]
            begun = time.monotonic()
            with host.log.open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as daemon:
                try:
                    served.append(first_answer(host.run_dir / "grpc.sock", data, digest))
                    took = time.monotonic() - begun
                    until_listens(host.run_dir / "admin.sock")
                    host.until_host("slot")
                finally:
                    daemon.terminate()
                assert daemon.wait(30) == 0, host.tail()
            return took

        ratio, own, other = alternate(ours, lambda: bare(model / "model.onnx"), pairs, noise)
    details = {
        "agent, s": str(own),
        "bare ONNX Runtime, s": str(other),
        "answered by": ", ".join(sorted(set(served))),
    }
    return [Result("start to first answer / bare ONNX Runtime load and run, ResNet-50", ratio, LIMIT, details=details)]


def bare(graph: Path) -> float:
    """Seconds from the start of a process to the answer that it prints."""
    begun = time.monotonic()
    script = Path(__file__).with_name("bare_runtime.py")
    with subprocess.Popen([sys.executable, str(script), str(graph), "1"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        return time.monotonic() - begun


def until_listens(path: Path, timeout: float = 60) -> None:
    """Until somebody does."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return
        time.sleep(0.002)
    raise AssertionError(f"nobody listens on {path}")


def first_answer(path: Path, data: bytes, digest: str, *, timeout: float = 60) -> str:
    """Who gave it: a client that tries again and again, from before anybody listens."""
    until = time.monotonic() + timeout
    until_listens(path, timeout)
    with grpc.insecure_channel(f"unix:{path}", options=CHANNEL_OPTIONS) as channel:
        call = channel.unary_unary(PREDICT)
        while time.monotonic() < until:
            try:
                _, done = call.with_call(data, timeout=20, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                time.sleep(0.002)
            else:
                told = dict(done.trailing_metadata())
                assert told["slotd-model-digest"] == digest
                return str(told["slotd-served-by"])
    raise AssertionError("nobody answered")
