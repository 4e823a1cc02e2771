"""model.yaml: what an image says of its model, checked before anything else is believed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent.errors import InvalidModel
from agent.model.documents import parse_yaml
from agent.model.signature import DType, Signature, TensorSpec

SCHEMA: Literal["slotd/v1"] = "slotd/v1"
MAX_YAML_BYTES = 256 * 1024
MAX_TENSORS = 32
MAX_RANK = 8
_AGAIN = "correct model.yaml and pack the image again"


def _inside(path: str) -> str:
    parts = path.split("/")
    if path.startswith("/") or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} must be a plain path inside /models")
    return path


def _uuid(text: str) -> str:
    plain = text.replace("-", "").lower()
    if not re.fullmatch(r"[0-9a-f]{32}", plain):
        raise ValueError(f"{text!r} is not an id of 32 hex digits")
    return plain


ModelFile = Annotated[str, AfterValidator(_inside)]
HexId = Annotated[str, AfterValidator(_uuid)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
TensorName = Annotated[str, Field(min_length=1, max_length=512)]
Size = Annotated[int, Field(ge=1, le=16384)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorType(_Part):
    """dtype and shape of one input or output; -1 is any size."""

    dtype: DType
    shape: Annotated[tuple[Annotated[int, Field(ge=-1)], ...], Field(max_length=MAX_RANK)]


class Resize(_Part):
    """Either keep the aspect (`shorter`) or not (`exact`: height, width)."""

    shorter: Size | None = None
    exact: tuple[Size, Size] | None = None

    @model_validator(mode="after")
    def _one(self) -> Resize:
        if (self.shorter is None) == (self.exact is None):
            raise ValueError("give exactly one of shorter and exact")
        return self


Triple = tuple[float, float, float]


class ImageStage(_Part):
    """JPEG or PNG bytes to a normalised float32 tensor: (pixel - mean) / std * scale, mean and std in R, G, B."""

    stage: Literal["image"]
    source: Annotated[TensorName, Field(alias="from")]
    to: TensorName
    resize: Resize | None = None
    crop: tuple[Size, Size] | None = None
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    scale: float = 1.0
    order: Literal["RGB", "BGR"] = "RGB"
    layout: Literal["NHWC", "NCHW"] = "NHWC"

    @model_validator(mode="after")
    def _fixed_size(self) -> ImageStage:
        if self.crop is None and (self.resize is None or self.resize.exact is None):
            raise ValueError("an image stage needs a crop or an exact resize, else pictures differ in size")
        if 0.0 in self.std:
            raise ValueError("std must not be zero")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        if self.crop is not None:
            return self.crop
        assert self.resize is not None and self.resize.exact is not None
        return self.resize.exact


class OnnxStage(_Part):
    """One ONNX graph. `inputs` and `outputs` map the graph's names to the pipeline's where they differ."""

    stage: Literal["onnx"]
    file: ModelFile
    on: Literal["slot", "cpu"] = "slot"
    cpu: ModelFile | Literal["none"] | None = None
    inputs: dict[TensorName, TensorName] = {}
    outputs: dict[TensorName, TensorName] = {}

    @property
    def cpu_file(self) -> str | None:
        """The file that the CPU runs for this stage; None if there is no CPU twin."""
        if self.cpu == "none":
            return None
        return self.cpu or self.file


Stage = Annotated[ImageStage | OnnxStage, Field(discriminator="stage")]


class SlotSection(_Part):
    """What the model needs in the slot."""

    interface: HexId
    accelerator: HexId
    bitstream: ModelFile


class Batching(_Part):
    """How requests may be put together along axis 0."""

    max_size: Annotated[int, Field(ge=1, le=1024)]
    max_delay_ms: Annotated[float, Field(ge=0, le=1000)] = 2.0


class ModelSpec(_Part):
    """The whole of model.yaml. Empty inputs and outputs are read from the graph (an image with one .onnx only)."""

    schema_: Annotated[Literal["slotd/v1"], Field(alias="schema")] = SCHEMA
    name: Name
    version: Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,17})$")] = "1"
    labels: Annotated[dict[str, str], Field(max_length=64)] = {}
    inputs: Annotated[dict[TensorName, TensorType], Field(max_length=MAX_TENSORS)] = {}
    outputs: Annotated[dict[TensorName, TensorType], Field(max_length=MAX_TENSORS)] = {}
    pipeline: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=16)]
    slot: SlotSection | None = None
    batching: Batching | None = None
    golden: Annotated[tuple[ModelFile, ...], Field(max_length=64)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if any(isinstance(stage, ImageStage) for stage in self.pipeline[1:]):
            raise ValueError("an image stage must be the first of the pipeline")
        if not isinstance(self.pipeline[-1], OnnxStage):
            raise ValueError("the pipeline must end in an onnx stage")
        slots = [stage for stage in self.pipeline if isinstance(stage, OnnxStage) and stage.on == "slot"]
        if len(slots) != 1:
            raise ValueError(f"exactly one stage must be `on: slot`, found {len(slots)}")
        first = self.pipeline[0]
        if isinstance(first, ImageStage):
            source = self.inputs.get(first.source)
            if source is None or source.dtype is not DType.STRING:
                raise ValueError(f"inputs must have {first.source!r} with dtype string, it feeds the image stage")
        if bool(self.inputs) != bool(self.outputs):
            raise ValueError("give inputs and outputs, or neither")
        return self

    @property
    def signature(self) -> Signature | None:
        """As model.yaml gives it; None if it must be read from the graph."""
        if not self.inputs:
            return None
        return Signature(
            {name: TensorSpec(name, spec.dtype, spec.shape) for name, spec in self.inputs.items()},
            {name: TensorSpec(name, spec.dtype, spec.shape) for name, spec in self.outputs.items()},
        )

    @property
    def image(self) -> ImageStage | None:
        """The stage that decoders run, if the pipeline starts with one."""
        first = self.pipeline[0]
        return first if isinstance(first, ImageStage) else None

    @property
    def graphs(self) -> tuple[OnnxStage, ...]:
        """The stages that executors run."""
        return tuple(stage for stage in self.pipeline if isinstance(stage, OnnxStage))

    @property
    def has_bridge(self) -> bool:
        """Whether the CPU can run the whole pipeline."""
        return all(stage.cpu_file is not None for stage in self.graphs)

    def files(self) -> Iterator[tuple[str, str]]:
        """(field, path) of every file that must be there."""
        for index, stage in enumerate(self.pipeline):
            if isinstance(stage, OnnxStage):
                yield f"pipeline.{index}.file", stage.file
                if stage.cpu not in (None, "none"):
                    yield f"pipeline.{index}.cpu", str(stage.cpu)
        if self.slot is not None:
            yield "slot.bitstream", self.slot.bitstream
        for index, path in enumerate(self.golden):
            yield f"golden.{index}", path


@dataclass(frozen=True)
class Model:
    """An unpacked, verified model on this host. `digest` is the image's manifest digest, `sha256:…`."""

    digest: str
    reference: str
    folder: Path
    spec: ModelSpec
    hashes: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """BLAKE2b-256 in hex of each file in `folder`, as verified; empty for a model that is not from the store."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def version(self) -> int:
        return int(self.spec.version)


def explain(error: ValidationError) -> tuple[str, str]:
    """The first fault of a validation as (field, message)."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("image", "onnx"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"]
    return field, message.removeprefix("Value error, ") + more


