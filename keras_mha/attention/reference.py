"""Attention with the scores materialised: right on its whole domain.

    softmax(mask(Q K^T / sqrt(H))) V

Masks select: keys and values that no query sees, and queries that see no key, are
cleared before the products, so NaN, infinities and huge values in padding are
harmless forward and backward. A query that sees no key yields zeros, with zero
gradient.

Source: Vaswani et al. 2017, "Attention is all you need", section 3.2.1.

Letters: B batch, T query length, S key length, N heads, H head size, V head size
of the values.
"""

from __future__ import annotations

import math

import numpy as np
from keras import backend, ops

from keras_mha.attention.dropout import dropout as apply_dropout
from keras_mha.attention.masks import Mask, materialize
from keras_mha.typing import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixes the values by the similarity of queries and keys.

    Queries are scaled before the product, and scores and softmax are computed in
    float32 where the inputs are narrower: 16-bit scores would overflow (float16)
    or lose the order of near keys (bfloat16).

    Args:
        query: `(B, T, N, H)`.
        key: `(B, S, N, H)`.
        value: `(B, S, N, V)`.
        mask: What may attend to what.
        dropout: Share of the probabilities to drop, `0 <= dropout < 1`.
        seed: Seed tensor `(2,)`; needed where `dropout > 0`.

    Returns:
        The mixed values `(B, T, N, V)` and the probabilities before dropout
        `(B, N, T, S)`, both in the dtype of `query`.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.masks import Mask
    >>> from keras_mha.attention.reference import attend
    >>> one, value = np.ones((1, 2, 1, 1)), np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> mixed, _ = attend(one, one, value, Mask(is_causal=True))
    >>> np.asarray(mixed).ravel().tolist()
    [1.0, 2.0]
    """
    dtype = backend.standardize_dtype(query.dtype)
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    query = ops.transpose(ops.cast(query, wide), (0, 2, 1, 3))
    key = ops.transpose(ops.cast(key, wide), (0, 2, 3, 1))
    value = ops.transpose(value, (0, 2, 1, 3))
    query = query * (1.0 / math.sqrt(query.shape[-1]))

    visible = materialize(mask, ops.shape(query)[2], ops.shape(key)[3])
    if visible is not None:
        seeing = ops.any(visible, axis=3, keepdims=True)
        seen = ops.any(visible, axis=2, keepdims=True)
        query = ops.where(seeing, query, ops.zeros_like(query))
        key = ops.where(seen, key, ops.zeros_like(key))
        seen = ops.transpose(seen, (0, 1, 3, 2))
        value = ops.where(seen, value, ops.zeros_like(value))

    scores = ops.matmul(query, key)
    if visible is not None:
        # finite: a row of -inf alone would turn into NaN before it is zeroed
        scores = ops.where(visible, scores, float(np.finfo(wide).min))
    probabilities = softmax(scores)
    if visible is not None:
        probabilities = ops.where(visible, probabilities, ops.zeros_like(probabilities))
    probabilities = ops.cast(probabilities, dtype)
    kept = apply_dropout(probabilities, dropout, seed) if dropout > 0 else probabilities
    mixed = ops.matmul(kept, value)
    return ops.transpose(mixed, (0, 2, 1, 3)), probabilities


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis, which may have one element.

    Keras warns of that case, because elsewhere it is a slip; here it is a sequence
    of one key.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.reference import softmax
    >>> np.asarray(softmax(np.array([[7.0], [-7.0]]))).tolist()
    [[1.0], [1.0]]
    """
    if scores.shape[-1] == 1:
        return ops.exp(scores - scores)  # NaN stays NaN
    return ops.softmax(scores, axis=-1)
