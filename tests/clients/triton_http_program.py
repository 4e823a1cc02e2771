"""Triton's own client over HTTP against a slotd: `triton_http_program.py ADDRESS`, in an environment that has it.

Prints a line "ready", sends until its input ends, and then prints one line of JSON with what it saw.
"""

from __future__ import annotations

import json
import sys
import threading

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

ADDRESS = sys.argv[1].removeprefix("http://")
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def tensor(name: str, values: np.ndarray, datatype: str = "FP32", *, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def refused(client: triton.InferenceServerClient, *inputs: triton.InferInput, model: str = "one") -> list[str]:
    try:
        client.infer(model, list(inputs))
    except InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def main() -> None:
    client = triton.InferenceServerClient(ADDRESS, concurrency=2)
    forms: dict[str, object] = {}
    for name, arguments in {
        "plain": {},
        "packed": {"request_compression_algorithm": "gzip"},
        "deflated": {"request_compression_algorithm": "deflate"},
        "text in": {"inputs": [tensor("x", X, binary=False)]},
        "text out": {"outputs": [triton.InferRequestedOutput("y", binary_data=False)]},
        "bytes out": {"outputs": [triton.InferRequestedOutput("y", binary_data=True)], "request_id": "r-1"},
    }.items():
        answer = client.infer("one", **{"inputs": [tensor("x", X)], **arguments})
        forms[name] = [answer.as_numpy("y").tolist(), answer.get_response().get("id", "")]
    seen: dict[str, object] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model": client.is_model_ready("one"),
        "version": client.is_model_ready("one", "1"),
        "other": client.is_model_ready("other"),
        "server": client.get_server_metadata()["name"],
        "metadata": client.get_model_metadata("one"),
        "forms": forms,
        "wrong tensor": refused(client, tensor("z", X)),
        "wrong shape": refused(client, tensor("x", np.ones((1, 5), np.float32))),
        "wrong dtype": refused(client, tensor("x", X.astype(np.float64), "FP64")),
        "wrong model": refused(client, tensor("x", X), model="other"),
    }
    print("ready", flush=True)
    answers: dict[str, int] = {}
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    model = "one"
    while not over.is_set():
        try:
            key = str(float(client.infer(model, [tensor("x", X)]).as_numpy("y")[0, 1]))
        except InferenceServerException as error:
            if error.status() != "404":  # REST names its model: the client learns which one answers now
                answers[f"{error.status()}: {error.message()}"] = 1
            model = "two" if model == "one" else "one"
            continue
        answers[key] = answers.get(key, 0) + 1
    seen["answers"] = answers
    print(json.dumps(seen), flush=True)


main()
