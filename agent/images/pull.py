"""The agent's side of the puller: start it, follow it, end it. Nothing of an image is parsed in this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import structlog

from agent.config import ImagesConfig
from agent.errors import PullerDied, revive
from agent.images.layout import Store
from agent.spawning import Child, start

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
    child = await _Child.start()
    _log.debug("puller started", verb=verb, image=reference, pid=child.pid)
    try:
        return await _follow(child, json.dumps(job).encode() + b"\n", progress)
    finally:
        await _end(child)


class _Child:
    """The process; `exited` has its exit status once it was reaped."""

    def __init__(self, child: Child, ears: BinaryIO, mouth: BinaryIO) -> None:
        """`ears` and `mouth`: where it reads what it is told, and where we read what it says. Raises OSError."""
        self._child, self._ears, self._mouth = child, ears, mouth
        self.pid = child.pid
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._transport: asyncio.ReadTransport | None = None
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._reap)

    @classmethod
    async def start(cls) -> _Child:
        """Raises OSError."""
        argv = (sys.executable, "-I", "-m", "agent.images.puller")
        environment = {name: value for name, value in os.environ.items() if name.upper() in _ENVIRONMENT}
        with ExitStack() as ours, ExitStack() as theirs:
            told, ears = _pipe(theirs, ours)
            mouth, says = _pipe(ours, theirs)
            child = await start(argv, env=environment, stdin=told.fileno(), stdout=says.fileno())
            try:
                made = cls(child, ears, mouth)
            except OSError:
                child.kill()
                child.wait()
                raise
            ours.pop_all()
            return made

    async def tell(self, job: bytes) -> None:
        """What it is to do."""
        with suppress(BrokenPipeError):  # it died at once; the end of its output says so
            await asyncio.to_thread(self._ears.write, job)

    async def answers(self) -> asyncio.StreamReader:
        """What it says, from now on."""
        reader = asyncio.StreamReader(limit=LINE)
        protocol = asyncio.StreamReaderProtocol(reader)
        # The transport closes it.
        self._transport, _ = await self._loop.connect_read_pipe(lambda: protocol, self._mouth)
        return reader

    def kill(self) -> None:
        if not self.exited.done():
            self._child.kill()

    def close(self) -> None:
        """Nothing more is said or heard."""
        (self._transport or self._mouth).close()
        self._ears.close()

    def _reap(self) -> None:
        status = self._child.poll()
        if status is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self.exited.set_result(status)


def _pipe(reader: ExitStack, writer: ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """Both ends of a pipe, each closed by its own."""
    read, write = os.pipe2(os.O_CLOEXEC)
    return reader.enter_context(os.fdopen(read, "rb", 0)), writer.enter_context(os.fdopen(write, "wb", 0))


async def _follow(child: _Child, job: bytes, progress: Progress | None) -> str:
    answers = await child.answers()
    await child.tell(job)
    while (document := await _answer(answers)) is not None:
        if "progress" in document:
            if progress is not None:
                progress(document["progress"])
        elif "error" in document:
            raise revive(document["error"])
        else:
            return str(document["result"])
    status = await asyncio.shield(child.exited)
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    raise PullerDied(f"the puller ended with {how}", hint="try again; what was fetched is kept")


async def _answer(stream: asyncio.StreamReader) -> dict[str, Any] | None:
    try:
        line = await stream.readline()
        document = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        raise PullerDied("the puller answered nonsense", hint="look into the log; try again") from None
    return document if isinstance(document, dict) else None


async def _end(child: _Child) -> None:
    """Kill and reap; also when we are cancelled, so that no puller writes on behind a later one."""
    child.kill()
    cancelled = False
    deadline = asyncio.get_running_loop().time() + REAP
    while not child.exited.done() and (left := deadline - asyncio.get_running_loop().time()) > 0:
        try:
            await asyncio.wait({child.exited}, timeout=left)
        except asyncio.CancelledError:
            cancelled = True
    if not child.exited.done():
        # It hangs in the kernel (a disk that does not answer). The store's lock keeps others out until it is gone.
        _log.error("puller does not die", pid=child.pid)
    child.close()
    if cancelled:
        raise asyncio.CancelledError
