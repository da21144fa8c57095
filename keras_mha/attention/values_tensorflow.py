"""Values of TensorFlow's tensors that are known before a graph runs."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from keras_mha.typing import Tensor


def known_values(tensor: Tensor) -> np.ndarray | None:
    """Returns the values of an eager tensor or a graph's constant, or else `None`."""
    return tf.get_static_value(tensor)
