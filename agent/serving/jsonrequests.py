"""Requests as REST has them, read into what slotd knows.

Sources: TensorFlow Serving, "RESTful API", Predict; KServe's Open Inference Protocol, "HTTP/REST"; Triton's "Binary
Tensor Data Extension": tensors as bytes behind the JSON document, whose length a header tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from agent.errors import InvalidInput, Unimplemented
from agent.model.signature import DType, Strings, Tensor, TensorSpec
from agent.serving.infer import BY_NAME, raw_tensor
from agent.serving.jsontensors import is_b64, read_json, read_tensor
from agent.serving.tensorproto import MAX_NAME, MAX_OUTPUTS, MAX_RANK, MAX_STRINGS, MAX_TENSORS, Parsed, short

SMALL = 2 << 10
"""Bytes of a JSON document that is read at once, however many bytes of tensors come behind it.

A list of nothing has two bytes and takes as long as a number: 1.5 ms for as much as that."""

# --- TensorFlow Serving -----------------------------------------------------------------------------------------------


def predict_context(inputs: Mapping[str, TensorSpec]) -> bytes:
    """What `read_predict_json` must know of the model that answers: its inputs' dtypes, by all names that they have."""
    known: dict[str, str] = {}
    for name, spec in inputs.items():
        for alias in (name.removesuffix(":0"), f"{name}:0"):
            known.setdefault(alias, spec.dtype.value)
    known |= {name: spec.dtype.value for name, spec in inputs.items()}
    return orjson.dumps({"known": known, "names": list(inputs)})


def read_predict_json(data: bytes | memoryview, *, most: int, context: bytes = b"") -> Parsed:
    """`instances`, row by row, or `inputs`, by column; tensors of at most `most` bytes together.

    Raises InvalidInput naming the field, TooLarge if only `most` stands against it.
    """
    model = orjson.loads(context)
    document = _object(read_json(data), "request")
    signature = document.get("signature_name", "")
    if not isinstance(signature, str):
        raise InvalidInput("is no string", field="signature_name")
    if ("instances" in document) == ("inputs" in document):
        raise InvalidInput("has both instances and inputs, or neither", field="request", hint="send one of them")
    _only(document, ("signature_name", "instances", "inputs"), "request")
    rows = "instances" in document
    columns = _columns(document["instances"], model) if rows else _named(document["inputs"], model)
    if len(columns) > MAX_TENSORS:
        raise InvalidInput(f"has {len(columns)} tensors; at most {MAX_TENSORS} are taken", field="request")
    inputs: dict[str, Tensor] = {}
    strings = MAX_STRINGS
    for name, value in columns.items():
        dtype = model["known"].get(name)
        if dtype is None:
            raise InvalidInput(
                f"the model has no such input; it has {', '.join(map(repr, model['names'][:8]))}", field=short(name)
            )
        tensor = read_tensor(value, DType(dtype), short(name), most=most, strings=strings)
        most -= tensor.nbytes
        strings -= len(tensor.items) if isinstance(tensor, Strings) else 0
        inputs[name] = tensor
    return Parsed(inputs, signature=signature, rows=rows)


def _columns(rows: Any, model: Any) -> dict[str, Any]:
    """Rows as columns: a list of values for the only input, or a list of objects with one value for each."""
    if not isinstance(rows, list) or not rows:
        raise InvalidInput("is no list, or an empty one", field="instances")
    if not isinstance(rows[0], dict) or is_b64(rows[0]):
        return {_only_name(model, "instances"): rows}
    names = set(rows[0])
    if any(not isinstance(row, dict) or set(row) != names for row in rows):
        raise InvalidInput("not all rows name the same inputs", field="instances")
    return {name: [row[name] for row in rows] for name in rows[0]}


def _named(inputs: Any, model: Any) -> dict[str, Any]:
    if isinstance(inputs, dict) and not is_b64(inputs):
        return inputs
    return {_only_name(model, "inputs"): inputs}


def _only_name(model: Any, where: str) -> str:
    if len(model["names"]) != 1:
        raise InvalidInput(f"name the inputs: the model has {', '.join(map(repr, model['names'][:8]))}", field=where)
    return str(model["names"][0])


# --- KServe -----------------------------------------------------------------------------------------------------------


def infer_context(head: int | None) -> bytes:
    """What `read_infer_json` must know: how many bytes the document has, if tensors may come behind it."""
    return b"" if head is None else str(head).encode()


def read_plain_infer_json(data: bytes | memoryview, *, most: int, context: bytes = b"") -> Parsed | None:
    """The request, if its document is small and all its tensors are bytes behind it; else None. They are views then."""
    if not context or int(context) > SMALL:
        return None
    try:
        return read_infer_json(data, most=most, context=context, only_views=True)
    except (_NotPlain, InvalidInput, Unimplemented):
        return None


