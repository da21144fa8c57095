"""Attention over any axes, folded into attention over one.

Every implementation works on `(B, T, N, H)`. Inputs with more dimensions are
brought there: axes that do not attend join the batch, axes that attend are laid
end to end, and the result is brought back.

Letters: B batch, T query length, S key length, N heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_mha.attention.mask_parts import MaskParts, spell_others
from keras_mha.typing import Tensor


def resolve_axes(axes: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Returns the attention axes of inputs `(B, ..., D)` as positive numbers.

    Args:
        axes: The axes asked for; `None` means all but the first and the last.
        rank: Number of dimensions of the inputs.

    Raises:
        ValueError: If an axis is the batch's or the features', out of range, or
            named twice, or if there is none.

    Example:

    >>> from keras_mha.layers.axes import resolve_axes
    >>> resolve_axes((-2,), rank=4), resolve_axes(None, rank=4)
    ((2,), (1, 2))
    """
    if axes is None:
        chosen = tuple(range(1, rank - 1))
    else:
        chosen = (axes,) if isinstance(axes, int) else tuple(axes)
    resolved = tuple(axis + rank if axis < 0 else axis for axis in chosen)
    inner = all(0 < axis < rank - 1 for axis in resolved)
    if not resolved or not inner or len(set(resolved)) < len(resolved):
        raise ValueError(
            "`attention_axes` must name different axes of the inputs, neither the "
            f"first (batch) nor the last (features) of their {rank}. "
            f"Received: attention_axes={axes}"
        )
    return resolved


def score_shape(
    query_shape: Sequence[int | None],
    key_shape: Sequence[int | None],
    num_heads: int,
    axes: tuple[int, ...],
) -> tuple[int | None, ...]:
    """Static shape of the scores, `(B, ..., N, T..., S...)`, from input shapes.

    Raises:
        ValueError: If queries and keys differ in an axis that does not attend.

    Example:

    >>> from keras_mha.layers.axes import score_shape
    >>> score_shape((2, 3, 11), (2, 5, 11), num_heads=7, axes=(1,))
    (2, 7, 3, 5)
    """
    free = _free_axes(len(query_shape) - 1, axes)
    pairs = [(query_shape[axis], key_shape[axis]) for axis in free]
    if any(None not in pair and pair[0] != pair[1] for pair in pairs):
        raise ValueError(
            f"`query` and `key` must agree in the axes {free}, which do not attend. "
            f"Received: query of shape {tuple(query_shape)} and key of shape "
            f"{tuple(key_shape)}"
        )
    return (
        *(query_shape[axis] for axis in free),
        num_heads,
        *(query_shape[axis] for axis in axes),
        *(key_shape[axis] for axis in axes),
    )


