"""TLS on both ports: gRPC's own client, curl and openssl's view of it, certificates that change while it serves."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509

from agent.config import GrpcConfig, HttpConfig, ServingConfig, TlsConfig
from agent.errors import InvalidConfig
from agent.health.issues import Issues
from agent.serving.listen import GrpcServer
from support.certificates import Authority
from support.fake_dataplane import FakeDataplane
from support.tfs_client import CHANNEL_OPTIONS, PREDICT, predict_request

X = np.arange(4, dtype=np.float32).reshape(1, 4)
REQUEST = predict_request({"x": X}).SerializeToString()
KEY = "k" * 32
LOCAL = ("grpc.use_local_subchannel_pool", 1)


class House:
    """A server with a certificate, and what its clients need."""

    def __init__(self, folder: Path, *, clients: bool = False, days: float = 365, **settings: Any) -> None:
        self.folder = folder
        self.ca, self.others = Authority(), Authority("clients' CA")
        (folder / "ca.pem").write_bytes(self.ca.pem)
        (folder / "others.pem").write_bytes(self.others.pem)
        self.certificate, self.key = self.ca.issue("first", days=days).write(folder, "server")
        tls = TlsConfig(
            certificate=self.certificate, key=self.key, client_ca=folder / "others.pem" if clients else None
        )
        settings = {"grpc": GrpcConfig(listen="127.0.0.1:0"), "http": HttpConfig(listen="127.0.0.1:0"), **settings}
        self.issues = Issues()
        config = ServingConfig(tls=tls, lame_duck=0.01, grace=0.5, **settings)
        self.server = GrpcServer(config, folder, FakeDataplane(), self.issues)  # type: ignore[arg-type]
        self.grpc = self.http = ""

    async def __aenter__(self) -> House:
        self.grpc = (await self.server.start())[0]
        await self.server.open_http(lambda: "", self._opened)
        return self

    def _opened(self, address: str) -> None:
        self.http = address

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(0.5)

    def channel(self, **arguments: bytes) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(self.ca.pem, **arguments)
        return grpc.aio.secure_channel(self.grpc, credentials, options=[*CHANNEL_OPTIONS, LOCAL])

    async def curl(self, path: str, *arguments: str) -> tuple[int, str]:
        """curl's exit code, and what it printed."""
        argv = ("curl", "-sS", "--max-time", "20", "--cacert", str(self.folder / "ca.pem"), *arguments)
        done = await asyncio.to_thread(subprocess.run, [*argv, self.http + path], capture_output=True, text=True)
        return done.returncode, done.stdout

    async def shown(self) -> str:
        """The name on the certificate that a new client is shown."""

        def look() -> str:
            context = ssl.create_default_context(cadata=self.ca.pem.decode())
            host, port = self.grpc.rsplit(":", 1)
            with (
                socket.create_connection((host, int(port)), 10) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as sealed,
            ):
                found = x509.load_der_x509_certificate(sealed.getpeercert(True) or b"")
            return found.subject.rfc4514_string()

        return await asyncio.to_thread(look)

    def issue(self, id: str) -> Any:
        return next((one for one in self.issues.list() if one["id"] == id), None)


async def test_both_ports_are_sealed(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        assert house.http.startswith("https://")
        async with house.channel() as channel:
            assert await channel.unary_unary(PREDICT)(REQUEST, timeout=20)
        assert await house.curl("/healthz") == (0, "ok\n")
        big = predict_request({"x": np.zeros((1 << 20, 4), np.float32)}).SerializeToString()
        async with house.channel() as channel:
            assert len(await channel.unary_unary(PREDICT)(big, timeout=20)) > 1 << 24
        in_the_clear = await asyncio.to_thread(
            subprocess.run, ["curl", "-sS", house.http.replace("https", "http")], capture_output=True
        )
        assert in_the_clear.returncode != 0
        for old in ("--tlsv1.0", "--tlsv1.1"):
            assert (await house.curl("/healthz", old, "--tls-max", old[-3:]))[0] != 0
        async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'grpc.sock'}") as channel:
            assert await channel.unary_unary(PREDICT)(REQUEST, timeout=20)


async def test_a_certificate_is_replaced(tmp_path: Path) -> None:
    """Who is connected stays; who comes is shown the new one; one that does not go with its key changes nothing."""
    async with House(tmp_path) as house, house.channel() as channel:
        assert await channel.unary_unary(PREDICT)(REQUEST, timeout=20)
        assert await house.shown() == "CN=first"
        tls = house.server._tls
        assert tls is not None
        house.ca.issue("second").write(tmp_path, "server")
        await tls.refresh()
        assert await house.shown() == "CN=second"
        house.certificate.write_bytes(house.ca.issue("third").certificate)
        await tls.refresh()
        assert await house.shown() == "CN=second"
        assert "serving.tls.key" in house.issue("serving-tls")["message"]
        house.ca.issue("fourth").write(tmp_path, "server")
        await tls.refresh()
        assert await house.shown() == "CN=fourth" and house.issue("serving-tls") is None
        assert await channel.unary_unary(PREDICT)(REQUEST, timeout=20)


