"""Images that are hostile, damaged, or only wrong, through `deploy` on a running host.

Each ends with its own error, before the slot is touched, and nothing has changed.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from agent.errors import InvalidInput
from drivers.simulated import write_bitstream
from support.host import Host
from support.images import compress, file_member, make_image, make_image_of_tars, member, pack_tar
from support.mosquitto import free_port
from support.tiny import accelerator_of, endless, huge, linear, on_signal, write_model
from support.unharmed import Watch, X, all_unharmed, probed_host, rss_of, unharmed

NOWHERE = f"127.0.0.1:{free_port()}"
"""A registry that is off."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Watch]]:
    with probed_host(
        tmp_path_factory.mktemp("images"),
        executor={"call_timeout": "2s", "memory": "1GiB"},
        images={"retries": 0, "insecure_registries": [NOWHERE]},
    ) as (host, watch):
        host.pack("tiny:1")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        host.pack("tiny:2", scale=3.0, version="2")
        assert host.deploy("tiny:2", digest="sha256:" + "0" * 64)["outcome"] == "refused"  # the first of its kind
        with all_unharmed(host, watch, "images"):
            yield host, watch


@pytest.fixture
def host(place: tuple[Host, Watch]) -> Host:
    return place[0]


@dataclass(frozen=True)
class Case:
    """`make` puts the image into the host's layout under the tag; what is expected of its deployment."""

    make: Callable[[Host, str], object]
    code: str
    phase: str
    words: tuple[str, ...]
    where: str | None = None
    outcome: str = "refused"


def model(host: Host, tag: str, **what: Any) -> dict[str, bytes]:
    """The files of a good model, as paths in an image."""
    folder = write_model(host.folder / "models" / tag.replace(":", "-"), **{"name": "tiny", "version": "9", **what})
    return {f"models/{path.name}": path.read_bytes() for path in folder.iterdir()}


def changed(name: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Host, str], object]:
    """A good model with one file that is another."""

    def make(host: Host, tag: str) -> object:
        files = model(host, tag)
        path = f"models/{name}"
        files[path] = data if isinstance(data, bytes) else data(files.get(path, b""))
        return make_image(host.layout, tag, files)

    return make


def spec(**fields: Any) -> Callable[[Host, str], object]:
    """A good model with other fields in model.yaml."""
    return lambda host, tag: make_image(host.layout, tag, model(host, tag, spec=fields))


def golden(**parts: Any) -> Callable[[Host, str], object]:
    """A good model whose first golden case has other parts."""
    return changed("case0.json", lambda data: json.dumps({**json.loads(data), **parts}).encode())


def graph(hostile: onnx.ModelProto | bytes) -> Callable[[Host, str], object]:
    """A model with this graph."""
    return changed("slot.onnx", hostile if isinstance(hostile, bytes) else hostile.SerializeToString())


def at_golden_time(hostile: onnx.ModelProto) -> Callable[[Host, str], object]:
    """A model that loads and measures well; its first golden case is what makes it hostile."""

    def make(host: Host, tag: str) -> object:
        files = model(host, tag, graph=on_signal(hostile), scale=1.0)
        for number in range(3):
            x = np.full((1, 4), 1e3 if number == 0 else float(number), np.float32) + np.arange(4, dtype=np.float32)
            parts = {"inputs": {"x": {"values": x.tolist()}}, "outputs": {"y": {"values": x.tolist()}}}
            case = json.loads(files[f"models/case{number}.json"])
            files[f"models/case{number}.json"] = json.dumps({**case, **parts}).encode()
        return make_image(host.layout, tag, files)

    return make


def tars(*members: tuple[tarfile.TarInfo, bytes], **how: Any) -> Callable[[Host, str], object]:
    return lambda host, tag: make_image_of_tars(host.layout, tag, [pack_tar(members)], **how)


