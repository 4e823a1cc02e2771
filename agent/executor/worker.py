"""The program that every child of the agent runs: `python -I -m agent.executor.worker`, the channel as standard input.

It must start fast: nothing here may import gRPC, MQTT, pydantic or the CLI.
"""

from __future__ import annotations

import sys
from typing import Any

from agent.executor.child import Handler, Job, OneByOne, serve

__all__ = ["Handler", "Job", "OneByOne", "bring", "load", "main", "serve"]


def bring(hello: dict[str, Any]) -> None:
    """The imports of `load`, while files may still be read at will, and compiled modules be written."""
    if hello["kind"] == "decoder":
        import agent.executor.decoder
    else:
        import agent.executor.pipeline  # noqa: F401


def load(hello: dict[str, Any]) -> Handler:
    """A model's executor or a decoder; each brings its own imports."""
    if hello["kind"] == "decoder":
        from agent.executor.decoder import Decoder

        return Decoder(hello)
    from agent.executor.pipeline import ModelHandler

    return ModelHandler(hello)


def main() -> int:
    """The program."""
    if sys.argv[1:] == ["eager"]:  # started ahead of its task (see spawn)
        bring({"kind": "model"})
    return serve(load, bring=bring)


if __name__ == "__main__":
    sys.exit(main())
