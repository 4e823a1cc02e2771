"""Bad configurations, requests, pictures and MQTT messages: each gets its own clear error and changes nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from agent.model.signature import Strings
from agent.serving.protos import PredictRequest, PredictResponse
from support.host import Host
from support.linked import Outside, outside, soon
from support.mosquitto import Mosquitto
from support.pictures import PNG_MAGIC, bad, chunk, good
from support.tfs_client import CHANNEL_OPTIONS, PREDICT, predict_request
from support.tiny import plain_picture, write_pictures
from support.unharmed import X, all_unharmed, probed_host, unharmed

ROOT = Path(__file__).parents[2]

# --- the configuration -----------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "no YAML": (b"slot: [", ("is not YAML", "line 1")),
    "no text": (b"\xff\xfe\0slot", ("is not text in UTF-8",)),
    "no mapping": (b"- slot\n", ("must be a mapping of sections",)),
    "unknown section": (b"colour: red\n", (": colour: there is no such field", "config.example.yaml")),
    "unknown field": (b"slot: {drain_timout: 5s}\n", (": slot.drain_timout: there is no such field",)),
    "wrong type": (b"serving: {max_queue: many}\n", (": serving.max_queue: ", "valid integer")),
    "no time": (b"slot: {drain_timeout: soon}\n", (": slot.drain_timeout: ", "write 500ms, 30s")),
    "aliases": (b"a: &a [x]\nb: *a\n", ("aliases are not allowed",)),
    "nested deeply": (b"[" * 20_000, ("nested too deeply",)),
    "unknown driver": (b"slot: {driver: abacus}\nembedded: true\n", (": slot", "abacus")),
    "a simulation unsaid": (b"slot: {driver: simulated}\n", ("embedded: true",)),
    "driver's option": (b"embedded: true\nslot: {options: {colour: 1}}\n", ("option colour",)),
    "open to the world": (
        b"embedded: true\nserving: {grpc: {listen: '0.0.0.0:0'}}\n",
        ("serving.grpc.listen", "without TLS"),
    ),
}
AT_START = ("open to the world",)
"""What only `run` finds."""


def slotd(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "agent", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said on standard error."""
    try:
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "Traceback" not in error
    return process.returncode, error


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    text, words = CONFIGS[name]
    path, state = tmp_path / "config.yaml", tmp_path / "state"
    own = f"state_dir: {state}\nrun_dir: {tmp_path / 'run'}\nlink: {{enabled: false}}\n".encode()
    path.write_bytes(text if text.startswith((b"[", b"-", b"\xff")) else text + own)
    running = {verb: slotd(verb, "--config", path) for verb in ("check", "run")}
    for verb, process in running.items():
        code, error = ended(process)
        if verb == "check" and name in AT_START:
            continue
        assert code == 78, (verb, error)
        assert f"error: {path}" in error or "error: slot" in error or name in AT_START, error
        assert all(word in error for word in words), error
    assert not (state / "boot.json").exists()


def test_no_configuration_at_all(tmp_path: Path) -> None:
    for process in [slotd(verb, "--config", tmp_path / "none.yaml") for verb in ("check", "run")]:
        code, error = ended(process)
        assert code == 78
        assert f"error: {tmp_path}/none.yaml: cannot be read: No such file" in error
        assert "hint: copy config.example.yaml there, or pass --config" in error
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = Host(tmp_path, serving={"grpc": {"listen": address}}).config
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        code, error = ended(slotd("run", "--config", tmp_path / "config.yaml"))
    assert code == 73
    assert f"error: serving.grpc.listen: {address} is in use by process {os.getpid()} (" in error
    assert "hint: stop that process, or choose another port" in error
    assert list((tmp_path / "run").iterdir()) == []


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, broker: Mosquitto) -> Iterator[Host]:
    link = {"enabled": True, "host": "127.0.0.1", "port": broker.port, "backoff_first": "0.1s"}
    with probed_host(tmp_path_factory.mktemp("inputs"), device="box1", link=link) as (host, watch):
        host.pack("tiny:1")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        host.until(lambda: host.status()["link"]["connected"])
        warm_up(host)
        with all_unharmed(host, watch, "requests and messages"):
            yield host


def warm_up(host: Host) -> None:
    """The first large message of each kind, and some small ones."""
    for _ in range(20):
        host.predict(X)
    wide = np.ones((400_000, 4), np.float32)
    for _ in range(3):
        ask(host, predict_request({"x": wide}, content=True))


