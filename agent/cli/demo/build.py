"""Makes everything that the demo needs, in a process of its own: models, images, photographs, expected answers.

    python -m agent.cli.demo.build FOLDER

One JSON document a line on standard output: {"progress": text}, then {"done": {...}} or {"error": {...}}.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from agent.errors import NotFound, SlotdError

LAYOUT = "layout"
_HINT = "pip install 'slotd[demo]'"


def build(folder: Path) -> dict[str, Any]:
    """{"models": [{name, tag, digest}, …], "bytes": of the images, "pictures": how many}. Raises SlotdError."""
    try:
        import amqtt  # noqa: F401  # the daemon needs it, and would say so only later
        import onnx  # noqa: F401

        from agent.cli.demo.pictures import write_expected, write_pictures
        from agent.forge.demo_models import Reference, build_demo_images, class_names, image_stage
        from agent.forge.efficientnet import LITE0, LITE1
    except ImportError as error:
        raise NotFound(f"the package {error.name} is not installed", hint=_HINT) from None
    class_names()
    models = folder / "models"
    digests = build_demo_images(folder / LAYOUT, models, _progress)
    _progress("asking bare ONNX Runtime")
    pictures = write_pictures(folder)
    variants = (LITE0, LITE1)
    write_expected(folder, [Reference(models / variant.name, image_stage(variant)) for variant in variants])
    shutil.rmtree(models)  # they are in the images now
    return {
        "models": [{"name": tag.rpartition(":")[0], "tag": tag, "digest": digest} for tag, digest in digests.items()],
        "bytes": sum(path.stat().st_size for path in (folder / LAYOUT).rglob("*") if path.is_file()),
        "pictures": len(pictures),
    }


def _progress(text: str) -> None:
    _say({"progress": text})


def _say(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


def main() -> int:
    """The process."""
    try:
        _say({"done": build(Path(sys.argv[1]))})
    except SlotdError as error:
        _say({"error": error.as_dict()})
        return error.exit
    except OSError as error:
        _say({"error": SlotdError(f"the models cannot be written: {error}", hint="is the disk full?").as_dict()})
        return SlotdError.exit
    return 0


if __name__ == "__main__":
    sys.exit(main())
