"""The program that every child of the agent runs: `python -I -m agent.executor.worker`, the channel as standard input.

It must start fast: nothing here may import gRPC, MQTT, pydantic or the CLI.
"""

from __future__ import annotations

import sys
from typing import Any

from agent.executor.child import Handler, Job, OneByOne, serve

__all__ = ["Handler", "Job", "OneByOne", "load", "main", "serve"]


def load(hello: dict[str, Any]) -> Handler:
    """A model's executor or a decoder; each brings its own imports."""
    if hello["kind"] == "decoder":
        from agent.executor.decoder import Decoder

        return Decoder(hello)
    from agent.executor.pipeline import ModelHandler

    return ModelHandler(hello)


def main() -> int:
    """The program."""
    return serve(load)


if __name__ == "__main__":
    sys.exit(main())
