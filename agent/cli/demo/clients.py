"""Clients that keep asking, each on its own channel, in a process of their own.

    python -m agent.cli.demo.clients FOLDER ADDRESS COUNT

They send the pictures in FOLDER one after the other until standard input ends. On standard output, a line for each few
answers: a list of `Answered` as lists. How far an answer is from what each model would say is measured here; what that
means is judged elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.cli.demo.judge import Answered
from agent.cli.demo.pictures import read_expected, read_pictures
from agent.errors import InvalidInput, SlotdError, Unavailable

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

METHOD = "/tensorflow.serving.PredictionService/Predict"
TIMEOUT = 20.0
_CONNECT = 10.0
_PAUSE = 0.05
_TELL = 0.1
_REPLY = 1 << 20


class Clients:
    """All of them."""

    def __init__(self, requests: Sequence[bytes], expected: npt.NDArray[np.float32]) -> None:
        self._requests = requests
        self._expected = expected
        self._answers: list[Answered] = []
        self._stop = asyncio.Event()

    async def run(self, address: str, count: int) -> None:
        """Until standard input ends."""
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), self._stdin_ends)
        clients = asyncio.gather(*(self._client(address, number) for number in range(count)))
        while not clients.done():
            await asyncio.wait((clients,), timeout=_TELL)
            self._tell()
        await clients

    def _stdin_ends(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._stop.set()

    def _tell(self) -> None:
        answers, self._answers = self._answers, []
        if answers:
            print(json.dumps([tuple(answer) for answer in answers]), flush=True)

    async def _client(self, address: str, number: int) -> None:
        import grpc

        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each, as separate programs have it
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            try:
                await asyncio.wait_for(channel.channel_ready(), _CONNECT)
            except TimeoutError:
                raise Unavailable(f"nobody answers at {address}") from None
            predict = channel.unary_unary(METHOD)
            picture = number
            while not self._stop.is_set():
                picture = (picture + 1) % len(self._requests)
                answer = await self._ask(predict, number, picture)
                self._answers.append(answer)
                if answer.error is not None:
                    await asyncio.sleep(_PAUSE)

    async def _ask(self, predict: Any, client: int, picture: int) -> Answered:
        import grpc

        began = time.monotonic()
        try:
            call = predict(self._requests[picture], timeout=TIMEOUT)
            reply = await call
            ended = time.monotonic()
            told = {key: value for key, value in await call.trailing_metadata() or () if isinstance(value, str)}
        except grpc.RpcError as error:
            why = f"{error.code().name}: {error.details()}"
            return Answered(client, picture, began, time.monotonic(), "", "", [], why)
        return Answered(
            client,
            picture,
            began,
            ended,
            told.get("slotd-served-by", ""),
            told.get("slotd-model-digest", ""),
            self._distances(reply, picture),
            None,
        )

    def _distances(self, reply: bytes, picture: int) -> list[float]:
        """Largest error against what each model says of the picture; empty if it is not even of that shape."""
        from agent.serving.protos import PredictResponse
        from agent.serving.tensorproto import read_tensor

        outputs = PredictResponse.FromString(reply).outputs
        if len(outputs) != 1:
            return []
        ((name, proto),) = outputs.items()
        try:
            found = read_tensor(name, proto, most=_REPLY)
        except InvalidInput:
            return []
        expected = self._expected[picture]
        if not isinstance(found, np.ndarray) or found.shape != (1, expected.shape[1]):
            return []
        return [float(error) for error in np.abs(expected - found).max(axis=1)]


def make_request(name: str, data: bytes) -> bytes:
    """A PredictRequest for one picture, as it goes over the wire."""
    from agent.serving.protos import PredictRequest

    request = PredictRequest()
    tensor = request.inputs[name]
    tensor.dtype = 7
    tensor.tensor_shape.dim.add(size=1)
    tensor.string_val.append(data)
    encoded: bytes = request.SerializeToString()
    return encoded


def main() -> int:
    """The process."""
    folder = Path(sys.argv[1])
    name, pictures = read_pictures(folder)
    requests = [make_request(name, data) for data in pictures.values()]
    try:
        asyncio.run(Clients(requests, read_expected(folder)).run(sys.argv[2], int(sys.argv[3])))
    except SlotdError as error:
        print(error, file=sys.stderr)
        return error.exit
    return 0


if __name__ == "__main__":
    sys.exit(main())
