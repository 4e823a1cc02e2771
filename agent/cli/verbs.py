"""The application with all its verbs, in the order in which help shows them."""

from __future__ import annotations

# isort: off
import agent.cli.daemon
import agent.cli.status
import agent.cli.reload
import agent.cli.doctor
import agent.cli.keys
import agent.cli.deploy
import agent.cli.predict
import agent.cli.demo
import agent.cli.retire
import agent.cli.about  # noqa: F401  # each adds its verbs

# isort: on
from agent.cli.app import app

__all__ = ["app"]