def ask(host: Host, request: Any, *, timeout: float = 60, metadata: Any = (), method: str = PREDICT) -> Any:
    data = request if isinstance(request, bytes) else request.SerializeToString()
    with grpc.insecure_channel(host.address, options=CHANNEL_OPTIONS) as channel:
        return PredictResponse.FromString(channel.unary_unary(method)(data, timeout=timeout, metadata=metadata))


@dataclass(frozen=True)
class Refusal:
    """What a client is told."""

    status: str
    words: tuple[str, ...]
    field: str | None = None
    code: str | None = None


def refused(host: Host, request: Any, expected: Refusal, **how: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(host, request, **how)
    error = caught.value
    told = dict(error.trailing_metadata() or ())
    text = f"{error.details()} | {told.get('slotd-error-hint', '')}"
    assert error.code().name == expected.status, text
    assert all(word in text for word in expected.words), text
    assert expected.field is None or told["slotd-error-field"] == expected.field, (text, told)
    assert told.get("slotd-error-code") == (expected.code or (expected.field and expected.status)), told


def shaped(shape: tuple[int, ...], name: str = "x", dtype: int = 1) -> Any:
    """A tensor that says it has this shape, and one value."""
    request = PredictRequest()
    proto = request.inputs[name]
    proto.dtype = dtype
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    proto.float_val.append(1.0)
    return request


def with_content(content: bytes) -> Any:
    """A tensor [1, 4] with these bytes."""
    request = shaped((1, 4))
    request.inputs["x"].ClearField("float_val")
    request.inputs["x"].tensor_content = content
    return request


def many_strings(count: int) -> bytes:
    """A request with that many empty strings, written by hand: two bytes for each."""

    def field(number: int, body: bytes) -> bytes:
        length, out = len(body), bytearray([number << 3 | 2])
        while length >= 0x80:
            out.append(length & 0x7F | 0x80)
            length >>= 7
        return bytes(out) + bytes([length]) + body

    tensor = b"\x08\x07" + b"\x42\x00" * count  # dtype DT_STRING, then string_val
    return field(2, field(1, b"x") + field(2, tensor))


INVALID = "INVALID_ARGUMENT"
REQUESTS: dict[str, tuple[Callable[[], Any], Refusal]] = {
    "wrong name": (lambda: predict_request({"z": X}), Refusal(INVALID, ("'x'",), "z")),
    "no input": (lambda: predict_request({}), Refusal(INVALID, ("missing",), "x")),
    "one input too many": (lambda: predict_request({"x": X, "z": X}), Refusal(INVALID, ("'x'",), "z")),
    "wrong dtype": (
        lambda: predict_request({"x": X.astype(np.float64)}),
        Refusal(INVALID, ("float64", "float32"), "x"),
    ),
    "strings for numbers": (
        lambda: predict_request({"x": Strings((1,), [b"x"])}),
        Refusal(INVALID, ("string", "float32"), "x"),
    ),
    "unknown dtype": (lambda: shaped((1, 4), dtype=99), Refusal(INVALID, ("dtype 99",), "x")),
    "wrong width": (lambda: predict_request({"x": np.ones((1, 5), np.float32)}), Refusal(INVALID, ("[1, 5]",), "x")),
    "wrong rank": (lambda: predict_request({"x": np.ones(4, np.float32)}), Refusal(INVALID, ("[4]",), "x")),
    "negative size": (lambda: shaped((-1, 4)), Refusal(INVALID, ("[-1, 4]",), "x")),
    "content of another length": (
        lambda: with_content(b"123"),
        Refusal(INVALID, ("3 bytes of tensor_content",), "x"),
    ),
    "a terabyte from one value": (lambda: shaped((1 << 38, 4)), Refusal(INVALID, ("is larger than",), "x")),
    "sizes that overflow": (lambda: shaped((1 << 62, 1 << 62)), Refusal(INVALID, ("is larger than",), "x")),
    "a thousand dimensions": (lambda: shaped((1,) * 1000), Refusal(INVALID, ("1000 dimensions",), "x")),
    "a thousand tensors": (
        lambda: predict_request({f"x{number}": X for number in range(1000)}),
        Refusal(INVALID, ("1000 tensors",), "inputs"),
    ),
    "2,000,000 empty strings": (lambda: many_strings(2_000_000), Refusal(INVALID, ("16384 strings",), "x")),
    "garbage": (lambda: b"\xff\x13garbage" * 9, Refusal(INVALID, ("not a tensorflow.serving",), "request")),
    "much garbage": (lambda: b"\xff" * (5 << 20), Refusal(INVALID, ("not a tensorflow.serving",), "request")),
    "nothing": (lambda: b"", Refusal(INVALID, ("missing",), "x")),
    "unknown output": (
        lambda: predict_request({"x": X}, outputs=["z"]),
        Refusal(INVALID, ("no such output", "'y'"), "z"),
    ),
    "unknown model": (
        lambda: predict_request({"x": X}, model="tony"),
        Refusal("NOT_FOUND", ("tony", "tiny"), "model_spec.name"),
    ),
    "unknown version": (
        lambda: predict_request({"x": X}, model="tiny", version=7),
        Refusal("NOT_FOUND", ("7", "1"), "model_spec.version"),
    ),
    "unknown signature": (
        lambda: predict_request({"x": X}, signature="train"),
        Refusal(INVALID, ("'train'", "serving_default"), "model_spec.signature_name"),
    ),
    "40 MiB": (
        lambda: predict_request({"x": np.ones((40 << 16, 4), np.float32)}, content=True),
        Refusal("RESOURCE_EXHAUSTED", ("41943075 bytes", "33554432", "max_message"), "request"),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(host: Host, name: str) -> None:
    make, expected = REQUESTS[name]
    with unharmed(host):
        refused(host, make(), expected)


def outcome(host: Host, timeout: float) -> grpc.StatusCode:
    try:
        ask(host, predict_request({"x": X}), timeout=timeout)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_deadlines_that_are_over_or_too_short(host: Host) -> None:
    """They are not answered late, and bring nobody into doubt: the slot takes 2 ms, and that is not its fault."""
    late = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    with unharmed(host):
        before = host.status()["serving"]
        told = {outcome(host, timeout) for timeout in (1e-6, 0.0005, 0.001, 0.002, 0.003) * 12}
        assert told <= {grpc.StatusCode.OK, *late}
        time.sleep(0.3)  # longer than a hang takes to be one
        after = host.status()["serving"]
        assert (after["by_bridge"], after["hedged"]) == (before["by_bridge"], before["hedged"])


def test_a_hang_is_seen_though_nobody_waits_for_it(tmp_path: Path) -> None:
    """Clients whose deadlines are shorter than what counts as a hang: the slot is mended all the same."""
    with Host(tmp_path) as host:
        host.pack("tiny:1")
        assert host.deploy("tiny:1")["outcome"] == "committed"
        for _ in range(20):
            host.predict(X)
        slot = host.status()["slot"]["executor"]["pid"]
        host.inject({"at": "infer", "kind": "hang"})

        def replaced() -> bool:
            for _ in range(4):
                with contextlib.suppress(grpc.RpcError):
                    ask(host, predict_request({"x": X}), timeout=0.03)
            executor = host.status()["slot"]["executor"]
            return executor is not None and executor["pid"] != slot

        host.until(replaced)
        host.until_host("slot")
        assert host.predict(X)[1]["slotd-served-by"] == "slot"


def test_unknown_methods_and_headers(host: Host) -> None:
    with unharmed(host):
        unknown = Refusal("UNIMPLEMENTED", ("PredictionService/Dream", "reflection"), code="UNIMPLEMENTED")
        refused(host, predict_request({"x": X}), unknown, method="/tensorflow.serving.PredictionService/Dream")
        wrong = Refusal(INVALID, ("from 0 to 9",), "slotd-priority")
        refused(host, predict_request({"x": X}), wrong, metadata=(("slotd-priority", "high"),))
        with pytest.raises(grpc.RpcError) as caught:
            ask(host, predict_request({"x": X}), metadata=(("x-large", "x" * 60_000),))
        # Headers of this size are not even read: the connection ends.
        assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


def test_a_gigabyte_announced_by_hand(host: Host) -> None:
    """HTTP/2 as raw frames: the length prefix says 1 GB. Refused when it is read, not when the gigabyte is there."""
    with unharmed(host):
        answer = raw_call(host.address, struct.pack(">BI", 0, 1_000_000_000) + bytes(8000))
        assert b"grpc-status" in answer and b"1000000000 bytes" in answer, answer[-300:]


def test_what_is_no_http2(host: Host) -> None:
    with unharmed(host):
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", bytes(range(256)) * 200):
            name, _, port = host.address.rpartition(":")
            connection = socket.create_connection((name, int(port)), 10)
            with connection, contextlib.suppress(OSError):  # it may hang up at once
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass


def raw_call(address: str, body: bytes) -> bytes:
    """One call of Predict with these bytes as its body, never ended; what came back until its status."""

    def frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
        return struct.pack(">I", len(data))[1:] + struct.pack(">BBI", kind, flags, stream) + data

    def header(name: bytes, value: bytes) -> bytes:
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    headers = b"".join(
        header(name, value)
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", PREDICT.encode()),
            (b":authority", address.encode()),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
    )
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.settimeout(20)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, headers))
        connection.sendall(frame(0, 0, 1, body))
        answer = b""
        while b"grpc-status" not in answer and (part := connection.recv(1 << 16)):
            answer += part
        return answer


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host whose model takes pictures."""
    from agent.forge.pack import pack

    with probed_host(tmp_path_factory.mktemp("pictures")) as (host, watch):
        pack(write_pictures(host.folder / "model"), host.layout, "pictures:1")
        assert host.deploy("pictures:1")["outcome"] == "committed"
        for level in (10, 200):
            assert level_of(host, plain_picture(level)) == [level]
        with all_unharmed(host, watch, "pictures"):
            yield host


def level_of(host: Host, *items: bytes) -> list[float]:
    reply = ask(host, predict_request({"pictures": Strings((len(items),), list(items))}))
    return [round(value, 2) for value in reply.outputs["y"].float_val]


def header_of_png(width: int, height: int) -> bytes:
    """What says how large it is, and a little of what would follow."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG_MAGIC + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def header_of_jpeg(width: int, height: int) -> bytes:
    """A good JPEG whose frame header says another size; it has 16 bits for each."""
    jpeg = bytearray(good()["jpeg 4:2:0"])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(jpeg)


PICTURES: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "PNG of 100,000 x 100,000": (
        lambda: header_of_png(100_000, 100_000),
        ("100000 x 100000 pixels, more than 50000000", "make it smaller"),
    ),
    "JPEG of 65,500 x 65,500": (
        lambda: header_of_jpeg(65_500, 65_500),
        ("65500 x 65500 pixels, more than 50000000", "make it smaller"),
    ),
    "JPEG of 65,535 x 65,535": (lambda: header_of_jpeg(65_535, 65_535), ("not a readable JPEG picture",)),
    "PNG of 2**31 - 1 pixels each way": (lambda: header_of_png(2**31 - 1, 2**31 - 1), ("pixels, more than",)),
    "PNG with almost no data": (lambda: header_of_png(7000, 7000), ("truncated",)),
    **{name: (lambda item=item: item, (word,)) for name, (item, word) in bad().items()},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(pictures: Host, name: str) -> None:
    make, words = PICTURES[name]
    with unharmed(pictures):
        request = predict_request({"pictures": Strings((2,), [plain_picture(7), make()])})
        refused(pictures, request, Refusal(INVALID, words, "pictures"))
        assert level_of(pictures, plain_picture(90)) == [90]


def test_a_large_picture_from_few_bytes_is_computed(pictures: Host) -> None:
    """Just below the limit it is only slow: 50 KB become 49,000,000 pixels in a decoder, not in the agent."""
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + 3 * 7000)) for _ in range(7000)) + rows.flush()
    head = struct.pack(">IIBBBBB", 7000, 7000, 8, 2, 0, 0, 0)
    item = PNG_MAGIC + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    with unharmed(pictures):
        assert level_of(pictures, item) == [0]


