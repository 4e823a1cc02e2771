"""What the host has lived through before its power is cut: of three images, the second committed over the first."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.host import Host
from support.images import file_member, make_image_of_tars, pack_tar
from support.tiny import write_model
from vm.power.image import make_ext4

SHARED, BALLAST = 1 << 20, (1 << 20, 5 << 20)
DISK = 160 << 20


@dataclass(frozen=True)
class Past:
    """`digests` of version 1, 2 and 3; version v answers v + 1 times x. `disk` is an ext4 image of the state folder."""

    layout: Path
    digests: tuple[str, str, str]
    disk: Path

    def blobs(self, digest: str) -> list[str]:
        """The blobs that one image consists of, sha256 in hex, the manifest first."""
        name = digest.removeprefix("sha256:")
        manifest = json.loads((self.layout / "blobs" / "sha256" / name).read_bytes())
        parts = (manifest["config"], *manifest["layers"])
        return [name, *(part["digest"].removeprefix("sha256:") for part in parts)]

    def scale(self, digest: str) -> float:
        return self.digests.index(digest) + 2.0


def make_past(folder: Path, seed: int) -> Past:
    """Two deployments by a slotd on this machine, whose state folder becomes the disk of the guest."""
    layout = folder / "layout"
    layout.mkdir()
    chance = np.random.default_rng(seed)
    shared = pack_tar([file_member("models/shared.bin", chance.bytes(SHARED))])
    digests = []
    for version in (1, 2, 3):
        model = write_model(folder / f"model-{version}", scale=version + 1.0, version=str(version))
        files = [file_member(f"models/{path.name}", path.read_bytes()) for path in sorted(model.iterdir())]
        tars = [pack_tar(files), shared]
        tars += [pack_tar([file_member(f"models/{n}.bin", chance.bytes(size))]) for n, size in enumerate(BALLAST)]
        digests.append(make_image_of_tars(layout, str(version), tars))
    host = Host(folder / "host", images={"layouts": [str(layout)]})
    with host:
        for version in (1, 2):
            ended = host.deploy(f"oci:{layout}:{version}", timeout=180)
            if ended["outcome"] != "committed":
                raise RuntimeError(f"version {version} was not committed: {ended['error']}")
        host.stop()
    state = folder / "host" / "state"
    disk = make_ext4(folder / "past.img", DISK, "-d", str(state))
    shutil.rmtree(folder / "host")
    return Past(layout, (digests[0], digests[1], digests[2]), disk)
