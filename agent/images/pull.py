"""The agent's side of the puller: start it, follow it, end it. Nothing of an image is parsed in this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from agent.config import ImagesConfig
from agent.errors import PullerDied, revive
from agent.images.layout import Store

LINE = 256 << 10
REAP = 10.0
# All that a child needs to know of the environment; proxies and certificates are the site's own.
_ENVIRONMENT = ("PATH", "LANG", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
_log = structlog.get_logger("images")

Progress = Callable[[dict[str, Any]], None]


async def resolve(
    reference: str, config: ImagesConfig, *, digest: str | None = None, store: Store | None = None
) -> str:
    """The manifest digest (`sha256:…`) of the image that `reference` names, for the configured platform.

    `digest` pins it (it may be that of an index). With `store`, an image that is pinned and stored needs no network.
    Raises InvalidInput, InvalidImage, NotFound, RegistryError, RegistryDenied, RegistryRefused, PullerDied.
    """
    return await _run("resolve", reference, digest or "", store, config, None)


async def pull(reference: str, digest: str, store: Store, config: ImagesConfig, progress: Progress) -> None:
    """Bring the blobs of the image into the store, each verified; what is there is not fetched again.

    `digest` is what `resolve` gave. `progress` gets {"bytes", "total"} at most every 0.2 s.
    Raises as `resolve` does, and StorageError (disk full, read-only), Conflict (another pull is running).
    """
    await _run("pull", reference, digest, store, config, progress)


async def unpack(
    digest: str, store: Store, config: ImagesConfig, progress: Progress, *, reference: str | None = None
) -> Path:
    """`models/<hex>` of an image that was pulled: complete, durable, with its hash list. `reference` is noted in it
    (default: the name under which it was pulled).

    Raises InvalidImage, InvalidModel (no /models), NotFound, StorageError, PullerDied.
    """
    return Path(await _run("unpack", reference or "", digest, store, config, progress))


async def _run(
    verb: str, reference: str, digest: str, store: Store | None, config: ImagesConfig, progress: Progress | None
) -> str:
    job = {
        "verb": verb,
        "reference": reference,
        "digest": digest,
        "state_dir": str(store.state_dir) if store else "",
        "images": config.model_dump(mode="json"),
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-m",
        "agent.images.puller",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name.upper() in _ENVIRONMENT},
        limit=LINE,
        start_new_session=True,
    )
    _log.debug("puller started", verb=verb, image=reference, pid=child.pid)
    try:
        return await _follow(child, json.dumps(job).encode() + b"\n", progress)
    finally:
        await _end(child)


async def _follow(child: asyncio.subprocess.Process, job: bytes, progress: Progress | None) -> str:
    assert child.stdin is not None and child.stdout is not None
    # It died at once; the end of its output says so. uvloop's word for that is RuntimeError.
    with suppress(BrokenPipeError, ConnectionResetError, RuntimeError):
        child.stdin.write(job)
        await child.stdin.drain()
    while (document := await _answer(child.stdout)) is not None:
        if "progress" in document:
            if progress is not None:
                progress(document["progress"])
        elif "error" in document:
            raise revive(document["error"])
        else:
            return str(document["result"])
    status = await child.wait()
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    raise PullerDied(f"the puller ended with {how}", hint="try again; what was fetched is kept")


async def _answer(stream: asyncio.StreamReader) -> dict[str, Any] | None:
    try:
        line = await stream.readline()
        document = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        raise PullerDied("the puller answered nonsense", hint="look into the log; try again") from None
    return document if isinstance(document, dict) else None


async def _end(child: asyncio.subprocess.Process) -> None:
    """Kill and reap; also when we are cancelled, so that no puller writes on behind a later one."""
    if child.returncode is None:
        with suppress(ProcessLookupError):
            child.kill()
    gone = asyncio.ensure_future(child.wait())
    cancelled = False
    deadline = asyncio.get_running_loop().time() + REAP
    while not gone.done() and (left := deadline - asyncio.get_running_loop().time()) > 0:
        try:
            await asyncio.wait({gone}, timeout=left)
        except asyncio.CancelledError:
            cancelled = True
    if not gone.done():
        # It hangs in the kernel (a disk that does not answer). The store's lock keeps others out until it is gone.
        gone.cancel()
        _log.error("puller does not die", pid=child.pid)
    if child.stdin is not None:
        child.stdin.close()
    if cancelled:
        raise asyncio.CancelledError
