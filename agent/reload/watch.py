"""Sees that a file may have become another one: written, renamed over, linked elsewhere, gone, or in another folder.

A file that is only being written is left alone until its writer closes it. Every link on the way to the file counts, so
that the swap of a folder behind a link (as Kubernetes does it) is seen as well.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import BaseObserver
from watchdog.observers.inotify import InotifyObserver

QUIET = 0.2
"""Seconds without another event after which the file is looked at."""
LOOK = 10.0
"""Seconds between two looks of our own: at folders that were replaced, and at the file if nobody watches."""
MAX_LINKS = 40
_SETTLED: tuple[type[FileSystemEvent], ...] = (
    FileClosedEvent,
    FileMovedEvent,
    FileDeletedEvent,
    FileAttribEvent,
    DirCreatedEvent,
    DirMovedEvent,
    DirDeletedEvent,
)
_FILTER: list[type[FileSystemEvent]] = [FileModifiedEvent, FileCreatedEvent, *_SETTLED]
Hops = dict[str, set[str]]
Folders = dict[str, tuple[int, int]]
Seen = tuple[int, ...]


def hops(path: Path) -> Hops:
    """The folders on the way to `path`, and the names in each on which it depends: the file's own and all links'."""
    found: Hops = {}
    left = list(path.absolute().parts[1:])[::-1]
    folder, links = "/", 0
    while left:
        name = left.pop()
        if name in (".", ".."):
            folder = folder if name == "." else os.path.dirname(folder)
            continue
        here = os.path.join(folder, name)
        try:
            mode = os.lstat(here).st_mode
        except OSError:  # it may come
            found.setdefault(folder, set()).add(name)
            break
        if stat.S_ISLNK(mode):
            links += 1
            found.setdefault(folder, set()).add(name)
            if links > MAX_LINKS:
                break
            target = os.readlink(here)
            folder = "/" if target.startswith("/") else folder
            left += [part for part in target.split("/") if part][::-1]
        elif left and stat.S_ISDIR(mode):
            folder = here
        else:
            found.setdefault(folder, set()).add(name)
            break
    return found


class Watch(FileSystemEventHandler):
    """`run` it as a task. `changed` is called in the loop's thread when the file may be another one; `trouble` with
    what keeps us from watching, None when that is over."""

    def __init__(self, path: Path, changed: Callable[[], None], trouble: Callable[[str | None], None]) -> None:
        self._path = path
        self._changed = changed
        self._trouble = trouble
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hops: Hops = {}
        self._folders: Folders = {}
        self._observer: BaseObserver | None = None
        self._wake = asyncio.Event()
        self._due: asyncio.TimerHandle | None = None
        self._writing = False
        self._seen: Seen | None = None
        self._handled: Seen | None = None

    async def run(self) -> None:
        """Until cancelled."""
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    await self._look()
                except Exception as error:  # a folder that went away just then; the next look may be luckier
                    self._trouble(f"{type(error).__name__}: {error}")
                try:
                    async with asyncio.timeout(LOOK):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
        finally:
            self._loop = None
            if self._due is not None:
                self._due.cancel()
            await asyncio.shield(asyncio.to_thread(self._unwatch))

    async def _look(self) -> None:
        """Watches the folders that matter now, and sees what no event has told: a file that is another one and has been
        the same for two looks."""
        wanted, folders, seen = await asyncio.to_thread(self._state)
        if self._observer is None or not _sound(self._observer) or (wanted, folders) != (self._hops, self._folders):
            self._hops, self._folders = wanted, folders
            try:
                await asyncio.to_thread(self._rewatch)
            except Exception as error:  # whatever it is, the looks go on
                await asyncio.to_thread(self._unwatch)
                self._trouble(f"{type(error).__name__}: {error}")
            else:
                self._trouble(None)
                self._settle()  # it may have changed while nobody watched
        if seen == self._seen and seen != self._handled and not self._writing and self._due is None:
            self._handled = seen
            self._settle()
        self._seen = seen

    def _state(self) -> tuple[Hops, Folders, Seen]:
        """Blocking."""
        wanted = hops(self._path)
        folders: Folders = {}
        for folder in wanted:
            try:
                found = os.stat(folder)
                folders[folder] = (found.st_dev, found.st_ino)
            except OSError:
                folders[folder] = (0, 0)
        try:
            found = os.stat(self._path)
            seen: Seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        except OSError as error:
            seen = (error.errno or 0,)
        return wanted, folders, seen

    # --- watchdog -----------------------------------------------------------------------------------------------------

    def _rewatch(self) -> None:
        """Blocking. Raises OSError: no more watches or instances, or a folder that is gone or not ours to read."""
        self._unwatch()
        observer = InotifyObserver()
        self._observer = observer
        observer.start()
        for folder in self._hops:
            observer.schedule(self, folder, recursive=False, event_filter=_FILTER)

    def _unwatch(self) -> None:
        """Blocking."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            if observer.is_alive():
                observer.join(5.0)

    def dispatch(self, event: FileSystemEvent) -> None:
        """In watchdog's thread."""
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(self._saw, event)
        except RuntimeError:  # the loop is closed
            pass

    def _saw(self, event: FileSystemEvent) -> None:
        paths = {os.fsdecode(path) for path in (event.src_path, event.dest_path) if path}
        if isinstance(event, DirDeletedEvent | DirMovedEvent) and paths & set(self._hops):
            self._wake.set()  # a folder that we watch is gone
            self._settle()
            return
        if not any(os.path.basename(path) in self._hops.get(os.path.dirname(path), ()) for path in paths):
            return
        if isinstance(event, FileModifiedEvent):
            self._written()
        elif isinstance(event, FileAttribEvent) and self._writing:
            pass
        elif isinstance(event, FileCreatedEvent):
            self._came(next(iter(paths)))
        else:
            self._wake.set()  # the way may be another one now
            self._settle()

    def _came(self, path: str) -> None:
        """A new name: of a file that is being written, or of one that is there already (a link, a move into here)."""
        self._wake.set()
        try:
            found = os.lstat(path)
        except OSError:
            return
        if stat.S_ISREG(found.st_mode) and not found.st_size:
            self._written()
        else:
            self._settle()

    def _written(self) -> None:
        """Somebody is at it; the close will come."""
        self._writing = True
        self._hold()

    def _settle(self) -> None:
        if self._loop is None:
            return
        self._writing = False
        self._hold()
        self._due = self._loop.call_later(QUIET, self._settled)

    def _hold(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _settled(self) -> None:
        self._due = None
        self._changed()


def _sound(observer: BaseObserver) -> bool:
    return observer.is_alive() and bool(observer.emitters) and all(one.is_alive() for one in observer.emitters)
