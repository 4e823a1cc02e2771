"""The /models folder of an image while its layers are applied: what belongs to it, and the same on disk.

Every name on disk is reached through folder descriptors, one part at a time, without following links; no link is ever
written. A symlink is kept in memory and becomes a second name of the file it leads to, once all layers are applied.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agent.errors import InvalidImage
from agent.images.files import check_space
from agent.images.hashes import NAME, hasher

MAX_NAME = 255
MAX_PATH = 1024
MAX_DEPTH = 32
MAX_HOPS = 16
CHECK_EVERY = 64 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Parts = tuple[str, ...]


@dataclass
class Node:
    """One entry below /models. `layer` is the number of the layer that brought it."""

    kind: Literal["file", "folder", "symlink"]
    layer: int
    hash: str = ""
    size: int = 0
    target: str = ""
    children: dict[str, Node] = field(default_factory=dict)


class Tree:
    """Files and folders of the model. Parts are relative to /models. Raises InvalidImage for what must not be."""

    def __init__(self, folder: Path, *, max_files: int, keep_free: int) -> None:
        """`folder` exists and is empty."""
        self.root = Node("folder", -1)
        self.found = False
        self._path = folder
        self._folder = os.open(folder, _FOLDER)
        self._max_files = max_files
        self._keep_free = keep_free
        self._count = 0
        self._unchecked = 0
        self._hidden: set[tuple[Parts, int]] = set()

    def close(self) -> None:
        os.close(self._folder)

    # --- what a layer can do -----------------------------------------------------------------------------------------

    def add_folder(self, parts: Parts, layer: int) -> None:
        self.found = True
        if not parts:
            self.root.layer = layer
            return
        self._parents(parts, layer)
        self._own_folder(parts, layer)

    def add_file(self, parts: Parts, content: Iterable[memoryview], layer: int) -> None:
        with self._place(parts, layer) as parent:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            digest, size = hasher(), 0
            with os.fdopen(os.open(parts[-1], flags, 0o644, dir_fd=parent), "wb", buffering=0) as file:
                for part in content:
                    digest.update(part)
                    size += len(part)
                    self._guard(len(part))
                    while part:
                        part = part[file.write(part) :]
                os.fsync(file.fileno())
            self._set(parts, Node("file", layer, digest.hexdigest(), size))

    def add_symlink(self, parts: Parts, target: str, layer: int) -> None:
        self._target(parts, target)  # refuse at once what leads outside
        with self._place(parts, layer):
            self._set(parts, Node("symlink", layer, target=target))

    def add_hardlink(self, parts: Parts, other: Parts, layer: int) -> None:
        node = self._node(other)
        if node is None or node.kind == "folder":
            raise InvalidImage("is a hard link to a file that is not in the image", field=_show(parts))
        if other == parts:
            return
        if node.kind == "symlink":
            self.add_symlink(parts, node.target, layer)
            return
        with self._place(parts, layer) as parent:
            self._link(other, parent, parts[-1])
            self._set(parts, Node("file", layer, node.hash, node.size))

    def whiteout(self, parts: Parts, layer: int) -> None:
        """Remove what lower layers have at `parts`, and below; `()` is /models itself."""
        if (parts, layer) in self._hidden:
            return  # saying it again changes nothing, and must not cost a walk
        self._hidden.add((parts, layer))
        node = self._node(parts)
        if node is None:
            return
        if not parts:
            self._hide_children((), self.root, layer)
            self.found = self.root.layer == layer or bool(self.root.children)
            return
        self._hide_children(parts, node, layer)
        if node.layer < layer and not node.children:
            self._remove(parts)

    def opaque(self, parts: Parts, layer: int) -> None:
        """Remove what lower layers have below the folder at `parts`."""
        node = self._node(parts)
        if node is not None and node.kind == "folder" and ((*parts, ""), layer) not in self._hidden:
            self._hidden.add(((*parts, ""), layer))
            self._hide_children(parts, node, layer)

    def _hide_children(self, parts: Parts, node: Node, layer: int) -> None:
        for name, child in list(node.children.items()):
            if child.kind == "folder":
                self._hide_children((*parts, name), child, layer)
            if child.layer < layer and not child.children:
                self._remove((*parts, name))

    # --- after the last layer ----------------------------------------------------------------------------------------

    def finish(self) -> dict[str, tuple[str, int]]:
        """Turn symlinks into names of their files, make all folders durable; path to (hash, size) of each file."""
        files: dict[str, tuple[str, int]] = {}
        for parts, node in list(self._walk((), self.root)):
            if node.kind == "symlink":
                other = self._resolve(parts, node)
                node.hash, node.size = other[1].hash, other[1].size
                with self._open(parts[:-1]) as parent:
                    self._link(other[0], parent, parts[-1])
            if node.kind != "folder":
                files["/".join(parts)] = (node.hash, node.size)
        for parts, node in self._walk((), self.root):
            if node.kind == "folder":
                with self._open(parts) as folder:
                    os.fsync(folder)
        os.fsync(self._folder)
        return files

    def _resolve(self, parts: Parts, node: Node) -> tuple[Parts, Node]:
        at, found = parts, node
        for _ in range(MAX_HOPS):
            at = self._target(at, found.target)
            following = self._node(at)
            if following is None:
                raise InvalidImage("is a symlink to a file that is not in /models", field=_show(parts))
            if following.kind == "folder":
                raise InvalidImage(
                    "is a symlink to a folder", field=_show(parts), hint="put the files there, or link each of them"
                )
            if following.kind == "file":
                return at, following
            found = following
        raise InvalidImage("is a symlink that leads nowhere", field=_show(parts))

    def _target(self, parts: Parts, target: str) -> Parts:
        stack = [] if target.startswith("/") else ["models", *parts[:-1]]
        for part in target.split("/"):
            if part == "..":
                if not stack:
                    break
                stack.pop()
            elif part not in ("", "."):
                stack.append(part)
        if stack[:1] != ["models"]:
            raise InvalidImage("is a symlink that leaves /models", field=_show(parts), hint="pack plain files only")
        return tuple(stack[1:])

    def _walk(self, parts: Parts, node: Node) -> Iterator[tuple[Parts, Node]]:
        for name, child in node.children.items():
            yield (*parts, name), child
            if child.kind == "folder":
                yield from self._walk((*parts, name), child)

    # --- names and folders -------------------------------------------------------------------------------------------

    def _node(self, parts: Parts) -> Node | None:
        node = self.root
        for name in parts:
            following = node.children.get(name)
            if following is None:
                return None
            node = following
        return node

    def _set(self, parts: Parts, node: Node) -> None:
        parent = self._node(parts[:-1])
        assert parent is not None
        parent.children[parts[-1]] = node

    def _guard(self, size: int) -> None:
        self._unchecked += size
        if self._unchecked >= CHECK_EVERY:
            check_space(self._path, 0, self._keep_free)
            self._unchecked = 0

    def _one_more(self) -> None:
        self._count += 1
        if self._count > self._max_files:
            raise InvalidImage(
                f"has more than {self._max_files} files and folders under /models",
                hint="raise images.max_files if the image is meant to be like that",
            )

    def _parents(self, parts: Parts, layer: int) -> None:
        self.found = True
        for depth in range(1, len(parts)):
            node = self._node(parts[:depth])
            if node is None:
                self._own_folder(parts[:depth], layer)
            elif node.kind != "folder":
                raise InvalidImage(f"lies below a {node.kind} ({_show(parts[:depth])})", field=_show(parts))

    def _own_folder(self, parts: Parts, layer: int) -> None:
        node = self._node(parts)
        if node is not None and node.kind == "folder":
            node.layer = layer
            return
        self._one_more()
        if node is not None:
            self._remove(parts)
        with self._open(parts[:-1]) as parent:
            os.mkdir(parts[-1], 0o755, dir_fd=parent)
        self._set(parts, Node("folder", layer))

    @contextmanager
    def _place(self, parts: Parts, layer: int) -> Iterator[int]:
        """The descriptor of the parent folder, with the name free for a new entry."""
        if not parts:
            raise InvalidImage("/models is not a folder", hint="the model's files must be in the folder /models")
        self._one_more()
        self._parents(parts, layer)
        if self._node(parts) is not None:
            self._remove(parts)
        with self._open(parts[:-1]) as parent:
            yield parent

    @contextmanager
    def _open(self, parts: Parts) -> Iterator[int]:
        descriptor = os.dup(self._folder)
        try:
            for name in parts:
                following = os.open(name, _FOLDER, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = following
            yield descriptor
        finally:
            os.close(descriptor)

    def _link(self, source: Parts, folder: int, name: str) -> None:
        with self._open(source[:-1]) as other:
            os.link(source[-1], name, src_dir_fd=other, dst_dir_fd=folder, follow_symlinks=False)

    def _remove(self, parts: Parts) -> None:
        node = self._node(parts)
        parent = self._node(parts[:-1])
        assert node is not None and parent is not None
        for name in list(node.children):
            self._remove((*parts, name))
        with self._open(parts[:-1]) as folder:
            if node.kind == "folder":
                os.rmdir(parts[-1], dir_fd=folder)
            elif node.kind == "file":
                os.unlink(parts[-1], dir_fd=folder)
        del parent.children[parts[-1]]


def _show(parts: Parts) -> str:
    return "/" + "/".join(("models", *parts))


def split(name: str) -> Parts:
    """The parts of a name in an archive, from the image's root. Raises InvalidImage for any that could lead outside."""
    shown = ascii(name[:200])
    if "\0" in name:
        raise InvalidImage(f"the archive has a name with a NUL: {shown}")
    if name.startswith("/"):
        raise InvalidImage(f"the archive has an absolute path: {shown}")
    if len(name) > 4096:
        raise InvalidImage(f"the archive has a name of {len(name)} characters: {shown}…")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise InvalidImage(f"the archive has a path that leaves the image: {shown}")
    return parts


def check_name(parts: Parts) -> Parts:
    """`parts` (relative to /models) if a file may be called that. Raises InvalidImage."""
    path = "/".join(parts)
    shown = ascii(path[:200])
    try:
        size = max((len(part.encode()) for part in parts), default=0)
    except UnicodeEncodeError:
        raise InvalidImage(f"the name {shown} under /models is not UTF-8") from None
    if any(not char.isprintable() for char in path):
        raise InvalidImage(f"the name {shown} under /models has control characters")
    if size > MAX_NAME or len(path.encode()) > MAX_PATH or len(parts) > MAX_DEPTH:
        raise InvalidImage(f"the name {shown} under /models is too long or too deep")
    if parts and parts[0] == NAME:
        raise InvalidImage(f"the name /models/{NAME} is reserved", hint="pack the image without it")
    return parts
