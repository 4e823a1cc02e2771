"""What an executor needs to know of a model, as plain data: with pydantic a child would take twice as long to start."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from agent.model.signature import DType, Signature, TensorSpec, signature_from

if TYPE_CHECKING:
    from agent.model.spec import ModelSpec


@dataclass(frozen=True)
class Graph:
    """One ONNX stage. `cpu` is None without a CPU twin; `inputs`, `outputs`: the graph's names to the pipeline's."""

    field: str
    file: str
    cpu: str | None
    on: str
    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class Picture:
    """The image stage, which decoders ran: the executor takes `to` in the place of `source`."""

    source: str
    to: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A model as an executor runs it. `signature` is None if the graph says it; `slot`: ids and bitstream."""

    graphs: tuple[Graph, ...]
    signature: Signature | None
    picture: Picture | None
    slot: dict[str, str] | None

    @property
    def executor_inputs(self) -> dict[str, TensorSpec] | None:
        """What the executor takes, in order; None if the graph says it."""
        if self.signature is None:
            return None
        picture = self.picture
        if picture is None:
            return dict(self.signature.inputs)
        decoded = TensorSpec(picture.to, DType.FLOAT32, picture.shape)
        return {
            spec.name: spec
            for spec in (decoded if name == picture.source else spec for name, spec in self.signature.inputs.items())
        }


def plan_of(spec: ModelSpec) -> dict[str, Any]:
    """A model's plan for the child, as JSON."""
    image = spec.image
    picture = None
    if image is not None:
        height, width = image.size
        shape = (-1, height, width, 3) if image.layout == "NHWC" else (-1, 3, height, width)
        picture = asdict(Picture(image.source, image.to, shape))
    signature = spec.signature
    first = len(spec.pipeline) - len(spec.graphs)
    return {
        "graphs": [
            asdict(
                Graph(f"pipeline.{first + place}", stage.file, stage.cpu_file, stage.on, stage.inputs, stage.outputs)
            )
            for place, stage in enumerate(spec.graphs)
        ],
        "signature": None if signature is None else signature.as_dict(),
        "picture": picture,
        "slot": None if spec.slot is None else spec.slot.model_dump(),
    }


def read_plan(document: dict[str, Any]) -> Plan:
    """The reverse of `plan_of`."""
    picture = document["picture"]
    signature = document["signature"]
    return Plan(
        tuple(Graph(**graph) for graph in document["graphs"]),
        None if signature is None else signature_from(signature),
        None if picture is None else Picture(picture["source"], picture["to"], tuple(picture["shape"])),
        document["slot"],
    )
