"""Bare ONNX Runtime: import, load the graph, run it once, say so. `bare_runtime.py MODEL.onnx [THREADS]`."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort

options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2]) if len(sys.argv) > 2 else 0
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
(taken,) = session.get_inputs()
picture = np.random.default_rng(1).standard_normal((1, *taken.shape[1:]), np.float32)
(answer,) = session.run(None, {taken.name: picture})
print(answer.shape, flush=True)
