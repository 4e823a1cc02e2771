"""A registry that is slow, wrong, rude or hostile: bounded tries, clear errors, and no password for strangers."""

from __future__ import annotations

import base64
import json
import os
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from agent.errors import InvalidImage, NotFound, RegistryDenied, RegistryError, RegistryRefused
from agent.images.pull import resolve
from agent.images.registry import parse_challenges
from support.fake_registry import fake_registry
from support.images import make_image
from support.pulling import fetch, images_config, open_store

SECRET = "hunter2-hunter2"
BASIC = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()
OCI = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def made(tmp_path):
    make_image(tmp_path / "made", "1", {"models/a.onnx": os.urandom(300_000)}, layers=1)
    return tmp_path / "made"


def settings(tmp_path, *hosts, **fields):
    logins = tmp_path / "logins.json"
    logins.write_text(json.dumps({"auths": {hosts[0]: {"username": "user", "password": SECRET}}}))
    return images_config(insecure_registries=list(hosts), credentials=logins, **fields)


async def test_passing_faults_are_tried_again(tmp_path, made):
    faults = [500, 502, 429, 503]

    def answer(asked, handler):
        if faults:
            handler.reply(faults.pop(), Retry_After="0")
            return True
        return False

    with fake_registry(made) as registry:
        registry.answer = answer
        config = settings(tmp_path, registry.host, retries=4)
        await resolve(f"{registry.host}/a:1", config)
        assert len(registry.asked) == 5


async def test_tries_are_bounded(tmp_path, made):
    with fake_registry(made) as registry:
        registry.answer = lambda asked, handler: handler.reply(500, b'{"errors":[{"message":"disk on fire"}]}') or True
        with pytest.raises(RegistryError, match="answered 500: disk on fire") as caught:
            await resolve(f"{registry.host}/a:1", settings(tmp_path, registry.host, retries=2))
        assert caught.value.code == "REGISTRY"
        assert len(registry.asked) == 3


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, RegistryRefused), (403, RegistryDenied), (404, NotFound), (410, RegistryRefused), (451, RegistryRefused)],
)
async def test_permanent_answers_end_at_once(tmp_path, made, status, error):
    with fake_registry(made) as registry:
        registry.answer = lambda asked, handler: handler.reply(status) or True
        with pytest.raises(error) as caught:
            await resolve(f"{registry.host}/a:1", settings(tmp_path, registry.host, retries=5))
        assert type(caught.value) is error
        assert len(registry.asked) == 1


async def test_retry_after_is_honoured_and_bounded(tmp_path, made):
    waits = ["1", None]

    def answer(asked, handler):
        wait = waits.pop(0) if waits else None
        if wait:
            handler.reply(429, Retry_After=wait)
        return bool(wait)

    with fake_registry(made) as registry:
        registry.answer = answer
        started = time.monotonic()
        await resolve(f"{registry.host}/a:1", settings(tmp_path, registry.host))
        assert time.monotonic() - started >= 1
        for long in ("86400", format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True)):
            waits[:] = [long]
            with pytest.raises(RegistryError, match="429") as caught:
                await resolve(f"{registry.host}/a:1", settings(tmp_path, registry.host))
            assert 86000 < (caught.value.retry_after or 0) <= 86400


async def test_a_registry_that_says_nothing(tmp_path, made):
    with fake_registry(made) as registry:
        registry.answer = lambda asked, handler: time.sleep(1.5) or True
        with pytest.raises(RegistryError, match="in time"):
            await resolve(f"{registry.host}/a:1", settings(tmp_path, registry.host, timeout=0.5, retries=1))
        assert len(registry.asked) == 2


async def test_a_redirect_to_another_host_takes_no_password_along(tmp_path, made):
    with fake_registry(made) as store, fake_registry(made) as registry:

        def answer(asked, handler):
            if "authorization" not in asked.headers:
                handler.reply(401, WWW_Authenticate='Basic realm="x"')
                return True
            if "/blobs/" in asked.path:
                handler.reply(307, Location=f"http://{store.host}{asked.path}?signature=s1gned")
                return True
            return False

        registry.answer = answer
        config = settings(tmp_path, registry.host, store.host)
        state = await open_store(tmp_path / "state", config)
        await fetch(f"{registry.host}/a:1", state, config)
        assert any(asked.headers.get("authorization") == BASIC for asked in registry.asked)
        assert store.asked and all("authorization" not in asked.headers for asked in store.asked)
        # The storage host fails: its signed address is not shown.
        await state.collect(set())
        store.answer = lambda asked, handler: handler.reply(403) or True
        with pytest.raises(RegistryDenied) as caught:
            await fetch(f"{registry.host}/a:1", state, config)
        assert "s1gned" not in json.dumps(caught.value.as_dict())


