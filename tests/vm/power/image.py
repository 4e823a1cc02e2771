"""What the guest boots: Debian's cloud kernel, a small initramfs, and this Python with slotd as a read-only ext4 image.

Nothing is installed into the host: the kernel's package is downloaded and unpacked below `build/vm`, and kept there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
CACHE = REPOSITORY / "build" / "vm"
TOOLS = ("qemu-system-x86_64", "setpriv", "mkfs.ext4", "e2fsck", "debugfs", "cpio", "dpkg-deb", "apt-get")
MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
NETWORK = ("failover", "net_failover", "virtio_net")
BUSYBOX = Path("/bin/busybox")
_LEFT_OUT = ("test", "tests", "idlelib", "ensurepip", "lib2to3", "turtledemo", "tkinter", "site-packages", "pydoc_data")

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /sysroot
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in {modules}; do /bin/busybox insmod /$module.ko; done
/bin/busybox mount -t ext4 -o ro,noload /dev/vda /sysroot || /bin/busybox poweroff -f
for place in proc sys dev; do /bin/busybox mount --move /$place /sysroot/$place; done
# The repository may lie below one of them: then it must not be covered.
for place in tmp run mnt; do
  test -n "$(/bin/busybox ls -A /sysroot/$place)" || /bin/busybox mount -t tmpfs tmpfs /sysroot/$place
done
/bin/busybox mkdir -p /sysroot/dev/shm && /bin/busybox mount -t tmpfs shm /sysroot/dev/shm
/bin/busybox ip link set lo up
/bin/busybox ip addr add 10.0.2.15/24 dev eth0
/bin/busybox ip link set eth0 up
exec /bin/busybox switch_root /sysroot /bin/busybox sh -c '{command}; /bin/busybox poweroff -f'
"""