def blob(change: Callable[[bytes], bytes]) -> Callable[[Host, str], object]:
    """A good image whose layer was damaged in the layout after it was packed."""

    def make(host: Host, tag: str) -> object:
        files = model(host, tag, scale=0.125 * (1 + len(tag)))
        digest = make_image(host.layout, tag, files)
        blobs = host.layout / "blobs" / "sha256"
        manifest = json.loads((blobs / digest.removeprefix("sha256:")).read_bytes())
        path = blobs / manifest["layers"][0]["digest"].removeprefix("sha256:")
        path.write_bytes(change(path.read_bytes()))
        return digest

    return make


def bomb(host: Host, tag: str) -> object:
    info = tarfile.TarInfo("models/a.onnx")
    info.size = 8 << 30
    pack = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    packed = pack.compress(info.tobuf(tarfile.GNU_FORMAT))
    packed += b"".join(pack.compress(bytes(1 << 20)) for _ in range(200)) + pack.flush()
    return make_image_of_tars(host.layout, tag, [b"bomb"], packed=[packed])


def half(host: Host, tag: str) -> object:
    tar = pack_tar([file_member(path, data) for path, data in model(host, tag).items()])
    packed = compress(tar, "gzip")
    return make_image_of_tars(host.layout, tag, [tar], packed=[packed[: len(packed) // 2]])


def bitstream(interface: str | None = None, accelerator: str | None = None) -> Callable[[Host, str], object]:
    """A good model.yaml, and a bitstream that is sound but another one."""

    def make(host: Host, tag: str) -> object:
        files = model(host, tag)
        section = yaml.safe_load(files["models/model.yaml"])["slot"]
        path = host.folder / "other.bit"
        write_bitstream(path, interface or section["interface"], accelerator or section["accelerator"], b"other")
        return make_image(host.layout, tag, {**files, "models/tiny.bit": path.read_bytes()})

    return make


def nothing(host: Host, tag: str) -> object:
    return None


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def npy(*row: Any, dtype: Any = np.float32) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([row], dtype))
    return buffer.getvalue()


ALIASES = b"a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: [*b, *b, *b, *b]\n"
MILLION = json.dumps({"inputs": {"x": {"values": [[1, 2, 3, 4]] * 70_000}}, "outputs": {"y": {"values": [[1]]}}})
TWIN = [{"stage": "onnx", "file": "slot.onnx", "on": "slot", "cpu": "none"}]
Z = {"z": {"dtype": "float32", "shape": [-1, 4]}}
IMAGE, MODEL, UNFIT = "IMAGE_INVALID", "MODEL_INVALID", "INCOMPATIBLE_BITSTREAM"

CASES = {
    "nothing of that name": Case(
        nothing, "NOT_FOUND", "resolve", ("is in none of the layouts", "images.layouts"), "image", "failed"
    ),
    # --- layers and archives
    "blob cut short": Case(blob(lambda data: data[:-100]), IMAGE, "pull", ("bytes instead of", "damaged"), "blobs/"),
    "blob with a flipped bit": Case(blob(flip), IMAGE, "pull", ("not what its digest says", "damaged"), "blobs/"),
    "layer cut short": Case(half, IMAGE, "unpack", ("ends in the middle", "pack it again"), "layer 0"),
    "path traversal": Case(
        tars(file_member("models/../../etc/cron.d/x", b"x")), IMAGE, "unpack", ("leaves the image", "etc/cron.d/x")
    ),
    "absolute path": Case(tars(file_member("/etc/cron.d/x", b"x")), IMAGE, "unpack", ("absolute path", "cron.d/x")),
    "symlink out": Case(
        tars(member("models/x", tarfile.SYMTYPE, "/etc/passwd")), IMAGE, "unpack", ("leaves /models",), "/models/x"
    ),
    "zip bomb": Case(bomb, IMAGE, "unpack", ("200 times its size: a bomb",), "layer 0"),
    # --- what is the model?
    "no /models": Case(
        lambda host, tag: make_image(host.layout, tag, {"etc/x": b"x"}), MODEL, "unpack", ("no /models", "slotd pack")
    ),
    "no model": Case(
        lambda host, tag: make_image(host.layout, tag, {"models/readme.txt": b"x"}),
        MODEL,
        "inspect",
        ("no model.yaml and no .onnx", "slotd pack"),
    ),
    "two models": Case(
        lambda host, tag: make_image(host.layout, tag, {"models/a.onnx": b"a", "models/b.onnx": b"b"}),
        MODEL,
        "inspect",
        ("2 .onnx files (a.onnx, b.onnx)", "add a model.yaml"),
    ),
    # --- model.yaml
    "no YAML": Case(changed("model.yaml", b"name: [a"), MODEL, "inspect", ("not YAML", "line 1"), "model.yaml"),
    "no text": Case(changed("model.yaml", b"\xff\xfe\0"), MODEL, "inspect", ("not YAML",), "model.yaml"),
    "aliases": Case(changed("model.yaml", ALIASES), MODEL, "inspect", ("aliases are not allowed",), "model.yaml"),
    "nested deeply": Case(changed("model.yaml", b"[" * 9000), MODEL, "inspect", ("too deeply",), "model.yaml"),
    "huge": Case(
        changed("model.yaml", lambda data: data + b"#" * (300 << 10)), MODEL, "inspect", ("larger than",), "model.yaml"
    ),
    "very many values": Case(
        changed("model.yaml", b"[" + b"1," * 120_000 + b"]"), MODEL, "inspect", ("more than 10000",), "model.yaml"
    ),
    "unknown field": Case(spec(flavour="sweet"), MODEL, "inspect", ("no such field",), "model.yaml: flavour"),
    "file that is not there": Case(spec(golden=["no.json"]), MODEL, "inspect", ("'no.json' is not",), "golden.0"),
    "file elsewhere": Case(spec(golden=["../../etc/passwd"]), MODEL, "inspect", ("plain path inside",), "golden.0"),
    "wrong dtype": Case(
        spec(inputs={"x": {"dtype": "int64", "shape": [-1, 4]}}), MODEL, "preflight", ("int64", "float32"), "model.yaml"
    ),
    "wrong output": Case(spec(outputs=Z), MODEL, "preflight", ("no graph makes", "make y"), "model.yaml: outputs.z"),
    # --- graphs
    "graph of garbage": Case(graph(b"\0garbage" * 50), MODEL, "preflight", ("not an ONNX graph",), "slot.onnx"),
    "graph cut short": Case(
        graph(linear(3.0).SerializeToString()[:-40]), MODEL, "preflight", ("cut short",), "slot.onnx"
    ),
    "empty graph": Case(graph(b""), MODEL, "preflight", ("not an ONNX graph",), "slot.onnx"),
    "graph that asks for 32 GiB": Case(
        graph(huge()), "OUT_OF_MEMORY", "preflight", ("executor.memory",), outcome="failed"
    ),
    "graph that never returns": Case(
        graph(endless()), "CALL_TIMEOUT", "preflight", ("longer than 2 s",), "slot.onnx", "failed"
    ),
    "32 GiB for a golden case": Case(
        at_golden_time(huge()), "OUT_OF_MEMORY", "preflight", ("executor.memory",), outcome="failed"
    ),
    "a golden case without end": Case(
        at_golden_time(endless()), "CALL_TIMEOUT", "preflight", ("longer than 2 s",), "slot.onnx", "failed"
    ),
    # --- golden cases
    "golden NaN": Case(changed("y0.npy", npy(1, np.nan, 0, 2)), MODEL, "preflight", ("NaN or infinity",), "case0.json"),
    "golden infinity": Case(changed("y0.npy", npy(1, np.inf, 0, 2)), MODEL, "preflight", ("NaN",), "case0.json"),
    "golden NaN in JSON": Case(
        golden(outputs={"y": {"values": [[float("nan"), 1, 2, 3]]}}), MODEL, "preflight", ("float32",), "outputs.y"
    ),
    "golden pickle": Case(
        changed("y0.npy", npy({"a": 1}, dtype=object)), MODEL, "preflight", ("not a .npy file",), "case0.json"
    ),
    "no golden JSON": Case(changed("case0.json", b"{"), MODEL, "preflight", ("is not JSON",), "case0.json"),
    "golden JSON of a megabyte": Case(
        changed("case0.json", MILLION.encode()), MODEL, "preflight", ("larger than 65536",), "case0.json"
    ),
    "large tolerance": Case(
        golden(tolerance={"cpu": 0.5, "slot": 0.5}),
        MODEL,
        "preflight",
        ("more than this host allows, 0.05", "swap.max_tolerance"),
        "case0.json: tolerance.cpu",
    ),
    "tolerance NaN": Case(
        golden(tolerance={"cpu": float("nan"), "slot": 0.01}), MODEL, "preflight", ("finite",), "tolerance.cpu"
    ),
    # --- the slot
    "another shell": Case(
        spec(slot={"interface": "f" * 32, "accelerator": accelerator_of("x"), "bitstream": "tiny.bit"}),
        UNFIT,
        "inspect",
        ("for shell ffff", "this slot has 9926", "build the bitstream"),
        "slot.interface",
    ),
    "bitstream for another shell": Case(
        bitstream(interface="e" * 32), UNFIT, "preflight", ("made for shell eeee", "9926"), "slot.bitstream"
    ),
    "bitstream with another accelerator": Case(
        bitstream(accelerator="e" * 32),
        "WRONG_ACCELERATOR",
        "preflight",
        ("brings accelerator eeee",),
        "slot.bitstream",
    ),
    "corrupt bitstream": Case(changed("tiny.bit", flip), UNFIT, "preflight", ("checksum is wrong",), "slot.bitstream"),
    "bitstream cut short": Case(
        changed("tiny.bit", lambda data: data[:40]), UNFIT, "preflight", ("header",), "slot.bitstream"
    ),
    "bitstream of garbage": Case(
        changed("tiny.bit", b"nothing"), UNFIT, "preflight", ("does not begin",), "slot.bitstream"
    ),
    "no CPU twin": Case(
        spec(pipeline=TWIN), "NO_BRIDGE", "inspect", ("no CPU twin", "--accept-dark", "swap.continuity")
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_image_is_refused_in_its_own_words(host: Host, name: str) -> None:
    case, tag = CASES[name], f"{name.lower().replace(' ', '-').replace('/', '')}:1"
    case.make(host, tag)
    with unharmed(host):
        check(host.deploy(tag), case)


def check(done: dict[str, Any], case: Case) -> None:
    error = done["error"]
    assert (done["outcome"], error["code"], done["phases"][-1]["phase"]) == (case.outcome, case.code, case.phase), done
    text = f"{error['message']} | {error.get('hint')}"
    assert all(word in text for word in case.words), text
    assert case.where is None or case.where in (error.get("field") or ""), error


def test_what_has_failed_is_forgotten(tmp_path: Path) -> None:
    """Golden cases of 8 MiB, again and again: the agent keeps the deployments' documents, not what they held."""
    x = np.random.default_rng(5).integers(0, 9, (1 << 18, 4)).astype(np.float32)
    with Host(tmp_path) as host:
        folder = write_model(tmp_path / "heavy", version="9")
        for name, array in (("x0", x), ("y0", x * 2)):  # it would be x * 2 + 1
            np.save(folder / f"{name}.npy", array)
        make_image(host.layout, "heavy:1", {f"models/{path.name}": path.read_bytes() for path in folder.iterdir()})
        sizes = []
        for _ in range(7):
            done = host.deploy("heavy:1")
            assert (done["outcome"], done["error"]["code"]) == ("failed", "PROOF_FAILED"), done
            sizes.append(rss_of(host))
    print("agent:", [f"{size >> 20} MiB" for size in sizes])
    assert sizes[-1] < sizes[0] + (24 << 20)  # what is freed is kept for the next message, once


def test_another_digest_than_the_tag_has(host: Host) -> None:
    host.pack("tiny:2", scale=3.0, version="2")
    with unharmed(host):
        done = host.deploy("tiny:2", digest="sha256:" + "0" * 64)
        check(done, Case(nothing, IMAGE, "resolve", ("tiny:2 is sha256:", "not sha256:000", "pin"), "digest"))


def test_a_registry_that_is_off(host: Host) -> None:
    with unharmed(host):
        done = host.deploy(f"{NOWHERE}/tiny:2")
        case = Case(nothing, "REGISTRY", "resolve", ("Connection refused", "check the registry"), NOWHERE, "failed")
        check(done, case)


def test_what_is_no_reference(host: Host) -> None:
    with unharmed(host):
        check(
            host.deploy("bad//name::"),
            Case(nothing, "INVALID_ARGUMENT", "resolve", ("is not an image reference", "host:port/name:tag"), "image"),
        )
        for arguments, where in (
            ({"image": ""}, "image"),
            ({"image": "tiny 2"}, "image"),
            ({"image": "tiny:2", "digest": "sha256:abc"}, "digest"),
            ({"image": "tiny:2", "flavour": "sweet"}, "flavour"),
            ({"image": "tiny:2", "probation": "soon"}, "probation"),
        ):
            with pytest.raises(InvalidInput) as error:
                host.call("deploy", **arguments)
            assert where in str(error.value.field), arguments


def test_what_only_the_slot_could_tell_of_a_signature(tmp_path: Path) -> None:
    """Neither a CPU twin nor model.yaml says what the outputs are: the executor in the slot does."""
    with Host(tmp_path) as host:
        host.pack("tiny:1")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        host.pack("tiny:2", version="2", cpu="none", output="z", spec={"inputs": {}, "outputs": {}})
        with host.load(2) as load:
            done = host.deploy("tiny:2", accept_dark=True)
        assert (done["outcome"], done["error"]["code"]) == ("rolled_back", "SIGNATURE_CHANGED"), done
        assert load.errors == []
        assert host.status()["committed"]["version"] == "1"
        done = host.deploy("tiny:2", accept_dark=True, allow_signature_change=True)
        assert done["outcome"] == "committed", done


def test_without_a_twin_only_if_darkness_is_accepted(tmp_path: Path) -> None:
    """Then clients of the old model lose nothing; those of the new one do when it is replaced, and that is measured."""
    with Host(tmp_path) as host:
        host.pack("tiny:1")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        host.pack("tiny:2", scale=3.0, version="2", cpu="none")
        assert host.deploy("tiny:2")["error"]["code"] == "NO_BRIDGE"
        with host.load(2) as load:
            done = host.deploy("tiny:2", accept_dark=True)
        assert done["outcome"] == "committed", done
        assert load.errors == []
        np.testing.assert_allclose(host.predict(X)[0], X * 3 + 1, rtol=1e-6)

        host.pack("tiny:3", scale=4.0, version="3")
        with host.load(2) as load:
            done = host.deploy("tiny:3")
        assert done["outcome"] == "committed", done
        assert {error.partition(":")[0] for _, _, error in load.errors} == {"StatusCode.UNAVAILABLE"}
        dark = [start for start, _, _ in load.errors]
        before = max(a[0] for a in load.answers if a[2] == 3.0)
        after = min(a[0] + a[1] for a in load.answers if a[2] == 4.0)
        print(f"dark: {len(dark)} requests refused; {after - before:.2f} s between two answers")
        assert before <= min(dark) <= max(dark) <= after

        # The way back is open though that model would be refused today without leave.
        assert host.deploy("tiny:2", accept_dark=True)["outcome"] == "committed"
        assert host.deploy("tiny:1")["outcome"] == "committed"
        done = host.ended(host.call("rollback")["task"])
        assert (done["outcome"], host.status()["committed"]["version"]) == ("committed", "2"), done
