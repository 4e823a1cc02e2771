"""A whole slotd in a process of its own: simulated slot, tiny models from a layout folder, real gRPC, real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import yaml

from agent.commands.admin import AdminClient
from agent.serving.protos import PredictRequest, PredictResponse, TensorProto
from drivers.simulated import clear, inject
from support.tiny import scale_of, write_model

PREDICT = "/tensorflow.serving.PredictionService/Predict"
RUNNER = Path(__file__).with_name("run_host.py")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins, section by section."""
    merged = dict(base)
    for key, value in over.items():
        merged[key] = (
            merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


class Host:
    """Start, ask, kill, start again: the state stays in `folder`."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.layout = folder / "layout"
        self.device = folder / "card"
        self.run_dir = folder / "run"
        self.config = merge(
            {
                "device": "test-host",
                "state_dir": str(folder / "state"),
                "run_dir": str(self.run_dir),
                "embedded": True,
                "slot": {
                    "driver": "simulated",
                    "options": {"device": str(self.device), "program_time": 0.1, "latency": 0.002},
                    "drain_timeout": "2s",
                    "stop_timeout": "1s",
                    "program_timeout": "5s",
                    "load_timeout": "30s",
                    "prove_timeout": "10s",
                    "retry_first": "0.2s",
                    "retry_max": "2s",
                },
                "swap": {"probation": {"duration": "0.3s", "min_requests": 3}},
                "serving": {
                    "grpc": {"listen": "127.0.0.1:0"},
                    "http": {"listen": "127.0.0.1:0"},
                    "lame_duck": "0.1s",
                    "grace": "2s",
                },
                "executor": {"threads": 1},
                "images": {"layouts": [str(self.layout)]},
                "link": {"enabled": False},
                "log": {"level": "info", "format": "json"},
            },
            settings,
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.prefix: tuple[str, ...] = ()
        """What its command line begins with, for a namespace to run in."""
        self.address = ""
        self.http = ""
        """Where HTTP is, http://host:port."""
        self.log = folder / "slotd.log"
        self.hold = folder / "hold"
        self.keep_config = False
        """Whether it starts with the configuration file as it is, or without one."""
        self.told: list[tuple[float, str]] = []
        """What systemd was told, and when (monotonic)."""

    # --- images -------------------------------------------------------------------------------------------------------

    def pack(self, tag: str, **model: Any) -> str:
        """A tiny model as an image in the layout folder; its digest."""
        from agent.forge.pack import pack

        folder = self.folder / "models" / tag.replace(":", "-").replace("/", "-")
        write_model(folder, **{"name": tag.split(":")[0], **model})
        return pack(folder, self.layout, tag)

    def inject(self, *faults: dict[str, Any]) -> None:
        """Faults of the simulated card."""
        inject(self.device, *faults)

    def cure(self) -> None:
        """No more faults."""
        clear(self.device)

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(
        self,
        *,
        kill_at: str | None = None,
        hold_at: str | None = None,
        wait: bool = True,
        frail: bool = False,
        **environment: str,
    ) -> Host:
        """Starts it; ready when systemd would be told so.

        `kill_at`: SIGKILLs itself when that phase is journaled; `hold_at`: stays in it until `let_go`;
        "asked" stays in the phase that `hold_in` names.
        """
        if hold_at and hold_at != "asked":
            self.hold.touch()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.yaml"
        if not self.keep_config:
            path.write_text(yaml.safe_dump(self.config))
        notify = self.folder / "notify.sock"
        notify.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(str(notify))
        notify.chmod(0o777)  # it may run as another user
        listener.settimeout(0.2)
        self.told = []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, str(RUNNER), str(path), kill_at or ""],
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": str(notify),
                    "PYTHONUNBUFFERED": "1",
                    "FRAIL": "1" if frail else "",
                    "HOLD_AT": hold_at or "",
                    "HOLD_WHILE": str(self.hold),
                    **environment,
                },
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        threading.Thread(target=self._hear, args=(listener, self.process, self.told), daemon=True).start()
        if wait:
            self.await_ready()
        return self

    @staticmethod
    def _hear(listener: socket.socket, process: subprocess.Popen[bytes], told: list[tuple[float, str]]) -> None:
        with listener:
            while True:
                over = process.poll() is not None
                try:
                    told.append((time.monotonic(), listener.recv(4096).decode()))
                except TimeoutError:
                    if over:
                        return

    def await_ready(self, *, timeout: float = 60) -> None:
        """Until systemd was told that it is ready."""
        assert self.process is not None
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if any("READY=1" in text.splitlines() for _, text in self.told):
                listen = self.status()["serving"]["listen"]
                tcp = [one for one in listen if not one.startswith(("unix", "http"))]
                self.http = next((one for one in listen if one.startswith("http")), "")
                self.address = tcp[0] if tcp else listen[-1]
                return
            if self.process.poll() is not None:
                raise AssertionError(f"slotd ended with {self.process.returncode}:\n{self.tail()}")
            time.sleep(0.005)
        raise AssertionError(f"slotd was not ready:\n{self.tail()}")

    def hold_in(self, phase: str) -> None:
        """Of a host that was started with hold_at="asked"."""
        self.hold.write_text(phase)

    def let_go(self) -> None:
        """Deployments that are held go on."""
        self.hold.unlink()

    def tail(self, count: int = 60) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def stop(self, *, timeout: float = 20) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def wait_dead(self, timeout: float = 60) -> int:
        """Until it has ended by itself."""
        assert self.process is not None
        return self.process.wait(timeout)

    def __enter__(self) -> Host:
        try:
            return self.start()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, *_: object) -> None:
        self.kill()

    # --- commands -----------------------------------------------------------------------------------------------------

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """A command over the admin socket. Raises SlotdError as the daemon said it."""
        with contextlib.closing(AdminClient(self.run_dir / "admin.sock")) as client:
            return client.call(command, arguments)

    def status(self) -> dict[str, Any]:
        return self.call("status")

    def deploy(self, image: str, *, timeout: float = 60, **arguments: Any) -> dict[str, Any]:
        """Deploys and waits for the end; the deployment's document."""
        return self.ended(self.call("deploy", image=image, **arguments)["task"], timeout=timeout)

    def ended(self, task: str, *, timeout: float = 60) -> dict[str, Any]:
        return self.until(
            lambda: (lambda d: d if d["outcome"] else None)(self.call("task", task=task)), timeout=timeout
        )

    def until(self, condition: Callable[[], Any], *, timeout: float = 30) -> Any:
        """The first true value of `condition`."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            value = condition()
            if value:
                return value
            time.sleep(0.02)
        raise AssertionError(f"it did not come true:\n{json.dumps(self.status(), indent=1)}\n{self.tail()}")

    def until_host(self, state: str, *, timeout: float = 30) -> dict[str, Any]:
        """Until the host is in a state; the status."""
        return self.until(lambda: (lambda s: s if s["host"] == state else None)(self.status()), timeout=timeout)

    def until_phase(self, task: str, phase: str, *, timeout: float = 30) -> None:
        """Until a deployment has reached a phase."""
        self.until(lambda: any(p["phase"] == phase for p in self.call("task", task=task)["phases"]), timeout=timeout)

    # --- clients ------------------------------------------------------------------------------------------------------

    def predict(self, x: np.ndarray, *, timeout: float = 10) -> tuple[np.ndarray, dict[str, str]]:
        """One request on a channel of its own: y and the trailing metadata."""
        with grpc.insecure_channel(self.address) as channel:
            return predict(channel, x, timeout=timeout)

    @contextlib.contextmanager
    def load(self, clients: int = 4, *, timeout: float = 10, pause: float = 0.004) -> Iterator[Load]:
        """Clients that keep asking, each on its own channel, until the end of the block."""
        load = Load(self.address, timeout, pause)
        threads = [threading.Thread(target=load.run, args=(number,), daemon=True) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield load
        finally:
            load.stop.set()
            for thread in threads:
                thread.join(timeout + 5)


def request_bytes(x: np.ndarray, name: str = "x") -> bytes:
    """A PredictRequest for float32 x."""
    request = PredictRequest()
    request.inputs[name].CopyFrom(tensor_proto(x))
    return request.SerializeToString()


def tensor_proto(x: np.ndarray) -> Any:
    """A TensorProto with raw content."""
    proto = TensorProto(dtype=1, tensor_content=np.ascontiguousarray(x, np.float32).tobytes())
    for size in x.shape:
        proto.tensor_shape.dim.add().size = size
    return proto


def predict(channel: grpc.Channel, x: np.ndarray, *, timeout: float = 10) -> tuple[np.ndarray, dict[str, str]]:
    """y and the trailing metadata. Raises grpc.RpcError."""
    call = channel.unary_unary(PREDICT)
    data, done = call.with_call(request_bytes(x), timeout=timeout)
    reply = PredictResponse.FromString(data)
    (proto,) = reply.outputs.values()
    y = np.array(proto.float_val, np.float32).reshape([dim.size for dim in proto.tensor_shape.dim])
    return y, {key: value for key, value in done.trailing_metadata() or () if isinstance(value, str)}


@dataclass
class Load:
    """What a group of clients saw: (start, seconds, scale, served by, digest) for each answer."""

    address: str
    timeout: float
    pause: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)
    answers: list[tuple[float, float, float, str, str]] = field(default_factory=list)
    errors: list[tuple[float, float, str]] = field(default_factory=list)
    went_back: int = 0

    def run(self, number: int) -> None:
        """One client; its answers must never go back to a digest that was replaced, outside a roll-back."""
        rng = np.random.default_rng(number)
        with grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            while not self.stop.is_set():
                x = rng.normal(size=(1, 4)).astype(np.float32)
                start = time.monotonic()
                try:
                    y, metadata = predict(channel, x, timeout=self.timeout)
                except grpc.RpcError as error:
                    self.errors.append((start, time.monotonic() - start, f"{error.code()}: {error.details()}"))
                else:
                    self.answers.append(
                        (
                            start,
                            time.monotonic() - start,
                            round(scale_of(x, y), 3),
                            metadata.get("slotd-served-by", ""),
                            metadata.get("slotd-model-digest", ""),
                        )
                    )
                if self.pause:
                    time.sleep(self.pause)

    def wrong(self, scales: dict[str, float]) -> list[tuple[float, float, float, str, str]]:
        """Answers whose value is not that of the digest they name."""
        return [one for one in self.answers if abs(scales.get(one[4], 1e9) - one[2]) > 0.01]

    def by(self) -> dict[tuple[float, str], int]:
        """How many answers for each (scale, slot or bridge)."""
        counts: dict[tuple[float, str], int] = {}
        for _, _, scale, served, _ in self.answers:
            counts[scale, served] = counts.get((scale, served), 0) + 1
        return counts
