"""The programmer: one verb on the slot, then the end (child side of agent.executor.programmer).

Standard input is a SOCK_SEQPACKET socket: one JSON request comes in, one JSON answer goes out.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import threading
from dataclasses import asdict
from typing import Any

from drivers import make
from drivers.base import Driver, DriverError, SlotState, Wanted

_PR_SET_NO_NEW_PRIVS = 38
_MAX_MESSAGE = 64 * 1024


def main() -> None:
    """Serve one request. The exit status says only whether an answer was given."""
    _no_new_privileges()
    channel = socket.socket(fileno=os.dup(0))
    request = json.loads(channel.recv(_MAX_MESSAGE))
    threading.Thread(target=_end_with, args=(channel.fileno(),), name="parent-watch", daemon=True).start()
    try:
        answer: dict[str, Any] = {"state": asdict(_do(request))}
    except DriverError as error:
        answer = {"error": {"code": error.code, "message": error.message[:2000], "hint": error.hint}}
    except Exception as error:  # a driver is third-party code; whatever it raises must reach the deployment's report
        answer = {
            "error": {
                "code": "PROGRAM_FAILED" if request["verb"] == "program" else "SLOT_FAILED",
                "message": f"the {request['driver']} driver failed: {type(error).__name__}: {error}"[:2000],
                "hint": None,
            }
        }
    channel.send(json.dumps(answer).encode())


def _do(request: dict[str, Any]) -> SlotState:
    driver = make(request["driver"], request["options"])
    wanted = Wanted(**request["wanted"])
    verb, bitstream = request["verb"], request["bitstream"]
    if verb == "program":
        driver.program(bitstream, wanted)
        return _read_back(driver, wanted)
    if verb == "check":
        driver.check(bitstream, wanted)
    else:
        driver.reset(verb.removeprefix("reset-"))
    return driver.probe()


def _read_back(driver: Driver, wanted: Wanted) -> SlotState:
    """Whatever the driver believes: what the slot says afterwards must be what was wanted."""
    state = driver.probe()
    if wanted.accelerator is not None and state.accelerator not in (None, wanted.accelerator):
        raise DriverError(
            "WRONG_ACCELERATOR", f"the slot was programmed and holds {state.accelerator}, not {wanted.accelerator}"
        )
    return state


def _end_with(channel: int) -> None:
    """A programmer without its agent must not keep the device."""
    poll = select.poll()
    poll.register(channel, 0)  # only hang-ups
    poll.poll()
    os._exit(1)


def _no_new_privileges() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


if __name__ == "__main__":
    main()
