"""The oracle: attention in NumPy float64, slow, straight from the formula.

    softmax(mask(cap(scale Q K^T) + bias)) V

One query, one head at a time, over the keys that the query may see; a query that
sees none yields zeros. Gradients are written out by hand in the same way. Nothing
here is shared with the package.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size of queries and keys, V head size of values, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def visible_pairs(
    shape: tuple[int, int, int, int],
    query_padding: ArrayLike | None = None,
    key_padding: ArrayLike | None = None,
    pairs: ArrayLike | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    query_segments: ArrayLike | None = None,
    key_segments: ArrayLike | None = None,
    offset: int = 0,
) -> Array:
    """Spells out which query sees which key, `(B, N, T, S)` boolean.

    The arguments after `shape`, which is (B, N, T, S), are the fields of
    `tests.support.attention_cases.MaskWords`.
    """
    B, _, T, S = shape
    real_rows, real_columns = (
        spell_padding(padding, (B, length))
        for padding, length in ((query_padding, T), (key_padding, S))
    )
    rows, columns = (
        np.broadcast_to(np.zeros(1, int) if ids is None else ids, (B, length))
        for ids, length in ((query_segments, T), (key_segments, S))
    )
    visible = np.ones(shape, bool)
    for b, n, t, s in np.ndindex(*shape):
        place = t + int(offset)
        visible[b, n, t, s] = (
            real_rows[b, t]
            and real_columns[b, s]
            and (not is_causal or s <= place)
            and (sliding_window is None or abs(place - s) < sliding_window)
            and rows[b, t] >= 0
            and rows[b, t] == columns[b, s]
        )
    if pairs is None:
        return visible
    pairs = np.asarray(pairs, bool)
    return visible & (pairs[:, None] if pairs.ndim == 3 else pairs)


def spell_padding(padding: ArrayLike | None, shape: tuple[int, int]) -> Array:
    """Padding `(B, T)` or lengths `(B,)` as booleans of `shape`, which is (B, T)."""
    padding = np.asarray(True if padding is None else padding)
    if padding.ndim == 1:
        return np.arange(shape[1]) < padding[:, None]
    return np.broadcast_to(padding.astype(bool), shape)


class Gradients(NamedTuple):
    """The gradient of every array that attention takes, each of its array's shape."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    distances: Array | None
    sinks: Array | None