def read_spec(folder: Path) -> ModelSpec:
    """The specification of the model unpacked in `folder`; every file that it names is there.

    Without model.yaml, exactly one .onnx file at the top is the whole model. Raises InvalidModel.
    """
    path = folder / "model.yaml"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InvalidModel("is not a plain file", field="model.yaml")
    spec = _written(path) if path.exists() else _bare(folder)
    root = folder.resolve()
    for where, name in spec.files():
        target = folder / name
        if not target.is_file() or not target.resolve().is_relative_to(root):
            raise InvalidModel(
                f"the file {name!r} is not in the image", field=f"model.yaml: {where}", hint="pack the image again"
            )
    return spec


def _written(path: Path) -> ModelSpec:
    if path.stat().st_size > MAX_YAML_BYTES:
        raise InvalidModel(f"is larger than {MAX_YAML_BYTES} bytes", field="model.yaml", hint=_AGAIN)
    try:
        document = parse_yaml(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InvalidModel(f"is not YAML: {' '.join(str(error).split())}", field="model.yaml", hint=_AGAIN) from None
    if not isinstance(document, dict):
        raise InvalidModel("must be a mapping", field="model.yaml", hint=_AGAIN)
    try:
        return ModelSpec.model_validate(document)
    except ValidationError as error:
        field, message = explain(error)
        raise InvalidModel(message, field=f"model.yaml: {field}" if field else "model.yaml", hint=_AGAIN) from None


def _bare(folder: Path) -> ModelSpec:
    graphs = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".onnx") and entry.is_file())
    if not graphs:
        raise InvalidModel("no model.yaml and no .onnx file under /models", hint="pack the image with `slotd pack`")
    if len(graphs) > 1:
        raise InvalidModel(
            f"{len(graphs)} .onnx files ({', '.join(graphs[:4])}) and no model.yaml to say which is the model",
            hint="add a model.yaml",
        )
    stem = re.sub(r"[^a-z0-9._-]", "-", graphs[0].removesuffix(".onnx").lower()).lstrip("._-")[:128]
    return ModelSpec(name=stem or "model", pipeline=(OnnxStage(stage="onnx", file=graphs[0]),))