# --- MQTT ------------------------------------------------------------------------------------------------------------

MESSAGES: dict[str, tuple[bytes, tuple[str, str]]] = {
    "malformed": (b'{"arguments": ', (INVALID, "not JSON")),
    "not UTF-8": (b'{"arguments": "\xff\xfe"}', (INVALID, "not UTF-8")),
    "oversized": (b'{"arguments": "' + b"x" * (65 << 10) + b'"}', ("TOO_LARGE", "larger than 65536")),
    "many brackets": (b"[" * (200 << 10), ("TOO_LARGE", "larger than 65536")),
    "deep": (b'{"arguments":' + b"[" * 1500 + b"]" * 1500 + b"}", (INVALID, "nested deeper")),
    "very many": (b'{"arguments": [' + b"1," * 20_000 + b"1]}", ("TOO_LARGE", "elements")),
    "no object": (b"[1, 2]", (INVALID, "JSON object")),
    "infinite": (b'{"arguments": Infinity}', (INVALID, "Infinity")),
    "unknown field": (b'{"colour": "red"}', (INVALID, "not a field of a command")),
}


@pytest.mark.parametrize("name", MESSAGES)
async def test_messages_on_every_topic(host: Host, broker: Mosquitto, name: str) -> None:
    payload, (code, words) = MESSAGES[name]
    with unharmed(host):
        async with outside(broker.port) as other:
            for command in ("ping", "status", "deploy", "undeploy", "rollback", "cancel", "task", "nonsense"):
                error = (await other.call(command, payload))["error"]
                assert error["code"] == code, (command, error)
                assert words in error["message"] and error["field"] and error["hint"], error
            await other.publish("desired", payload, retain=True)
            reported = await other.next("reported", lambda d: d["desired"].get("refused"))
            assert reported["desired"]["refused"]["error"]["field"].startswith("desired")
            seen = len(other.on("reported"))
            await other.publish("desired", b"", retain=True)
            await other.next("reported", lambda d: not d["desired"].get("refused"), after=seen)
            for topic in ("status", "reported", "health", "event", "cmd", "cmd/", "cmd/a/b", "res/ping", "other"):
                await other.publish(topic, payload)
            assert (await other.call("ping", {"id": f"after {name}".replace(" ", "-")}))["ok"] is True


