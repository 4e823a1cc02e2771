"""The slotd command: one file for each group of verbs. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from agent.errors import SlotdError


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

    from agent.cli.start import plain, start
    from agent.errors import SlotdError

    try:
        if (options := plain(sys.argv[1:])) is not None:
            sys.exit(start(*options))
        from agent.cli.verbs import app

        app(prog_name="slotd")
    except KeyboardInterrupt:
        sys.exit(130)
    except SlotdError as error:
        _fail(error)
    except Exception as fault:
        if os.environ.get("SLOTD_TRACEBACK"):
            raise
        text = " ".join(f"{type(fault).__name__}: {fault}".split())
        _fail(SlotdError(f"an unforeseen fault: {text}", hint="SLOTD_TRACEBACK=1 shows where; please report it"))


def _fail(error: SlotdError) -> NoReturn:
    from agent.cli.output import show_error

    show_error(error)
    sys.exit(error.exit)
