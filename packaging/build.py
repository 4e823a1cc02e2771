#!/usr/bin/python3
"""Builds build/deb/slotd_<version>_<architecture>.deb with Debian's own Python: `make deb`.

The same sources, the same versions of what slotd depends on and the same SOURCE_DATE_EPOCH (default: the last commit)
give the same bytes. What went in is listed in the package, as requirements.txt.
"""

from __future__ import annotations

import compileall
import hashlib
import os
import py_compile
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent
PACKAGING = SOURCES / "packaging"
MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
NEXT = f"{sys.version_info.major}.{sys.version_info.minor + 1}"
EXTRAS = ("amqtt>=0.11.3",)
"""The broker inside slotd: an installed slotd can be told to use it, and has no pip to fetch it."""
MAINTAINER = "slotd <slotd@localhost>"
CONTROL = """\
Package: slotd
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Installed-Size: {size}
Depends: python{minor}, python3 (>= {minor}), python3 (<< {next}), init-system-helpers (>= 1.52), libc6 (>= 2.28),
 libstdc++6, systemd (>= 250)
Recommends: ca-certificates
Section: net
Priority: optional
Description: keeps one accelerator slot serving
 slotd pulls converted model containers from an OCI registry, swaps the model in
 an accelerator slot without a client noticing, proves the slot before trusting
 it, and always comes back to the last model that worked.
"""


def main() -> None:
    """Builds the package and prints its path."""
    version, architecture = _version(), _output("dpkg", "--print-architecture")
    os.environ.setdefault("SOURCE_DATE_EPOCH", _epoch())
    os.umask(0o022)
    work = SOURCES / "build" / "deb"
    root = work / "root"
    shutil.rmtree(root, ignore_errors=True)
    _tree(root / "opt/slotd/package", work, version)
    _system(root)
    package = work / f"slotd_{version}_{architecture}.deb"
    control(root, version, architecture)
    pack(root, package)
    print(package)


