"""Runs a TFLite file in ai-edge-litert's interpreter on the CPU.

Stand-alone: ai_edge_litert and NumPy, no import of tensorflow. The operations of
tensorflow-text are taken from its shared library, and that package is not imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .descriptor import Arrays, File, Loaded, Runtime


def load(path: str, *, signature_name: str, registrar: Sequence[str] = ()) -> Loaded:
    """Loads the signature `signature_name` of the file at `path`.

    Args:
        path: The file.
        signature_name: The signature's name.
        registrar: What `registrar` returns; empty for a file of builtin operations.
    """
    import numpy as np

    interpreter = _interpreter(path, registrar)
    endpoint = interpreter.get_signature_runner(signature_name)

    def answer(case: Arrays) -> Arrays:
        return {name: np.array(array) for name, array in endpoint(**case).items()}

    def facts() -> dict[str, Any]:
        return {
            "version": version("ai-edge-litert"),
            "machine": platform.machine(),
            "delegate_partitions": _count_partitions(interpreter),
        }

    return answer, facts


def registrar() -> tuple[str, ...]:
    """Finds the libraries that register tensorflow-text's operations.

    Returns:
        Their paths in loading order; the last is the one that registers.

    Raises:
        FileNotFoundError: If tensorflow-text is not installed, or without them.
    """
    paths = (
        _folder("tensorflow") / "libtensorflow_framework.so.2",
        _folder("tensorflow_text") / "core" / "pybinds" / "tflite_registrar.so",
    )
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                "A file that takes strings needs tensorflow-text for Linux, of which "
                f"{path.name} is missing: pip install 'keras-mha[text]'"
            )
    return tuple(map(str, paths))


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else Path(package)


def options(file: File) -> Mapping[str, Any]:
    """Returns the keyword arguments of `load` for a file."""
    return {
        "signature_name": file.signature_name,
        "registrar": registrar() if file.kind == "tflite/text" else (),
    }


def _interpreter(path: str, registrar: Sequence[str]) -> Any:
    from ai_edge_litert.interpreter import Interpreter, InterpreterWithCustomOps

    if not registrar:
        return Interpreter(model_path=path, num_threads=1)
    *needed, library = registrar
    for other in needed:
        ctypes.CDLL(other, mode=ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location(Path(library).stem, library)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{library} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # `tensorflow_text` calls the list of all of them SELECT_TFTEXT_OPS.
    operations = [getattr(module, n) for n in dir(module) if n.startswith("Add")]
    return InterpreterWithCustomOps(
        custom_op_registerers=operations, model_path=path, num_threads=1
    )


def _count_partitions(interpreter: Any) -> int | None:
    """Counts delegate calls in the execution plan; the API for it is private."""
    details = getattr(interpreter, "_get_ops_details", None)
    if details is None:
        return None
    return sum(op["op_name"] == "DELEGATE" for op in details())


RUNTIME = Runtime(
    "litert",
    "LiteRT interpreter, CPU",
    ("tflite", "tflite/text"),
    {"ai_edge_litert": "tflite"},
    options=options,
    takes_text=True,
)
