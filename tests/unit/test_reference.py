"""References: what is taken, what is refused, and under which names a layout may know an image."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import InvalidConfig, InvalidInput
from agent.images.credentials import read_credentials
from agent.images.reference import Reference, parse_digest, parse_reference

HEX = "a" * 64


@pytest.mark.parametrize(
    ("text", "host", "name", "tag", "digest"),
    [
        ("127.0.0.1:5000/models/resnet:3", "127.0.0.1:5000", "models/resnet", "3", None),
        ("registry.example/a", "registry.example", "a", "latest", None),
        ("localhost/a:b", "localhost", "a", "b", None),
        ("[::1]:5000/a:b", "[::1]:5000", "a", "b", None),
        (f"r.example/a/b@sha256:{HEX}", "r.example", "a/b", None, f"sha256:{HEX}"),
        (f"r.example/a/b:1@sha256:{HEX}", "r.example", "a/b", "1", f"sha256:{HEX}"),
        ("demo/lite0:1", None, "demo/lite0", "1", None),
        ("lite0", None, "lite0", "latest", None),
    ],
)
def test_registry_references(text, host, name, tag, digest):
    assert parse_reference(text) == Reference(text, host, name, tag, digest)


@pytest.mark.parametrize(
    ("text", "folder", "tag", "digest"),
    [
        ("oci:/srv/images:lite0", "/srv/images", "lite0", None),
        ("oci:/srv/images:host:5000/a/b:1", "/srv/images", "host:5000/a/b:1", None),
        ("oci:/srv/images", "/srv/images", None, None),
        (f"oci:/srv/images@sha256:{HEX}", "/srv/images", None, f"sha256:{HEX}"),
        (f"oci:/srv/images:x@sha256:{HEX}", "/srv/images", "x", f"sha256:{HEX}"),
    ],
)
def test_layout_references(text, folder, tag, digest):
    parsed = parse_reference(text)
    assert (parsed.layout, parsed.tag, parsed.digest) == (Path(folder), tag, digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "UPPER/case",
        "host.example/",
        "host.example/a//b",
        "host.example/../etc",
        "host.example/a:tag with space",
        "host.example/a:" + "t" * 129,
        "host.example/a@sha256:123",
        "host.example/a@sha512:" + "a" * 128,
        f"host.example/a@sha256:{HEX}x",
        "host.example:123456/a:1",
        "127.0.0.1:65536/a:1",
        "-host.example/a:1",
        "user:secret@host.example/a:1",
        "https://host.example/a:1",
        "host.example/a:1\n",
        "oci:relative:tag",
        "oci:",
        "oci:/a:",
        "oci:/a\0b:t",
        "oci:/a:tag\nwith newline",
        "x" * 5000,
    ],
)
def test_what_is_no_reference_is_refused_by_name(text):
    with pytest.raises(InvalidInput) as caught:
        parse_reference(text)
    assert caught.value.field == "image"
    assert caught.value.hint


@given(st.text(max_size=200))
def test_any_text_gives_a_reference_or_a_typed_error(text):
    try:
        parsed = parse_reference(text)
    except InvalidInput:
        return
    assert str(parsed) == text
    assert parsed.name or parsed.layout


def test_a_layout_may_know_the_image_as_typed_or_in_full():
    assert parse_reference("host:5000/a/b:1").titles == {"host:5000/a/b:1"}
    assert parse_reference("host:5000/a/b").titles == {"host:5000/a/b", "host:5000/a/b:latest"}
    assert parse_reference("lite0").titles == {"lite0", "lite0:latest"}
    # Another repository's image of the same tag is not this image.
    assert "1" not in parse_reference("host:5000/a/b:1").titles


def test_digest():
    assert parse_digest(f"sha256:{HEX}") == f"sha256:{HEX}"
    with pytest.raises(InvalidInput):
        parse_digest(f"sha256:{HEX.upper()}")


def test_credentials_are_found_by_host_and_never_shown(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        '{"auths": {"https://one.example/v1/": {"auth": "dXNlcjpzM2NyZXQ="},'
        ' "two.example:5000": {"username": "u", "password": "p4ss"}, "three.example": {"identitytoken": "t0ken"}}}'
    )
    one = read_credentials(path, "one.example")
    assert one and (one.user, one.password) == ("user", "s3cret")
    assert "s3cret" not in repr(one)
    two = read_credentials(path, "two.example:5000")
    assert two and two.basic == "Basic dTpwNHNz"
    three = read_credentials(path, "three.example")
    assert three and three.identity == "t0ken" and three.basic is None
    assert read_credentials(path, "two.example") is None


@pytest.mark.parametrize("text", ["", "[]", '{"auths": 3}', '{"auths": {"h": {"auth": "s3cret!"}}}'])
def test_credentials_that_cannot_be_read_are_a_fault_of_the_configuration(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        read_credentials(path, "h")
    assert "s3cret" not in str(caught.value)
