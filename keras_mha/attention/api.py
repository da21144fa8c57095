"""The public door to attention: checks every argument once, and hands over."""

from __future__ import annotations

from typing import Any

from keras import KerasTensor, backend, ops

from keras_mha.attention import dispatch, mask_arguments
from keras_mha.attention.bias import as_bias, check_bias
from keras_mha.attention.dropout import as_seed, check_rate
from keras_mha.attention.mask_arguments import as_pairs
from keras_mha.attention.mask_parts import NOTHING, MaskParts, meet
from keras_mha.attention.masks import Mask, checked_parts
from keras_mha.attention.numeric import plain_number
from keras_mha.typing import Tensor


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Any = None,
    bias: Any = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    segment_ids: Any = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    implementation: str = "auto",
    return_scores: bool = False,
) -> Any:
    """Mixes values by the similarity of queries and keys.

        softmax(mask(cap(scale Q K^T) + bias)) V

    Scores and softmax are computed in float32 or wider. A query that sees no key
    yields zeros, with zero gradient. Fewer heads of keys and values than of queries
    are shared by groups of query heads, in order, and never repeated in memory.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.2.1; groups:
    Ainslie et al. 2023, "GQA"; soft cap: Gemma Team 2024, "Gemma 2"; sinks: Xiao et
    al. 2024, "Efficient streaming language models with attention sinks"; blockwise:
    Rabe and Staats 2021, "Self-attention does not need O(n^2) memory", and Dao 2024,
    "FlashAttention-2".

    Letters: B batch, T query length, S key length, N query heads, K key/value heads,
    H head size of queries and keys, V head size of values.

    Args:
        query: Floating `(B, T, N, H)`.
        key: `(B, S, K, H)`, of the same dtype; N must be a multiple of K.
        value: `(B, S, K, V)`, likewise.
        mask: Boolean or integer `(T, S)`, `(B, T, S)` or `(B, N or 1, T, S)`, True
            or non-zero = attend; or a `Mask`, such as
            `CausalMask() & PaddingMask(lengths)`.
        bias: Floating `(T, S)`, `(B, T, S)` or `(B or 1, N or 1, T, S)`, added to
            the scores, with gradient; or a callable that maps integer distances
            `j - i` of key from query to biases `(N or 1, *shape)`, such as `ALiBi`
            or `RelativePositionBias`.
        is_causal: Whether query `i` attends to keys `j <= i` only, counted from the
            first query and the first key.
        sliding_window: Query `i` attends to keys with `|i - j| < sliding_window`;
            with `is_causal`, `0 <= i - j < sliding_window`.
        segment_ids: Integers `(B, T)` or `(T,)` where T = S, or a pair for queries
            and keys: attention stays within equal ids; negative ids see nothing.
        scale: Factor of the scores. Defaults to `1 / sqrt(H)`.
        logits_soft_cap: `c` turns scores `x` into `c tanh(x / c)`, before the bias.
        sinks: Floating `(N,)`: score of a key that every query sees and whose value
            is zero.
        dropout: Share of the probabilities to drop, `0 <= dropout < 1`. Positions
            depend on the seed alone, not on the implementation or the compiler.
        seed: An integer, a `keras.random.SeedGenerator`, or a seed tensor `(2,)`
            as the generator gives it. Needed where `dropout > 0`.
        implementation: `"reference"` stores the scores; `"blockwise"` computes them
            block by block, and again for the gradient, in memory linear in T and S,
            and skips blocks that causality, window, segments or padding rule out;
            `"portable"` is the form that converts to TFLite and ONNX, for
            inference; `"fused"` is the backend's own kernel, cuDNN on JAX and
            `scaled_dot_product_attention` on torch. `"auto"` chooses by device, options
            and what is known of the shape: an unknown batch is taken to be 32, an
            unknown length to be short, for which scores are stored.
        return_scores: Whether to return the probabilities too.

    Returns:
        `(B, T, N, V)` in the dtype of `query`; with `return_scores`, also the
        probabilities before dropout `(B, N, T, S)`.

    Raises:
        ValueError: If shapes do not fit each other, an argument is out of its
            domain, `dropout > 0` has no seed, or the implementation asked for
            cannot serve the call.
        TypeError: If an argument has a dtype that it cannot have, or is a symbolic
            `KerasTensor`.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> query = np.random.normal(size=(2, 5, 6, 8)).astype("float32")
    >>> key, value = np.random.normal(size=(2, 2, 7, 3, 8)).astype("float32")
    >>> mask = keras_mha.SlidingWindowMask(3) & keras_mha.PaddingMask(np.array([7, 4]))
    >>> tuple(keras_mha.dot_product_attention(query, key, value, mask=mask).shape)
    (2, 5, 6, 8)
    """
    query, key, value = _check_heads(query, key, value)
    (B, T, N, _), S = query.shape, key.shape[1]
    scale = _as_number(scale, "scale")
    logits_soft_cap = _as_cap(logits_soft_cap)
    parts = _as_parts(mask, (B, N, T, S))
    if is_causal:
        parts = meet(parts, MaskParts(upper=0))
    if sliding_window is not None:
        size = mask_arguments.check_window(sliding_window, "sliding_window")
        parts = meet(parts, MaskParts(lower=1 - size, upper=size - 1))
    if segment_ids is not None:
        ids = mask_arguments.as_pair(segment_ids, "segment_ids")
        segments = (
            mask_arguments.as_segments(part, shape, "segment_ids", (1, 2))
            for part, shape in zip(ids, ((B, T), (B, S)), strict=True)
        )
        parts = meet(parts, MaskParts(None, None, None, None, None, *segments))
    dispatch.check_implementation(implementation, "implementation")
    dropout = check_rate(dropout, "dropout")
    if dropout > 0 and seed is None:
        raise ValueError(
            f"`dropout` above 0 needs a `seed`. Received: dropout={dropout}, seed=None"
        )
    joined = as_bias(bias, sinks, ops.shape(query)[1], ops.shape(key)[1])
    check_bias(joined, (B, N, T, S))
    mixed, scores = dispatch.attend(
        query,
        key,
        value,
        parts,
        joined,
        None if seed is None else as_seed(seed),
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        dropout=dropout,
        return_scores=return_scores,
        implementation=implementation,
    )
    return (mixed, scores) if return_scores else mixed


