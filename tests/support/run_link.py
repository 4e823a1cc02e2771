"""A link in a process of its own, to be killed: run_link.py FOLDER PORT PROTOCOL."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.linked import linked, make_config


async def main(folder: str, port: str, protocol: str) -> None:
    async with linked(make_config(Path(folder), int(port), protocol)):
        print("online", flush=True)
        await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
