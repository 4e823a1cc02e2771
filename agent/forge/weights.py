"""Large weights of an ONNX graph in a file of their own, which executors map and share."""

from __future__ import annotations

from pathlib import Path

from agent.errors import InvalidModel, NotFound

LARGE = 1 << 20
"""Weights of at least so many bytes are moved."""
_PAGE = 4096


def split_weights(graph: Path, graph_to: Path, data_to: Path, *, location: str) -> bool:
    """Write `graph` to `graph_to` with its large weights in `data_to`, which the graph will call `location`.

    False, and nothing written, if it has none or keeps some outside already. Each weight begins on a page of its own.
    Raises InvalidModel, NotFound (the package onnx is not installed).
    """
    try:
        import onnx
        from onnx.external_data_helper import set_external_data
    except ImportError:
        raise NotFound("the package onnx is not installed", hint="pip install 'slotd[convert]'") from None
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(graph, load_external_data=False)
    except DecodeError as error:
        raise InvalidModel(f"is not an ONNX graph: {error}", field=graph.name) from None
    weights = model.graph.initializer
    large = [weight for weight in weights if len(weight.raw_data) >= LARGE]
    if not large or any(weight.data_location == onnx.TensorProto.EXTERNAL for weight in weights):
        return False
    with data_to.open("wb") as data:
        for weight in large:
            data.write(bytes(-data.tell() % _PAGE))
            set_external_data(weight, location, data.tell(), len(weight.raw_data))
            data.write(weight.raw_data)
            weight.ClearField("raw_data")
    graph_to.write_bytes(model.SerializeToString(deterministic=True))
    return True
