"""Dropout as a layer, for models made of several layers."""

from __future__ import annotations

from typing import Any

import keras
from typing_extensions import override

from keras_mha.attention.dropout import check_rate, dropout
from keras_mha.layers.arguments import check_seed
from keras_mha.layers.seeded_layer import SeededLayer
from keras_mha.typing import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_mha")
class Dropout(SeededLayer):
    """Drops a share of its inputs in training, and scales up the rest.

    Unlike `keras.layers.Dropout` it drops the same positions in eager, graph and XLA
    execution, and under `keras.RematScope` in both runs of a call.

    Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks
    from overfitting".

    Args:
        rate: Share that is dropped, `0 <= rate < 1`.
        seed: Integer seed.
        **kwargs: Arguments of `keras.layers.Layer`, such as `name` and `dtype`.

    Call arguments:
        inputs: A floating tensor.
        training: Whether dropout is active.

    Returns:
        A tensor of the shape of `inputs`.

    Raises:
        ValueError: If an argument is out of its domain.

    Example:

    >>> import numpy as np
    >>> from keras_mha.layers.dropout import Dropout
    >>> outputs = Dropout(0.5, seed=1)(np.ones((2, 50), "float32"), training=True)
    >>> sorted({float(value) for value in np.ravel(outputs)})
    [0.0, 2.0]
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.rate = check_rate(rate, "rate")
        self.seed = check_seed(seed)
        if self.rate > 0:
            self._add_generator(self.seed)

    @override
    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}

    @override
    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        if not training or self.rate == 0:
            return inputs
        return dropout(inputs, self.rate, self._draw_seed())

    @override
    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape
