"""The form of attention that converts best to TFLite and runs on its delegates.

Rank 4 throughout, plain matrix products, an additive mask that fits float16, no
einsum, no selection, no new axes by indexing. Exporters alone choose it.

Its domain is narrower than the reference's, and there its values are the same:
finite inputs, padding included, and scaled scores under 5e3 in size. Outside, NaN
spreads and a row can put its weight on a hidden key.

Letters: B batch, T query length, S key length, N heads, H head size, V head size
of the values.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_mha.attention.bias import Bias
from keras_mha.attention.masks import Mask, materialize, spell_out
from keras_mha.attention.reference import add_bias, grouped_matmul, softmax
from keras_mha.typing import Tensor

_HIDDEN = 1e4  # float16 ends at 65504


def refusal(*, dropout: float, **call: Any) -> str | None:
    """Says why a call cannot be served: exported files do not train."""
    del call
    return "is for inference and has no dropout" if dropout > 0 else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    bias: Bias,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    dropout: float = 0.0,
    seed: None = None,
) -> tuple[Tensor, Tensor]:
    """Mixes the values by the similarity of queries and keys, for inference.

    Args and returns are those of `keras_mha.attention.reference.attend`, without
    dropout.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.bias import Bias
    >>> from keras_mha.attention.masks import Mask
    >>> from keras_mha.attention.portable import attend
    >>> one, value = np.ones((1, 2, 1, 1)), np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> mixed, _ = attend(one, one, value, Mask(is_causal=True), Bias(), scale=1.0)
    >>> np.asarray(mixed).ravel().tolist()
    [1.0, 2.0]
    """
    del dropout, seed  # see `refusal`
    dtype = query.dtype
    query = ops.transpose(query, (0, 2, 1, 3))
    key = ops.transpose(key, (0, 2, 3, 1))
    value = ops.transpose(value, (0, 2, 1, 3))
    query = query * scale
    T, S = ops.shape(query)[2], ops.shape(key)[3]

    scores = grouped_matmul(query, key)
    if logits_soft_cap is not None:
        scores = ops.tanh(scores * (1.0 / logits_soft_cap)) * logits_soft_cap
    scores = add_bias(scores, bias, T, S)
    mask = spell_out(mask, T, S)
    # A padded query would hide every key of its row; its row is cleared below.
    visible = materialize(mask._replace(query_padding=None), T, S)
    if visible is not None:
        visible = ops.cast(visible, dtype)
        scores = scores + (visible - 1.0) * _HIDDEN
    probabilities = softmax(scores, bias.sinks)
    if mask.query_padding is not None:
        rows = ops.cast(mask.query_padding, dtype)
        probabilities = probabilities * ops.reshape(rows, (-1, 1, T, 1))
    # In self-attention with padding alone, a query that is none sees itself. Without
    # padding nothing tells self-attention; the first key is seen, if no window is set.
    sees_itself = (
        mask.pairs is None
        and mask.query_segments is None
        and mask.key_padding is mask.query_padding
        and (mask.key_padding is not None or mask.sliding_window is None)
        and isinstance(mask.offset, int)
        and mask.offset == 0
    )
    if visible is not None and not sees_itself:
        probabilities = probabilities * ops.max(visible, axis=-1, keepdims=True)
    mixed = grouped_matmul(probabilities, value)
    return ops.transpose(mixed, (0, 2, 1, 3)), probabilities
