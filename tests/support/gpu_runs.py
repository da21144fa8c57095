"""The same file on LiteRT's CPU and on its GPU delegate, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_mha.export.runtimes import litert, litert_gpu
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.runtimes.fresh_process import run_in_fresh_process


class Answers(NamedTuple):
    cpu: np.ndarray
    gpu: np.ndarray
    facts: dict[str, Any]

    @property
    def difference(self) -> float:
        """The largest, relative to the largest value."""
        cpu = self.cpu.astype(np.float64)
        return float(np.max(np.abs(self.gpu - cpu)) / max(np.max(np.abs(cpu)), 1.0))


def run_on_both(path: Path, **case: np.ndarray) -> Answers:
    file = File(path, "tflite")
    (on_cpu,), _ = run_in_fresh_process(litert.RUNTIME, file, [case], timeout=120.0)
    (on_gpu,), facts = run_in_fresh_process(
        litert_gpu.RUNTIME, file, [case], timeout=120.0
    )
    return Answers(on_cpu["y"], on_gpu["y"], facts)
