"""A parent as the agent is one, with children of each role that hold foreign code (see planted.py).

`python -I planting.py MODE FOLDER REPOSITORY ROLE…` prints what came of each role's attempts, as JSON. In the mode
`free` neither the children nor this process have any protection; in `withheld` only this process has.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(sys.argv[3])

from agent.config import Config
from agent.executor.client import DecodedMemory, Launch, Worker, launch_decoder, launch_model
from agent.executor.programmer import run_programmer
from agent.executor.sandbox import withhold_memory
from agent.executor.spawn import environment
from agent.model.spec import Model, read_spec
from agent.serving import handover
from drivers.base import Wanted

MODE, FOLDER = sys.argv[1], Path(sys.argv[2])
HERE = Path(__file__).parent
SECRET = ctypes.create_string_buffer(b"secret")
IMAGE = {"stage": "image", "from": "pictures", "to": "x", "resize": {"exact": [12, 12]}, "crop": [12, 12]}
MODEL = {
    "schema": "slotd/v1",
    "name": "m",
    "version": "1",
    "inputs": {"pictures": {"dtype": "string", "shape": [-1]}},
    "outputs": {"y": {"dtype": "float32", "shape": [-1, 4]}},
    "pipeline": [IMAGE, {"stage": "onnx", "file": "model.onnx", "on": "slot"}],
}


def argv(role: str, **targets: Any) -> tuple[str, ...]:
    everybody = {
        "parent": os.getpid(),
        "address": ctypes.addressof(SECRET),
        "admin": str(FOLDER / "run" / "admin.sock"),
        "key": str(FOLDER / "etc" / "link.key"),
        "journal": str(FOLDER / "state" / "journal.db"),
        "outside": str(FOLDER / "else" / "file"),
        "own": str(FOLDER / "state" / "models" / "m" / "model.onnx"),
        **targets,
    }
    mode = "free" if MODE == "withheld" else MODE
    return (sys.executable, "-I", str(HERE / "planted.py"), role, mode, json.dumps(everybody))


def prepare() -> tuple[Config, Model, socket.socket]:
    for name in ("run", "etc", "else", "card", "state/models/m", "state/store"):
        (FOLDER / name).mkdir(parents=True)
    for name in (
        "etc/link.key",
        "state/journal.db",
        "else/file",
        "state/models/m/model.onnx",
        "state/store/index.json",
    ):
        (FOLDER / name).write_bytes(b"0123456789")
    folder = FOLDER / "state" / "models" / "m"
    (folder / "model.yaml").write_text(json.dumps(MODEL))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(FOLDER / "run" / "admin.sock"))
    listener.listen(64)
    config = Config.model_validate(
        {
            "embedded": True,
            "state_dir": FOLDER / "state",
            "executor": {"memory": 1 << 30, "arena": 1 << 20},
            "slot": {"options": {"device": str(FOLDER / "card")}},
        }
    )
    return config, Model("sha256:" + "0" * 64, "test", folder, read_spec(folder)), listener


async def worker(role: str, launch: Launch, **targets: Any) -> dict[str, Any]:
    child = await Worker.start(replace(launch, argv=argv(role, **targets)), timeout=60)
    await child.stop(grace=5)
    return {**child.ready["attempts"]}


def puller(role: str, config: Config, verb: str, reference: str) -> dict[str, Any]:
    job = {
        "verb": verb,
        "reference": reference,
        "digest": "sha256:" + "0" * 64,
        "state_dir": str(FOLDER / "state"),
        "images": config.images.model_dump(mode="json"),
    }
    child = subprocess.Popen(
        argv(role, own=str(FOLDER / "state" / "store" / "index.json")), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    with child:
        child.stdin.write(json.dumps(job).encode() + b"\n")
        child.stdin.flush()
        answer = json.loads(child.stdout.readline())
    assert "result" in answer, answer
    return dict(json.loads(answer["result"]))


def parser() -> dict[str, Any]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = subprocess.Popen(
            argv("parser", arguments=[str(theirs.fileno()), str(1 << 20)]),
            pass_fds=(theirs.fileno(),),
            stdout=subprocess.PIPE,
            env=environment(),
        )
        request = os.memfd_create("request")
        socket.send_fds(ours, [handover.TASK.pack(0, 0, 0)], [request])
        return dict(json.loads(child.communicate(timeout=60)[0]))


async def run(role: str, config: Config, model: Model) -> dict[str, Any]:
    if role == "executor":
        return await worker(role, launch_model(config, model, "cpu", role=role))
    if role == "slot":
        return await worker(role, launch_model(config, model, "slot", role=role))
    if role == "decoder":
        memory = DecodedMemory(1 << 20)
        return await worker(role, launch_decoder(config, model, memory))
    if role == "puller":
        return await asyncio.to_thread(puller, role, config, "unpack", "registry.example/m:1")
    if role == "registry":
        return await asyncio.to_thread(puller, role, config, "pull", "registry.example/m:1")
    if role == "programmer":
        state = await run_programmer(
            "simulated",
            config.driver_options,
            "reset-port",
            bitstream=None,
            wanted=Wanted(),
            timeout=60,
            argv=argv(role),
        )
        return dict(json.loads(state.detail))
    return await asyncio.to_thread(parser)


async def main() -> None:
    config, model, listener = prepare()
    if MODE != "free":
        withhold_memory()
    with listener:
        print(json.dumps({role: await run(role, config, model) for role in sys.argv[4:]}))


asyncio.run(main())
