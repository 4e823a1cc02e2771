"""YAML as strangers write it: model.yaml of images, and the configuration. Without numpy, which a start waits for."""

from __future__ import annotations

from typing import Any

import yaml

MAX_YAML_NODES = 10_000
"""Scalars, lists and mappings together; each takes some 700 bytes and 30 µs to parse."""


class _Bounded(yaml.SafeLoader):
    """Without aliases, and with so many nodes at the most."""

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.nodes > MAX_YAML_NODES:
            raise yaml.YAMLError(f"has more than {MAX_YAML_NODES} values")
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def parse_yaml(text: bytes | str) -> Any:
    """YAML without aliases (a page of which can describe gigabytes) and of a bounded size. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Bounded)  # noqa: S506  # a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
