"""TensorFlow Serving's own stubs against a slotd: `tfserving_program.py ADDRESS`, in an environment that has
TensorFlow and tensorflow-serving-api.

Prints a line "ready", sends until its input ends, and then prints one line of JSON with what it saw.
"""

from __future__ import annotations

import json
import sys
import threading

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

ADDRESS = sys.argv[1]
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def request(name: str, values: np.ndarray, model: str = "") -> predict_pb2.PredictRequest:
    made = predict_pb2.PredictRequest()
    made.model_spec.name = model
    made.model_spec.signature_name = "serving_default"
    made.inputs[name].CopyFrom(tf.make_tensor_proto(values))
    return made


def refused(call: object, *arguments: object) -> list[str]:
    try:
        call(*arguments, timeout=20)  # type: ignore[operator]
    except grpc.RpcError as error:
        return [error.code().name, error.details()]
    return ["OK", ""]


def main() -> None:
    channel = grpc.insecure_channel(ADDRESS)
    predictions = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    models = model_service_pb2_grpc.ModelServiceStub(channel)
    answer = predictions.Predict(request("x", X, "one"), timeout=20)
    asked = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    asked.model_spec.name = "one"
    metadata = predictions.GetModelMetadata(asked, timeout=20)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    metadata.metadata["signature_def"].Unpack(signatures)
    signature = signatures.signature_def["serving_default"]
    status = models.GetModelStatus(get_model_status_pb2.GetModelStatusRequest(), timeout=20).model_version_status[0]
    seen: dict[str, object] = {
        "tensor": tf.make_ndarray(answer.outputs["y"]).tolist(),
        "float_val": list(answer.outputs["y"].float_val),
        "model": [answer.model_spec.name, answer.model_spec.version.value, answer.model_spec.signature_name],
        "inputs": {
            name: [info.dtype, [dim.size for dim in info.tensor_shape.dim]] for name, info in signature.inputs.items()
        },
        "method": signature.method_name,
        "status": [status.version, get_model_status_pb2.ModelVersionStatus.State.Name(status.state)],
        "wrong tensor": refused(predictions.Predict, request("z", X)),
        "wrong model": refused(predictions.Predict, request("x", X, "other")),
        "reload": refused(models.HandleReloadConfigRequest, model_management_pb2.ReloadConfigRequest()),
    }
    print("ready", flush=True)
    answers: dict[str, int] = {}
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    while not over.is_set():
        try:
            key = str(float(predictions.Predict(request("x", X), timeout=20).outputs["y"].float_val[1]))
        except grpc.RpcError as error:
            key = f"{error.code().name}: {error.details()}"
        answers[key] = answers.get(key, 0) + 1
    seen["answers"] = answers
    print(json.dumps(seen), flush=True)


main()