class _NotPlain(Exception):
    pass


def read_infer_json(data: bytes | memoryview, *, most: int, context: bytes = b"", only_views: bool = False) -> Parsed:
    """An inference request; its tensors may take `most` bytes together.

    Raises InvalidInput naming the tensor, TooLarge if only `most` stands against it, Unimplemented.
    """
    view = memoryview(data)
    head = int(context) if context else len(view)
    if head > len(view):
        raise InvalidInput(f"says {head}, the body has {len(view)} bytes", field="inference-header-content-length")
    document = _object(read_json(view[:head]), "request")
    behind = view[head:]
    inputs: dict[str, Tensor] = {}
    strings = MAX_STRINGS
    for one in _list(document.get("inputs"), "inputs", MAX_TENSORS):
        name, dtype, shape, size = _input(one)
        where = short(name)
        if name in inputs:
            raise InvalidInput("is given twice", field=where)
        if size is None:
            if only_views:
                raise _NotPlain
            tensor = read_tensor(one["data"], dtype, where, most=most, strings=strings, shape=shape)
        else:
            if size > len(behind):
                raise InvalidInput(f"binary_data_size is {size}, {len(behind)} bytes are left", field=where)
            if only_views and dtype in (DType.STRING, DType.BOOL) and size > SMALL:
                raise _NotPlain
            tensor = raw_tensor(behind[:size], dtype, shape, where, most=most, strings=strings)
            behind = behind[size:]
        most -= tensor.nbytes
        strings -= len(tensor.items) if isinstance(tensor, Strings) else 0
        inputs[name] = tensor
    if len(behind):
        raise InvalidInput(f"{len(behind)} bytes behind the document belong to no tensor", field="request")
    outputs, binary = _outputs(document)
    id_ = document.get("id", "")
    if not isinstance(id_, str) or len(id_) > MAX_NAME:
        raise InvalidInput("is no string, or a long one", field="id")
    return Parsed(inputs, outputs=outputs, id=id_, binary=binary)


def _input(one: Any) -> tuple[str, DType, tuple[int, ...], int | None]:
    """Name, dtype, shape, and the bytes behind the document that it has, if it has some."""
    one = _object(one, "inputs")
    name = one.get("name")
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise InvalidInput("an input has no name, or a long one", field="inputs")
    where = short(name)
    parameters = _parameters(one, where)
    datatype = one.get("datatype")
    if not isinstance(datatype, str):
        raise InvalidInput("has no datatype", field=where, hint=f"one of {', '.join(BY_NAME)}")
    known = BY_NAME.get(datatype)
    if known is None:
        raise InvalidInput(
            f"has datatype {short(datatype)!r}, which slotd does not carry",
            field=where,
            hint=f"one of {', '.join(BY_NAME)}",
        )
    shape = one.get("shape")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not set(map(type, shape)) <= {int}:
        raise InvalidInput("has no shape: a list of whole numbers", field=where)
    size = parameters.get("binary_data_size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
        raise InvalidInput("binary_data_size is no number of bytes", field=where)
    if ("data" in one) == (size is not None):
        raise InvalidInput("has both data and binary_data_size, or neither", field=where, hint="send one of them")
    return name, known[0], tuple(shape), size


def _outputs(document: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, bool]]:
    """Which are asked for, and which of them as bytes."""
    binary = {"": _flag(_parameters(document, "parameters"), "binary_data_output", "parameters", False)}
    names: list[str] = []
    for one in _list(document.get("outputs", []), "outputs", MAX_OUTPUTS):
        name = _object(one, "outputs").get("name")
        if not isinstance(name, str) or not name or len(name) > MAX_NAME:
            raise InvalidInput("an output has no name, or a long one", field="outputs")
        parameters = _parameters(one, short(name))
        if parameters.get("classification"):
            raise Unimplemented("classification of outputs is not offered", field=short(name))
        if name in names:
            raise InvalidInput("an output is asked for twice", field="outputs")
        names.append(name)
        binary[name] = _flag(parameters, "binary_data", short(name), binary[""])
    return tuple(names), binary


def _parameters(one: Any, where: str) -> dict[str, Any]:
    parameters = _object(one.get("parameters", {}), where)
    if "shared_memory_region" in parameters:
        raise Unimplemented("shared memory is not offered", field=where, hint="send the tensor inline")
    return parameters


def _flag(parameters: dict[str, Any], name: str, where: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"{name} is neither true nor false", field=where)
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInput("is no JSON object", field=where)
    return value


def _list(value: Any, where: str, most: int) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidInput("is no list", field=where)
    if len(value) > most:
        raise InvalidInput(f"has {len(value)} tensors; at most {most} are taken", field=where)
    return value


def _only(document: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in document:
        if name not in names:
            raise InvalidInput(f"there is no {short(name)!r}", field=where, hint=f"one of {', '.join(names)}")
