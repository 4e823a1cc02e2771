"""HTTP as clients meet it: a real host behind it, and curl; then a server alone, for what a host rarely does."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.config import GrpcConfig, HttpConfig, ServingConfig
from agent.errors import Unavailable
from agent.forge.pack import pack
from agent.health.issues import Issues
from agent.serving import listen
from agent.serving.listen import GrpcServer
from support.fake_dataplane import FakeDataplane
from support.host import Host
from support.stall import stall_probe
from support.tiny import plain_picture, write_pictures

X = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 0.1]]
KEY = "k" * 32


def curl(url: str, *arguments: str) -> tuple[int, dict[str, str], str]:
    """Status, headers, body."""
    argv = ["curl", "-sS", "-i", "--max-time", "30", *arguments, url]
    text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    while text.startswith("HTTP/1.1 100"):
        text = text.partition("\n\n")[2]
    head, _, body = text.partition("\n\n")
    first, *lines = head.split("\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    host.pack("tiny:1", scale=2.0)
    with host:
        assert host.deploy("tiny:1")["outcome"] == "committed"
        yield host


def test_what_monitors_ask(host: Host) -> None:
    assert curl(f"{host.http}/healthz")[::2] == (200, "ok\n")
    assert curl(f"{host.http}/readyz")[::2] == (200, "ok\n")
    status, headers, body = curl(f"{host.http}/score")
    assert (status, headers["allow"]) == (405, "POST")
    assert body.startswith("POST a picture")
    status, _, body = curl(f"{host.http}/nowhere")
    assert (status, json.loads(body)["code"]) == (404, "NOT_FOUND")


def test_the_same_bits_through_each_door(host: Host) -> None:
    """A float in few digits is the same float again."""
    x = np.array([[0.1, 1e-45, 3.4028235e38, -0.0]], np.float32)
    wanted, told = host.predict(x)
    text = json.dumps(x.astype(float).tolist())
    found = {}
    for name, path, body in (
        ("rows", "/v1/models/tiny:predict", f'{{"instances": {text}}}'),
        ("columns", "/v1/models/tiny/versions/1:predict", f'{{"inputs": {{"x": {text}}}}}'),
        (
            "kserve",
            "/v2/models/tiny/infer",
            f'{{"inputs":[{{"name":"x","shape":[1,4],"datatype":"FP32","data":{text}}}]}}',
        ),
    ):
        status, headers, answer = curl(host.http + path, "-d", body)
        assert status == 200, answer
        assert headers["slotd-model-digest"] == told["slotd-model-digest"]
        found[name] = json.loads(answer)
    found["kserve"] = found["kserve"]["outputs"][0]["data"]
    for values in (found["rows"]["predictions"], found["columns"]["outputs"], [found["kserve"]]):
        assert np.array(values, np.float32).tobytes() == wanted.tobytes()


def test_what_is_said_of_a_wrong_request(host: Host) -> None:
    for path, body, status, said in (
        ("/v1/models/tiny:predict", '{"instances": [[1, 2]]}', 400, "x: has shape [1, 2], the model takes [-1, 4]"),
        ("/v1/models/tiny:predict", '{"instances": [["a"]]}', 400, "x: has values that are not float32"),
        ("/v1/models/tiny:predict", "{", 400, "request: is no JSON"),
        ("/v1/models/tiny:regress", "{}", 501, "the model takes tensors"),
        ("/v1/models/other:predict", '{"instances": [[1]]}', 404, "no model 'other' is served here"),
        ("/v1/models/tiny/labels/best:predict", '{"instances": [[1]]}', 404, "no version is labelled 'best'"),
        ("/v2/models/tiny/versions/7/infer", '{"inputs": []}', 404, "version 7 of 'tiny' is not served"),
        ("/score", "\xff\xd8", 501, "tiny takes no pictures but tensors"),
    ):
        found, headers, text = curl(host.http + path, "-d", body, "-H", "content-type: text/plain")
        assert found == status, (path, text)
        assert headers["content-type"] == "application/json"
        assert said in json.loads(text)["error"], text


def test_metrics(host: Host) -> None:
    curl(f"{host.http}/v1/models/tiny:predict", "-d", json.dumps({"instances": X}))
    _, headers, text = curl(f"{host.http}/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    figures = {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in text.splitlines() if line and line[0] != "#")
    }
    answered = figures['slotd_requests_total{outcome="slot"}'] + figures['slotd_requests_total{outcome="bridge"}']
    assert answered >= 1 == figures['slotd_host_state{state="slot"}']
    assert figures["slotd_request_duration_seconds_count"] == answered
    assert figures['slotd_request_duration_seconds_bucket{le="+Inf"}'] == answered
    assert figures['slotd_http_responses_total{code="200"}'] >= 1
    assert figures["process_resident_memory_bytes"] > 1e6
    assert {f'slotd_issues{{severity="{name}"}}' for name in ("info", "warning", "error", "critical")} <= set(figures)


def test_pictures(tmp_path: Path) -> None:
    host = Host(tmp_path)
    model = write_pictures(tmp_path / "pictures")
    pack(model, host.layout, "pictures:1")
    picture = tmp_path / "grey.png"
    picture.write_bytes(plain_picture(77))
    with host:
        assert host.deploy("pictures:1")["outcome"] == "committed"
        status, headers, body = curl(
            f"{host.http}/score", "--data-binary", f"@{picture}", "-H", "content-type: image/png"
        )
        assert (status, json.loads(body)) == (200, pytest.approx([77.0], abs=0.5)), body
        assert headers["slotd-model-version"] == "1"
        coded = {"instances": [{"b64": base64.b64encode(picture.read_bytes()).decode()}] * 2}
        (tmp_path / "body").write_text(json.dumps(coded))
        status, _, body = curl(
            f"{host.http}/score", "--data-binary", f"@{tmp_path / 'body'}", "-H", "content-type: application/json"
        )
        assert np.array(json.loads(body)["predictions"]).round().tolist() == [[77.0], [77.0]]
        status, _, body = curl(f"{host.http}/score", "-d", "no picture", "-H", "content-type: image/jpeg")
        assert (status, json.loads(body)["code"]) == (400, "INVALID_ARGUMENT")


def test_a_port_that_is_anothers(tmp_path: Path) -> None:
    """gRPC serves, the status says what is wrong, and HTTP comes when the port is free."""
    other = socket.create_server(("127.0.0.1", 0))
    listen = f"127.0.0.1:{other.getsockname()[1]}"
    host = Host(tmp_path, serving={"http": {"listen": listen}})
    host.pack("tiny:1")
    with host:
        assert host.deploy("tiny:1")["outcome"] == "committed"
        (issue,) = [one for one in host.status()["issues"] if one["id"] == "http-listen"]
        assert f"{listen} is in use by process {os.getpid()}" in issue["message"]
        other.close()
        host.until(lambda: not [one for one in host.status()["issues"] if one["id"] == "http-listen"])
        assert curl(f"http://{listen}/readyz")[0] == 200
        assert f"http://{listen}" in host.status()["serving"]["listen"]


# --- a server alone ---------------------------------------------------------------------------------------------------


class House:
    def __init__(self, folder: Path, *, keys: Path | None = None) -> None:
        self.dataplane = FakeDataplane()
        grpc, http = GrpcConfig(listen=None), HttpConfig(listen="127.0.0.1:0")
        config = ServingConfig(grpc=grpc, http=http, keys=keys, lame_duck=0.05, grace=1.0)
        self.issues = Issues()
        self.server = GrpcServer(config, folder, self.dataplane, self.issues)  # type: ignore[arg-type]
        self.port = 0

    async def __aenter__(self) -> House:
        await self.server.start()
        await self.server.open_http(lambda: "figures 1\n", self._opened)
        assert self.port
        return self

    def _opened(self, address: str) -> None:
        self.port = int(address.rpartition(":")[2])

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(1.0)

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """From a thread, as another client would."""

        def call() -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
                answer = connection.getresponse()
                return answer.status, answer.read()
            finally:
                connection.close()

        return await asyncio.to_thread(call)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with House(tmp_path) as house:
        yield house


async def test_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    async with House(tmp_path, keys=keys) as house:
        for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert (await house.ask("GET", path))[0] == 200, path
        for path in ("/metrics", "/v2", "/v2/models/toy", "//healthz", "/healthz/../metrics", "/HEALTHZ", "/healthz/"):
            assert (await house.ask("GET", path))[0] == 401, path
        assert (await house.ask("GET", "/metrics", authorization=f"Bearer {KEY}")) == (200, b"figures 1\n")
        assert (await house.ask("GET", "/v2", authorization=KEY))[0] == 200  # as the older clients send it
        for wrong in (f"Bearer {KEY}x", "Bearer", f"Basic {KEY}"):
            status, body = await house.ask("GET", "/v2", authorization=wrong)
            assert (status, json.loads(body)["code"]) == (401, "UNAUTHENTICATED")
            assert KEY.encode() not in body
        status, _ = await house.ask("POST", "/v2/models/toy/infer", b"x" * (1 << 20))
        assert status == 401


async def test_a_client_that_goes_away_takes_its_request_with_it(house: House) -> None:
    house.dataplane.hold = asyncio.Event()
    body = json.dumps({"instances": X}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", house.port)
    writer.write(
        b"POST /v1/models/toy:predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    await until(lambda: len(house.dataplane.requests) == 1)
    writer.close()
    await until(lambda: house.dataplane.cancelled == 1)


async def test_priority_and_deadline(house: House) -> None:
    body = json.dumps({"instances": X}).encode()
    await house.ask("POST", "/v1/models/toy:predict", body, slotd_priority="7", slotd_timeout_ms="1500")
    (request,) = house.dataplane.requests
    assert (request.priority, request.model) == (7, "toy") and 1 < request.timeout <= 1.5
    for headers in ({"slotd_priority": "10"}, {"slotd_timeout_ms": "0"}, {"slotd_timeout_ms": "soon"}):
        assert (await house.ask("POST", "/v1/models/toy:predict", body, **headers))[0] == 400


async def test_when_to_come_back(house: House) -> None:
    def busy(_: Any) -> Any:
        raise Unavailable("the model is loading", retry_after=1.2)

    house.dataplane.behave = busy
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
    body = json.dumps({"instances": X}).encode()
    writer.write(b"POST /v1/models/toy:predict HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    answer = (await reader.read()).decode()
    writer.close()
    assert answer.startswith("HTTP/1.1 503 ")
    assert "\r\nretry-after: 2\r\n" in answer


async def test_a_stop_ends_what_is_in_hand(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        house.dataplane.hold = asyncio.Event()
        asking = asyncio.create_task(house.ask("POST", "/v1/models/toy:predict", json.dumps({"instances": X}).encode()))
        idle = await asyncio.open_connection("127.0.0.1", house.port)
        await until(lambda: len(house.dataplane.requests) == 1)
        begun = time.monotonic()
        await house.server.stop(0.2)
        assert time.monotonic() - begun < 5
        status, body = await asking
        assert (status, json.loads(body)["error"]) == (503, "slotd is stopping")
        assert await idle[0].read() == b""
        idle[1].close()


@pytest.mark.alone
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"instances": [' + b"[0.125,1,2,3]," * 1_900_000 + b"[0,0,0,0]]}", id="numbers"),
        pytest.param(b'{"instances": [' + b'"",' * 2_000_000 + b'""]}', id="strings"),
        pytest.param(b'{"instances": ' + b"[" * 13_000_000, id="depth"),
        pytest.param(b'{"inputs":[{"name":"x","shape":[4],"datatype":"FP32","data":[' + b"0," * 6_000_000, id="cut"),
    ],
)
async def test_the_loop_goes_on_while_large_bodies_come(house: House, tmp_path: Path, body: bytes) -> None:
    """From a process of its own: what a client does with 26 MB does not count against the loop."""
    (tmp_path / "body").write_bytes(body)
    house.dataplane.behave = lambda _: {"y": np.zeros(1, np.float32)}
    await house.ask("POST", "/v1/models/toy:predict", b" " * 100_000)  # the parser's child is there
    await asyncio.sleep(1)
    argv = (
        "curl",
        "-sS",
        "--data-binary",
        f"@{tmp_path / 'body'}",
        f"http://127.0.0.1:{house.port}/v1/models/toy:predict",
    )
    async with stall_probe(limit=0.05, label=f"{len(body)} bytes of JSON"):
        process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
        answer, _ = await process.communicate()
    assert answer.startswith(b"{")


HEAD = b"POST /v1/models/toy:predict HTTP/1.1\r\nHost: localhost\r\n"


SENDER = """
import socket, sys, threading
def send():
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10) as connection:
        connection.settimeout(5)
        try:
            connection.sendall(open(sys.argv[2], "rb").read())
            while connection.recv(1 << 16):
                pass
        except OSError:
            pass
