"""The one door to attention: checks, picks an implementation, calls it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from keras import KerasTensor, backend, ops

from keras_mha.attention import mask_arguments, masks, portable, reference
from keras_mha.attention.axes import (
    fold_heads,
    fold_padding,
    fold_pairs,
    unfold_heads,
    unfold_scores,
)
from keras_mha.attention.bias import Bias, as_bias, check_bias
from keras_mha.attention.blockwise import front as blockwise
from keras_mha.attention.dispatch import select
from keras_mha.attention.dropout import as_seed, check_rate
from keras_mha.attention.fused import front as fused
from keras_mha.attention.mask_arguments import as_pairs
from keras_mha.attention.masks import Mask
from keras_mha.attention.numeric import plain_number
from keras_mha.typing import Tensor

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "blockwise": blockwise,
    "portable": portable,
    "fused": fused,
}

_implementation: ContextVar[str] = ContextVar("implementation", default="auto")


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
    mask = _as_mask(mask, (B, N, T, S))
    masks.check_fit(mask, (B, N, T, S), "mask")
    if is_causal:
        mask &= masks.CausalMask()
    if sliding_window is not None:
        size = mask_arguments.check_window(sliding_window, "sliding_window")
        mask &= masks.SlidingWindowMask(size)
    if segment_ids is not None:
        ids = mask_arguments.as_pair(segment_ids, "segment_ids")
        mask &= masks.SegmentMask(
            mask_arguments.as_segments(ids[0], (B, T), "segment_ids", (1, 2)),
            mask_arguments.as_segments(ids[1], (B, S), "segment_ids", (1, 2)),
        )
    dropout = check_rate(dropout, "dropout")
    seed = None if seed is None else as_seed(seed)
    mixed, scores = attend(
        query,
        key,
        value,
        mask,
        as_bias(bias, sinks, ops.shape(query)[1], ops.shape(key)[1]),
        seed,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        dropout=dropout,
        return_scores=return_scores,
        implementation=implementation,
    )
    return (mixed, scores) if return_scores else mixed


@contextmanager
def implementation_scope(name: str) -> Iterator[None]:
    """Makes every attention layer traced inside run on the implementation `name`.

    Exporters trace a model under `"portable"`; the model itself is not changed.

    Args:
        name: `"auto"`, or the name of an implementation.

    Raises:
        ValueError: If there is no implementation of that name.

    Example:

    >>> from keras_mha.attention.api import current_implementation
    >>> from keras_mha.attention.api import implementation_scope
    >>> with implementation_scope("portable"):
    ...     current_implementation()
    'portable'
    """
    check_implementation(name, "name")
    token = _implementation.set(name)
    try:
        yield
    finally:
        _implementation.reset(token)


def current_implementation() -> str:
    """Returns the name of the implementation that layers use now."""
    return _implementation.get()


def prepare_inputs(inputs: Tensor, padding: Tensor | None) -> Tensor:
    """Clears padded positions of `inputs`, where the implementation needs it.

    See `keras_mha.attention.masks.clear_padding`. Portable's padding is finite by
    its contract, so there the selection is left out of the exported graph.
    """
    if current_implementation() == "portable":
        return inputs
    return masks.clear_padding(inputs, padding)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    bias: Bias = Bias(),  # noqa: B008 - a tuple, which nobody can change
    seed: Tensor | None = None,
    *,
    axes: tuple[int, ...] = (1,),
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    dropout: float = 0.0,
    return_scores: bool = False,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention on projected heads; pure, so that it can be compiled as it is.

    Args:
        query: `(B, T, N, H)`, or with more axes between the first and the last two.
        key: `(B, S, K, H)`, likewise.
        value: `(B, S, K, V)`, likewise.
        mask: What may attend to what, in the axes of the tensors above: padding
            `(B, ...)`, pairs of the scores' rank.
        bias: What joins the scores; several axes take none but sinks.
        seed: Seed tensor `(2,)`; needed where `dropout > 0`.
        axes: The axes that attend.
        scale: Factor of the scores. Defaults to `1 / sqrt(H)`.
        logits_soft_cap: Bound of the scores before the bias.
        dropout: Share of the probabilities to drop.
        return_scores: Whether the probabilities are wanted. Where they are not,
            a compiled function need not store them.
        implementation: A key of `IMPLEMENTATIONS`, or `"auto"`.

    Returns:
        The mixed values `(B, T, N, V)`, and the probabilities before dropout
        `(B, N, T, S)` or `None`. With other axes, `(B, ..., N, V)` and
        `(B, ..., N, T..., S...)`.

    Raises:
        ValueError: If what depends on the order of positions is asked for over
            several axes, `dropout > 0` has no seed, there is no such
            implementation, or it cannot serve the call.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.api import attend
    >>> from keras_mha.attention.masks import Mask
    >>> heads = np.zeros((2, 3, 5, 7), "float32")
    >>> mixed, scores = attend(heads, heads, heads, Mask(), return_scores=True)
    >>> tuple(mixed.shape), tuple(scores.shape)
    ((2, 3, 5, 7), (2, 5, 3, 3))
    """
    check_order(mask, axes)
    check_implementation(implementation, "implementation")
    if dropout > 0 and seed is None:
        raise ValueError(
            f"`dropout` above 0 needs a `seed`. Received: dropout={dropout}, seed=None"
        )
    heads: Any = [fold_heads(tensor, axes) for tensor in (query, key, value)]
    (rows, T, N, _), S = heads[0].shape, heads[1].shape[1]
    check_bias(bias, (rows, N, T, S))
    mask = mask._replace(
        query_padding=_map(fold_padding, mask.query_padding, query, axes),
        key_padding=_map(fold_padding, mask.key_padding, key, axes),
        pairs=_map(fold_pairs, mask.pairs, query, key, axes),
    )
    chosen = select(
        IMPLEMENTATIONS,
        implementation,
        heads[0],
        heads[1],
        heads[2],
        mask,
        bias,
        logits_soft_cap=logits_soft_cap,
        dropout=dropout,
        return_scores=return_scores,
    )
    mixed, scores = chosen.attend(
        *heads,
        mask,
        bias,
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale,
        logits_soft_cap=logits_soft_cap,
        dropout=dropout,
        seed=seed,
    )
    mixed = unfold_heads(mixed, query, axes)
    if not return_scores:
        return mixed, None
    return mixed, unfold_scores(scores, query, key, axes)


