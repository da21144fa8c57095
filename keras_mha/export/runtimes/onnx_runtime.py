"""Runs an ONNX file in ONNX Runtime on the CPU.

Stand-alone: onnxruntime and NumPy, no import of tensorflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def run(
    path: str, cases: Sequence[Mapping[str, np.ndarray]]
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """Runs every case on the file at `path`.

    Returns:
        The arrays by output name for each case, and facts about the runtime.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    answers = [
        dict(zip(names, session.run(names, dict(case)), strict=True)) for case in cases
    ]
    facts = {
        "runtime": "ONNX Runtime, CPU",
        "version": onnxruntime.__version__,
        "outputs": [[o.name, o.shape] for o in session.get_outputs()],
    }
    return answers, facts