def attend(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    visible: ArrayLike | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Attention of heads `(B, T, N, H)`, `(B, S, K, H)`, `(B, S, K, V)`.

    Options are those of `attend_and_gradients`.

    Returns the mixed values `(B, T, N, V)` and the probabilities `(B, N, T, S)`,
    before dropout.
    """
    return attend_and_gradients(query, key, value, visible, **options)[:2]


def attend_and_gradients(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    visible: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    distances: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    upstream: ArrayLike = 0.0,
    scores_upstream: ArrayLike = 0.0,
) -> tuple[Array, Array, Gradients]:
    """Attention and the gradients of `sum(mixed upstream + scores scores_upstream)`.

    Args:
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`; query head `n` reads head `n // (N / K)`.
        value: `(B, S, K, V)`, likewise.
        visible: Which query sees which key; broadcasts to `(B, N, T, S)`.
        bias: Added to the scores; rank 2 `(T, S)`, 3 `(B, T, S)` or 4, any axis of
            which may be 1.
        distances: `(N or 1, T + S - 1)`: added to the score of query `i` and key
            `j`, the number at `j - i + T - 1`.
        sinks: `(N,)`: score of one more key, whose value is zero.
        keep: Factors of the probabilities, `(B, N, T, S)`: zero where dropout hits,
            `1 / (1 - rate)` elsewhere.
        scale: Factor of the scores, `1 / sqrt(H)` by default.
        logits_soft_cap: `c` turns scores `x` into `c tanh(x / c)`, before the bias.
        upstream: Broadcasts to `(B, T, N, V)`.
        scores_upstream: Broadcasts to `(B, N, T, S)`.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    pairs = (B, N, T, S)
    visible = np.broadcast_to(np.asarray(True if visible is None else visible), pairs)
    keep = np.broadcast_to(np.asarray(1.0 if keep is None else keep), pairs)
    upstream = np.broadcast_to(upstream, (B, T, N, value.shape[-1]))
    scores_upstream = np.broadcast_to(scores_upstream, pairs)
    factor = 1.0 / np.sqrt(H) if scale is None else scale
    added = np.zeros(pairs)
    if bias is not None:
        bias = np.asarray(bias, np.float64)
        added = added + (bias[:, None] if bias.ndim == 3 else bias)
    if distances is not None:
        distances = np.asarray(distances, np.float64)
        for t, s in np.ndindex(T, S):
            added[:, :, t, s] += distances[:, s - t + T - 1]

    mixed, scores = np.zeros((B, T, N, value.shape[-1])), np.zeros(pairs)
    d_query, d_key, d_value = (np.zeros(x.shape) for x in (query, key, value))
    d_added, d_sinks = np.zeros(pairs), np.zeros(N)
    for b, n, t in np.ndindex(B, N, T):
        seen, k = np.flatnonzero(visible[b, n, t]), n * K // N
        if seen.size == 0:
            continue
        logits = factor * (key[b, seen, k] @ query[b, t, n])
        slope = np.ones(seen.size)
        if logits_soft_cap is not None:
            slope = 1.0 - np.tanh(logits / logits_soft_cap) ** 2
            logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
        logits = logits + added[b, n, t, seen]
        sink = -np.inf if sinks is None else float(np.asarray(sinks)[n])
        largest = max(logits.max(), sink)
        weights, sink = np.exp(logits - largest), np.exp(sink - largest)
        total = weights.sum() + sink
        p, p_sink, kept = weights / total, sink / total, keep[b, n, t, seen]
        scores[b, n, t, seen] = p
        mixed[b, t, n] = (p * kept) @ value[b, seen, k]

        d_p = kept * (value[b, seen, k] @ upstream[b, t, n])
        d_p = d_p + scores_upstream[b, n, t, seen]
        d_logits = p * (d_p - p @ d_p)
        d_raw = factor * slope * d_logits
        d_query[b, t, n] = d_raw @ key[b, seen, k]
        d_key[b, seen, k] += np.outer(d_raw, query[b, t, n])
        d_value[b, seen, k] += np.outer(p * kept, upstream[b, t, n])
        d_added[b, n, t, seen] = d_logits
        d_sinks[n] -= p_sink * (p @ d_p)

    return (
        mixed,
        scores,
        Gradients(
            d_query,
            d_key,
            d_value,
            None if bias is None else _sum_to(d_added, bias.shape),
            None if distances is None else _sum_diagonals(d_added, distances.shape),
            None if sinks is None else d_sinks,
        ),
    )


def _sum_to(pairs: Array, shape: tuple[int, ...]) -> Array:
    """Sums a table over the axes along which a bias of `shape` was repeated."""
    spread = (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape
    spread = (1,) * (4 - len(spread)) + tuple(spread)
    axes = tuple(axis for axis in range(4) if spread[axis] == 1)
    return pairs.sum(axis=axes, keepdims=True).reshape(shape)


def _sum_diagonals(pairs: Array, shape: tuple[int, ...]) -> Array:
    """Sums a table over the pairs of each distance."""
    sums = np.zeros((pairs.shape[1], shape[1]))
    T, S = pairs.shape[2:]
    for t, s in np.ndindex(T, S):
        sums[:, s - t + T - 1] += pairs[:, :, t, s].sum(axis=0)
    return sums if shape[0] > 1 else sums.sum(axis=0, keepdims=True)


def attend_axes(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    axes: Sequence[int],
    visible: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """`attend` over any axes of heads `(B, ..., N, H)`.

    `visible` broadcasts to the scores `(B, ..., N, T..., S...)`. The axes that do not
    attend are walked one index at a time.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    free = [axis for axis in range(query.ndim - 2) if axis not in axes]
    rows, columns = ([x.shape[axis] for axis in axes] for x in (query, key))
    N, H = query.shape[-2:]
    outer = [query.shape[axis] for axis in free]
    visible = np.broadcast_to(
        np.asarray(True if visible is None else visible), (*outer, N, *rows, *columns)
    )
    mixed = np.zeros((*query.shape[:-1], value.shape[-1]))
    scores = np.zeros(visible.shape)
    for index in np.ndindex(*outer):
        # The free axes are gone after this; those that attend are put in their order.
        place: list[Any] = [slice(None)] * (query.ndim - 2)
        for axis, i in zip(free, index, strict=True):
            place[axis] = i
        left = sorted(axes)
        order = [left.index(axis) for axis in axes]
        pick = [*order, len(axes), len(axes) + 1]
        q, k, v = (x[tuple(place)].transpose(pick) for x in (query, key, value))
        one, probabilities = attend(
            q.reshape(1, -1, N, H),
            k.reshape(1, -1, N, H),
            v.reshape(1, -1, N, v.shape[-1]),
            visible[index].reshape(1, N, int(np.prod(rows)), int(np.prod(columns))),
        )
        back = [order.index(i) for i in range(len(axes))]
        mixed[tuple(place)] = one.reshape(*rows, N, -1).transpose(
            [*back, len(axes), len(axes) + 1]
        )
        scores[index] = probabilities.reshape(N, *rows, *columns)
    return mixed, scores


def project(inputs: Array, weights: Mapping[str, Array], name: str) -> Array:
    """Dense layer `name` on the last axis: `(..., D)` to `(..., N, H)`."""
    projected = np.tensordot(inputs, weights[f"{name}/kernel"], axes=1)
    return projected + weights.get(f"{name}/bias", 0.0)


def multi_head_attention(
    weights: Mapping[str, Array],
    query: Array,
    value: Array,
    key: Array | None = None,
    visible: ArrayLike | None = None,
    axes: Sequence[int] = (1,),
) -> tuple[Array, Array]:
    """The layer: projections, attention, gate (if it has weights), output projection.

    Args:
        weights: As `layer_weights` returns them.
        query: `(B, T, D)`, or with more axes in between.
        value: `(B, S, D)`, likewise.
        key: `(B, S, D)`, likewise; the values where `None`.
        visible: Broadcasts to the scores.
        axes: The axes that attend.

    Returns:
        Outputs and probabilities.
    """
    query, value = np.asarray(query, np.float64), np.asarray(value, np.float64)
    key = value if key is None else np.asarray(key, np.float64)
    mixed, scores = attend_axes(
        project(query, weights, "query"),
        project(key, weights, "key"),
        project(value, weights, "value"),
        axes,
        visible,
    )
    if "gate/kernel" in weights:
        mixed = mixed / (1.0 + np.exp(-project(query, weights, "gate")))
    outputs = np.tensordot(mixed, weights["attention_output/kernel"], axes=2)
    return outputs + weights.get("attention_output/bias", 0.0), scores


def layer_weights(layer: Any) -> dict[str, Array]:
    """A layer's weights in float64 by the last two parts of their paths."""
    return {
        "/".join(weight.path.split("/")[-2:]): np.asarray(weight, np.float64)
        for weight in layer.weights
    }


def directional_derivative(
    function: Callable[..., float],
    arrays: Sequence[Array],
    place: int,
    direction: Array,
    step: float = 1e-5,
) -> float:
    """Central difference of `function(*arrays)` as `arrays[place]` moves."""

    def moved(by: float) -> float:
        changed = [np.asarray(array, np.float64) for array in arrays]
        changed[place] = changed[place] + by * direction
        return function(*changed)

    return (moved(step) - moved(-step)) / (2 * step)
