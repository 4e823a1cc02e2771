"""Fits what a client sent to what a model takes: names, dtypes, shapes, and which outputs are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.errors import InvalidInput, NotFound
from agent.model.signature import Signature, Tensor, TensorSpec, dtype_of
from agent.model.spec import Model


@dataclass(frozen=True, slots=True)
class ModelFields:
    """What a protocol calls the fields that name a model, for errors."""

    name: str = "model"
    version: str = "version"


OUR_FIELDS = ModelFields()


def check_model(model: Model, name: str, version: int | None, fields: ModelFields) -> None:
    """Whether `model` is the one that is meant; an empty name and no version mean any. Raises NotFound."""
    if name not in ("", model.name):
        raise NotFound(f"no model {name[:100]!r} is served here, {model.name!r} is", field=fields.name)
    if version not in (None, model.version):
        raise NotFound(f"version {version} of {model.name!r} is not served, {model.version} is", field=fields.version)


def _find(name: str, specs: Mapping[str, TensorSpec], side: str) -> TensorSpec:
    """By exact name, else with or without the `:0` that TensorFlow adds."""
    spec = specs.get(name) or specs.get(f"{name}:0") or specs.get(name.removesuffix(":0"))
    if spec is None:
        known = ", ".join(map(repr, list(specs)[:8]))
        raise InvalidInput(f"the model has no such {side}; it has {known}", field=name[:200] or "(empty name)")
    return spec


def bind_inputs(signature: Signature, sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs by the model's own names, each of the right dtype and shape. Raises InvalidInput naming the tensor."""
    bound: dict[str, Tensor] = {}
    for name, tensor in sent.items():
        spec = _find(name, signature.inputs, "input")
        if spec.name in bound:
            raise InvalidInput("is given twice", field=name)
        dtype = dtype_of(tensor)
        if dtype is not spec.dtype:
            raise InvalidInput(f"has dtype {dtype.value}, the model takes {spec.dtype.value}", field=name)
        if not spec.accepts(tuple(tensor.shape)):
            raise InvalidInput(f"has shape {list(tensor.shape)}, the model takes {list(spec.shape)}", field=name)
        bound[spec.name] = tensor
    for name in signature.inputs:
        if name not in bound:
            raise InvalidInput("is missing", field=name)
    return bound


def bind_outputs(signature: Signature, wanted: Iterable[str]) -> dict[str, str]:
    """The model's name of each output that is wanted, by the client's name; all of them if none is named."""
    names = tuple(wanted)
    if not names:
        return {name: name for name in signature.outputs}
    return {name: _find(name, signature.outputs, "output").name for name in names}
