"""What tests in a machine share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vm.machine import Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A fresh machine for one test; modules that can share one define their own."""
    with Machine() as booted:
        yield booted
