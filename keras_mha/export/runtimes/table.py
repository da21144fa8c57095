"""The runtimes that `verify` knows. To add one, write its file and add its line here.

Stand-alone: the standard library.
"""

from __future__ import annotations

from importlib import import_module

from .descriptor import Runtime

# The name that users write, and the file.
_FILES = {
    "saved_model": "cpp_loader",
    "openvino": "openvino_runtime",
    "litert": "litert",
    "litert_gpu": "litert_gpu",
    "litert_arm": "litert_arm",
    "mediapipe": "mediapipe_text",
    "onnx_runtime": "onnx_runtime",
}

RUNTIMES: dict[str, Runtime] = {
    name: import_module(f".{file}", __package__).RUNTIME
    for name, file in _FILES.items()
}
