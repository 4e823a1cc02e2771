"""Descriptors, manifests, indexes and image configs, checked before anything in them is believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agent.errors import InvalidImage
from agent.images.reference import DIGEST

MAX_DOCUMENT = 4 << 20
MAX_LAYERS = 256
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
ACCEPT = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))
CONFIGS = frozenset({"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"})
Compression = Literal["none", "gzip", "zstd"]
LAYERS: Mapping[str, Compression] = {
    "application/vnd.oci.image.layer.v1.tar": "none",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
}


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Descriptor:
    """What a manifest says of a blob; `platform` is (os, architecture, variant) where an index gives it."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: tuple[str, str, str] | None = None

    @property
    def hex(self) -> str:
        return self.digest.removeprefix("sha256:")


@dataclass(frozen=True)
class Manifest:
    """One image: its config and its layers, lowest first."""

    descriptor: Descriptor
    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Config and layers, each digest once."""
        return tuple({blob.digest: blob for blob in (self.config, *self.layers)}.values())

    @property
    def size(self) -> int:
        """Compressed bytes of everything."""
        return self.descriptor.size + sum(blob.size for blob in self.blobs)


@dataclass(frozen=True)
class Index:
    """Several images, one for each platform."""

    manifests: tuple[Descriptor, ...]

    def choose(self, platform: str, where: str) -> Descriptor:
        """The first entry for `platform` (os/architecture[/variant]). Raises InvalidImage."""
        os_, _, rest = platform.partition("/")
        architecture, _, variant = rest.partition("/")
        images = [entry for entry in self.manifests if entry.media_type in MANIFESTS]
        for entry in images:
            found = entry.platform
            if found and found[:2] == (os_, architecture) and variant in ("", found[2]):
                return entry
        plain = [entry for entry in images if entry.platform is None]
        if len(plain) == 1 and len(images) == 1:
            return plain[0]
        known = sorted({"/".join(filter(None, entry.platform)) for entry in images if entry.platform})
        raise InvalidImage(
            f"has no image for {platform} (it has {', '.join(known[:8]) or 'none'})",
            field=where,
            hint="build the image for this platform, or set images.platform",
        )


def _document(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > MAX_DOCUMENT:
        raise InvalidImage(f"is larger than {MAX_DOCUMENT} bytes", field=where)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidImage("is not JSON", field=where) from None
    if not isinstance(document, dict):
        raise InvalidImage("is not a JSON object", field=where)
    return document


def parse_descriptor(raw: object, where: str) -> Descriptor:
    """One descriptor. Raises InvalidImage naming what is wrong."""
    if not isinstance(raw, dict):
        raise InvalidImage("is not a descriptor", field=where)
    media_type, digest, size = raw.get("mediaType"), raw.get("digest"), raw.get("size")
    if not isinstance(media_type, str) or not media_type:
        raise InvalidImage("has no mediaType", field=where)
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise InvalidImage("has no sha256 digest", field=where, hint="only sha256 digests are supported")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
        raise InvalidImage("has no valid size", field=where)
    notes = raw.get("annotations")
    annotations = {k: v for k, v in notes.items() if isinstance(v, str)} if isinstance(notes, dict) else {}
    return Descriptor(media_type, digest, size, annotations, _platform(raw.get("platform")))


def _platform(raw: object) -> tuple[str, str, str] | None:
    if not isinstance(raw, dict):
        return None
    os_, architecture, variant = (str(raw.get(key) or "") for key in ("os", "architecture", "variant"))
    return (os_, architecture, variant) if os_ or architecture else None


def parse_manifest(data: bytes, media_type: str | None, where: str) -> Manifest | Index:
    """A manifest or an index. `media_type` is what the transport called it (None: it did not say).

    Raises InvalidImage: not JSON, two types for one document, a type that is not an image.
    """
    document = _document(data, where)
    own = document.get("mediaType")
    if own is not None and media_type is not None and own != media_type:
        raise InvalidImage(f"says it is {own!r} but came as {media_type!r}", field=where)
    kind = own or media_type
    if document.get("schemaVersion") == 1:
        raise InvalidImage(
            "is a Docker schema 1 manifest, which nobody should use",
            field=where,
            hint="push it again with a newer tool",
        )
    if "manifests" in document and "layers" in document:
        raise InvalidImage("is an index and a manifest at once", field=where)
    if kind in INDEXES:
        return Index(
            tuple(
                parse_descriptor(raw, f"{where}: manifests.{number}")
                for number, raw in enumerate(_list(document, "manifests", where, 1024))
            )
        )
    if kind not in MANIFESTS:
        raise InvalidImage(f"has the type {kind!r}, which is no image", field=where)
    _refuse_artifacts(document, where)
    config = parse_descriptor(document.get("config"), f"{where}: config")
    layers = tuple(
        parse_descriptor(raw, f"{where}: layers.{number}")
        for number, raw in enumerate(_list(document, "layers", where, MAX_LAYERS))
    )
    if config.media_type not in CONFIGS:
        raise InvalidImage(f"is not an image but an artifact ({config.media_type})", field=where, hint=_PACK)
    for number, layer in enumerate(layers):
        compression(layer, f"{where}: layers.{number}")
    sizes: dict[str, int] = {}
    for blob in (config, *layers):
        if sizes.setdefault(blob.digest, blob.size) != blob.size:
            raise InvalidImage(f"gives two sizes for {blob.digest}", field=where)
    return Manifest(Descriptor(str(kind), digest_of(data), len(data)), config, layers)


_PACK = "make an ordinary image with the model under /models, as `slotd pack` does"


def _refuse_artifacts(document: Mapping[str, Any], where: str) -> None:
    config = document.get("config")
    kinds = (document.get("artifactType"), config.get("mediaType") if isinstance(config, dict) else None)
    if any(isinstance(kind, str) and kind.startswith("application/vnd.cncf.model.") for kind in kinds):
        raise InvalidImage("is a ModelPack artifact, which cannot be unpacked yet", field=where, hint=_PACK)


def _list(document: Mapping[str, Any], key: str, where: str, limit: int) -> list[object]:
    found = document.get(key)
    if not isinstance(found, list) or not found:
        raise InvalidImage(f"has no {key}", field=where)
    if len(found) > limit:
        raise InvalidImage(f"has {len(found)} {key}, more than {limit}", field=where)
    return found


def compression(layer: Descriptor, where: str) -> Compression:
    """How a layer is compressed. Raises InvalidImage for types that cannot be unpacked, by name."""
    kind = LAYERS.get(layer.media_type)
    if kind is not None:
        return kind
    if layer.media_type.endswith("+encrypted"):
        raise InvalidImage("is encrypted, which is not supported", field=where, hint="push the image unencrypted")
    if "nondistributable" in layer.media_type or "foreign" in layer.media_type:
        raise InvalidImage("is kept outside the registry (a foreign layer), which is not supported", field=where)
    raise InvalidImage(f"has the unknown type {layer.media_type!r}", field=where)


def parse_diff_ids(data: bytes, layers: int, where: str) -> tuple[str, ...]:
    """The digests of the uncompressed layers, from an image config. Raises InvalidImage."""
    rootfs = _document(data, where).get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or len(found) != layers:
        raise InvalidImage(f"does not have one diff_id for each of {layers} layers", field=where)
    if not all(isinstance(item, str) and DIGEST.fullmatch(item) for item in found):
        raise InvalidImage("has a diff_id that is not a sha256 digest", field=where)
    return tuple(found)