def _check_heads(*heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    names = ("query", "key", "value")
    if any(isinstance(tensor, KerasTensor) for tensor in heads):
        raise TypeError(
            "`dot_product_attention` computes and takes no symbolic tensors: call it "
            "in the `call` of a layer, or use `MultiHeadAttention`. Received: "
            "a KerasTensor"
        )
    tensors: Any = [ops.convert_to_tensor(tensor) for tensor in heads]
    query, key, value = tensors
    dtypes = [backend.standardize_dtype(x.dtype) for x in tensors]
    if len(set(dtypes)) > 1 or "float" not in dtypes[0]:
        raise TypeError(
            "`query`, `key` and `value` must have one floating dtype. Received: "
            + ", ".join(f"{n} {d}" for n, d in zip(names, dtypes, strict=True))
        )
    shapes = [tuple(x.shape) for x in tensors]
    text = ", ".join(f"{n} {s}" for n, s in zip(names, shapes, strict=True))
    if any(len(shape) != 4 for shape in shapes):
        raise ValueError(
            "`query` must have the shape (B, T, N, H), `key` (B, S, K, H) and `value` "
            f"(B, S, K, V). Received: {text}"
        )
    (qb, _, heads_q, size), (kb, S, heads_k, size_k), (vb, S_v, heads_v, _) = shapes
    if not (_fit(qb, kb) and _fit(kb, vb) and _fit(S, S_v) and size == size_k):
        raise ValueError(
            "`query` (B, T, N, H), `key` (B, S, K, H) and `value` (B, S, K, V) must "
            f"agree in B, S and H. Received: {text}"
        )
    if not heads_k or not size:
        raise ValueError(
            f"There must be a head, and its size be 1 or more. Received: {text}"
        )
    if heads_k != heads_v or heads_q % heads_k:
        raise ValueError(
            "`key` and `value` must have K heads, and N of `query` must be a multiple "
            f"of K. Received: {text}"
        )
    return query, key, value


def _as_number(value: Any, name: str) -> float | None:
    number = plain_number(value)
    if number is None and value is not None:
        raise ValueError(
            f"`{name}` must be a finite number. Received: {name}={value!r}"
        )
    return number


def _as_cap(value: Any) -> float | None:
    number = _as_number(value, "logits_soft_cap")
    if number is not None and number <= 0:
        raise ValueError(f"`logits_soft_cap` must be positive. Received: {value!r}")
    return number


def _as_parts(mask: Any, score_shape: tuple[int | None, ...]) -> MaskParts:
    if mask is None:
        return NOTHING
    if isinstance(mask, Mask):
        return checked_parts(mask, score_shape, 1, "mask")
    return MaskParts(pairs=as_pairs(mask, score_shape, 1, "mask"))


def _fit(one: int | None, other: int | None) -> bool:
    return one is None or other is None or one == other
