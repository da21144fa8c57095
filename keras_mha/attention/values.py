"""Values of tensors that are known before anything runs."""

from __future__ import annotations

import numpy as np
from keras import KerasTensor, backend, ops

from keras_mha.typing import Tensor


def known_values(tensor: Tensor) -> np.ndarray | None:
    """Returns what a tensor holds, or `None` where that is not known yet.

    Example:

    >>> import keras
    >>> from keras_mha.attention.values import known_values
    >>> known_values(keras.ops.arange(3)), known_values(keras.Input((3,)))
    (array([0, 1, 2], dtype=int32), None)
    """
    if isinstance(tensor, KerasTensor):
        return None
    if isinstance(tensor, np.ndarray):
        return tensor
    if backend.backend() == "tensorflow":
        from keras_mha.attention import values_tensorflow

        return values_tensorflow.known_values(tensor)
    try:
        return np.asarray(ops.convert_to_numpy(tensor))
    except (TypeError, RuntimeError):  # it is being traced
        return None
