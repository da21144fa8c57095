"""Runs a SavedModel or an ONNX file in OpenVINO on the CPU, in float32.

Stand-alone: openvino and NumPy, no import of tensorflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .descriptor import Arrays, File, Loaded, Runtime

_OPTIONS = {
    # Processors with bfloat16 compute in it by default.
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
}


def load(path: str, *, outputs: Sequence[str]) -> Loaded:
    """Loads the file at `path`.

    Args:
        path: A SavedModel's directory or an ONNX file.
        outputs: Names of the outputs.
    """
    import numpy as np
    import openvino

    core: Any = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", _OPTIONS)
    request = compiled.create_infer_request()

    def answer(case: Arrays) -> Arrays:
        request.infer(dict(case))
        return {name: np.array(request.get_tensor(name).data) for name in outputs}

    def facts() -> dict[str, Any]:
        # What follows the version names the build.
        return {"version": openvino.__version__.partition("-")[0]}

    return answer, facts


def _options(file: File) -> Mapping[str, Any]:
    return {"outputs": list(file.outputs)}


# It takes no strings, not even with openvino-tokenizers: 2026.4 has no rule for the
# operations FastBertNormalize and FastWordpieceTokenizeWithOffsets.
RUNTIME = Runtime(
    "openvino_runtime",
    "OpenVINO, CPU",
    ("saved_model", "onnx"),
    {"openvino": "openvino"},
    options=_options,
)
