"""Attention followed back through the layers of a stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_mha.attention.numeric import plain_number


def attention_rollout(
    maps: Mapping[str, np.ndarray] | Sequence[np.ndarray],
    *,
    padding_mask: Any = None,
    residual: float = 0.5,
) -> np.ndarray:
    """Says how much of each input reaches each position of a stack, by its attention.

    In each layer the heads' mean `W` is joined by the residual connection `I`,

        A = normalize(residual I + (1 - residual) W),

    with rows that sum to one, and the layers are multiplied, the last one first:
    `A_L ... A_2 A_1`.

    Source: Abnar and Zuidema 2020, "Quantifying attention flow in transformers", with
    its `residual` of 0.5.

    What it does not prove. It takes a position's value for the sum of what flows in
    and knows nothing of the values' size and direction, the feed-forward networks or
    the normalizations. The paper finds its ranking closer to leaving words out and to
    gradients than raw maps are, no more. What is said of maps in
    `keras_mha.attention_maps` holds here as well.

    Letters: B batch, N query heads, T length.

    Args:
        maps: Maps `(B, N, T, T)` of self-attention, from the first layer to the last
            of one stack, as `attention_maps` returns them. Heads and their number
            may differ. Of a model with several stacks, or with attention to other
            inputs, pass the maps of one stack only.
        padding_mask: `(B, T)`, true or non-zero = a real position. Rows and columns
            of the rest are zero in the result. By default no position is padding;
            one that sees nothing then keeps its own input, `I`.
        residual: Share of the residual connection, from 0 to 1.

    Returns:
        `(B, T, T)` in float64: row `i` is made of inputs `j`, and sums to one.

    Raises:
        ValueError: If no map comes, a map is not `(B, N, T, T)`, maps differ in B
            or T, the mask does not fit, an argument is out of its domain, or with
            `residual=0` a real position sees nothing.

    Example:

    >>> import numpy as np
    >>> from keras_mha.interpret import attention_rollout
    >>> first = np.array([[[[0.0, 1.0], [0.0, 1.0]]]])
    >>> attention_rollout([first]).tolist()
    [[[0.5, 0.5], [0.0, 1.0]]]
    >>> attention_rollout([first, first]).tolist()
    [[[0.25, 0.75], [0.0, 1.0]]]
    """
    share = plain_number(residual)
    if share is None or not 0 <= share <= 1:
        raise ValueError(f"`residual` must be from 0 to 1. Received: {residual!r}")
    layers = _check_maps(maps)
    B, _, T, _ = layers[0].shape
    real = _check_mask(padding_mask, (B, T))
    flow = np.eye(T) * real[:, :, None]
    for scores in layers:
        joined = share * np.eye(T) + (1 - share) * scores.mean(axis=1)
        joined = joined * real[:, :, None] * real[:, None, :]
        sums = joined.sum(axis=-1, keepdims=True)
        if np.any((sums[..., 0] == 0) & real):
            raise ValueError(
                "With `residual=0` every position must see one, itself or another. "
                "Received: `maps` with a row of zeros that is not padding"
            )
        flow = joined / np.where(sums == 0, 1.0, sums) @ flow
    return flow


def _check_maps(
    maps: Mapping[str, np.ndarray] | Sequence[np.ndarray],
) -> list[np.ndarray]:
    named = maps if isinstance(maps, Mapping) else dict(enumerate(maps))
    if not named:
        raise ValueError(f"`maps` must hold one map or more. Received: {maps!r}")
    arrays = {name: np.asarray(map_, np.float64) for name, map_ in named.items()}
    first = next(iter(arrays.values())).shape
    for name, array in arrays.items():
        shape = array.shape
        if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
            raise ValueError(
                "`maps` must be of self-attention, each (B, N, T, T). "
                f"Received: map {name!r} of shape {shape}"
            )
        if (shape[0], shape[2]) != (first[0], first[2]):
            raise ValueError(
                "`maps` must have one B and one T. Received: map "
                f"{name!r} of shape {shape} after one of shape {first}"
            )
    return list(arrays.values())


def _check_mask(mask: Any, shape: tuple[int, int]) -> np.ndarray:
    if mask is None:
        return np.ones(shape, bool)
    mask = np.asarray(mask)
    if mask.shape != shape or mask.dtype.kind not in "biu":
        raise ValueError(
            f"`padding_mask` must be boolean or integer, (B, T) = {shape}. "
            f"Received: {mask.dtype} of shape {mask.shape}"
        )
    return mask.astype(bool)
