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

import numpy as np


def run(
    path: str,
    cases: Sequence[Mapping[str, np.ndarray]],
    *,
    signature_name: str,
    registrar: Sequence[str] = (),
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """Runs every case on the signature `signature_name` of the file at `path`.

    Args:
        path: The file.
        cases: Arrays by input name, for each run.
        signature_name: The signature's name.
        registrar: The shared library that registers tensorflow-text's operations,
            after those that it needs; none for a file of builtin operations.

    Returns:
        The arrays by output name for each case, and facts about the runtime.
    """
    interpreter = _interpreter(path, registrar)
    endpoint = interpreter.get_signature_runner(signature_name)
    answers = [
        {name: np.array(array) for name, array in endpoint(**case).items()}
        for case in cases
    ]
    facts = {
        "runtime": "LiteRT interpreter, CPU",
        "version": version("ai-edge-litert"),
        "machine": platform.machine(),
        "delegate_partitions": _count_partitions(interpreter),
    }
    return answers, facts


def _interpreter(path: str, registrar: Sequence[str]) -> Any:
    from ai_edge_litert.interpreter import Interpreter, InterpreterWithCustomOps

    if not registrar:
        return Interpreter(model_path=path, num_threads=1)
    *needed, library = registrar
    for other in needed:
        ctypes.CDLL(other, mode=ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location(Path(library).stem, library)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{library} is no Python module")
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
