"""The oracle: attention in NumPy float64, slow, straight from the formula.

    softmax(mask(Q K^T / sqrt(H))) V

One query, one head at a time, over the keys that the query may see; a query that
sees none yields zeros. Nothing here is shared with the package.

Letters: B batch, T query length, S key length, N heads, H head size of queries and
keys, V head size of values, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
) -> Array:
    """Spells out which query sees which key, `(B, N, T, S)` boolean.

    The arguments after `shape`, which is (B, N, T, S), are the fields of
    `keras_mha.attention.masks.Mask`.
    """
    visible = np.ones(shape, bool)
    for b, n, t, s in np.ndindex(*shape):
        if query_padding is not None:
            visible[b, n, t, s] &= bool(np.asarray(query_padding)[b, t])
        if key_padding is not None:
            visible[b, n, t, s] &= bool(np.asarray(key_padding)[b, s])
        if is_causal:
            visible[b, n, t, s] &= s <= t
        if sliding_window is not None:
            visible[b, n, t, s] &= abs(t - s) < sliding_window
    return visible if pairs is None else visible & np.asarray(pairs, bool)


def attend(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, visible: ArrayLike | None = None
) -> tuple[Array, Array]:
    """Attention of heads `(B, T, N, H)`, `(B, S, N, H)`, `(B, S, N, V)`.

    Returns the mixed values `(B, T, N, V)` and the probabilities `(B, N, T, S)`.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    (B, T, N, H), S = query.shape, key.shape[1]
    visible = np.broadcast_to(
        np.asarray(True if visible is None else visible), (B, N, T, S)
    )
    mixed, scores = np.zeros((B, T, N, value.shape[-1])), np.zeros((B, N, T, S))
    for b, n, t in np.ndindex(B, N, T):
        seen = np.flatnonzero(visible[b, n, t])
        if seen.size == 0:
            continue
        logits = key[b, seen, n] @ query[b, t, n] / np.sqrt(H)
        weights = np.exp(logits - logits.max())
        scores[b, n, t, seen] = weights / weights.sum()
        mixed[b, t, n] = scores[b, n, t, seen] @ value[b, seen, n]
    return mixed, scores


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
