"""The share of the time for which a serial device with 2 ms a run is computing, by its own account, under 8 clients."""

from __future__ import annotations

import multiprocessing
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import grpc
import numpy as np
from echo import FLOATS, idle_host
from pairs import Noise, Result, Spread

from drivers.simulated import Card
from support.host import PREDICT, request_bytes
from support.tfs_client import CHANNEL_OPTIONS

CLIENTS = 8
LATENCY = 0.002
LIMIT = 0.97


def run(folder: Path, windows: int, noise: Noise, *, seconds: float = 3.0) -> list[Result]:
    """`windows` stretches of `seconds` each; the clients live in a process of their own."""
    with idle_host(folder, latency=LATENCY) as host:
        done = host.deploy("scores:1")
        assert done["outcome"] == "committed", done
        host.until_host("slot")
        over = multiprocessing.get_context("spawn").Event()
        clients = multiprocessing.get_context("spawn").Process(target=keep_asking, args=(host.address, over))
        clients.start()
        card = Card(host.device)
        try:
            before = card.counters().inferences
            host.until(lambda: card.counters().inferences > before + 200)
            shares, rates = [], []
            for _ in range(windows):
                noise.tick()
                begun, first = time.monotonic(), card.counters()
                time.sleep(seconds)
                ended, last = time.monotonic(), card.counters()
                shares.append((last.busy_ns - first.busy_ns) / 1e9 / (ended - begun))
                rates.append((last.inferences - first.inferences) / (ended - begun))
        finally:
            over.set()
            clients.join(30)
        serving = host.status()["serving"]
    assert clients.exitcode == 0 and serving["failed"] == serving["refused"] == 0, serving
    details = {"answers a second (500 would be all of it)": str(Spread(tuple(rates)))}
    name = f"busy share of a serial {LATENCY * 1e3:.0f} ms slot, 602,112-byte input, {CLIENTS} clients"
    return [Result(name, Spread(tuple(shares)), LIMIT, at_least=True, details=details)]


def keep_asking(address: str, over: Event) -> None:
    """Clients that each wait for their answer and ask again, each with a connection of its own."""
    data = request_bytes(np.random.default_rng(1).standard_normal((1, FLOATS), np.float32))

    def ask() -> None:
        with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            call = channel.unary_unary(PREDICT)
            while not over.is_set():
                call(data, timeout=20)

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
