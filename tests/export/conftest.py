"""Fixtures that several tests of the exports share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import numpy as np

    from tests.support.gpu_runs import Answers

# TensorFlow is imported late: ../conftest.py sets its environment first.


@pytest.fixture(scope="module")
def driver() -> str:
    from keras_mha.export.runtimes import litert_gpu

    try:
        return str(litert_gpu.find_software_driver())
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def answers(tmp_path: Path, driver: str) -> Callable[..., Answers]:
    """Converts a function and runs it on LiteRT's CPU and GPU."""
    del driver  # skips where there is none
    import tensorflow as tf

    from tests.support.gpu_runs import run_on_both
    from tests.support.tflite_files import convert

    def convert_and_run(function: Callable[..., Any], **case: np.ndarray) -> Answers:
        path = tmp_path / "model.tflite"
        inputs = {
            name: (array.shape, tf.as_dtype(array.dtype))
            for name, array in case.items()
        }
        path.write_bytes(convert(function, inputs))
        return run_on_both(path, **case)

    return convert_and_run
