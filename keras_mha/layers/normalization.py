"""A normalization that keeps masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from typing_extensions import override

from keras_mha.typing import Shape


@keras.saving.register_keras_serializable(package="keras_mha")
class RMSNormalization(keras.layers.RMSNormalization):
    """Divides by the root mean square of the features; the outputs carry the mask.

    It is `keras.layers.RMSNormalization`, which loses the mask of its inputs: pooling
    and attention after it would then count padding. Put this one after the last of a
    stack of `"pre"` blocks.

    Source: Zhang and Sennrich 2019, "Root mean square layer normalization".

    Letters: B batch, D model width.

    Args:
        axis: The axis, or axes, of the mean.
        epsilon: Added to the mean square.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        x: Floating `(B, ..., D)`.

    Returns:
        A tensor of the shape of `x`, with its mask.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_mha
    >>> ids = keras.Input((None,), dtype="int32")
    >>> vectors = keras.layers.Embedding(9, 4, mask_zero=True)(ids)
    >>> normalized = keras_mha.RMSNormalization()(vectors)
    >>> model = keras.Model(ids, keras.layers.GlobalAveragePooling1D()(normalized))
    >>> bool(np.allclose(model(np.array([[5, 0, 0]])), model(np.array([[5]]))))
    True
    """

    def __init__(
        self, axis: int | Sequence[int] = -1, epsilon: float = 1e-6, **kwargs: Any
    ) -> None:
        axes: Any = axis  # Keras takes several, too
        super().__init__(axis=axes, epsilon=epsilon, **kwargs)
        self.supports_masking = True

    @override
    def build(self, input_shape: Shape) -> None:
        # As in Keras, which would replace `axis` by a list.
        axes = [self.axis] if isinstance(self.axis, int) else sorted(self.axis)
        shape = tuple(input_shape[axis] for axis in axes)
        self.scale = self.add_weight(name="scale", shape=shape, initializer="ones")
