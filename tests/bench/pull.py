"""The p99 of Predict while an image of 500 MB is pulled and unpacked, over its p99 without. The slot sets the pace."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import grpc
import numpy as np
from pairs import Noise, Result, Spread, quantile

from support.host import PREDICT, Host, request_bytes
from support.networks import put_folder, write_noise
from support.tfs_client import CHANNEL_OPTIONS
from support.tiny import write_model

SIZE = 500 << 20
LATENCY = 0.01
"""Seconds that the slot takes: with that, neither the CPU nor its scheduler is what is measured."""
CLIENTS = 2
LIMIT = 1.5


def run(folder: Path, pulls: int, noise: Noise) -> list[Result]:
    """Before each pull the same clients are measured for as long as the last pull took, at least two seconds."""
    settings = {"options": {"device": str(folder / "card"), "latency": LATENCY, "program_time": 0.1}}
    ratios, quiet, loud, lasted = [], [], [], []
    with Host(folder, slot=settings) as host:
        host.pack("tiny:1")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        took = 2.0
        for pull in range(pulls):
            noise.tick()
            large_image(host, f"large:{pull}", pull)
            with Clients(host.address) as clients:
                time.sleep(0.5)
                since = time.monotonic()
                time.sleep(max(2.0, took))
                begun = time.monotonic()
                took = watch_pull(host, f"large:{pull}")
                ended = begun + took
            without, beside = clients.between(since, begun), clients.between(begun, ended)
            quiet.append(quantile(without, 0.99) * 1e3)
            loud.append(quantile(beside, 0.99) * 1e3)
            ratios.append(loud[-1] / quiet[-1])
            lasted.append(took)
    details = {
        "p99 beside it, ms": str(Spread(tuple(loud))),
        "p99 without, ms": str(Spread(tuple(quiet))),
        "pull, verify and unpack, s": str(Spread(tuple(lasted))),
    }
    return [Result("Predict p99 beside a pull of 500 MB / without", Spread(tuple(ratios)), LIMIT, details=details)]


def large_image(host: Host, tag: str, seed: int) -> None:
    """A tiny model and 500 MB beside it, another for each tag; an image that the host cannot have yet."""
    model = host.folder / "models" / tag.replace(":", "-")
    write_model(model, name="tiny", version=str(seed + 2), scale=2.0 + seed)
    write_noise(model / "ballast.bin", SIZE, seed)
    put_folder(model, host.layout, tag)
    (model / "ballast.bin").unlink()


def watch_pull(host: Host, tag: str) -> float:
    """Deploys it; seconds until it is unpacked."""
    begun = time.monotonic()
    task = host.call("deploy", image=tag)["task"]
    host.until_phase(task, "inspect", timeout=300)
    took = time.monotonic() - begun
    done = host.ended(task)
    assert done["outcome"] == "committed", done
    return took


class Clients:
    """Each waits for its answer and asks again, until the end of the block."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._over = threading.Event()
        self._seen: list[tuple[float, float]] = []
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _ask(self) -> None:
        data = request_bytes(np.ones((1, 4), np.float32))
        try:
            with grpc.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                call = channel.unary_unary(PREDICT)
                while not self._over.is_set():
                    begun = time.monotonic()
                    call(data, timeout=20)
                    self._seen.append((begun, time.monotonic() - begun))
        except BaseException as error:
            self._errors.append(error)

    def between(self, begin: float, end: float) -> list[float]:
        """Seconds of each request that began then."""
        return [took for begun, took in self._seen if begin <= begun < end]