async def test_a_message_larger_than_the_host_lets_the_broker_send(host: Host, broker: Mosquitto) -> None:
    with unharmed(host):
        async with outside(broker.port) as other:
            for topic in ("cmd/ping", "cmd/deploy", "desired"):
                await other.publish(topic, b"[" * (8 << 20))
            assert (await other.call("status"))["ok"] is True
            assert other.on("res/deploy") == []


def deploy(expires: str | None, **arguments: Any) -> dict[str, Any]:
    body = {"arguments": {"image": "tiny:2", **arguments}}
    return body if expires is None else {**body, "expires": expires}


async def test_commands_that_must_not_run(host: Host, broker: Mosquitto) -> None:
    host.pack("tiny:2", scale=3.0, version="2")  # it would work
    with unharmed(host):
        async with outside(broker.port) as other:
            cases = (
                ("deploy", deploy(None), "EXPIRY_REQUIRED", "expires"),
                ("deploy", deploy(soon(-5)), "EXPIRED", "expires"),
                ("deploy", deploy(soon(90_000)), "EXPIRY_REQUIRED", "expires"),
                ("deploy", deploy("tomorrow"), INVALID, "expires"),
                ("deploy", deploy(soon(), colour="red"), INVALID, "colour"),
                ("deploy", deploy(soon(), digest="x"), INVALID, "digest"),
                ("deploy", {**deploy(soon()), "v": 2}, INVALID, "v"),
                ("deploy", {**deploy(soon()), "reply": "slotd/box1/desired"}, "REPLY_FORBIDDEN", "reply"),
                ("undeploy", {}, "EXPIRY_REQUIRED", "expires"),
                ("rollback", {"expires": soon()}, "NO_PREVIOUS", None),
                ("cancel", {"expires": soon()}, "NOT_FOUND", None),
                ("task", {"arguments": {"task": "d-none"}}, "NOT_FOUND", None),
                ("deplpy", {"expires": soon()}, "NOT_FOUND", "command"),
                ("deploy/now", {"expires": soon()}, "NOT_FOUND", "command"),
            )
            for command, body, code, where in cases:
                error = (await other.call(command, body))["error"]
                assert error["code"] == code, (command, body, error)
                assert where is None or where in (error["field"] or ""), (command, body, error)
                assert error["message"], error
            near = (await other.call("deplpy", {"expires": soon()}))["error"]
            assert "deploy" in f"{near['message']} {near['hint']}"
            await retained(other)
            assert (await other.call("status", {}))["result"]["committed"]["version"] == "1"


async def retained(other: Outside) -> None:
    """Neither when it comes nor when the host hears of it again."""
    await other.publish("cmd/deploy", deploy(soon()), retain=True)
    refusal = await other.next("res/deploy", lambda d: d["error"]["code"] == "RETAINED")
    assert "mosquitto_pub -r -n -t slotd/box1/cmd/deploy" in refusal["error"]["hint"]
    await other.publish("cmd/deploy", b"", retain=True)


async def test_a_wish_that_cannot_be_fulfilled(host: Host, broker: Mosquitto) -> None:
    with unharmed(host):
        async with outside(broker.port) as other:
            await other.publish("desired", {"image": "nothing:1", "revision": 1}, retain=True)
            reported = await other.next("reported", lambda d: d["desired"].get("state") == "failed")
            assert reported["desired"]["error"]["code"] == "NOT_FOUND"
            assert reported["desired"]["in_sync"] is False
            assert reported["committed"]["version"] == "1"
            await other.publish("desired", b"", retain=True)
            await other.next("reported", lambda d: d["desired"].get("state") == "none")