async def test_redirects_are_bounded(tmp_path, made):
    with fake_registry(made) as registry:
        registry.answer = lambda asked, handler: handler.reply(302, Location=asked.path) or True
        with pytest.raises(RegistryRefused, match="more than 5 times"):
            await resolve(f"{registry.host}/a:1", settings(tmp_path, registry.host))
        for place, match in (
            ("ftp://x/y", "ftp://x"),
            ("http://x:port/", "invalid address"),
            ("http://127.0.0.1:99999/", "99999, which"),
        ):
            registry.answer = lambda asked, handler, place=place: handler.reply(302, Location=place) or True
            with pytest.raises(RegistryRefused, match=match):
                await resolve(f"{registry.host}/a:1", settings(tmp_path, registry.host))


async def test_bearer_tokens_are_fetched_and_renewed_in_the_middle(tmp_path, made):
    with fake_registry(made) as registry:
        tokens: list[str] = []

        def answer(asked, handler):
            if asked.path.startswith("/token"):
                tokens.append(f"t{len(tokens)}")
                handler.reply(200, json.dumps({"access_token" if len(tokens) % 2 else "token": tokens[-1]}).encode())
                return True
            used = registry.asked.count(asked) and sum(
                1 for old in registry.asked if tokens and old.headers.get("authorization") == f"Bearer {tokens[-1]}"
            )
            if not tokens or asked.headers.get("authorization") != f"Bearer {tokens[-1]}" or used > 2:
                realm = f"http://{registry.host}/token"
                handler.reply(401, WWW_Authenticate=f'Bearer realm="{realm}",service="s",scope="repository:a:pull"')
                return True
            return False

        registry.answer = answer
        config = settings(tmp_path, registry.host)
        store = await open_store(tmp_path / "state", config)
        await fetch(f"{registry.host}/a:1", store, config)
        asked = [item for item in registry.asked if item.path.startswith("/token")]
        assert len(asked) >= 2
        assert all(item.headers.get("authorization") == BASIC for item in asked)
        assert "service=s" in asked[0].path and "scope=repository" in asked[0].path
        assert not any(
            item.headers.get("authorization") == BASIC for item in registry.asked if not item.path.startswith("/token")
        )


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (401, b"", RegistryDenied),
        (404, b"", RegistryRefused),
        (200, b"[]", RegistryRefused),
        (200, b"", RegistryRefused),
    ],
)
async def test_a_token_server_that_gives_none(tmp_path, made, status, body, error):
    with fake_registry(made) as registry:

        def answer(asked, handler):
            if asked.path.startswith("/token"):
                handler.reply(status, body)
            else:
                handler.reply(401, WWW_Authenticate=f'Bearer realm="http://{registry.host}/token"')
            return True

        registry.answer = answer
        with pytest.raises(error) as caught:
            await resolve(f"{registry.host}/a:1", settings(tmp_path, registry.host))
        assert SECRET not in json.dumps(caught.value.as_dict())


async def test_an_echoed_password_is_not_repeated(tmp_path, made):
    with fake_registry(made) as registry:

        def answer(asked, handler):
            sent = asked.headers.get("authorization")
            if sent is None:
                handler.reply(401, WWW_Authenticate='Basic realm="x"')
            else:
                said = {"errors": [{"message": f"not {sent} or {SECRET}, \x1b[31m"}]}
                handler.reply(403, json.dumps(said, ensure_ascii=False).encode())
            return True

        registry.answer = answer
        with pytest.raises(RegistryDenied) as caught:
            await resolve(f"{registry.host}/a:1", settings(tmp_path, registry.host))
        shown = json.dumps(caught.value.as_dict())
        assert SECRET not in shown and BASIC.split()[1] not in shown and "\\u001b" not in shown
        assert "***" in shown


def manifest_answer(body: bytes, **headers):
    def answer(asked, handler):
        if "/manifests/" in asked.path:
            handler.reply(200, body, **headers)
            return True
        return False

    return answer


