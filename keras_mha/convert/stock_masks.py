"""Our attention with the masks of Keras' layers, faults included."""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import ops
from typing_extensions import override

from keras_mha.layers.arguments import check_flag
from keras_mha.layers.keras_mask import get_keras_mask, set_keras_mask
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.typing import Tensor


class StockRows(MultiHeadAttention):
    """`MultiHeadAttention` in which queries that see no key get what Keras gives them.

    That is the mean of all values, unless the layer has dropout or returns its scores.
    """

    @override
    def _compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        fused = not (
            self._dropout > 0 or return_attention_scores or len(query.shape) != 4
        )
        if fused and attention_mask is not None:
            # Keras' fused path: where all scores are equally low, all weigh the same.
            sees: Any = ops.any(attention_mask, axis=-1, keepdims=True)
            attention_mask = ops.logical_or(attention_mask, ops.logical_not(sees))
            if len(sees.shape) == 3:
                sees = ops.expand_dims(sees, 1)
            query = ops.where(ops.swapaxes(sees, 1, 2), query, ops.zeros_like(query))
        return super()._compute_attention(
            query,
            key,
            value,
            attention_mask,
            training,
            return_attention_scores,
            use_causal_mask,
        )


@keras.saving.register_keras_serializable(package="keras_mha")
class StockMaskAttention(StockRows):
    """`MultiHeadAttention` that treats masks as Keras' layers do, faults included.

    `from_keras(model, masks="as_keras")` makes it, for a model that was trained with
    these faults and must go on answering as it did:

    - Masks are taken off the inputs, so that layers after it read their padding. Keras'
      `GroupQueryAttention` leaves them on.
    - `query_mask` is read off the queries; an argument is ignored.
    - A query that sees no key gets the mean of all values, padding included, unless
      the layer has dropout or returns its scores.
    - A floating `attention_mask` is read as booleans.

    The mask is always a table `(B, T, S)`, so memory is not linear in the lengths.

    Args:
        *args: Arguments of `MultiHeadAttention`.
        takes_masks_off: Whether the first two faults are there.
        **kwargs: Arguments of `MultiHeadAttention`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_mha.convert import StockMaskAttention
    >>> ids = np.array([[3, 1, 0], [1, 0, 0]])
    >>> x = keras.layers.Embedding(5, 8, mask_zero=True)(ids)
    >>> mixed = StockMaskAttention(num_heads=2, key_dim=4)(x, x)
    >>> getattr(x, "_keras_mask", None) is None
    True
    """

    def __init__(self, *args: Any, takes_masks_off: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._takes_masks_off = check_flag(takes_masks_off, "takes_masks_off")

    @override
    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "takes_masks_off": self._takes_masks_off}

    @override
    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        key = value if key is None else key
        if self._takes_masks_off:
            query_mask = get_keras_mask(query)
            for tensor in (query, value, key):
                set_keras_mask(tensor, None)
        outputs = super().call(
            query,
            value,
            key,
            attention_mask=_table(
                query, value, query_mask, value_mask, key_mask, attention_mask
            ),
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
        )
        if self._takes_masks_off and query_mask is not None:
            mixed = outputs[0] if return_attention_scores else outputs
            set_keras_mask(mixed, query_mask)
        return outputs

    @override
    def compute_output_spec(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor | None = None,
        return_attention_scores: bool = False,
        **masks: Any,
    ) -> Any:
        del masks  # Keras' layer refuses none
        return super().compute_output_spec(
            query, value, key, return_attention_scores=return_attention_scores
        )


def _table(
    query: Tensor,
    value: Tensor,
    query_mask: Tensor | None,
    value_mask: Tensor | None,
    key_mask: Tensor | None,
    attention_mask: Tensor | None,
) -> Tensor | None:
    """Joins masks as Keras does."""
    padding = [(query_mask, -1), (value_mask, -2), (key_mask, -2)]
    parts: list[Any] = [
        ops.expand_dims(mask, axis) for mask, axis in padding if mask is not None
    ]
    if attention_mask is not None:
        parts.append(attention_mask)
    if not parts:
        return None
    if len(query.shape) == 3:
        sizes = ops.shape(query)[1], ops.shape(value)[1]
        parts.append(ops.ones((1, *sizes), dtype="bool"))
    rank = max(len(part.shape) for part in parts)
    parts = [ops.cast(part, "bool") for part in parts]
    if rank == 4:  # of which one is for each head
        parts = [ops.expand_dims(x, -3) if len(x.shape) == 3 else x for x in parts]
    return functools.reduce(ops.logical_and, parts)
