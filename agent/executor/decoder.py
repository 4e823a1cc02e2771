"""A decoder: pictures in, one tensor out, in memory that executors map."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.errors import InvalidInput
from agent.executor.child import Job, OneByOne
from agent.executor.stages.image import prepare
from agent.model.signature import DType, Strings
from agent.model.spec import ImageStage


class Decoder(OneByOne):
    """Input 0: n pictures as strings. Output 0: float32 [n, height, width, 3], or [n, 3, height, width]."""

    def __init__(self, hello: dict[str, Any]) -> None:
        self._stage = ImageStage.model_validate(hello["image"])
        self._timeout: float = hello["call_timeout"]
        height, width = self._stage.size
        self._shape = (height, width, 3) if self._stage.layout == "NHWC" else (3, height, width)

    @property
    def ready(self) -> dict[str, Any]:
        return {"shape": list(self._shape)}

    def begin(self, job: Job) -> None:
        """Decode all pictures of the job; the first that is wrong ends it."""
        pictures = job.inputs.get(0)
        if not isinstance(pictures, Strings):
            raise InvalidInput("must be pictures, as strings", field=self._stage.source)
        out = job.room(0, DType.FLOAT32, (len(pictures.items), *self._shape))
        job.start()
        # A decoder in native code cannot be told to end: past this the kernel ends the process.
        signal.setitimer(signal.ITIMER_REAL, self._timeout)
        try:
            self._decode(job, pictures, out)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        job.answer([out])

    def _decode(self, job: Job, pictures: Strings, out: npt.NDArray[np.generic]) -> None:
        for place, item in enumerate(pictures.items):
            job.on_time()
            try:
                prepare(self._stage, item, out[place])
            except InvalidInput as error:
                if len(pictures.items) > 1:
                    error.message = f"picture {place}: {error.message}"
                raise
