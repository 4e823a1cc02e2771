"""Ids of deployments and requests: on the lines that belong to them, and on no others."""

from __future__ import annotations

import asyncio

import pytest

from agent.scope import ids, scope


def test_the_innermost_wins_and_all_end() -> None:
    with scope(deployment="d-1", request="r-1"):
        with scope(request="r-2"):
            assert ids() == {"deployment": "d-1", "request": "r-2"}
        assert ids() == {"deployment": "d-1", "request": "r-1"}
    assert ids() == {}


def test_it_ends_with_an_error() -> None:
    with pytest.raises(KeyError), scope(deployment="d-1"):
        raise KeyError
    assert ids() == {}


async def test_what_outlives_a_scope_leaves_it() -> None:
    go_on = asyncio.Event()
    seen = []

    async def executor() -> None:
        seen.append(ids())
        await go_on.wait()
        seen.append(ids())
        with scope(deployment="d-2"):
            seen.append(ids())

    with scope(deployment="d-1"):
        task = asyncio.create_task(executor())
        await asyncio.sleep(0)
    go_on.set()
    await task
    assert seen == [{"deployment": "d-1"}, {}, {"deployment": "d-2"}]


async def test_tasks_side_by_side_do_not_mix() -> None:
    async def request(number: str) -> dict[str, str]:
        with scope(request=number):
            await asyncio.sleep(0.001)
            return ids()

    found = await asyncio.gather(*(request(str(number)) for number in range(20)))
    assert found == [{"request": str(number)} for number in range(20)]
