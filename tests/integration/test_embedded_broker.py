"""The broker inside slotd."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

import pytest

from agent.errors import Conflict, InvalidConfig
from agent.link.broker import EmbeddedBroker
from support.linked import linked, make_config, outside, soon
from support.mosquitto import Mosquitto


async def test_the_link_brings_its_own_broker(tmp_path: Path) -> None:
    async with linked(make_config(tmp_path, 0, host="")) as parts:
        described = parts.link.describe()
        assert described["embedded"] is True
        host, port = described["broker"].split(":")
        assert host == "127.0.0.1"
        async with outside(int(port), "3.1.1") as other:
            assert json.loads(await other.retained("status"))["state"] == "online"
            assert (await other.call("ping", {"id": "1"}))["ok"] is True
            answer = await other.call("deploy", {"id": "d", "expires": soon(), "arguments": {"image": "r/a:1"}})
            assert answer["ok"] is True
            await other.publish("desired", {"image": "r/b:1", "revision": 1}, retain=True)
            await other.next("reported", lambda d: d["desired"].get("in_sync"))
            await parts.outbox.append("test", {"number": 1})
            await other.next("event", lambda d: d["kind"] == "test")
            assert (await other.call("deploy", b"{"))["error"]["code"] == "INVALID_ARGUMENT"
        loop = asyncio.get_running_loop()
        began = loop.time()
        await parts.stop()
        assert loop.time() - began < 4
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", int(port))


async def test_start_and_stop_leave_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = asyncio.all_tasks()
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            broker = EmbeddedBroker()
            await broker.start()
            assert broker.port
            await broker.stop()
            await broker.stop()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert [record.name for record in caplog.records if record.name.startswith(("amqtt", "transitions"))] == []


async def test_only_this_machine_may_come() -> None:
    broker = EmbeddedBroker()
    await broker.start()
    try:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.2", broker.port)
    finally:
        await broker.stop()


async def test_a_taken_port_is_a_conflict(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as other:
        with pytest.raises(Conflict) as caught:
            await EmbeddedBroker(other.port).start()
        assert caught.value.field == "link.port"
        async with linked(make_config(tmp_path, other.port, host=""), online=False) as parts:
            assert parts.task is not None
            with pytest.raises(Conflict):
                await parts.task


async def test_without_amqtt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amqtt.broker", None)
    with pytest.raises(InvalidConfig) as caught:
        await EmbeddedBroker().start()
    assert "pip install" in str(caught.value.hint)
