"""The outbox: in order, nothing lost without a gap that says so."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.errors import InvalidInput, StorageError
from agent.journal.database import Journal
from agent.journal.outbox import MAX_AGE, Outbox
from support.clocks import Hands


@asynccontextmanager
async def opened(folder: Path, hands: Hands | None = None, **bounds: Any) -> AsyncIterator[Outbox]:
    journal = await Journal.open(folder, "b", clock=hands.clock() if hands else None)
    try:
        yield Outbox(journal, **bounds)
    finally:
        await journal.close()


def shown(events: list[tuple[int, str, dict[str, Any]]]) -> list[Any]:
    """A gap as (from, to), an event as its number; each stands at its seq."""
    for seq, _, document in events:
        assert seq == (document["to"] if document["kind"] == "gap" else document["n"])
    return [(d["from"], d["to"]) if d["kind"] == "gap" else d["n"] for _, _, d in events]


async def test_in_order_and_until_acknowledged(tmp_path: Path) -> None:
    async with opened(tmp_path) as outbox:
        assert (outbox.depth(), outbox.oldest_age()) == (0, None)
        assert await outbox.pending(0, 10) == []
        assert [await outbox.append("test", {"n": n}) for n in (1, 2, 3)] == [1, 2, 3]
        events = await outbox.pending(0, 10)
        assert shown(events) == [1, 2, 3]
        assert {epoch for _, epoch, _ in events} == {await outbox.epoch()}
        assert events[0][2]["kind"] == "test"
        assert events[0][2]["ts"].endswith("Z")
        assert shown(await outbox.pending(1, 1)) == [2]
        await outbox.acknowledge(2)
        assert outbox.depth() == 1
    async with opened(tmp_path) as outbox:
        assert outbox.depth() == 1
        assert outbox.oldest_age() is not None
        again = await outbox.pending(0, 10)
        assert shown(again) == [3]
        assert again[0][1] == events[0][1]
        await outbox.acknowledge(3)
        await outbox.acknowledge(3)
    async with opened(tmp_path) as outbox:  # seq goes on when all are gone
        assert outbox.depth() == 0
        assert await outbox.append("test", {"n": 4}) == 4


async def test_kind_and_time(tmp_path: Path) -> None:
    async with opened(tmp_path) as outbox:
        await outbox.append("deployment_ended", {"kind": "rollback", "ts": "2026-01-01T00:00:00.000Z"})
        ((_, _, document),) = await outbox.pending(0, 1)
        assert document == {"kind": "deployment_ended", "ts": "2026-01-01T00:00:00.000Z"}


async def test_overflow_leaves_one_gap(tmp_path: Path) -> None:
    async with opened(tmp_path, max_events=4) as outbox:
        for n in range(1, 5):
            await outbox.append("test", {"n": n})
        assert shown(await outbox.pending(0, 10)) == [1, 2, 3, 4]
        await outbox.append("test", {"n": 5})
        assert shown(await outbox.pending(0, 10)) == [(1, 2), 3, 4, 5]
        for n in range(6, 101):
            await outbox.append("test", {"n": n})
        assert shown(await outbox.pending(0, 10)) == [(1, 97), 98, 99, 100]
        assert outbox.depth() == 4
    async with opened(tmp_path, max_events=2) as outbox:  # a smaller one from now on
        assert shown(await outbox.pending(0, 10)) == [(1, 99), 100]


async def test_a_gap_that_grows_while_events_are_on_their_way(tmp_path: Path) -> None:
    async with opened(tmp_path, max_events=4) as outbox:
        for n in range(1, 5):
            await outbox.append("test", {"n": n})
        sent = await outbox.pending(0, 3)
        for n in range(5, 8):
            await outbox.append("test", {"n": n})
        assert shown(await outbox.pending(0, 10)) == [(1, 4), 5, 6, 7]
        await outbox.acknowledge(sent[-1][0])
        assert shown(await outbox.pending(0, 10)) == [(4, 4), 5, 6, 7]  # 1 to 3 have arrived
        await outbox.acknowledge(4)
        assert shown(await outbox.pending(0, 10)) == [5, 6, 7]


async def test_bounded_in_bytes(tmp_path: Path) -> None:
    async with opened(tmp_path, max_bytes=20_000) as outbox:
        for n in range(1, 31):
            await outbox.append("test", {"n": n, "x": "x" * 1900})
        events = shown(await outbox.pending(0, 100))
        assert events[0] == (1, events[1] - 1)
        assert events[-1] == 30
        assert 8 <= len(events) <= 11
        with pytest.raises(InvalidInput, match="too long"):
            await outbox.append("test", {"x": "x" * 200_000})
        with pytest.raises(InvalidInput):
            await outbox.append("test", {"x": float("inf")})
        assert shown(await outbox.pending(0, 100)) == events


async def test_bounded_in_age(tmp_path: Path) -> None:
    hands = Hands()
    async with opened(tmp_path, hands) as outbox:
        for n in range(1, 4):
            await outbox.append("test", {"n": n})
        hands.pass_(MAX_AGE - 10)
        await outbox.append("test", {"n": 4})
        assert outbox.oldest_age() == MAX_AGE - 10
        hands.pass_(20)
        assert outbox.oldest_age() == MAX_AGE + 10
        assert shown(await outbox.pending(0, 100)) == [(1, 3), 4]
        hands.pass_(10 * MAX_AGE)
        assert shown(await outbox.pending(0, 100)) == [(1, 4)]
        assert shown(await outbox.pending(0, 100)) == [(1, 4)]  # a gap does not grow old


async def test_a_clock_that_is_set_drops_nothing(tmp_path: Path) -> None:
    hands = Hands(wall=100.0)  # 1970, as before the first synchronisation
    async with opened(tmp_path, hands) as outbox:
        await outbox.append("test", {"n": 1})
        hands.pass_(10)
        hands.set(1_800_000_000.0)
        await outbox.append("test", {"n": 2})
        assert shown(await outbox.pending(0, 10)) == [1, 2]
        assert outbox.oldest_age() == pytest.approx(10, abs=0.01)


async def test_waiting(tmp_path: Path) -> None:
    async with opened(tmp_path) as outbox:
        await outbox.append("test", {"n": 1})
        await outbox.wait(0)
        waiter = asyncio.create_task(outbox.wait(1))
        await outbox.pending(0, 1)
        await outbox.acknowledge(1)
        await asyncio.sleep(0.01)
        assert not waiter.done()
        empty = asyncio.create_task(outbox.wait(0))
        await asyncio.sleep(0.01)
        assert not empty.done()  # the one there was has gone
        await outbox.append("test", {"n": 2})
        await asyncio.wait_for(asyncio.gather(waiter, empty), 5)


async def test_seq_goes_on_over_a_journal_that_broke(tmp_path: Path) -> None:
    """A reader that asks for what is above the last seq must not miss what comes after."""
    async with opened(tmp_path) as outbox:
        for n in range(1, 6):
            await outbox.append("test", {"n": n})
        before = await outbox.epoch()
        database = outbox._database
        await asyncio.wrap_future(database._thread.submit(database._drop))
        (tmp_path / "journal.db").write_bytes(b"\xff" * 8192)
        (tmp_path / "journal.db-wal").unlink(missing_ok=True)
        assert await outbox.append("test", {"n": 6}) == 6
        assert database.put_aside is not None
        assert shown(await outbox.pending(5, 10)) == [6]
        assert await outbox.epoch() != before


async def test_what_fails_is_not_there(tmp_path: Path) -> None:
    async with opened(tmp_path) as outbox:
        await outbox.append("test", {"n": 1})
        database = outbox._database
        await database.run(lambda db, _: db.execute("PRAGMA max_page_count = 1").fetchone())
        await outbox.append("test", {"n": 2})
        with pytest.raises(StorageError):
            await outbox.append("test", {"n": 3, "x": "x" * 100_000})
        await database.run(lambda db, _: db.execute("PRAGMA max_page_count = 100000").fetchone())
        assert await outbox.append("test", {"n": 3}) == 3
        assert shown(await outbox.pending(0, 10)) == [1, 2, 3]


async def test_at_random(tmp_path: Path) -> None:
    """Each event arrives, or a gap covers it, in order, across restarts; acknowledged ones never come again."""
    chance = random.Random(7)
    produced, acknowledged, told = 0, 0, set()
    for _ in range(6):
        async with opened(tmp_path, max_events=8) as outbox:
            for _ in range(40):
                if chance.random() < 0.7:
                    produced += 1
                    assert await outbox.append("test", {"n": produced}) == produced
                else:
                    events = shown(await outbox.pending(0, chance.randint(1, 5)))
                    numbers = [n for e in events for n in (range(e[0], e[1] + 1) if isinstance(e, tuple) else [e])]
                    assert numbers == list(range(acknowledged + 1, acknowledged + 1 + len(numbers)))
                    told.update(numbers)
                    if numbers and chance.random() < 0.8:
                        acknowledged = numbers[-1]
                        await outbox.acknowledge(acknowledged)
                assert outbox.depth() <= 8
    assert acknowledged > 100
    assert told >= set(range(1, acknowledged + 1))
