"""The slotd command: one file for each group of verbs. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `slotd`. Users see no traceback, unless SLOTD_TRACEBACK is set."""
    import gc
    import os

    # Whatever plug-in is installed beside us has no business in here; looking for one takes 30 ms.
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"

    if sys.argv[1:2] == ["run"] and "--help" not in sys.argv:
        from agent.executor.spawn import start_early

        start_early()  # before all that takes long to import
        gc.disable()  # until the daemon is ready: there is no garbage before
        import agent.cli.daemon  # noqa: F401  # the one verb that is wanted; all of them take 40 ms
        from agent.cli.app import app
    else:
        from agent.cli.verbs import app

    try:
        app(prog_name="slotd")
    except Exception as fault:
        if os.environ.get("SLOTD_TRACEBACK"):
            raise
        from agent.cli.output import show_error
        from agent.errors import SlotdError

        text = " ".join(f"{type(fault).__name__}: {fault}".split())
        show_error(SlotdError(f"an unforeseen fault: {text}", hint="SLOTD_TRACEBACK=1 shows where; please report it"))
        sys.exit(SlotdError.exit)
