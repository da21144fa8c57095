"""Dropout that hits the same positions in eager, graph and XLA execution.

Floating random numbers of the same seed differ between TensorFlow's kernels and
XLA's; the integer bits below them do not. So integers are drawn and compared with
a threshold.

Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks
from overfitting".
"""

from __future__ import annotations

import keras
from keras import ops

from keras_mha.typing import Tensor

_RANGE = 1 << 30  # a power of two: drawing from it is unbiased


class _DrawnSeed(keras.random.SeedGenerator):
    """Hands a seed that was already drawn to `keras.random`.

    `keras.random` takes a generator or a Python integer, never a tensor, yet a
    compiled function must get its seed as an argument: one read inside would be
    frozen into the trace.
    """

    def __init__(self, seed: Tensor) -> None:
        self._seed = seed

    def next(self, ordered: bool = True) -> Tensor:
        del ordered  # there is one seed to hand out
        return self._seed


def check_rate(rate: float, name: str) -> float:
    """Returns `rate` as a float if it is a probability below one.

    Raises:
        ValueError: If `rate` is not a number with `0 <= rate < 1`.
    """
    number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not number or not 0 <= rate < 1:
        raise ValueError(
            f"`{name}` must be a number with 0 <= {name} < 1. Received: {name}={rate}"
        )
    return float(rate)


def dropout(
    inputs: Tensor, rate: float, seed: Tensor, noise_shape: Tensor | None = None
) -> Tensor:
    """Zeroes a share `rate` of `inputs` and scales the rest by `1 / (1 - rate)`.

    Args:
        inputs: Floating tensor of any shape.
        rate: Probability of dropping, `0 < rate < 1`.
        seed: Seed tensor `(2,)`, as `keras.random.SeedGenerator.next()` gives it.
        noise_shape: Shape of the decisions, broadcast to `inputs`. Defaults to
            the shape of `inputs`: every element decides for itself.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_mha.attention.dropout import dropout
    >>> seed = keras.random.SeedGenerator(7).next()
    >>> sorted(set(np.asarray(dropout(np.ones(100), 0.5, seed)).tolist()))
    [0.0, 2.0]
    """
    shape = ops.shape(inputs) if noise_shape is None else noise_shape
    drawn = keras.random.randint(shape, 0, _RANGE, seed=_DrawnSeed(seed))
    kept = drawn >= round(rate * _RANGE)
    return ops.where(kept, inputs * (1.0 / (1.0 - rate)), ops.zeros_like(inputs))