threads = [threading.Thread(target=send) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.alone
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(HEAD + b"a:\r\n" * 60_000 + b"\r\n", id="many headers"),
        pytest.param(HEAD + b"a:" + b" " * 250_000 + b"\0\r\n\r\n", id="spaces"),
        pytest.param(HEAD + b"a:" + b" " * 30_000 + b"\0\r\n\r\n", id="spaces within the bound"),
        pytest.param(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 6_000, id="requests without a key"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 200_000, id="tiny chunks"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"\t" * 200_000 + b"\n", id="a chunk's head"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 100_000, id="many trailers"),
        pytest.param((HEAD + b"".join(b"a%d: b\r\n" % n for n in range(98)) + b"\r\n") * 300, id="large heads"),
    ],
)
async def test_the_loop_goes_on_whatever_comes_before_a_key(tmp_path: Path, data: bytes) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)

    (tmp_path / "data").write_bytes(data)

    async with House(tmp_path, keys=keys) as house:
        async with stall_probe(limit=0.05, label=f"{len(data)} bytes that nobody wants"):
            argv = (sys.executable, "-I", "-c", SENDER, str(house.port), str(tmp_path / "data"))
            process = await asyncio.create_subprocess_exec(*argv)
            assert await process.wait() == 0
        assert (await house.ask("GET", "/healthz"))[0] == 200
        assert house.server._shared is not None
        await until(lambda: house.server._shared.room.free == listen.HELD_MESSAGES * (32 << 20))  # type: ignore[union-attr]


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
