"""The form of attention that converts best to TFLite and runs on its delegates.

Rank 4 throughout, plain matrix products, an additive mask that fits float16, no
einsum, no selection, no new axes by indexing. Only exporters choose it.

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
from keras_mha.attention.mask_parts import MaskParts, materialize, spell_out
from keras_mha.attention.reference import add_bias, grouped_matmul, softmax
from keras_mha.typing import Tensor

TAKES = frozenset(MaskParts._fields)
HIDDEN = 1e4  # what is taken off hidden scores; float16 ends at 65504


def refusal(*, dropout: float, **call: Any) -> str | None:
    """Says why a call cannot be served: exported files do not train."""
    del call
    return "is for inference and has no dropout" if dropout > 0 else None


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
    seed: None = None,
    keys_are_finite: bool = True,
) -> tuple[Tensor, Tensor]:
    """Mixes the values by the similarity of queries and keys, for inference.

    Args and returns are those of `keras_mha.attention.reference.attend`, without
    dropout. Paddings may also be numbers, 1 and 0 in place of True and False.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.bias import Bias
    >>> from keras_mha.attention.mask_parts import MaskParts
    >>> from keras_mha.attention.portable import attend
    >>> one, value = np.ones((1, 2, 1, 1)), np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> mixed, _ = attend(one, one, value, MaskParts(upper=0), Bias(), scale=1.0)
    >>> np.asarray(mixed).ravel().tolist()
    [1.0, 2.0]
    >>> padding = np.array([[True, False]])
    >>> mask = MaskParts(padding, padding)
    >>> mixed, _ = attend(one, one, value, mask, Bias(), scale=1.0)
    >>> np.asarray(mixed).ravel().tolist()
    [1.0, 0.0]
    """
    del dropout, seed, keys_are_finite  # see `refusal`; here all is finite
    dtype = query.dtype
    query = ops.transpose(query, (0, 2, 1, 3))
    key = ops.transpose(key, (0, 2, 3, 1))
    value = ops.transpose(value, (0, 2, 1, 3))
    if scale != 1.0:
        query = query * scale
    T, S = ops.shape(query)[2], ops.shape(key)[3]

    scores = grouped_matmul(query, key)
    if logits_soft_cap is not None:
        scores = ops.tanh(scores * (1.0 / logits_soft_cap)) * logits_soft_cap
    scores = add_bias(scores, bias, T, S)
    mask = spell_out(mask, T, S)
    visible = _visible(mask, dtype, T, S)
    if visible is not None:
        scores = scores + (visible - 1.0) * HIDDEN
    probabilities = softmax(scores, bias.sinks)
    mixed = grouped_matmul(probabilities, value)
    counts = _counts(mask, visible, dtype, T)
    if counts is not None:
        mixed, probabilities = mixed * counts, probabilities * counts
    return ops.transpose(mixed, (0, 2, 1, 3)), probabilities


def _visible(mask: MaskParts, dtype: Any, T: Tensor, S: Tensor) -> Tensor | None:
    """1 where a query sees a key and else 0, `(B or 1, N or 1, T or 1, S)`.

    A padded query would hide every key of its row; see `_counts`.
    """
    pairs = materialize(mask._replace(query_padding=None, key_padding=None), T, S)
    visible = None if pairs is None else ops.cast(pairs, dtype)
    if mask.key_padding is None:
        return visible
    keys = ops.reshape(ops.cast(mask.key_padding, dtype), (-1, 1, 1, S))
    return keys if visible is None else keys * visible


def _counts(
    mask: MaskParts, visible: Tensor | None, dtype: Any, T: Tensor
) -> Tensor | None:
    """0 for queries whose row is zero, else 1, `(B or 1, N or 1, T or 1, 1)`."""
    # In self-attention with padding only, a query that is not padding sees itself.
    # Without padding nothing tells self-attention from the rest; the first key is seen,
    # if no window is set.
    sees_itself = (
        mask.pairs is None
        and mask.query_segments is None
        and mask.key_padding is mask.query_padding
        and (mask.key_padding is not None or mask.lower is None)
        and (mask.lower is None or (isinstance(mask.lower, int) and mask.lower <= 0))
        and (mask.upper is None or (isinstance(mask.upper, int) and mask.upper >= 0))
    )
    counts = None
    if visible is not None and not sees_itself:
        counts = ops.max(visible, axis=-1, keepdims=True)
    if mask.query_padding is not None:
        rows = ops.reshape(ops.cast(mask.query_padding, dtype), (-1, 1, T, 1))
        counts = rows if counts is None else counts * rows
    return counts
