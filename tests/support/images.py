"""Makes OCI images for tests, with Python's own tarfile: not the code that reads them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import ssl
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import zstandard

Compression = Literal["gzip", "zstd", "none"]
_SUFFIX = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}
_DOCKER = {"gzip": ".gzip", "zstd": ".zstd", "none": ""}


def make_image(
    layout: Path,
    tag: str,
    files: dict[str, bytes],
    *,
    layers: int = 1,
    compression: Compression = "gzip",
    docker: bool = False,
) -> str:
    """Put an image into the OCI layout folder `layout` under `tag`; its manifest digest.

    `files`: path below the image's root (`models/model.yaml`) to content, spread over `layers` in order.
    """
    items = list(files.items())
    share = -(-len(items) // layers)
    tars = [
        pack_tar([file_member(path, data) for path, data in items[n * share : (n + 1) * share]]) for n in range(layers)
    ]
    return make_image_of_tars(layout, tag, tars, compression=compression, docker=docker)


def make_image_of_tars(
    layout: Path,
    tag: str,
    tars: Sequence[bytes],
    *,
    compression: Compression = "gzip",
    docker: bool = False,
    diff_ids: Sequence[str] | None = None,
    packed: Sequence[bytes] | None = None,
    platform: tuple[str, str] = ("linux", "amd64"),
) -> str:
    """As `make_image`, from whole tar archives; `packed` and `diff_ids` replace what would be right."""
    blobs = list(packed) if packed is not None else [compress(tar, compression) for tar in tars]
    config = {
        "architecture": platform[1],
        "os": platform[0],
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids or [digest(tar) for tar in tars])},
    }
    layer_type = (
        f"application/vnd.docker.image.rootfs.diff.tar{_DOCKER[compression]}"
        if docker
        else f"application/vnd.oci.image.layer.v1.tar{_SUFFIX[compression]}"
    )
    config_type = (
        "application/vnd.docker.container.image.v1+json" if docker else "application/vnd.oci.image.config.v1+json"
    )
    kind = (
        "application/vnd.docker.distribution.manifest.v2+json"
        if docker
        else "application/vnd.oci.image.manifest.v1+json"
    )
    document = {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": describe(layout, config_type, json.dumps(config).encode()),
        "layers": [describe(layout, layer_type, blob) for blob in blobs],
    }
    return put_manifest(layout, tag, document)


def put_manifest(layout: Path, tag: str, document: dict[str, Any]) -> str:
    """Add a manifest or index to the layout under `tag`; its digest."""
    entry = describe(layout, document["mediaType"], json.dumps(document).encode())
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    index = layout / "index.json"
    listed = json.loads(index.read_bytes())["manifests"] if index.exists() else []
    kept = [old for old in listed if old["annotations"]["org.opencontainers.image.ref.name"] != tag]
    index.write_text(json.dumps({"schemaVersion": 2, "manifests": [*kept, entry]}))
    return str(entry["digest"])


def describe(layout: Path, media_type: str, data: bytes) -> dict[str, Any]:
    """Write a blob; its descriptor."""
    folder = layout / "blobs" / "sha256"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(data).hexdigest()
    (folder / name).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def compress(data: bytes, compression: Compression) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, compresslevel=1, mtime=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=1).compress(data)
    return data


Member = tuple[tarfile.TarInfo, bytes]


def file_member(path: str, data: bytes, mode: int = 0o644) -> Member:
    info = tarfile.TarInfo(path)
    info.size, info.mode = len(data), mode
    return info, data


def member(path: str, kind: bytes, link: str = "") -> Member:
    """A folder, link, device or fifo: `kind` is one of tarfile's types."""
    info = tarfile.TarInfo(path)
    info.type, info.linkname, info.mode = kind, link, 0o755
    return info, b""


def pack_tar(members: Iterable[Member], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def push_image(
    layout: Path,
    tag: str,
    host: str,
    name: str,
    as_tag: str | None = None,
    auth: tuple[str, str] | None = None,
    ca: Path | None = None,
) -> str:
    """Push an image of a layout to repository `name` (over TLS if `ca` is given); its manifest digest."""
    index = json.loads((layout / "index.json").read_bytes())
    entry = next(item for item in index["manifests"] if item["annotations"]["org.opencontainers.image.ref.name"] == tag)
    url = f"{'https' if ca else 'http'}://{host}/v2/{name}"
    verify = ssl.create_default_context(cafile=str(ca)) if ca else False
    with httpx.Client(base_url=url, auth=auth, trust_env=False, timeout=30, verify=verify) as client:
        _push(client, layout, entry, as_tag or tag)
    return str(entry["digest"])


def _push(client: httpx.Client, layout: Path, entry: dict[str, Any], tag: str) -> None:
    data = (layout / "blobs" / "sha256" / entry["digest"].removeprefix("sha256:")).read_bytes()
    document = json.loads(data)
    for child in document.get("manifests", []):
        _push(client, layout, child, child["digest"])
    for blob in [document["config"], *document["layers"]] if "layers" in document else []:
        content = (layout / "blobs" / "sha256" / blob["digest"].removeprefix("sha256:")).read_bytes()
        started = client.post("/blobs/uploads/")
        started.raise_for_status()
        where = httpx.URL(started.headers["Location"]).copy_merge_params({"digest": blob["digest"]})
        client.put(where, content=content).raise_for_status()
    client.put(f"/manifests/{tag}", content=data, headers={"Content-Type": entry["mediaType"]}).raise_for_status()
