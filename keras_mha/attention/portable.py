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

import math

from keras import ops

from keras_mha.attention.masks import Mask, materialize
from keras_mha.attention.reference import softmax
from keras_mha.typing import Tensor

_HIDDEN = 1e4  # float16 ends at 65504


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixes the values by the similarity of queries and keys, for inference.

    Args and returns are those of `keras_mha.attention.reference.attend`.

    Raises:
        ValueError: If `dropout > 0`: exported files do not train.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.masks import Mask
    >>> from keras_mha.attention.portable import attend
    >>> one, value = np.ones((1, 2, 1, 1)), np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> mixed, _ = attend(one, one, value, Mask(is_causal=True))
    >>> np.asarray(mixed).ravel().tolist()
    [1.0, 2.0]
    """
    if dropout > 0:
        raise ValueError(
            "The portable implementation is for inference and has no dropout. "
            f"Received: dropout={dropout}, seed={seed}"
        )
    dtype = query.dtype
    query = ops.transpose(query, (0, 2, 1, 3))
    key = ops.transpose(key, (0, 2, 3, 1))
    value = ops.transpose(value, (0, 2, 1, 3))
    query = query * (1.0 / math.sqrt(query.shape[-1]))

    scores = ops.matmul(query, key)
    # A padded query would hide every key of its row; its row is cleared below.
    visible = materialize(
        mask._replace(query_padding=None), ops.shape(query)[2], ops.shape(key)[3]
    )
    if visible is not None:
        visible = ops.cast(visible, dtype)
        scores = scores + (visible - 1.0) * _HIDDEN
    probabilities = softmax(scores)
    if mask.query_padding is not None:
        rows = ops.cast(mask.query_padding, dtype)
        probabilities = probabilities * ops.reshape(
            rows, (-1, 1, ops.shape(query)[2], 1)
        )
    # In self-attention with padding alone, a query that is none sees itself.
    sees_itself = mask.pairs is None and mask.key_padding is mask.query_padding
    if visible is not None and not sees_itself:
        probabilities = probabilities * ops.max(visible, axis=-1, keepdims=True)
    mixed = ops.matmul(probabilities, value)
    return ops.transpose(mixed, (0, 2, 1, 3)), probabilities
