"""ONNX Runtime on the CPU: the only module that makes sessions."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Read at the import, which else leaves a file in the temporary folder, and may call home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from agent.errors import ExecutorError, InvalidInput, InvalidModel
from agent.executor.graph import has_external_weights
from agent.model.signature import DType, Strings, Tensor, TensorSpec
from drivers.base import Numerics

_MEMORY = re.compile(
    r"bad_alloc|bad allocation|failed to allocate|allocate memory|out of memory|std::length_error", re.I
)
_INPUT = re.compile(
    r"INVALID_ARGUMENT|shape|dimension|rank|broadcast|out of (data )?bounds|element type|data type|indices", re.I
)
_DTYPES = {
    "tensor(float)": DType.FLOAT32,
    "tensor(double)": DType.FLOAT64,
    **{f"tensor({dtype.value})": dtype for dtype in DType if dtype not in (DType.FLOAT32, DType.FLOAT64)},
}
_HARD = 5.0
"""Seconds that a run may go on after it was told to end."""
ort.set_default_logger_severity(3)


class Session:
    """One graph, loaded. `run` is called by one thread at a time."""

    def __init__(self, session: Any, path: Path, call_timeout: float | None) -> None:
        self.inputs = [_spec(path, node) for node in session.get_inputs()]
        self.outputs = [_spec(path, node) for node in session.get_outputs()]
        self._session = session
        self._path = path
        self._names = [spec.name for spec in self.outputs]
        self._dtypes = {spec.name: spec.dtype for spec in self.inputs}
        self._limit = _Limit(call_timeout) if call_timeout else None

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by the graph's names.

        Raises InvalidInput for shapes and types that the graph does not take, ExecutorError: OUT_OF_MEMORY,
        CALL_TIMEOUT, EXECUTOR_FAILED.
        """
        values = {name: _to_ort(name, tensor) for name, tensor in feeds.items()}
        for name, value in values.items():
            wanted = self._dtypes.get(name)
            if wanted is not None and wanted is not DType.STRING and value.dtype != wanted.numpy:
                raise InvalidInput(f"is {value.dtype}, the graph takes {wanted.value}", field=name)
        options = ort.RunOptions()
        options.log_severity_level = 4  # what fails is raised, it need not be written too
        try:
            if self._limit is None:
                results = self._session.run(self._names, values, options)
            else:
                with self._limit.around(options):
                    results = self._session.run(self._names, values, options)
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime has a class for each status; all derive from Exception alone
            raise self._fault(error, options) from None
        return {name: _from_ort(value) for name, value in zip(self._names, results, strict=True)}

    def compute(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        """`run` for a simulated slot: numbers only."""
        outputs: dict[str, npt.NDArray[np.generic]] = {}
        for name, value in self.run(arrays).items():
            if isinstance(value, Strings):
                raise InvalidModel(f"output {name!r} is of strings, which a slot cannot compute", field=self._path.name)
            outputs[name] = value
        return outputs

    def _fault(self, error: Exception, options: Any) -> Exception:
        text = _words(error)
        if options.terminate:
            assert self._limit is not None
            return ExecutorError(
                f"the graph ran longer than {self._limit.seconds:g} s", code="CALL_TIMEOUT", field=self._path.name
            )
        if _MEMORY.search(text):
            return ExecutorError(text, code="OUT_OF_MEMORY", hint="executor.memory limits what a child may use")
        if _INPUT.search(text):
            return InvalidInput(text)
        return ExecutorError(text, field=self._path.name)


class _Limit:
    """Ends a run that takes too long; if it cannot be ended, the process. One thread, which sleeps between runs."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until = 0.0
        self._options: Any = None
        self._armed = threading.Event()
        threading.Thread(target=self._watch, name="call-timeout", daemon=True).start()

    def around(self, options: Any) -> _Limit:
        """For `with`: the run inside is ended by its `options`."""
        self._until = time.monotonic() + self.seconds
        self._options = options
        if not self._armed.is_set():
            self._armed.set()
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._options = None

    def _watch(self) -> None:
        while True:
            options, left = self._options, self._until - time.monotonic()
            if options is None:
                self._armed.clear()
                if self._options is None:
                    self._armed.wait()
            elif left > 0:
                time.sleep(left)
            elif not options.terminate:
                options.terminate = True
            elif left < -_HARD:
                print(f"a run did not end {_HARD:g} s after it was told to", file=sys.stderr, flush=True)
                os._exit(75)
            else:
                time.sleep(0.1)


def open_session(
    path: Path, *, threads: int, numerics: Numerics | None = None, call_timeout: float | None = None
) -> Session:
    """Load a graph on the CPU. External data is only taken from the graph's own folder (ONNX Runtime sees to it).

    `numerics`: the arithmetic to compute with. `call_timeout` in seconds bounds every run. Raises InvalidModel naming
    the file, ExecutorError: OUT_OF_MEMORY, NUMERICS_UNSUPPORTED.
    """
    if numerics is not None and not numerics.exact:
        raise ExecutorError(f"the CPU cannot compute as {numerics.name} does", code="NUMERICS_UNSUPPORTED")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if has_external_weights(path):
        # Mapped as they are, the weights' pages are shared by all executors of a model, and loading takes a tenth.
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime has a class for each status; all derive from Exception alone
        text = _words(error)
        if _MEMORY.search(text):
            raise ExecutorError(
                text, code="OUT_OF_MEMORY", field=path.name, hint="executor.memory limits what a child may use"
            ) from None
        raise InvalidModel(f"cannot be loaded: {text}", field=path.name) from None
    return Session(session, path, call_timeout)


def _spec(path: Path, node: Any) -> TensorSpec:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise InvalidModel(f"{node.name!r} is a {node.type}, which slotd does not carry", field=path.name)
    return TensorSpec(node.name, dtype, tuple(size if isinstance(size, int) else -1 for size in node.shape))


def _to_ort(name: str, tensor: Tensor) -> npt.NDArray[np.generic]:
    if not isinstance(tensor, Strings):
        return tensor
    values = np.empty(len(tensor.items), object)
    try:
        values[:] = [item.decode() for item in tensor.items]
    except UnicodeDecodeError:
        raise InvalidInput("has strings that are not UTF-8, which ONNX requires", field=name) from None
    return values.reshape(tensor.shape)


def _from_ort(value: Any) -> Tensor:
    if not isinstance(value, np.ndarray):
        raise ExecutorError(f"the graph made a {type(value).__name__} in the place of a tensor")
    if value.dtype.kind in "OUS":
        items = [item if isinstance(item, bytes) else str(item).encode() for item in value.reshape(-1)]
        return Strings(value.shape, items)
    return value


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", text) or type(error).__name__