async def test_manifests_that_lie(tmp_path, made):
    digest = json.loads((made / "index.json").read_bytes())["manifests"][0]["digest"]
    good = (made / "blobs/sha256" / digest[7:]).read_bytes()
    docker = "application/vnd.docker.distribution.manifest.v2+json"
    with fake_registry(made) as registry:
        config = settings(tmp_path, registry.host)
        for which, body, headers, match in (
            (":1", good, {"Content_Type": docker}, "came as"),
            (":1", good, {"Content_Type": "text/html"}, "came as 'text/html'"),
            (":1", good, {"Content_Type": OCI, "Docker_Content_Digest": "sha256:" + "0" * 64}, "but it is"),
            (f"@{digest}", good + b" ", {"Content_Type": OCI}, "other bytes"),
            (":1", b"<html>", {"Content_Type": OCI}, "not JSON"),
            (":1", b" " * (5 << 20), {"Content_Type": OCI}, "larger than"),
        ):
            registry.answer = manifest_answer(body, **headers)
            with pytest.raises(InvalidImage, match=match):
                await resolve(f"{registry.host}/a{which}", config)
        registry.answer = manifest_answer(good, Content_Type=OCI + "; charset=utf-8", Docker_Content_Digest=digest)
        assert await resolve(f"{registry.host}/a:1", config) == digest


async def test_sizes_that_lie(tmp_path, made):
    digest = json.loads((made / "index.json").read_bytes())["manifests"][0]["digest"]
    layer = json.loads((made / "blobs/sha256" / digest[7:]).read_bytes())["layers"][0]
    good = (made / "blobs/sha256" / layer["digest"][7:]).read_bytes()

    def endless(asked, handler):
        """More than was said, without a length."""
        if not asked.path.endswith(layer["digest"]):
            return False
        handler.close_connection = True
        handler.send_response(200)
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(bytes(1 << 20))
        return True

    def short(asked, handler):
        if asked.path.endswith(layer["digest"]):
            handler.reply(200, good[:-1])
            return True
        return False

    def stranger(asked, handler):
        if asked.path.endswith(layer["digest"]):
            handler.reply(200, good[:-1] + b"?")
            return True
        return False

    with fake_registry(made) as registry:
        config = settings(tmp_path, registry.host)
        store = await open_store(tmp_path / "state", config)
        for answer, match in ((endless, "is larger than"), (short, "the manifest says"), (stranger, "other bytes")):
            registry.answer = answer
            with pytest.raises(InvalidImage, match=match):
                await fetch(f"{registry.host}/a:1", store, config)
            assert not store.layout.has(layer["digest"])
            left = store.layout.partials / f"{layer['digest'][7:]}.partial"
            assert not left.exists() or left.stat().st_size <= layer["size"]


@pytest.mark.parametrize("content_range", ["bytes 0-9/10", "bytes 5-", "", "bytes 99999999999999999999-1/2"])
async def test_ranges_that_lie(tmp_path, made, content_range):
    digest = json.loads((made / "index.json").read_bytes())["manifests"][0]["digest"]
    layer = json.loads((made / "blobs/sha256" / digest[7:]).read_bytes())["layers"][0]
    good = (made / "blobs/sha256" / layer["digest"][7:]).read_bytes()

    def answer(asked, handler):
        if "range" in asked.headers:
            handler.reply(206, good[1000:], Content_Range=content_range)
            return True
        return False

    with fake_registry(made) as registry:
        registry.answer = answer
        config = settings(tmp_path, registry.host)
        store = await open_store(tmp_path / "state", config)
        (store.layout.partials / f"{layer['digest'][7:]}.partial").write_bytes(good[:1000])
        assert (await fetch(f"{registry.host}/a:1", store, config)).digest == digest


def test_challenges():
    assert parse_challenges('Bearer realm="https://a/t?x=1,2",service="s", scope="a:b:pull,push"') == [
        ("bearer", {"realm": "https://a/t?x=1,2", "service": "s", "scope": "a:b:pull,push"})
    ]
    assert parse_challenges('Negotiate, Basic realm="a \\"b\\""') == [("negotiate", {}), ("basic", {"realm": 'a "b"'})]
    assert parse_challenges("Basic") == [("basic", {})]
    assert parse_challenges('"" ,,,') == []
    assert parse_challenges("Bearer realm=x service=y") == [("bearer", {"realm": "x", "service": "y"})]
