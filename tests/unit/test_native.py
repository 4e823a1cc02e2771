"""Dialect native: topics, documents and commands as they come in."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import CommandRefused, InvalidConfig, InvalidInput, NotFound, SlotdError
from agent.link.backoff import Backoff, Takeovers
from agent.link.native import (
    MAX_PAYLOAD,
    Call,
    Reply,
    Topics,
    Unreadable,
    answer_document,
    check_expiry,
    check_reply,
    decode,
    encode,
    error_document,
    parse_call,
    parse_expiry,
    reported_document,
    settled,
    status_document,
)
from agent.link.state import Memory, accept, parse_desired

TOPICS = Topics("box1")
ALLOW = ["slotd/+/res/#"]


def call(body: Any = None, name: str = "ping", **more: Any) -> Call:
    payload = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
    return parse_call(name, payload, topics=TOPICS, allow=ALLOW, **more)


def refused(body: Any, **more: Any) -> Unreadable:
    with pytest.raises(Unreadable) as caught:
        call(body, **more)
    return caught.value


# --- topics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["", "-a", "a/b", "a+", "#", "a b", "ä", "x" * 65, "a\n"])
def test_a_device_is_one_level_of_a_topic(device: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        Topics(device)
    assert caught.value.field == "device"


def test_commands_are_told_by_their_topic() -> None:
    assert TOPICS.command("slotd/box1/cmd/deploy") == "deploy"
    assert TOPICS.command("slotd/box1/cmd/a/b") == "a/b"
    assert TOPICS.command("slotd/box1/cmd") == TOPICS.command("slotd/box1/cmd/") == ""
    assert TOPICS.command("slotd/box1/cmdx/deploy") is None
    assert TOPICS.command("slotd/box2/cmd/deploy") is None


@pytest.mark.parametrize("name", ["", "a\x01", "ä", "x" * 65, "a//b", "a/b/c/d/e"])
def test_a_name_that_no_command_could_have_is_not_repeated(name: str) -> None:
    assert TOPICS.answer(name) == "slotd/box1/res"
    assert TOPICS.answer("deploy") == "slotd/box1/res/deploy"


# --- what comes in ---------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)
near_commands = st.fixed_dictionaries(
    {},
    optional={
        "v": json_values,
        "id": json_values,
        "reply": json_values | st.sampled_from(["slotd/a/res/b", "$SYS/a", "#", "slotd/box1/desired"]),
        "expires": json_values | st.text(alphabet="0123456789-:TZ+."),
        "arguments": json_values,
        "image": json_values,
    },
)
near_desired = st.fixed_dictionaries(
    {},
    optional={
        "v": json_values,
        "image": json_values,
        "revision": json_values,
        "epoch": json_values,
        "digest": json_values,
        "probation": json_values,
    },
)


def read_or_refused(read: Callable[[], Any], field: str) -> Any:
    """What was read; None if it was refused with an error that names the field and can be sent."""
    try:
        return read()
    except InvalidInput as error:
        fault = error
    assert (fault.field or "").startswith(field)
    assert fault.hint
    encode(error_document(fault))
    return None


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    document = read_or_refused(lambda: decode(payload, "body"), "body")
    if document is not None:
        encode(document)


@given(near_commands)
@settings(max_examples=100, deadline=None)
def test_any_command_is_read_or_refused(body: dict[str, Any]) -> None:
    payload = json.dumps(body).encode()
    try:
        found = parse_call("ping", payload, topics=TOPICS, allow=ALLOW)
    except Unreadable as unreadable:
        encode(answer_document("ping", unreadable.reply, error=unreadable.error))
        reply = unreadable.reply
    else:
        encode(answer_document("ping", found.reply, result={}))
        reply = found.reply
        assert isinstance(found.arguments, dict)
    check_reply(reply.topic, topics=TOPICS, allow=ALLOW, field="reply")


@given(near_desired)
@settings(max_examples=100, deadline=None)
def test_any_desired_document_is_read_or_refused(body: dict[str, Any]) -> None:
    document = read_or_refused(lambda: parse_desired(decode(json.dumps(body).encode(), "desired")), "desired")
    if document is not None:
        memory = accept(Memory(), document)
        assert memory.state == "waiting"
        assert Memory.from_dict(json.loads(json.dumps(memory.as_dict()))) == memory


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[]", "object"),
        (b"{} {}", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "not JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": "\\udc00"}', "surrogate"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "nested"),
        (b'{"a":' + b"[" * 4000, "nested"),
        (b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}", "nested"),
        (b'{"a":' + b"[" * 20000 + b"]" * 20000 + b"}", "elements"),
        (b'{"a": [' + b"1," * 5000 + b"1]}", "elements"),
    ],
)
def test_faults_are_named(payload: bytes, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        decode(payload, "body")


def test_what_is_too_large_is_not_even_read() -> None:
    assert decode(b"{" + b" " * (MAX_PAYLOAD - 2) + b"}", "body") == {}
    with pytest.raises(InvalidInput) as caught:
        decode(b"{" + b" " * (MAX_PAYLOAD - 1) + b"}", "body")
    assert caught.value.code == "TOO_LARGE"


def test_properties_count_before_the_body() -> None:
    found = call({"id": "1", "reply": "slotd/a/res/x"}, response_topic="slotd/b/res/y", correlation=b"c")
    assert found.reply == Reply("slotd/b/res/y", b"c", "1")
    assert call({"id": "1", "reply": "slotd/a/res/x"}).reply == Reply("slotd/a/res/x", None, "1")
    assert call({}).reply == Reply("slotd/box1/res/ping")


def test_an_error_goes_where_the_answer_would_have_gone() -> None:
    assert refused(b"{", response_topic="slotd/b/res/y", correlation=b"c").reply == Reply("slotd/b/res/y", b"c")
    assert refused({"id": "7", "reply": "slotd/a/res/x", "oops": 1}).reply == Reply("slotd/a/res/x", None, "7")
    assert refused({"id": "7", "reply": "elsewhere"}).reply == Reply("slotd/box1/res/ping", None, "7")


@pytest.mark.parametrize(
    "topic",
    ["a/b", "slotd/x/res/+", "slotd/x/res/#", "$share/g/slotd/x/res/a", "slotd/box1/res", "slotd/x/resx", "\ud800", ""],
)
def test_replies_go_only_where_they_may(topic: str) -> None:
    with pytest.raises(SlotdError) as caught:
        check_reply(topic, topics=TOPICS, allow=ALLOW, field="reply")
    assert caught.value.code == "REPLY_FORBIDDEN"


def test_even_a_wide_rule_spares_the_own_topics_and_the_brokers() -> None:
    for topic in ("slotd/box1/desired", "slotd/box1/cmd/deploy", "$SYS/x"):
        with pytest.raises(SlotdError):
            check_reply(topic, topics=TOPICS, allow=["#", "$SYS/#"], field="reply")
    check_reply("anywhere", topics=TOPICS, allow=["#"], field="reply")


@pytest.mark.parametrize("id", ["", "a b", "a\n", "ä", "x" * 129, 7, ["a"]])
def test_an_id_is_a_short_word(id: Any) -> None:
    assert refused({"id": id}).error.field == "id"


def test_a_command_without_id_is_known_by_its_bytes() -> None:
    first = call({"arguments": {"image": "a"}})
    assert first.key is None
    assert first.fingerprint == call({"arguments": {"image": "a"}}).fingerprint
    assert first.fingerprint != call({"arguments": {"image": "b"}}).fingerprint
    assert first.fingerprint != call({"arguments": {"image": "a"}}, name="pong").fingerprint
    assert first.fingerprint != call({"arguments": {"image": "a"}}, correlation=b"1").fingerprint
    assert call({"id": "1"}).key != call({"id": "1"}, name="pong").key


# --- expiry ----------------------------------------------------------------------------------------------------------


def test_expiry_in_both_forms() -> None:
    assert parse_expiry("1970-01-01T00:01:00Z") == parse_expiry("1970-01-01T02:01:00+02:00") == parse_expiry(60) == 60
    for wrong in ("1970-01-01T00:01:00", "soon", True, -1, 1e12, float("nan"), None, [], "9" * 100):
        with pytest.raises(InvalidInput) as caught:
            parse_expiry(wrong)
        assert caught.value.field == "expires"


@pytest.mark.parametrize(
    ("expires", "changes", "code"),
    [
        (None, True, "EXPIRY_REQUIRED"),
        (None, False, None),
        (1000.0, True, "EXPIRED"),
        (1000.0, False, "EXPIRED"),
        (1000.1, True, None),
        (1000.0 + 86400, True, None),
        (1001.0 + 86400, True, "EXPIRY_REQUIRED"),
        (1001.0 + 86400, False, None),
    ],
)
def test_when_a_command_may_run(expires: float | None, changes: bool, code: str | None) -> None:
    found = call({} if expires is None else {"expires": expires})
    if code is None:
        check_expiry(found, changes=changes, now=1000.0)
        return
    with pytest.raises(CommandRefused) as caught:
        check_expiry(found, changes=changes, now=1000.0)
    assert (caught.value.code, caught.value.field) == (code, "expires")


# --- what goes out ---------------------------------------------------------------------------------------------------


def test_the_will_has_no_time() -> None:
    will = status_document("offline", boot_id="b", version="1", reason="lost")
    assert will == {"v": 1, "state": "offline", "boot_id": "b", "version": "1", "reason": "lost"}
    assert "ts" in status_document("offline", boot_id="b", version="1", reason="stop")


def test_an_error_has_all_four() -> None:
    document = answer_document("x", Reply("t", id="1"), error=NotFound("no", hint="look"))
    assert document["error"] == {"code": "NOT_FOUND", "message": "no", "hint": "look", "field": None}
    assert (document["ok"], document["id"]) == (False, "1")


def test_only_progress_is_no_hurry() -> None:
    def shown(**more: Any) -> dict[str, Any]:
        return settled(reported_document({"deployment": {"id": "1", "phase": "pull"} | more}, {}, "r"))

    assert shown(progress={"bytes": 1}, seconds=1.0) == shown(progress={"bytes": 2}, seconds=2.0)
    assert shown(phase="verify") != shown()


def test_what_moves_by_itself_is_not_reported() -> None:
    document = reported_document({"slot": {"present": True, "temperature_c": 40.0}, "uptime_s": 1.0}, {}, "r")
    assert document["slot"] == {"present": True}
    assert "uptime_s" not in document


# --- back-off --------------------------------------------------------------------------------------------------------


def test_backoff_doubles_with_jitter_up_to_the_longest() -> None:
    backoff = Backoff(1.0, 300.0)
    pauses = [backoff.next() for _ in range(2000)]
    for number, pause in enumerate(pauses[:8]):
        assert 0.5 * 2**number <= pause <= 2**number
    assert all(150 <= pause <= 300 for pause in pauses[9:])
    assert len(set(pauses[9:])) > 1000


def test_only_a_steady_connection_ends_the_backoff() -> None:
    backoff = Backoff(1.0, 300.0)
    for _ in range(10):
        backoff.next()
        backoff.lasted(1.0)
    assert backoff.next() > 100
    backoff.lasted(30.0)
    assert backoff.next() <= 1.0


def test_three_takeovers_in_ten_minutes() -> None:
    takeovers = Takeovers()
    assert [takeovers.count(now) for now in (0, 500, 601, 602, 1200)] == [False, False, False, True, True]
    assert not takeovers.count(5000)
