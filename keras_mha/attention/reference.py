"""Attention with the scores materialized: right on its whole domain.

    softmax(mask(cap(scale Q K^T) + bias)) V

Masks select: keys and values that no query sees, and queries that see no key, are
cleared before the products, so NaN, infinities and huge values in padding are
harmless forward and backward. A query that sees no key yields zeros, with zero
gradient.

Source: Vaswani et al. 2017, "Attention is all you need", section 3.2.1.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size, V head size of the values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import backend, ops

from keras_mha.attention.bias import Bias, table
from keras_mha.attention.dropout import draw_pair_noise, keep_pairs
from keras_mha.attention.mask_parts import NOTHING, MaskParts, materialize
from keras_mha.typing import Tensor

TAKES = frozenset(MaskParts._fields)


def refusal(**call: Any) -> None:
    """Says why a call cannot be served: this implementation serves every one."""
    del call


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskParts,
    bias: Bias,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    keys_are_finite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mixes the values by the similarity of queries and keys.

    Queries are scaled before the product, and scores and softmax are computed in
    float32 where the inputs are narrower: 16-bit scores would overflow (float16)
    or lose the order of near keys (bfloat16).

    Args:
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`; query head `n` reads key head `n // (N / K)`.
        value: `(B, S, K, V)`.
        mask: What may attend to what.
        bias: What joins the scores.
        scale: Factor of the scores.
        logits_soft_cap: `c` turns scores `x` into `c tanh(x / c)`, before the bias.
        dropout: Share of the probabilities to drop, `0 <= dropout < 1`.
        seed: Seed tensor `(2,)`; needed where `dropout > 0`.
        keys_are_finite: Whether keys and values hold neither NaN nor infinities where
            they are hidden, so that they need not be cleared.

    Returns:
        The mixed values `(B, T, N, V)` and the probabilities before dropout
        `(B, N, T, S)`, both in the dtype of `query`.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.bias import Bias
    >>> from keras_mha.attention.mask_parts import MaskParts
    >>> from keras_mha.attention.reference import attend
    >>> one, value = np.ones((1, 2, 1, 1)), np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> mixed, _ = attend(one, one, value, MaskParts(upper=0), Bias(), scale=1.0)
    >>> np.asarray(mixed).ravel().tolist()
    [1.0, 2.0]
    """
    dtype = backend.standardize_dtype(query.dtype)
    wide = wider(dtype)
    if wide != dtype:
        query, key = ops.cast(query, wide), ops.cast(key, wide)
    T, S = _sizes(query)[1], _sizes(key)[1]
    query = ops.transpose(query, (0, 2, 1, 3)) * scale
    key = ops.transpose(key, (0, 2, 3, 1))
    value = ops.transpose(value, (0, 2, 1, 3))

    visible = None if mask is NOTHING else materialize(mask, T, S)
    if visible is not None:
        query = _clear(query, ops.any(visible, axis=3, keepdims=True))
        if not keys_are_finite:
            seen = _any_of_group(visible, query.shape[1], key.shape[1])
            key, value = _clear(key, ops.swapaxes(seen, 2, 3)), _clear(value, seen)

    scores = grouped_matmul(query, key)
    if logits_soft_cap is not None:
        scores = ops.tanh(scores * (1.0 / logits_soft_cap)) * logits_soft_cap
    scores = add_bias(scores, bias, T, S)
    if visible is not None:
        # Finite, because a row of nothing but -inf would turn into NaN first.
        scores = ops.where(visible, scores, float(np.finfo(wide).min))
    probabilities = softmax(scores, bias.sinks)
    if visible is not None:
        probabilities = ops.where(visible, probabilities, 0.0)
    if wide != dtype:
        probabilities = ops.cast(probabilities, dtype)
    weights = probabilities
    if dropout > 0:
        shape: Any = ops.shape(weights)
        noise = draw_pair_noise(seed, shape[:3], S)
        weights = ops.where(
            keep_pairs(noise, dropout),
            weights * (1.0 / (1.0 - dropout)),
            ops.zeros_like(weights),
        )
    mixed = grouped_matmul(weights, value)
    return ops.transpose(mixed, (0, 2, 1, 3)), probabilities


def wider(dtype: str) -> str:
    """The dtype of scores and softmax: float32, or float64 for float64."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def grouped_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiplies `(B, N, T, X)` with `(B, K, X, Y)`, each of K for N / K in a row.

    The heads of a group are laid under each other as rows of one product, so that
    what they share is not repeated.
    """
    heads, shared = left.shape[1], right.shape[1]
    if heads == shared:
        return ops.matmul(left, right)
    batch, _, length, inner = _sizes(left)
    left = ops.reshape(left, (batch, shared, heads // shared * length, inner))
    product = ops.matmul(left, right)
    return ops.reshape(product, (batch, heads, length, ops.shape(right)[-1]))


def add_bias(scores: Tensor, bias: Bias, T: Tensor, S: Tensor) -> Tensor:
    """Adds what a bias holds for each pair to the scores `(B, N, T, S)`."""
    if bias.pairs is not None:
        scores = scores + ops.cast(bias.pairs, scores.dtype)
    if bias.distances is not None:
        scores = scores + table(ops.cast(bias.distances, scores.dtype), T, S)
    return scores


def softmax(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the last axis, which may have one element.

    Keras warns of that case, because elsewhere it is a slip; here it is a sequence
    of one key.

    Args:
        scores: `(..., S)`, or `(B, N, T, S)` with sinks.
        sinks: `(N,)`: scores that join the normalization and are dropped after it,
            as in Xiao et al. 2024, "Efficient streaming language models with
            attention sinks", learned as in gpt-oss.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.reference import softmax
    >>> np.asarray(softmax(np.array([[7.0], [-7.0]]))).tolist()
    [[1.0], [1.0]]
    """
    if sinks is not None:
        sinks = ops.reshape(ops.cast(sinks, scores.dtype), (1, -1, 1, 1))
        column = sinks + ops.zeros_like(scores[..., :1])
        scores = ops.concatenate([scores, column], axis=-1)
        return ops.softmax(scores, axis=-1)[..., :-1]
    if scores.shape[-1] == 1:
        return ops.exp(scores - scores)  # NaN stays NaN
    return ops.softmax(scores, axis=-1)


def _clear(inputs: Tensor, counts: Tensor) -> Tensor:
    """Zeroes what does not count, by selection: `0 * NaN` would be NaN."""
    return ops.where(counts, inputs, 0.0)


def _any_of_group(visible: Tensor, heads: int, shared: int) -> Tensor:
    """Whether any query of a group sees a key, `(B or 1, K or 1, S, 1)`."""
    seen = ops.any(visible, axis=2)
    if seen.shape[1] not in (1, shared):
        shape: Any = ops.shape(seen)
        batch, _, length = shape
        # It may turn out to be one for all heads, if that was not known.
        seen = ops.broadcast_to(seen, (batch, heads, length))
        seen = ops.reshape(seen, (batch, shared, heads // shared, length))
        seen = ops.any(seen, axis=2)
    return ops.expand_dims(seen, -1)


def _sizes(tensor: Tensor) -> tuple[Any, ...]:
    """Sizes; `ops.shape` adds an operation even where all are known."""
    known = tuple(tensor.shape)
    if None not in known:
        return known
    shape: Any = ops.shape(tensor)
    return tuple(shape)
