"""The programmer: one verb on the slot, then the end (child side of agent.executor.programmer).

Standard input is a SOCK_SEQPACKET socket: one JSON request comes in, one JSON answer goes out.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
from dataclasses import asdict
from typing import Any

from agent.executor import sandbox
from agent.executor.needs import grants_of
from drivers import make
from drivers.base import Driver, DriverError, SlotState, Wanted

MEMORY = 1 << 30
"""Bytes of private memory."""
_MAX_MESSAGE = 64 * 1024


def main() -> None:
    """Serve one request. The exit status says only whether an answer was given."""
    channel = socket.socket(fileno=os.dup(0))
    request = json.loads(channel.recv(_MAX_MESSAGE))
    try:
        # The driver's modules are imported by this; its constructor does not touch the device.
        driver = make(request["driver"], request["options"])
        sandbox.enter(sandbox.Limits(MEMORY + driver.needs.address_space), grants_of(driver.needs))
        threading.Thread(target=_end_with, args=(channel.fileno(),), name="parent-watch", daemon=True).start()
        answer: dict[str, Any] = {"state": asdict(_do(driver, request))}
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


def _do(driver: Driver, request: dict[str, Any]) -> SlotState:
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


if __name__ == "__main__":
    main()
