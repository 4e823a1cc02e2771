"""`slotd predict` against the real gRPC server, with a fake dataplane behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from agent.cli.verbs import app
from agent.config import GrpcConfig, ServingConfig
from agent.errors import Overloaded, SlotError
from agent.health.issues import Issues
from agent.model.signature import Strings
from agent.serving.dataplane import Request
from agent.serving.listen import GrpcServer
from support.fake_dataplane import FakeDataplane
from support.loops import Loop

SCORES = np.linspace(0.0, 1.0, 1000, dtype=np.float32)


class Server:
    def __init__(self, loop: Loop, run_dir: Path) -> None:
        self.dataplane = FakeDataplane()
        config = ServingConfig(grpc=GrpcConfig(listen="127.0.0.1:0"), lame_duck=0.0, grace=0.5)
        self._server = GrpcServer(config, run_dir, self.dataplane, Issues())  # type: ignore[arg-type]
        self._loop = loop
        self.tcp, self.unix = loop.run(self._server.start)

    def answer(self, *outputs: Any) -> None:
        """What it answers to anything: outputs `out`, `out1`, …; an exception is raised."""

        def behave(_: Request) -> dict[str, Any]:
            if isinstance(outputs[0], Exception):
                raise outputs[0]
            return {f"out{index or ''}": output for index, output in enumerate(outputs)}

        self.dataplane.behave = behave

    def close(self) -> None:
        self._loop.run(self._server.stop(0.5))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Loop() as loop:
        server = Server(loop, tmp_path)
        yield server
        server.close()


def predict(server: Server, *arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", "--address", server.tcp, *map(str, arguments)])


def picture(folder: Path, name: str = "cat.jpg") -> Path:
    path = folder / name
    path.write_bytes(b"\xff\xd8 " + name.encode())
    return path


def test_an_image_and_its_best_classes(server: Server, tmp_path: Path) -> None:
    server.answer(SCORES[None])
    done = predict(server, "--image", picture(tmp_path))
    assert done.exit_code == 0
    first, where, *best = done.stdout.splitlines()
    assert first.startswith("toy 3 · sha256:abababababab · answered by the slot · ")
    assert first.endswith(" ms")
    assert where == "out  float32 [1, 1000]"
    assert [line.split()[0] for line in best] == ["1.0000", "0.9990", "0.9980", "0.9970", "0.9960"]
    assert best[0].split(maxsplit=1)[1].startswith("toilet")
    assert best[0].endswith("(999)")
    (request,) = server.dataplane.requests
    assert request.inputs == {"Placeholder:0": Strings((1,), [b"\xff\xd8 cat.jpg"])}
    assert server.dataplane.answers[0].released


def test_several_images_are_one_batch(server: Server, tmp_path: Path) -> None:
    server.answer(np.stack([SCORES, SCORES[::-1]]))
    images = [picture(tmp_path, "a.jpg"), picture(tmp_path, "b.jpg")]
    done = predict(server, "--image", images[0], "--image", images[1], "--image-input", "images", "--top", "1")
    lines = done.stdout.splitlines()
    assert [lines[2].strip(), lines[4].strip()] == ["a.jpg", "b.jpg"]
    assert lines[3].endswith("(999)")
    assert lines[5].endswith("(0)")
    assert server.dataplane.requests[0].inputs["images"].shape == (2,)


def test_json(server: Server, tmp_path: Path) -> None:
    server.answer(SCORES[None], Strings((2,), [b"a", b"\xff"]), np.arange(4, dtype=np.int32).reshape(2, 2))
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"class-{index}" for index in range(1000)))
    done = predict(server, "--image", picture(tmp_path), "--json", "--top", "2", "--labels", labels)
    document = json.loads(done.stdout)
    assert document["model"] == {"name": "toy", "version": 3, "digest": "sha256:" + "ab" * 32}
    assert document["served_by"] == "slot"
    assert document["ms"] > 0
    assert document["outputs"] == {
        "out": {
            "dtype": "float32",
            "shape": [1, 1000],
            "top": [
                [
                    {"class": 999, "name": "class-999", "score": float(SCORES[999])},
                    {"class": 998, "name": "class-998", "score": float(SCORES[998])},
                ]
            ],
        },
        "out1": {"dtype": "string", "shape": [2], "values": ["a", "�"]},
        "out2": {"dtype": "int32", "shape": [2, 2], "values": [[0, 1], [2, 3]]},
    }


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array(3.5),
    np.array([[True, False]]),
    np.array([-1, 2], np.int8),
    np.array([1, 2**63], np.uint64),
    np.array([0.5], np.float16),
    np.zeros((0, 3), np.float32),
    np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    np.array([1, 2], ">i4"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{list(array.shape)}")
def test_arrays_arrive_as_they_are(array: np.ndarray, server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    server.answer(array.astype(array.dtype.newbyteorder("=")))
    done = predict(server, "--input", f"a=b={tmp_path / 'x.npy'}", "--json", "--top", "0")
    assert done.exit_code == 0
    (request,) = server.dataplane.requests
    np.testing.assert_array_equal(request.inputs["a=b"], array)
    assert request.inputs["a=b"].dtype == array.dtype.newbyteorder("=")
    assert json.loads(done.stdout)["outputs"]["out"]["values"] == array.tolist()


@pytest.mark.parametrize("array", [np.array([["a", "bcd"]]), np.array([[b"a", b"bcd"]])])
def test_arrays_of_strings(array: np.ndarray, server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    server.answer(Strings((1,), [b"x\x1b[2J"]))
    done = predict(server, "--input", f"x={tmp_path / 'x.npy'}")
    assert server.dataplane.requests[0].inputs["x"] == Strings((1, 2), [b"a", b"bcd"])
    assert "x [2J" in done.stdout


def test_an_output_that_is_no_list_of_classes(server: Server, tmp_path: Path) -> None:
    server.answer(np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4), np.zeros((0, 2), np.float32))
    text = predict(server, "--image", picture(tmp_path)).stdout
    assert "24 values from 0 to 23, mean 11.5: 0, 1, 2, 3, 4, 5 …" in text
    assert "out1  float32 [0, 2]" in text


def test_the_address_may_be_a_unix_socket_or_come_from_the_configuration(server: Server, tmp_path: Path) -> None:
    server.answer(SCORES[None])
    image = str(picture(tmp_path))
    assert CliRunner().invoke(app, ["predict", "--image", image, "--address", server.unix]).exit_code == 0
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: {tmp_path}\nserving: {{grpc: {{listen: null}}}}")
    assert CliRunner().invoke(app, ["predict", "--image", image, "--config", str(config)]).exit_code == 0
    config.write_text(f"serving: {{grpc: {{listen: '{server.tcp}'}}}}")
    assert CliRunner().invoke(app, ["predict", "--image", image], env={"SLOTD_CONFIG": str(config)}).exit_code == 0


def test_what_the_server_says_is_told(server: Server, tmp_path: Path) -> None:
    done = predict(server, "--image", picture(tmp_path))
    assert done.exit_code == 65
    assert done.stderr.startswith("error: Placeholder:0: the model has no such input; it has 'x:0'\n")
    server.answer(Overloaded("the queue is full", hint="ask again in a second"))
    done = predict(server, "--image", picture(tmp_path), "--json")
    assert done.exit_code == 75
    assert done.stderr == "error: the queue is full\nhint: ask again in a second\n"
    assert json.loads(done.stdout)["error"]["code"] == "RESOURCE_EXHAUSTED"
    server.answer(SlotError("no answer from the card", code="DEVICE_HUNG"))
    assert predict(server, "--image", picture(tmp_path), "--json").exit_code == 69


def test_nobody_is_there(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'nobody.sock'}"
    done = CliRunner().invoke(app, ["predict", "--address", address, "--image", str(picture(tmp_path))])
    assert done.exit_code == 69
    assert done.stderr.startswith(f"error: nobody answers at {address}\nhint: ")


def test_a_request_has_a_deadline(server: Server, tmp_path: Path) -> None:
    server.dataplane.hold = asyncio.Event()
    done = predict(server, "--image", picture(tmp_path), "--timeout", "0.3")
    assert done.exit_code == 75
    assert "error: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 65, "nothing to send"),
        (["--image", "{0}/none.jpg"], 66, "{0}/none.jpg: cannot be read: No such file or directory"),
        (["--image", "{0}"], 66, "{0}: cannot be read: Is a directory"),
        (["--input", "x"], 65, "--input: 'x' is not NAME=FILE.npy"),
        (["--input", "=x.npy"], 65, "--input: '=x.npy' is not NAME=FILE.npy"),
        (["--input", "x={0}/text.npy"], 65, "{0}/text.npy: is not a .npy file"),
        (["--input", "x={0}/empty.npy"], 65, "{0}/empty.npy: is not a .npy file"),
        (["--input", "x={0}/objects.npy"], 65, "{0}/objects.npy: is not a .npy file"),
        (["--input", "x={0}/several.npz"], 65, "{0}/several.npz: holds several arrays"),
        (["--input", "x={0}/complex.npy"], 65, "{0}/complex.npy: has dtype complex128"),
        (["--input", "x={0}/good.npy", "--input", "x={0}/good.npy"], 65, "x: is given twice"),
    ],
)
def test_bad_input_never_leaves(arguments: list[str], code: int, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "empty.npy").write_text("")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=np.zeros(1), b=np.zeros(1))
    np.save(tmp_path / "complex.npy", np.zeros(1, complex))
    np.save(tmp_path / "good.npy", np.zeros(1))
    done = CliRunner().invoke(app, ["predict", *(argument.format(tmp_path) for argument in arguments)])
    assert done.exit_code == code
    assert done.stderr.startswith(f"error: {complaint.format(tmp_path)}")
    assert "Traceback" not in done.stderr


def test_labels_that_cannot_be_read(server: Server, tmp_path: Path) -> None:
    server.answer(SCORES[None])
    done = predict(server, "--image", picture(tmp_path), "--labels", tmp_path / "none.txt")
    assert done.exit_code == 66
    assert "none.txt: cannot be read" in done.stderr
