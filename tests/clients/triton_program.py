"""Triton's own client against a slotd: `triton_program.py ADDRESS`, in an environment that has tritonclient.

Prints a line "ready", sends until its input ends, and then prints one line of JSON with what it saw.
"""

from __future__ import annotations

import json
import queue
import sys
import threading

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

ADDRESS = sys.argv[1]
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def tensor(name: str, values: np.ndarray, datatype: str = "FP32") -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def refused(client: triton.InferenceServerClient, *inputs: triton.InferInput, model: str = "one") -> list[str]:
    try:
        client.infer(model, list(inputs))
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def streamed(client: triton.InferenceServerClient) -> list[float | str]:
    answers: queue.Queue[tuple[triton.InferResult | None, InferenceServerException | None]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for value in (1.0, 2.0):
        client.async_stream_infer("", [tensor("x", np.full((1, 4), value, np.float32))])
    client.async_stream_infer("", [tensor("x", np.ones((1, 5), np.float32))])
    client.async_stream_infer("", [tensor("x", np.full((1, 4), 3.0, np.float32))])
    seen: list[float | str] = []
    for _ in range(4):
        result, error = answers.get(timeout=20)
        seen.append(float(result.as_numpy("y")[0, 0]) if result is not None else str(error))
    client.stop_stream()
    return seen


def main() -> None:
    client = triton.InferenceServerClient(ADDRESS)
    metadata = client.get_model_metadata("one", as_json=True)
    wanted = [triton.InferRequestedOutput("y")]
    named = client.infer("one", [tensor("x", X)], model_version="1", outputs=wanted, request_id="r-1")
    seen: dict[str, object] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model": client.is_model_ready("one"),
        "other": client.is_model_ready("other"),
        "server": client.get_server_metadata().name,
        "metadata": metadata,
        "named": [named.get_response().id, named.get_response().model_version, named.as_numpy("y").tolist()],
        "wrong tensor": refused(client, tensor("z", X)),
        "wrong shape": refused(client, tensor("x", np.ones((1, 5), np.float32))),
        "wrong dtype": refused(client, tensor("x", X.astype(np.float64), "FP64")),
        "wrong model": refused(client, tensor("x", X), model="other"),
        "stream": streamed(client),
    }
    print("ready", flush=True)
    answers: dict[str, int] = {}
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    while not over.is_set():
        try:
            key = str(float(client.infer("", [tensor("x", X)]).as_numpy("y")[0, 1]))
        except InferenceServerException as error:
            key = f"{error.status()}: {error.message()}"
        answers[key] = answers.get(key, 0) + 1
    seen["answers"] = answers
    print(json.dumps(seen), flush=True)


main()