async def test_clients_have_certificates(tmp_path: Path) -> None:
    async with House(tmp_path, clients=True) as house:
        good, bad = house.others.issue("client"), house.ca.issue("stranger")
        async with house.channel(private_key=good.key, certificate_chain=good.certificate) as channel:
            assert await channel.unary_unary(PREDICT)(REQUEST, timeout=20)
        for arguments in ({}, {"private_key": bad.key, "certificate_chain": bad.certificate}):
            async with house.channel(**arguments) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(PREDICT)(REQUEST, timeout=5)
                assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        certificate, key = good.write(tmp_path, "client")
        assert await house.curl("/healthz", "--cert", str(certificate), "--key", str(key)) == (0, "ok\n")
        assert (await house.curl("/healthz"))[0] != 0
        newer = Authority("newer clients' CA")
        (tmp_path / "others.pem").write_bytes(newer.pem)
        assert house.server._tls is not None
        await house.server._tls.refresh()
        assert (await house.curl("/healthz", "--cert", str(certificate), "--key", str(key)))[0] != 0
        certificate, key = newer.issue("client").write(tmp_path, "newer")
        assert await house.curl("/healthz", "--cert", str(certificate), "--key", str(key)) == (0, "ok\n")


async def test_who_was_let_in_shows_a_certificate_again(tmp_path: Path) -> None:
    """A ticket from before its CA was taken away opens nothing."""
    async with House(tmp_path, clients=True) as house:
        certificate, key = house.others.issue("client").write(tmp_path, "client")
        context = ssl.create_default_context(cadata=house.ca.pem.decode())
        context.load_cert_chain(certificate, key)

        def visit(session: ssl.SSLSession | None) -> ssl.SSLSession | None:
            host, port = house.http.removeprefix("https://").rsplit(":", 1)
            with (
                socket.create_connection((host, int(port)), 10) as plain,
                context.wrap_socket(plain, server_hostname="localhost", session=session) as sealed,
            ):
                sealed.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert sealed.recv(4096).startswith(b"HTTP/1.1 200")
                assert not sealed.session_reused
                return sealed.session

        session = await asyncio.to_thread(visit, None)
        await asyncio.to_thread(visit, session)
        (tmp_path / "others.pem").write_bytes(Authority("newer").pem)
        assert house.server._tls is not None
        await house.server._tls.refresh()
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
            await asyncio.to_thread(visit, session)


async def test_a_slow_client_gets_all_of_its_answer(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        big = np.zeros(2_000_000, np.float32)
        house.server._dataplane.behave = lambda _: {"y": big}  # type: ignore[attr-defined]
        context = ssl.create_default_context(cadata=house.ca.pem.decode())

        def read() -> int:
            host, port = house.http.removeprefix("https://").rsplit(":", 1)
            body = b'{"instances": [[1, 2, 3, 4]]}'
            with (
                socket.create_connection((host, int(port)), 30) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as sealed,
            ):
                head = b"POST /v1/models/toy:predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                sealed.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                time.sleep(4)
                got = 0
                while piece := sealed.recv(1 << 16):
                    got += len(piece)
                return got

        assert await asyncio.to_thread(read) > 2_000_000 * 4


@pytest.mark.parametrize(("days", "severity"), [(-1, "critical"), (0.5, "critical"), (6, "error"), (29, "warning")])
async def test_the_end_of_a_certificate_is_told(tmp_path: Path, days: float, severity: str) -> None:
    async with House(tmp_path, days=days) as house:
        assert house.issue("serving-tls-end")["severity"] == severity
        house.ca.issue("new").write(tmp_path, "server")
        assert house.server._tls is not None
        await house.server._tls.refresh()
        assert house.issue("serving-tls-end") is None


async def test_beyond_loopback_only_sealed_and_known(tmp_path: Path) -> None:
    everywhere = {"grpc": GrpcConfig(listen="0.0.0.0:0"), "http": HttpConfig(listen="0.0.0.0:0")}
    with pytest.raises(InvalidConfig, match="reached from other hosts"):
        async with House(tmp_path, **everywhere):
            pass
    async with House(tmp_path, clients=True, **everywhere) as house:
        assert house.grpc.startswith("0.0.0.0:") and house.http
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    keys.chmod(0o600)
    async with House(tmp_path, keys=keys, **everywhere) as house:
        house.http = house.http.replace("0.0.0.0", "127.0.0.1")
        assert (await house.curl("/v2"))[1].startswith('{"error":"authorization')
        assert (await house.curl("/v2", "-H", f"authorization: Bearer {KEY}"))[1].startswith('{"name":"slotd"')


@pytest.mark.parametrize("spoil", ["open key", "no key", "other key", "no certificate", "nonsense"])
async def test_files_that_cannot_be_used(tmp_path: Path, spoil: str) -> None:
    house = House(tmp_path)
    if spoil == "open key":
        house.key.chmod(0o644)
    elif spoil == "no key":
        house.key.unlink()
    elif spoil == "other key":
        house.key.write_bytes(house.ca.issue("other").key)
    elif spoil == "no certificate":
        house.certificate.unlink()
    else:
        house.certificate.write_text("nonsense")
    with pytest.raises(InvalidConfig, match=r"serving\.tls\.") as caught:
        async with house:
            pass
    assert caught.value.hint


async def test_who_never_finishes_the_handshake(tmp_path: Path) -> None:
    async with House(tmp_path) as house:
        host, port = house.grpc.rsplit(":", 1)
        begun = time.monotonic()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x16\x03\x01")
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        assert time.monotonic() - begun < 15
        writer.close()
