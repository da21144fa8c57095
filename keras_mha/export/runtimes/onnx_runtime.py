"""Runs an ONNX file in ONNX Runtime on the CPU.

Stand-alone: onnxruntime.
"""

from __future__ import annotations

from typing import Any

from .descriptor import Arrays, Loaded, Runtime


def load(path: str) -> Loaded:
    """Loads the file at `path`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    outputs = session.get_outputs()
    names = [output.name for output in outputs]

    def answer(case: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, dict(case)), strict=True))

    def facts() -> dict[str, Any]:
        return {
            "version": onnxruntime.__version__,
            "outputs": [[output.name, output.shape] for output in outputs],
        }

    return answer, facts


RUNTIME = Runtime(
    "onnx_runtime",
    "ONNX Runtime, CPU",
    ("onnx",),
    {"onnxruntime": "onnx"},
    blocked=("keras_mha", "keras", "tensorflow", "tensorflow_text", "tf2onnx"),
)