def fold_heads(heads: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Brings projected heads `(B, ..., N, H)` to `(B', T, N, H)`."""
    rank = len(heads.shape)
    if is_folded(rank, axes):
        return heads
    shape: Any = ops.shape(heads)
    free = _free_axes(rank - 2, axes)
    heads = ops.transpose(heads, (*free, *axes, rank - 2, rank - 1))
    # Not -1: what is left over is unknown where another size is zero.
    rows = math.prod(shape[axis] for axis in free)
    length = math.prod(shape[axis] for axis in axes)
    return ops.reshape(heads, (rows, length, shape[-2], shape[-1]))


def unfold_heads(mixed: Tensor, like: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Brings mixed values `(B', T, N, V)` back to the layout of `like`.

    Args:
        mixed: What an implementation returned.
        like: The projected queries `(B, ..., N, H)` before `fold_heads`.
        axes: The attention axes.
    """
    rank = len(like.shape)
    if is_folded(rank, axes):
        return mixed
    shape: Any = ops.shape(like)
    order = (*_free_axes(rank - 2, axes), *axes)
    last = ops.shape(mixed)[-1]
    mixed = ops.reshape(mixed, (*(shape[axis] for axis in order), shape[-2], last))
    back = [order.index(axis) for axis in range(rank - 2)]
    return ops.transpose(mixed, (*back, rank - 2, rank - 1))


def fold_padding(padding: Tensor, like: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Brings a padding mask, the leading dimensions of inputs, to `(B', T)`.

    Args:
        padding: Boolean `(B, ...)`, at most the inputs' dimensions but the last.
        like: The projected heads `(B, ..., N, H)` that it belongs to.
        axes: The attention axes.
    """
    rank = len(like.shape)
    if is_folded(rank, axes):
        return padding
    shape: Any = ops.shape(like)
    free = _free_axes(rank - 2, axes)
    for _ in range(rank - 2 - len(padding.shape)):
        padding = ops.expand_dims(padding, axis=-1)
    padding = ops.broadcast_to(padding, shape[: rank - 2])
    padding = ops.transpose(padding, (*free, *axes))
    rows = math.prod(shape[axis] for axis in free)
    return ops.reshape(padding, (rows, math.prod(shape[axis] for axis in axes)))


def fold_pairs(
    pairs: Tensor, query: Tensor, key: Tensor, axes: tuple[int, ...]
) -> Tensor:
    """Brings a mask of the scores' rank to `(B' or 1, N or 1, T, S)`.

    Args:
        pairs: Boolean, broadcastable to the scores `(B, ..., N, T..., S...)`.
        query: Projected queries `(B, ..., N, H)`.
        key: Projected keys `(B, ..., N, H)`.
        axes: The attention axes.
    """
    rank = len(query.shape)
    if is_folded(rank, axes):
        return pairs
    queries: Any = ops.shape(query)
    keys: Any = ops.shape(key)
    free = [queries[axis] for axis in _free_axes(rank - 2, axes)]
    rows = [queries[axis] for axis in axes]
    columns = [keys[axis] for axis in axes]
    heads = pairs.shape[len(free)]
    pairs = ops.broadcast_to(pairs, (*free, heads, *rows, *columns))
    sizes = math.prod(free), heads, math.prod(rows), math.prod(columns)
    return ops.reshape(pairs, sizes)


def fold_mask(
    mask: MaskParts, query: Tensor, key: Tensor, axes: tuple[int, ...]
) -> MaskParts:
    """Brings what is in the axes of queries and keys to `(B', T)` and `(B', S)`."""
    if mask.others is not None:
        (axis,) = axes
        lengths = ops.shape(query)[axis], ops.shape(key)[axis]
        mask = spell_others(mask, *lengths, rank=len(query.shape))
    rows, columns, pairs = mask.query_padding, mask.key_padding, mask.pairs
    return mask._replace(
        query_padding=None if rows is None else fold_padding(rows, query, axes),
        key_padding=None if columns is None else fold_padding(columns, key, axes),
        pairs=None if pairs is None else fold_pairs(pairs, query, key, axes),
    )


def check_order(mask: MaskParts, axes: tuple[int, ...]) -> None:
    """Refuses what depends on the order of positions, over several axes.

    Raises:
        ValueError: If `mask` is causal or has a window and `axes` has no one order.
    """
    if len(axes) > 1 and mask.is_ordered:
        raise ValueError(
            "`use_causal_mask` and `sliding_window` need a single attention axis: "
            "several have no one order of positions. "
            f"Received: attention_axes={axes} and keys limited to distances from "
            f"{mask.lower} to {mask.upper}"
        )


def attend_over(
    axes: tuple[int, ...],
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskParts,
    *others: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Calls `attend`, which knows one axis, on heads with several.

    Args:
        axes: The attention axes.
        attend: Maps heads `(B', T, N, H)`, a mask and the rest to the mixed values
            `(B', T, N, V)` and the scores `(B', N, T, S)` or `None`.
        query: `(B, ..., N, H)`.
        key: `(B, ..., K, H)`.
        value: `(B, ..., K, V)`.
        mask: What may attend to what: padding `(B, ...)`, pairs of the scores' rank.
        *others: Positional arguments of `attend` after these.
        **options: Its keyword arguments.

    Returns:
        Mixed values `(B, ..., N, V)`, and scores `(B, ..., N, T..., S...)` or `None`.
    """
    mixed, scores = attend(
        *(fold_heads(heads, axes) for heads in (query, key, value)),
        fold_mask(mask, query, key, axes),
        *others,
        **options,
    )
    if scores is not None:
        scores = unfold_scores(scores, query, key, axes)
    return unfold_heads(mixed, query, axes), scores


def unfold_scores(
    scores: Tensor, query: Tensor, key: Tensor, axes: tuple[int, ...]
) -> Tensor:
    """Brings scores `(B', N, T, S)` to `(B, ..., N, T..., S...)`."""
    rank = len(query.shape)
    if is_folded(rank, axes):
        return scores
    queries: Any = ops.shape(query)
    keys: Any = ops.shape(key)
    free = [queries[axis] for axis in _free_axes(rank - 2, axes)]
    rows = [queries[axis] for axis in axes]
    columns = [keys[axis] for axis in axes]
    return ops.reshape(scores, (*free, queries[-2], *rows, *columns))


def is_folded(heads_rank: int, axes: tuple[int, ...]) -> bool:
    """Whether heads of this rank are `(B, T, N, H)` as they are."""
    return heads_rank == 4 and axes == (1,)


def _free_axes(leading: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes among the first `leading` that do not attend, the batch first."""
    return tuple(axis for axis in range(leading) if axis not in axes)
