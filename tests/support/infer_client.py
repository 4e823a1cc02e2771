"""ModelInferRequests as Triton's clients write them."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from agent.model.signature import DType, Strings, Tensor, dtype_of
from agent.serving.protos import ModelInferRequest

DATATYPES = {
    DType.BOOL: ("BOOL", "bool_contents"),
    DType.INT8: ("INT8", "int_contents"),
    DType.INT16: ("INT16", "int_contents"),
    DType.INT32: ("INT32", "int_contents"),
    DType.INT64: ("INT64", "int64_contents"),
    DType.UINT8: ("UINT8", "uint_contents"),
    DType.UINT16: ("UINT16", "uint_contents"),
    DType.UINT32: ("UINT32", "uint_contents"),
    DType.UINT64: ("UINT64", "uint64_contents"),
    DType.FLOAT16: ("FP16", ""),
    DType.FLOAT32: ("FP32", "fp32_contents"),
    DType.FLOAT64: ("FP64", "fp64_contents"),
    DType.STRING: ("BYTES", "bytes_contents"),
}


def infer_request(
    inputs: dict[str, Tensor],
    *,
    model: str = "",
    version: str = "",
    id: str = "",
    outputs: list[str] | None = None,
    raw: bool = True,
) -> Any:
    """A ModelInferRequest; `raw` as tritonclient does, else one value after the other."""
    request = ModelInferRequest(model_name=model, model_version=version, id=id)
    for name, tensor in inputs.items():
        datatype, field = DATATYPES[dtype_of(tensor)]
        entry = request.inputs.add(name=name, datatype=datatype, shape=tensor.shape)
        if raw:
            request.raw_input_contents.append(raw_bytes(tensor))
        elif isinstance(tensor, Strings):
            entry.contents.bytes_contents.extend(tensor.items)
        else:
            getattr(entry.contents, field).extend(tensor.reshape(-1).tolist())
    for name in outputs or []:
        request.outputs.add(name=name)
    return request


def raw_bytes(tensor: Tensor) -> bytes:
    if isinstance(tensor, Strings):
        return b"".join(struct.pack("<I", len(item)) + item for item in tensor.items)
    return tensor.tobytes()


def outputs_of(response: Any) -> dict[str, Tensor]:
    """The tensors of a ModelInferResponse, which come raw."""
    found: dict[str, Tensor] = {}
    by_name = {name: dtype for dtype, (name, _) in DATATYPES.items()}
    assert len(response.outputs) == len(response.raw_output_contents)
    for head, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        dtype, shape = by_name[head.datatype], tuple(head.shape)
        if dtype is DType.STRING:
            items, at = [], 0
            while at < len(raw):
                (size,) = struct.unpack_from("<I", raw, at)
                items.append(raw[at + 4 : at + 4 + size])
                at += 4 + size
            assert len(items) == math.prod(shape)
            found[head.name] = Strings(shape, items)
        else:
            found[head.name] = np.frombuffer(raw, dtype.numpy).reshape(shape)
    return found