def check_order(mask: Mask, axes: tuple[int, ...]) -> None:
    """Refuses what depends on the order of positions, over several axes.

    Raises:
        ValueError: If `mask` is causal or has a window and `axes` has no one order.
    """
    if len(axes) > 1 and mask.is_ordered:
        raise ValueError(
            "`use_causal_mask` and `sliding_window` need a single attention axis: "
            "several have no one order of positions. "
            f"Received: attention_axes={axes}, use_causal_mask={mask.is_causal}, "
            f"sliding_window={mask.sliding_window}"
        )


def check_implementation(name: str, argument: str) -> str:
    """Returns `name` if there is an implementation of that name, or it is "auto".

    Raises:
        ValueError: Otherwise.
    """
    names = ["auto", *IMPLEMENTATIONS]
    if name not in names:
        raise ValueError(
            f"`{argument}` must be one of {names}. Received: {argument}={name!r}"
        )
    return name


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


def _as_mask(mask: Any, score_shape: tuple[int | None, ...]) -> Mask:
    mask = mask if isinstance(mask, Mask) else Mask(pairs=mask)
    return mask._replace(pairs=as_pairs(mask.pairs, score_shape, 1, "mask"))


def _fit(one: int | None, other: int | None) -> bool:
    return one is None or other is None or one == other


def _map(function: Callable[..., Tensor], mask: Tensor | None, *rest: Any) -> Any:
    return None if mask is None else function(mask, *rest)
