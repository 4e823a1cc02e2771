"""`slotd reload`: the daemon reads its configuration again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agent.cli.app import HOST, ConfigOption, JsonOption, SocketOption, app
from agent.cli.output import console, emit, plain

TITLES = {
    "now": "in force now",
    "new executors": "in force for executors that start from now on",
}


@app.command(rich_help_panel=HOST)
def reload(as_json: JsonOption = False, socket: SocketOption = None, config: ConfigOption = None) -> None:
    """Read the configuration again and put into force what has changed, while requests are answered.

    Shows each field that has changed and those that need a restart. Ends with 78, and every field that is wrong, if the
    file is invalid; then nothing has changed.
    """
    from agent.cli.connect import ask

    answer = ask(socket, config, "reload")
    if as_json:
        emit(answer)
        return
    for line in lines(answer):
        console().print(line, soft_wrap=True)


def lines(answer: Mapping[str, Any]) -> list[str]:
    """What there is to say of the answer."""
    found: list[str] = []
    for effect, title in TITLES.items():
        fields = [one for one in answer["changed"] if one["effect"] == effect]
        found += _block(title, fields)
    if not found:
        found.append("nothing that is in force has changed")
    return found + _block("at the next start of slotd", answer["pending"])


def _block(title: str, fields: list[dict[str, Any]]) -> list[str]:
    width = max((len(one["field"]) for one in fields), default=0)
    shown = [f"  {plain(one['field']):<{width}}  {_value(one['from'])} → {_value(one['to'])}" for one in fields]
    return [title, *shown] if fields else []


def _value(value: Any) -> str:
    return plain(json.dumps(value, ensure_ascii=False))
