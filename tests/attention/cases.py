"""Heads and masks on which every implementation of attention is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mha.attention.masks import Mask
from tests import reference as oracle

B, T, S, N, H, V = 2, 5, 7, 3, 11, 13
QUERY_PADDING = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
KEY_PADDING = np.array([[1, 1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]], bool)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def heads(
    query_length: int = T, key_length: int = S, scale: float = 1.0, batch: int = B
) -> list[np.ndarray]:
    """Queries, keys and values of unequal sizes."""
    return [
        scale * draw(batch, query_length, N, H, seed=1),
        scale * draw(batch, key_length, N, H, seed=2),
        draw(batch, key_length, N, V, seed=3),
    ]


def pairs(*shape: int) -> np.ndarray:
    """A random mask that hides about half, never a whole row."""
    visible = np.random.default_rng(4).random(shape) < 0.5
    visible[..., 0] |= ~visible.any(axis=-1)
    return visible


# Every query that is not padding sees a key: portable's domain.
FULL_ROWS = {
    "none": Mask(),
    "causal": Mask(is_causal=True),
    "window": Mask(sliding_window=2, pairs=None),
    "causal window": Mask(is_causal=True, sliding_window=3),
    "keys": Mask(key_padding=KEY_PADDING),
    "queries": Mask(query_padding=QUERY_PADDING),
    "padding": Mask(QUERY_PADDING, KEY_PADDING),
    "pairs 11TS": Mask(pairs=pairs(1, 1, T, S)),
    "pairs B1TS": Mask(pairs=pairs(B, 1, T, S)),
    "pairs BNTS": Mask(pairs=pairs(B, N, T, S)),
    "pairs BN1S": Mask(pairs=pairs(B, N, 1, S)),
    "all": Mask(
        QUERY_PADDING,
        np.array([[1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1, 0]], bool),
        pairs(B, N, T, S) | np.eye(T, S, dtype=bool) | np.eye(T, S, -1, dtype=bool),
        True,
        4,
    ),
}

_rows = pairs(B, N, T, S)
_rows[0, 1, 2] = _rows[1, 0, 0] = _rows[1, :, 4] = False
EMPTY_ROWS = {
    "empty rows": Mask(pairs=_rows),
    "empty keys": Mask(key_padding=np.array([[False] * S, [True] * S])),
    "empty queries": Mask(query_padding=np.array([[True] * T, [False] * T])),
    "causal without its keys": Mask(
        key_padding=np.array([[0, 0, 1, 1, 1, 0, 0], [1] * S], bool), is_causal=True
    ),
    "window past the keys": Mask(
        key_padding=np.array([[1, 0, 0, 0, 0, 0, 0], [1] * S], bool), sliding_window=2
    ),
}


def visible(mask: Mask, shape: tuple[int, int, int, int] = (B, N, T, S)) -> np.ndarray:
    return oracle.visible_pairs(shape, *mask)


def cast(arrays: Sequence[Any], dtype: str) -> list[Any]:
    return [keras.ops.convert_to_tensor(array, dtype=dtype) for array in arrays]


def numbers(tensor: Any) -> np.ndarray:
    """A tensor of any floating dtype, bfloat16 too, as float64."""
    return np.asarray(keras.ops.convert_to_numpy(tensor)).astype(np.float64)


def gradients(
    function: Callable[..., Any], arrays: Sequence[Any], upstream: Any
) -> list[np.ndarray]:
    """Gradients of `sum(function(*arrays) * upstream)` for every array."""
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        outputs = function(*arrays)
        loss = tf.reduce_sum(outputs * tf.cast(upstream, outputs.dtype))
    return [numbers(gradient) for gradient in tape.gradient(loss, arrays)]


def check_gradients(
    function: Callable[..., Any],
    expected: Callable[..., np.ndarray],
    arrays: Sequence[np.ndarray],
) -> None:
    """Compares the float64 gradients of `function` with the slopes of `expected`."""
    upstream = draw(*expected(*arrays).shape, seed=7)
    found = gradients(function, cast(arrays, "float64"), upstream)
    check_slopes(found, expected, arrays, upstream)


def check_slopes(
    found: Sequence[np.ndarray],
    expected: Callable[..., np.ndarray],
    arrays: Sequence[np.ndarray],
    upstream: np.ndarray,
    tolerance: float = 1e-7,
) -> None:
    """Compares gradients with central differences of the oracle `expected`.

    Each array moves along one random direction: a gradient that is wrong in any
    element is wrong along it.
    """

    def loss(*moved: np.ndarray) -> float:
        return float(np.sum(expected(*moved) * upstream))

    for place, gradient in enumerate(found):
        direction = draw(*arrays[place].shape, seed=8 + place)
        slope = oracle.directional_derivative(loss, arrays, place, direction)
        error = abs(float(np.sum(gradient * direction)) - slope)
        assert error <= tolerance * (float(np.linalg.norm(gradient)) + 1.0)
