"""Dropout that hits the same positions in eager, graph and XLA execution.

Floating random numbers of the same seed differ between TensorFlow's kernels and
XLA's; the integer bits below them do not. So integers are drawn and compared with
a threshold.

Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks
from overfitting".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_mha.attention.numeric import plain_integer, plain_number
from keras_mha.typing import Tensor

_RANGE = 1 << 30  # a power of two: drawing from it is unbiased
# torch has no arithmetic on unsigned 32-bit integers
_IS_TORCH = keras.config.backend() == "torch"
_WORD = "int64" if _IS_TORCH else "uint32"
_SEED = "int32" if _IS_TORCH else "uint32"


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


def as_seed(seed: Any) -> Tensor:
    """Returns a seed tensor `(2,)` from an integer, a generator or such a tensor.

    Raises:
        TypeError: If `seed` is none of them.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.dropout import as_seed
    >>> np.asarray(as_seed(7)).tolist()
    [7, 0]
    """
    if isinstance(seed, keras.random.SeedGenerator):
        return seed.next()
    number = plain_integer(seed)
    if number is not None:
        return ops.convert_to_tensor([number % 2**31, 0], dtype=_SEED)
    if len(getattr(seed, "shape", ())) == 1:
        return seed
    raise TypeError(
        "`seed` must be an integer, a `keras.random.SeedGenerator` or a seed tensor "
        f"(2,). Received: seed={seed!r}"
    )


def check_rate(rate: float, name: str) -> float:
    """Returns `rate` as a float if it is a probability below one.

    Raises:
        ValueError: If `rate` is not a number with `0 <= rate < 1`.
    """
    number = plain_number(rate)
    if number is None or not 0 <= number < 1:
        raise ValueError(
            f"`{name}` must be a number with 0 <= {name} < 1. Received: {name}={rate}"
        )
    return number


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


class PairNoise(NamedTuple):
    """Random integers from which each pair's decision is computed.

    Linear memory: what falls on a block of the table is computed from its rows and
    columns, in whatever order the blocks come.

    Attributes:
        rows: Unsigned 32-bit numbers `(B, N, T)`.
        columns: Likewise, `(S,)`.
    """

    rows: Tensor
    columns: Tensor


def draw_pair_noise(
    seed: Tensor, heads_shape: tuple[Any, Any, Any], key_length: Tensor
) -> PairNoise:
    """Draws what decides on the pairs of one attention call.

    Args:
        seed: Seed tensor `(2,)`.
        heads_shape: `(B, N, T)`.
        key_length: S, an int or an integer scalar tensor.
    """
    batch, heads, length = heads_shape
    count = batch * heads * length
    drawn = keras.random.randint(
        (count + key_length,), 0, _RANGE, seed=_DrawnSeed(seed)
    )
    drawn = ops.cast(drawn, _WORD)
    return PairNoise(ops.reshape(drawn[:count], heads_shape), drawn[count:])


def keep_pairs(noise: PairNoise, rate: float) -> Tensor:
    """Which pairs stay, `(B, N, T, S)` boolean, each with probability `1 - rate`.

    A row's number plus a column's is mixed until its upper bits depend on all of
    both, and compared with a threshold. Only integer arithmetic, so every backend
    and compiler comes to the same decisions.

    Source: the mixing is the first two rounds of `lowbias32` (Wellons 2018, "Hash
    function prospector").

    Args:
        noise: Numbers of the rows and columns wanted, of one block say.
        rate: Probability of dropping, `0 < rate < 1`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_mha.attention.dropout import draw_pair_noise, keep_pairs
    >>> seed = keras.random.SeedGenerator(7).next()
    >>> kept = np.asarray(keep_pairs(draw_pair_noise(seed, (2, 3, 50), 70), 0.25))
    >>> kept.shape, bool(abs(kept.mean() - 0.75) < 0.01)
    ((2, 3, 50, 70), True)
    """
    mixed = _wrap(ops.expand_dims(noise.rows, -1) + noise.columns)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        shifted = ops.right_shift(mixed, _word(shift))
        mixed = _wrap(ops.bitwise_xor(mixed, shifted) * _word(factor))
    return ops.greater_equal(mixed, _word(round(rate * 2**32)))


def _word(number: int) -> Tensor:
    return ops.convert_to_tensor(number, dtype=_WORD)


def _wrap(number: Tensor) -> Tensor:
    """The lower 32 bits, which unsigned 32-bit arithmetic keeps by itself."""
    return number if _WORD == "uint32" else ops.bitwise_and(number, _word(2**32 - 1))
