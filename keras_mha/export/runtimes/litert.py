"""Runs a TFLite file in ai-edge-litert's interpreter on the CPU.

Stand-alone: ai_edge_litert and NumPy, no import of tensorflow.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np


def run(
    path: str,
    cases: Sequence[Mapping[str, np.ndarray]],
    *,
    signature_name: str,
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """Runs every case on the signature `signature_name` of the file at `path`.

    Returns:
        The arrays by output name for each case, and facts about the runtime.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path, num_threads=1)
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


def _count_partitions(interpreter: Any) -> int | None:
    """Counts delegate calls in the execution plan; the API for it is private."""
    details = getattr(interpreter, "_get_ops_details", None)
    if details is None:
        return None
    return sum(op["op_name"] == "DELEGATE" for op in details())
