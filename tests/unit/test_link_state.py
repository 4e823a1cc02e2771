"""The rules of desired and reported."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.errors import InvalidInput
from agent.link.state import (
    Arrival,
    Document,
    Malformed,
    Memory,
    Withdrawn,
    accept,
    desired_section,
    ended,
    find,
    fold,
    in_sync,
    observe,
    parse_desired,
    started,
)

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def wish(image: str | None = "r/a:1", revision: int | None = None, epoch: str = "", **more: Any) -> Document:
    return parse_desired({"image": image, "revision": revision, "epoch": epoch} | more)


def deployment(id: str, outcome: str | None, *, kind: str = "desired", reference: str = "r/a:1", **more: Any) -> dict:
    return {
        "id": id,
        "reference": reference,
        "digest": A,
        "actor": f"{kind}: n",
        "outcome": outcome,
        "error": None,
        "started": "2026-01-01T00:00:00Z",
    } | more


def applied(digest: str | None = A, **more: Any) -> Memory:
    return ended(started(accept(Memory(), wish(**more)), "t1"), "committed", digest=digest)


# --- documents -------------------------------------------------------------------------------------------------------


def test_identity_is_the_hash_of_the_section() -> None:
    first = wish(revision=1, ts="2026-01-01T00:00:00Z").section.hash
    assert wish(revision=9, epoch="e", v=1).section.hash == first
    assert wish(accept_dark=False, digest=None).section.hash == first
    assert wish(accept_dark=True).section.hash != first
    assert wish("r/a:2").section.hash != first
    assert wish(None).section.hash != first


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({}, "desired.image"),
        ({"image": ""}, "desired.image"),
        ({"image": 1}, "desired.image"),
        ({"image": "a", "revision": -1}, "desired.revision"),
        ({"image": "a", "revision": "1"}, "desired.revision"),
        ({"image": "a", "revision": True}, "desired.revision"),
        ({"image": "a", "revision": 1 << 63}, "desired.revision"),
        ({"image": "a", "digest": "sha256:1"}, "desired.digest"),
        ({"image": "a", "probation": float("inf")}, "desired.probation"),
        ({"image": "a", "v": 2}, "desired.v"),
        ({"image": "a", "force": True}, "desired.force"),
    ],
)
def test_a_fault_names_its_field(document: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_desired(document)
    assert caught.value.field == field


def test_memory_survives_the_journal() -> None:
    memory = applied(revision=4, epoch="e")
    assert Memory.from_dict(json.loads(json.dumps(memory.as_dict()))) == memory
    assert Memory.from_dict(None) == Memory()
    assert Memory.from_dict({"revision": 3, "unknown": 1}) == Memory(revision=3)


# --- order -----------------------------------------------------------------------------------------------------------


def test_a_new_wish_waits() -> None:
    memory = accept(Memory(), wish(revision=5))
    assert (memory.state, memory.revision) == ("waiting", 5)
    assert memory.section == {"image": "r/a:1"}


def test_a_lower_revision_is_refused_and_told() -> None:
    before = applied(revision=5)
    after = accept(before, wish("r/b:1", revision=4))
    assert after.refused is not None
    assert after.refused["error"]["code"] == "REVISION_TOO_LOW"
    assert after.refused["revision"] == 4
    assert (after.hash, after.state, after.revision) == (before.hash, "applied", 5)
    assert accept(after, wish(revision=6)).refused is None


def test_a_revision_stands_for_one_wish() -> None:
    after = accept(applied(revision=5), wish("r/b:1", revision=5))
    assert after.refused is not None
    assert after.refused["error"]["code"] == "REVISION_REUSED"


def test_a_new_epoch_begins_anew() -> None:
    memory = accept(applied(revision=500, epoch="old"), wish("r/b:1", revision=1, epoch="new"))
    assert (memory.state, memory.revision, memory.epoch) == ("waiting", 1, "new")


def test_the_same_wish_is_not_carried_out_again() -> None:
    memory = accept(applied(revision=5), wish(revision=6))
    assert (memory.state, memory.revision, memory.digest) == ("applied", 6, A)
    assert accept(memory, wish(revision=6)) == memory


def test_without_revisions_the_hash_alone_counts() -> None:
    memory = applied()
    assert accept(memory, wish()).state == "applied"
    assert accept(memory, wish("r/b:1")).state == "waiting"


def test_a_wish_without_revision_does_not_forget_the_order() -> None:
    memory = accept(applied(revision=5), wish("r/b:1"))
    assert (memory.state, memory.revision) == ("waiting", 5)
    assert accept(memory, wish("r/c:1", revision=4)).refused is not None


def test_withdrawn_is_no_wish_but_keeps_the_order() -> None:
    memory = accept(applied(revision=5), Withdrawn())
    assert (memory.hash, memory.state, memory.revision) == (None, "none", 5)
    assert accept(memory, wish("r/b:1", revision=4)).refused is not None
    assert accept(memory, wish(revision=5)).state == "waiting"


def test_what_cannot_be_read_changes_nothing() -> None:
    before = applied(revision=5)
    after = accept(before, Malformed({"code": "INVALID_ARGUMENT", "message": "is not JSON"}))
    assert after.refused is not None
    assert (after.hash, after.state, after.revision) == (before.hash, "applied", 5)


def test_only_the_newest_of_a_batch_is_carried_out() -> None:
    batch: list[Arrival] = [wish("r/5:1", revision=5), wish("r/6:1", revision=6), wish("r/7:1", revision=7)]
    memory, passed = fold(Memory(), [*batch, wish("r/7:1", revision=7)])
    assert (memory.state, memory.revision) == ("waiting", 7)
    assert [wish["revision"] for wish in passed] == [5, 6]


def test_a_late_old_document_does_not_win() -> None:
    memory, passed = fold(Memory(), [wish("r/7:1", revision=7), wish("r/5:1", revision=5)])
    assert (memory.revision, passed) == (7, [])
    assert memory.refused is not None


def test_a_batch_that_ends_empty_starts_nothing() -> None:
    memory, passed = fold(Memory(), [wish("r/5:1", revision=5), Withdrawn()])
    assert memory.state == "none"
    assert [wish["revision"] for wish in passed] == [5]


# --- the end of a wish -----------------------------------------------------------------------------------------------


def test_committed_is_in_sync() -> None:
    memory = started(accept(Memory(), wish(revision=1)), "t1")
    status = {"deployment": deployment("t1", None), "committed": None}
    assert observe(memory, status) == memory
    status = {"last": deployment("t1", "committed"), "committed": {"digest": A}}
    memory = observe(memory, status)
    assert (memory.state, memory.digest) == ("applied", A)
    assert desired_section(memory, status)["in_sync"] is True


def test_an_empty_slot_can_be_wished() -> None:
    memory = started(accept(Memory(), wish(None)), "t1")
    status = {"last": deployment("t1", "committed", digest=None), "committed": None}
    memory = observe(memory, status)
    assert in_sync(memory, status)
    assert not in_sync(memory, {"committed": {"digest": A}})


@pytest.mark.parametrize("outcome", ["refused", "failed", "rolled_back", "cancelled", "superseded"])
def test_a_failed_wish_is_not_tried_again_until_the_hash_changes(outcome: str) -> None:
    memory = started(accept(Memory(), wish(revision=1)), "t1")
    status = {"last": deployment("t1", outcome), "committed": {"digest": B}}
    memory = observe(memory, status)
    assert memory.state == "failed"
    assert memory.error is not None
    assert memory.error["code"] == outcome.upper()
    assert desired_section(memory, status)["in_sync"] is False
    assert accept(memory, wish(revision=2)).state == "failed"
    assert accept(memory, wish("r/b:1", revision=2)).state == "waiting"


def test_an_interrupted_wish_is_tried_again_for_a_new_revision() -> None:
    memory = started(accept(Memory(), wish(revision=1)), "t1")
    memory = ended(memory, "failed", error={"code": "INTERRUPTED", "message": "power"})
    assert memory.state == "interrupted"
    assert accept(memory, wish(revision=1)).state == "interrupted"
    assert accept(memory, wish(revision=2)).state == "waiting"


def test_what_a_restart_put_in_its_place_is_followed() -> None:
    memory = started(accept(Memory(), wish()), "t1")
    resumed = deployment("t2", None) | {"actor": "resume of t1"}
    cut = deployment("t1", "failed", error={"code": "INTERRUPTED", "message": "cut off"})
    memory = observe(memory, {"deployment": resumed, "last": cut})
    assert (memory.state, memory.task) == ("applying", "t2")
    status = {"last": resumed | {"outcome": "committed"}, "committed": {"digest": A}}
    assert observe(memory, status).state == "applied"


def test_one_that_was_given_up_and_yet_came_through_is_in_sync() -> None:
    memory = ended(started(accept(Memory(), wish()), "t1"), "failed", error={"code": "INTERRUPTED", "message": "cut"})
    cut = {"last": deployment("t1", "failed", error={"code": "INTERRUPTED", "message": "cut"})}
    assert observe(memory, cut) == memory
    running = {"deployment": deployment("t3", None) | {"actor": "resume of t2"}} | cut
    assert observe(memory, running).state == "applying"
    status = {"last": deployment("t3", "committed") | {"actor": "resume of t2"}, "committed": {"digest": A}}
    memory = observe(memory, status)
    assert in_sync(memory, status)
    assert memory.override is None


def test_a_resumed_local_deployment_is_an_override() -> None:
    resumed = deployment("t3", "committed", reference="r/b:1", digest=B) | {"actor": "resume of t2"}
    assert observe(applied(), {"last": resumed, "committed": {"digest": B}}).override is not None


def test_a_resumed_deployment_is_recognised_without_its_id() -> None:
    memory = started(accept(Memory(), wish(), last="t0"), None)
    assert find(memory, {"deployment": deployment("t9", None)}) is not None
    assert find(memory, {"deployment": deployment("t9", None, kind="local")}) is None
    assert find(memory, {"last": deployment("t0", "failed")}) is None


# --- overrides -------------------------------------------------------------------------------------------------------


def test_a_local_deployment_overrides_until_the_hash_changes() -> None:
    memory = applied(revision=5)
    local = deployment("t2", "committed", kind="local", reference="r/b:1", digest=B)
    status = {"last": local, "committed": {"digest": B}}
    memory = observe(memory, status)
    shown = desired_section(memory, status)
    assert shown["in_sync"] is False
    assert (shown["override"]["by"], shown["override"]["since"]) == ("local: n", local["started"])
    assert observe(memory, status) == memory
    assert accept(memory, wish(revision=6)).override is not None
    assert accept(memory, wish("r/c:1", revision=7)).override is None


def test_an_override_survives_a_failing_deployment_after_it() -> None:
    memory = observe(applied(), {"last": deployment("t2", "committed", kind="local"), "committed": {"digest": B}})
    later = {"last": deployment("t3", "failed", kind="local"), "committed": {"digest": B}}
    assert observe(memory, later).override == memory.override


def test_coming_back_by_hand_ends_the_override() -> None:
    memory = observe(applied(), {"last": deployment("t2", "committed", kind="mqtt"), "committed": {"digest": B}})
    assert memory.override is not None
    status = {"last": deployment("t3", "committed", kind="mqtt"), "committed": {"digest": A}}
    memory = observe(memory, status)
    assert memory.override is None
    assert in_sync(memory, status)


def test_what_ended_before_the_wish_does_not_override_it() -> None:
    status = {"last": deployment("t0", "committed", kind="local"), "committed": {"digest": B}}
    memory = accept(Memory(), wish(), last="t0")
    memory = ended(memory, "refused", error={"code": "REFUSED", "message": "no"})
    assert observe(memory, status).override is None


def test_no_wish_has_no_override() -> None:
    status = {"last": deployment("t2", "committed", kind="local"), "committed": {"digest": B}}
    assert observe(Memory(), status) == Memory()
    assert desired_section(Memory(), status)["state"] == "none"
