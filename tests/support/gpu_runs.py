"""The same file on LiteRT's CPU and on its GPU delegate, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_mha.export.runtimes.fresh_process import run_in_fresh_process

BLOCKED = ("keras_mha", "keras", "tensorflow")


class Answers(NamedTuple):
    cpu: np.ndarray
    gpu: np.ndarray
    facts: dict[str, Any]

    @property
    def difference(self) -> float:
        """The largest, relative to the largest value."""
        cpu = self.cpu.astype(np.float64)
        return float(np.max(np.abs(self.gpu - cpu)) / max(np.max(np.abs(cpu)), 1.0))


def run_on_both(path: Path, driver: str, **case: np.ndarray) -> Answers:
    def run(runtime: str, **options: str) -> tuple[np.ndarray, dict[str, Any]]:
        (answer,), facts = run_in_fresh_process(
            runtime,
            path,
            [case],
            blocked=BLOCKED,
            options={"signature_name": "serving_default", **options},
            timeout=120.0,
        )
        return answer["y"], facts

    cpu, _ = run("litert")
    gpu, facts = run("litert_gpu", driver=driver)
    return Answers(cpu, gpu, facts)
