"""PyTorch's `scaled_dot_product_attention`, as Keras calls it.

The kernel knows causality from the first position; other masks are spelled out.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size, V head size of the values.
"""

from __future__ import annotations

from keras import ops

from keras_mha.attention.mask_parts import (
    MaskParts,
    clear_padding,
    materialize,
    untaken,
)
from keras_mha.typing import Tensor


def refusal(query: Tensor, value: Tensor) -> None:
    """Says why the kernel cannot take these heads: it takes all."""
    del query, value


def is_native(mask: MaskParts) -> bool:
    """Whether the kernel takes the mask as it is."""
    if untaken(mask, ("upper",)):
        return False
    return mask.upper is None or (isinstance(mask.upper, int) and mask.upper == 0)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: MaskParts, scale: float
) -> Tensor:
    """Mixes the values.

    Args:
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`.
        value: `(B, S, K, V)`.
        mask: What may attend to what.
        scale: Factor of the scores.

    Returns:
        The mixed values `(B, T, N, V)`.
    """
    visible = sees = None
    if not is_native(mask):
        T, S = ops.shape(query)[1], ops.shape(key)[1]
        visible = materialize(mask, T, S)
        visible = ops.broadcast_to(visible, (*ops.shape(visible)[:2], T, S))
        sees = ops.expand_dims(ops.swapaxes(ops.any(visible, axis=3), 1, 2), -1)
        seen = ops.any(visible, axis=(1, 2))
        query = ops.where(sees, query, ops.zeros_like(query))
        key, value = clear_padding(key, seen), clear_padding(value, seen)
    mixed = ops.dot_product_attention(
        query,
        key,
        value,
        mask=visible,
        scale=scale,
        is_causal=mask.upper is not None and visible is None,
    )
    return mixed if sees is None else ops.where(sees, mixed, ops.zeros_like(mixed))
