"""Runs inside the guest: slotd itself on the disk whose power is cut, and somebody who keeps deploying.

It loads everything first and then waits for a line on the second serial port: at that point the machine is frozen and
cloned, so that each boot begins here, with the disk not yet looked at and nothing random yet drawn. From then on it
tells on that port, a JSON line each, what it is about to do and what is done.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import json
import os
import random
import struct
import subprocess
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from agent import daemon  # noqa: F401 - so that it is loaded when the machine is cloned
from agent.cli import main as slotd
from agent.commands.admin import AdminClient
from agent.errors import SlotdError
from agent.images.layout import Store
from agent.journal import boot
from agent.journal.boot import BootRecord
from agent.journal.database import Journal
from agent.serving.protos import PredictRequest, PredictResponse
from agent.slot import deployment

PORT = "/dev/ttyS1"
STATE = Path("/var/lib/slotd")
CONFIG = Path("/run/config.yaml")
DRIVER = Path("/sys/bus/virtio/drivers/virtio_blk")
PREDICT = "/tensorflow.serving.PredictionService/Predict"
X = np.array([[0.5, -1.0, 2.0, 3.0]], np.float32)
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207


class Line:
    """The serial port to the harness. `tell` returns when the last byte has left the machine."""

    def __init__(self) -> None:
        self._file = os.open(PORT, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self._file)
        self._lock = threading.Lock()

    def tell(self, what: str, **more: Any) -> None:
        data = json.dumps({"at": what, **more}).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._file, data) :]
            termios.tcdrain(self._file)

    def hear(self) -> Any:
        data = b""
        while not data.endswith(b"\n"):
            data += os.read(self._file, 4096)
        return json.loads(data)


def warm() -> None:
    """Brings what the children of slotd are made of into the page cache."""
    for module in ("httpx", "onnxruntime"):
        folder = Path(str(importlib.util.find_spec(module).origin)).parent  # type: ignore[union-attr]
        for path in folder.rglob("*"):
            if path.suffix in (".pyc", ".so"):
                path.read_bytes()


def reseed(seed: str) -> None:
    """Clones share what the kernel and Python knew of chance."""
    data = bytes.fromhex(seed)
    with open("/dev/urandom", "wb") as pool:
        fcntl.ioctl(pool, _RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
        fcntl.ioctl(pool, _RNDRESEEDCRNG)
    random.seed(data)
    np.random.seed(int.from_bytes(data[:4], "big"))


def mark(line: Line, stops: list[str]) -> None:
    """slotd tells when it enters a phase, and before and after it commits and collects.

    At each of `stops` it waits for a line, so that it can be frozen there.
    """

    def at(what: str, **more: Any) -> None:
        line.tell(what, **more)
        if what in stops:
            line.hear()

    entered, write, collect = Journal.phase, boot.write_boot, Store._collect

    async def phase(self: Journal, deployment_id: str, name: str, **more: Any) -> None:
        await entered(self, deployment_id, name, **more)
        await asyncio.to_thread(at, name)

    def write_boot(state_dir: Path, record: BootRecord) -> Any:
        at("committing", digest=record.committed and record.committed.digest, generation=record.generation)
        doubt = write(state_dir, record)
        line.tell("committed", digest=record.committed and record.committed.digest, generation=record.generation)
        return doubt

    def sweep(self: Store, keep: frozenset[str]) -> int:
        at("gc")
        freed = collect(self, keep)
        line.tell("gc done", freed=freed)
        return freed

    Journal.phase = phase  # type: ignore[method-assign]
    Store._collect = sweep  # type: ignore[method-assign]
    deployment.write_boot = write_boot  # type: ignore[attr-defined]


def mount(device: str) -> None:
    """Binds the driver to the disk, which is seen for the first time, and mounts it as Debian would."""
    (DRIVER / "bind").write_text(device)
    until = time.monotonic() + 10
    while not Path("/dev/vdb").exists() and time.monotonic() < until:
        time.sleep(0.01)
    subprocess.run(["/bin/busybox", "mount", "-t", "ext4", "-o", "relatime", "/dev/vdb", str(STATE)], check=True)


class Deployer(threading.Thread):
    """Sees that slotd serves, then deploys one image after the other until the power goes."""

    def __init__(self, line: Line, job: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.line = line
        self.job = job
        self.run_dir = Path(job["config"]["run_dir"])

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.line.tell("failed", error=repr(error))
            raise

    def _run(self) -> None:
        status = self._until(lambda: self._call("status"), OSError, SlotdError)
        if status["committed"] is not None:
            committed, issues = status["committed"]["digest"], [issue["id"] for issue in status["issues"]]
            self.line.tell("serves", **self._predict(), committed=committed, host=status["host"], issues=issues)
        else:
            self.line.tell("serves nothing", host=status["host"])
        while True:
            status = self._call("status")
            running = status["deployment"] or status["waiting"]
            task = running["id"] if running else self._deploy(self._next(status))
            self.line.tell("deploying", task=task, resumed=bool(running))
            document = self._until(lambda task=task: self._ended(task))
            self.line.tell("ended", outcome=document["outcome"], error=document["error"], digest=document["digest"])
            if document["outcome"] == "committed":
                self.line.tell("answers", **self._predict())

    def _deploy(self, image: str) -> Any:
        return self._call("deploy", image=image, force=True)["task"]

    def _next(self, status: dict[str, Any]) -> str:
        images = self.job["images"]
        version = int(status["committed"]["version"]) if status["committed"] else 0
        return str(images[version % len(images)])

    def _ended(self, task: str) -> Any:
        document = self._call("task", task=task)
        return document if document["outcome"] else None

    def _call(self, command: str, **arguments: Any) -> Any:
        with closing(AdminClient(self.run_dir / "admin.sock")) as client:
            return client.call(command, arguments)

    def _until(self, condition: Callable[[], Any], *ignored: type[BaseException]) -> Any:
        until = time.monotonic() + 900
        while time.monotonic() < until:
            try:
                value = condition()
                if value:
                    return value
            except ignored:
                pass
            time.sleep(0.1)
        raise TimeoutError("it did not come true")

    def _predict(self) -> dict[str, Any]:
        request = PredictRequest()
        proto = request.inputs["x"]
        proto.dtype, proto.tensor_content = 1, X.tobytes()
        for size in X.shape:
            proto.tensor_shape.dim.add().size = size
        with grpc.insecure_channel(f"unix:{self.run_dir}/grpc.sock") as channel:
            data, done = channel.unary_unary(PREDICT).with_call(
                request.SerializeToString(), timeout=300, wait_for_ready=True
            )
        (answer,) = PredictResponse.FromString(data).outputs.values()
        y = np.array(answer.float_val, np.float32).reshape(X.shape)
        trailer = dict(done.trailing_metadata() or ())
        return {
            "scale": float(np.median((y - 1) / X)),
            "digest": trailer.get("slotd-model-digest"),
            "by": trailer.get("slotd-served-by"),
        }


def main() -> None:
    line = Line()
    device = Path("/sys/block/vdb/device").resolve().name
    (DRIVER / "unbind").write_text(device)
    warm()
    line.tell("loaded")
    job = line.hear()  # here the machine is cloned
    started = time.monotonic()
    line.tell("awake")
    reseed(job["seed"])
    if job["careless"]:
        os.fsync = os.fdatasync = lambda descriptor: None  # to see that the cuts find it
    mark(line, job["stops"])
    mount(device)
    line.tell("mounted", seconds=time.monotonic() - started)
    CONFIG.write_text(json.dumps(job["config"]))
    Deployer(line, job).start()
    sys.argv = ["slotd", "run", "--config", str(CONFIG)]
    slotd()


if __name__ == "__main__":
    main()