def _tree(tree: Path, work: Path, version: str) -> None:
    """A virtual environment without pip and scripts, which works wherever it lies."""
    site = tree / "lib" / f"python{MINOR}" / "site-packages"
    pip = _pip(work)
    wheels = work / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    _run(*pip, "wheel", "--no-deps", "--wheel-dir", wheels, SOURCES)
    (wheel,) = wheels.glob("slotd-*.whl")
    site.mkdir(parents=True)
    _run(*pip, "install", "--no-compile", "--only-binary", ":all:", "--target", site, wheel, *EXTRAS)
    shutil.rmtree(site / "bin")
    shutil.rmtree(site / "numpy" / "tests", ignore_errors=True)
    for folder in site.glob("numpy/*/tests"):
        shutil.rmtree(folder)
    for record in site.glob("*.dist-info/direct_url.json"):  # says where it was built
        record.unlink()
    (tree / "bin").mkdir()
    (tree / "bin" / "python").symlink_to(f"/usr/bin/python{MINOR}")
    (tree / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {MINOR}\n")
    shutil.copytree(SOURCES / "systemd", tree / "systemd")
    names = sorted(folder.name.removesuffix(".dist-info") for folder in site.glob("*.dist-info"))
    (tree / "requirements.txt").write_text("".join(f"{'=='.join(name.rsplit('-', 1))}\n" for name in names))
    seal(tree, version)


def seal(tree: Path, version: str) -> None:
    """Compiles a tree's modules anew and writes its BUILD."""
    for cache in [*tree.rglob("__pycache__")]:
        shutil.rmtree(cache)
    # Not by the time of the source, which hard links and dpkg need not keep.
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(
        tree / "lib", quiet=2, workers=os.cpu_count() or 1, stripdir=tree, prependdir="/", invalidation_mode=mode
    )
    digest = hashlib.sha256()
    for path in _files(tree):
        if path.name != "BUILD":
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
            name = str(path.relative_to(tree)).encode()
            digest.update(b"%d %s %d %s" % (len(name), name, len(content), hashlib.sha256(content).digest()))
    (tree / "BUILD").write_text(f"{version} {digest.hexdigest()}\n")


def _system(root: Path) -> None:
    """What lies elsewhere: launcher, slotd-versions, units, users, rules, settings, papers."""
    _place(PACKAGING / "slotd.sh", root / "usr/bin/slotd", 0o755)
    _place(PACKAGING / "versions.py", root / "usr/sbin/slotd-versions", 0o755)
    units = root / "usr/lib/systemd/system"
    folders = {
        ".service": units,
        ".socket": units,
        ".sysusers": root / "usr/lib/sysusers.d",
        ".tmpfiles": root / "usr/lib/tmpfiles.d",
        ".rules": root / "usr/lib/udev/rules.d",
        ".modules-load": root / "usr/lib/modules-load.d",
    }
    for path in sorted((SOURCES / "systemd").iterdir()):
        named = path.name if folders[path.suffix] == units or path.suffix == ".rules" else f"{path.stem}.conf"
        _place(path, folders[path.suffix] / named)
    _place(PACKAGING / "slotd-upgrade-guard.service", units / "slotd-upgrade-guard.service")
    _place(PACKAGING / "upgrade-guard.conf", units / "slotd.service.d/upgrade-guard.conf")
    settings = root / "etc/slotd/config.yaml"
    _place(SOURCES / "config.example.yaml", settings)
    # Two hosts with the example's name would fight over it; without a name a host has its own.
    settings.write_text(re.sub(r"^device: ", "# device: ", settings.read_text(), flags=re.MULTILINE))
    papers = root / "usr/share/doc/slotd"
    _place(SOURCES / "LICENSE", papers / "copyright")
    _place(SOURCES / "README.md", papers / "README.md")
    _place(PACKAGING / "README.md", papers / "packaging.md")
    _place(PACKAGING / "slot-helper.example.toml", papers / "slot-helper.toml")


def control(root: Path, version: str, architecture: str) -> None:
    """DEBIAN/: what dpkg wants to know."""
    folder = root / "DEBIAN"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(PACKAGING / "debian", folder)
    for script in folder.iterdir():
        script.chmod(0o755)
    files = [path for path in _files(root) if folder not in path.parents]
    size = sum(path.lstat().st_size for path in files) // 1024
    (folder / "conffiles").write_text("/etc/slotd/config.yaml\n")
    (folder / "control").write_text(
        CONTROL.format(
            version=version, architecture=architecture, maintainer=MAINTAINER, size=size, minor=MINOR, next=NEXT
        )
    )
    lines = (
        f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n"  # noqa: S324  # dpkg's own format
        for path in files
        if not path.is_symlink()
    )
    (folder / "md5sums").write_text("".join(lines))


def pack(root: Path, package: Path, *compression: str) -> None:
    """The .deb of what lies under `root`."""
    package.unlink(missing_ok=True)
    options = compression or ("-Zzstd", "-z6")
    _run("dpkg-deb", "--root-owner-group", *options, "--build", root, package)


def _files(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names.sort()
        links = [name for name in names if Path(folder, name).is_symlink()]
        yield from (Path(folder, name) for name in sorted(files + links))


def _place(source: Path, target: Path, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def _pip(work: Path) -> tuple[str | Path, ...]:
    tools = work / "tools"
    if not (tools / "bin" / "pip").exists():
        shutil.rmtree(tools, ignore_errors=True)
        _run(sys.executable, "-m", "venv", tools)
    return tools / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"


def _version() -> str:
    text = (SOURCES / "agent" / "__init__.py").read_text()
    match = re.search(r'^__version__ = "([0-9][0-9A-Za-z.+~]*)"$', text, re.MULTILINE)
    if not match:
        raise SystemExit("build.py: agent/__init__.py has no version that Debian could take")
    return match[1]


def _epoch() -> str:
    try:
        return _output("git", "-C", str(SOURCES), "log", "-1", "--format=%ct")
    except (OSError, subprocess.CalledProcessError):
        return str(int((SOURCES / "pyproject.toml").stat().st_mtime))


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"build.py: {' '.join(map(str, command))} ended with {done.returncode}")


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
