"""Runs a SavedModel or an ONNX file in OpenVINO on the CPU, in float32.

Stand-alone: openvino and NumPy, no import of tensorflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_OPTIONS = {
    # Processors with bfloat16 compute in it by default.
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
}


def run(
    path: str, cases: Sequence[Mapping[str, np.ndarray]], *, outputs: Sequence[str]
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """Runs every case on the file at `path`.

    Args:
        path: A SavedModel's directory or an ONNX file.
        cases: Arrays by input name, for each run.
        outputs: Names of the outputs.

    Returns:
        The arrays by output name for each case, and facts about the runtime.
    """
    import openvino

    core: Any = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", _OPTIONS)
    request = compiled.create_infer_request()
    answers = []
    for case in cases:
        request.infer(dict(case))
        answers.append(
            {name: np.array(request.get_tensor(name).data) for name in outputs}
        )
    version = openvino.__version__.partition("-")[0]  # the rest names the build
    facts = {"runtime": "OpenVINO, CPU", "version": version}
    return answers, facts
