"""Runs a SavedModel in TensorFlow's Python loader, where there is no C++ one.

Weaker than `cpp_loader`: it does not restore variables the way TF Serving does
and leaves XLA on. Stand-alone: tensorflow and NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def run(
    path: str,
    cases: Sequence[Mapping[str, np.ndarray]],
    *,
    outputs: Sequence[str],
    operations: Sequence[str],
    operation_libraries: Sequence[str],
    signature_name: str = "serving_default",
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """Runs every case on the SavedModel at `path`; see `cpp_loader.run`."""
    import tensorflow as tf
    from tensorflow.python.framework import op_def_registry

    def unregistered() -> list[str]:
        return [name for name in operations if op_def_registry.get(name) is None]

    custom = unregistered()
    for library in operation_libraries:
        if not unregistered():
            break
        tf.load_op_library(library)
    if unregistered():
        raise RuntimeError(
            f"No library at hand registers the operations {unregistered()}"
        )
    endpoint = tf.saved_model.load(path).signatures[signature_name]
    answers = []
    for case in cases:
        given = {name: tf.constant(array) for name, array in case.items()}
        results = endpoint(**given)
        answers.append({name: _to_array(results[name]) for name in outputs})
    facts = {
        "runtime": "TensorFlow Python loader",
        "version": tf.__version__,
        "custom_operations": custom,
    }
    return answers, facts


def _to_array(tensor: Any) -> np.ndarray:
    import tensorflow as tf

    if tensor.dtype == tf.bfloat16:  # NumPy has none: widen, which is exact
        tensor = tf.cast(tensor, tf.float32)
    return np.asarray(tensor.numpy())