def missing_tools() -> list[str]:
    """What has to be installed first: qemu-system-x86, e2fsprogs, cpio, busybox-static."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=environment()["PATH"]) is None]
    if not BUSYBOX.exists() or b"/ld-linux" in BUSYBOX.read_bytes()[:4096]:
        missing.append(f"{BUSYBOX} (static)")
    return missing


def kernel(cache: Path = CACHE) -> Path:
    """The folder of an unpacked kernel package: boot/vmlinuz-*, lib/modules. Downloaded once."""
    folder = cache / "kernel"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        listed = run("apt-cache", "depends", "linux-image-cloud-amd64").stdout
        names = re.findall(r"Depends: (linux-image-\S+-cloud-amd64)", listed)
        if not names:
            raise RuntimeError("apt knows no linux-image-cloud-amd64; run apt-get update")
        run("apt-get", "download", "-o", "APT::Sandbox::User=root", names[0], cwd=cache)
        partial = cache / "kernel.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (package,) = cache.glob(f"{names[0]}_*.deb")
        run("dpkg-deb", "-x", str(package), str(partial))
        package.unlink()
        partial.rename(folder)
    return folder


def initramfs(target: Path, command: str, cache: Path = CACHE) -> Path:
    """Busybox, the modules for virtio, and an init that ends in `command` on the root image."""
    folder = target.with_suffix(".d")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "bin").mkdir(parents=True)
    shutil.copy2(BUSYBOX, folder / "bin" / "busybox")
    found = {path.stem.replace("-", "_"): path for path in (kernel(cache) / "lib").rglob("*.ko")}
    modules = [name for name in (*MODULES, *NETWORK) if name in found]  # the others are built in
    for name in modules:
        shutil.copy2(found[name], folder / f"{name}.ko")
    init = folder / "init"
    init.write_text(INIT.format(modules=" ".join(modules), command=command))
    init.chmod(0o755)
    names = "\n".join(str(path.relative_to(folder)) for path in sorted(folder.rglob("*")))
    with target.open("wb") as archive:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), stdout=archive, cwd=folder, check=True
        )
    return target


def vmlinuz(cache: Path = CACHE) -> Path:
    (path,) = (kernel(cache) / "boot").glob("vmlinuz-*")
    return path


def root_image(target: Path, staging: Path) -> Path:
    """An ext4 image with the interpreter, slotd's dependencies, slotd and the guest's program, at the host's paths."""
    shutil.rmtree(staging, ignore_errors=True)
    for source in files():
        place = staging / str(source).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(place):
            shutil.copy2(source, place, follow_symlinks=False)
    for name in ("proc", "sys", "dev", "tmp", "run", "mnt", "var/lib/slotd", "etc", "bin"):
        (staging / name).mkdir(parents=True, exist_ok=True)
    shutil.copy2(BUSYBOX, staging / "bin" / "busybox")
    (staging / "etc" / "passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (staging / "etc" / "group").write_text("root:x:0:\n")
    (staging / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    size = sum(path.lstat().st_size + 4096 for path in staging.rglob("*"))
    make_ext4(target, int(size * 1.1) + (32 << 20), "-O", "^has_journal", "-m", "0", "-d", str(staging))
    shutil.rmtree(staging)
    return target


def make_ext4(target: Path, size: int, *options: str) -> Path:
    """A fresh ext4 file system in a file, with the defaults that Debian's installer uses but for `options`."""
    target.unlink(missing_ok=True)
    with target.open("wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", "-F", *options, str(target))
    return target


def files() -> Iterator[Path]:
    """Everything that slotd needs to run here, links and what they point to included."""
    found: set[Path] = set()
    for path in [*_interpreter(), *_packages("slotd"), *_sources()]:
        found |= _with_links(path)
    yield from sorted(found | _libraries(found))


def _interpreter() -> Iterator[Path]:
    yield Path(sys.executable)
    environment = Path(sys.prefix) / "pyvenv.cfg"
    if environment.exists():
        yield environment
    for place in {sysconfig.get_path("stdlib", vars={"base": sys.base_prefix}), sysconfig.get_path("platstdlib")}:
        base = Path(place)
        if not base.is_relative_to(sys.base_prefix):
            continue
        for folder, folders, names in os.walk(base):
            folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
            yield from (Path(folder) / name for name in names if not name.endswith((".a", ".opt-1.pyc", ".opt-2.pyc")))


def _packages(name: str) -> Iterator[Path]:
    """The files of a distribution and of all that it requires."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        try:
            distribution = importlib.metadata.distribution(todo.pop())
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        key = distribution.metadata["Name"].lower()
        if key in seen:
            continue
        seen.add(key)
        for requirement in distribution.requires or ():
            wanted, _, marker = requirement.partition(";")
            if "extra" not in marker:
                todo += re.findall(r"^[\w.-]+", wanted)
        for file in distribution.files or ():
            path = Path(os.path.normpath(str(distribution.locate_file(file))))
            if not set(file.parts) & set(_LEFT_OUT) and path.exists():
                yield path


def _sources() -> Iterator[Path]:
    for place in ("agent", "drivers", "tests/vm/power"):
        yield from (path for path in (REPOSITORY / place).rglob("*") if path.is_file())


def _with_links(path: Path) -> set[Path]:
    """The file, and each symbolic link on the way to it."""
    path = Path(os.path.abspath(path))
    for parent in (*reversed(path.parents), path):
        if parent.is_symlink():
            rest = path.relative_to(parent)
            return {parent} | _with_links(Path(os.path.join(parent.parent, os.readlink(parent))) / rest)
    return {path} if path.is_file() else set()


def _libraries(paths: Iterable[Path]) -> set[Path]:
    """The shared libraries that those programs and extensions load, and what loads them."""
    binaries = [path for path in paths if ".so" in path.name or path == Path(sys.executable).resolve()]
    listed = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True).stdout
    found: set[Path] = set()
    for line in sorted(set(re.findall(r"(?:=> |\t)(/\S+) \(0x", listed))):
        found |= _with_links(Path(line))
    # Opened at run time: names of users and hosts.
    for folder in {path.parent for path in found if path.name.startswith("libc.so")}:
        for path in folder.glob("libnss_files*"):
            found |= _with_links(path)
    return found


def fingerprint() -> str:
    """Changes with anything that the root image is made of."""
    digest = hashlib.sha256(sys.version.encode())
    for path in files():
        status = path.lstat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A program that must do what it is told. Raises RuntimeError with what it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr or done.stdout}")
    return done


def environment() -> dict[str, str]:
    """Ours, with the folders in which Debian has e2fsprogs."""
    return {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


def copy_sparse(source: Path, target: Path) -> Path:
    """A copy with the same holes."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", str(source), str(target)], check=True)
    return target
