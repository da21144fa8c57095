"""Finds the keys that the queries of a block may see, so that others are skipped.

Letters: B batch, T query length, S key length.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_mha.attention.mask_parts import MaskParts, intersect
from keras_mha.typing import Tensor


def key_ranges(
    mask: MaskParts, query_length: Tensor, key_length: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns a range of keys for each block of queries, which sees none outside it.

    Causality, window, segments and padding narrow the range. Segments do by blocks
    of keys as long as those of queries, so that nothing of the size `(T, S)` is made.

    Args:
        mask: The mask, spelled out.
        query_length: T, an int or an integer scalar tensor.
        key_length: S, likewise.
        size: Queries in a block, likewise.

    Returns:
        First key and the one after the last, `(B or 1, ceil(T / size))` int32. They
        are S and 0 where a block sees nothing.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.blockwise.ranges import key_ranges
    >>> from keras_mha.attention.mask_parts import MaskParts
    >>> first, last = key_ranges(MaskParts(lower=-2, upper=0), 7, 7, size=2)
    >>> np.asarray(first)[0].tolist(), np.asarray(last)[0].tolist()
    ([0, 0, 2, 4], [2, 4, 6, 7])
    """
    T, S = query_length, key_length
    start = ops.arange(_count(T, size), dtype="int32") * size
    end = ops.minimum(start + size, T)
    first, last = ops.zeros_like(start), ops.zeros_like(start) + S
    if mask.lower is not None:
        first = ops.maximum(first, start + ops.cast(mask.lower, "int32"))
    if mask.upper is not None:
        last = ops.minimum(last, end + ops.cast(mask.upper, "int32"))
    first, last = ops.expand_dims(first, 0), ops.expand_dims(last, 0)
    if mask.key_padding is not None:
        some = _bounds(mask.key_padding)
        first, last = ops.maximum(first, some[0]), ops.minimum(last, some[1])
    if mask.query_segments is not None:
        some = _segment_ranges(mask.query_segments, mask.key_segments, size)
        first = ops.maximum(first, some[0])
        last = ops.minimum(last, ops.minimum(some[1], S))
    sees = first < last
    if mask.query_padding is not None:
        sees = ops.logical_and(sees, ops.any(_blocks(mask.query_padding, size, 0), 2))
    return (
        ops.where(sees, first, ops.zeros_like(first) + S),
        ops.where(sees, last, ops.zeros_like(last)),
    )


def _segment_ranges(
    query_ids: Tensor, key_ids: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Ranges of the blocks of keys that hold an id between a block's extremes."""
    wanted, there = (_extremes(ids, size) for ids in (query_ids, key_ids))
    overlap = ops.logical_and(
        ops.expand_dims(wanted[0], 2) <= ops.expand_dims(there[1], 1),
        ops.expand_dims(wanted[1], 2) >= ops.expand_dims(there[0], 1),
    )
    first, last = _bounds(overlap)
    return first[..., 0] * size, last[..., 0] * size


def _extremes(ids: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest id of each block; negative ids do not count."""
    none = 2**31 - 1
    blocks = _blocks(ids, size, -1)
    least = ops.where(blocks < 0, ops.zeros_like(blocks) + none, blocks)
    return ops.min(least, axis=2), ops.max(blocks, axis=2)


def _bounds(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """First place that is True along the last axis, and the one after the last."""
    length = ops.shape(chosen)[-1]
    places = ops.arange(length, dtype="int32")
    zeros = ops.zeros_like(chosen, dtype="int32")
    first = ops.min(ops.where(chosen, places, zeros + length), axis=-1, keepdims=True)
    last = ops.max(ops.where(chosen, places + 1, zeros), axis=-1, keepdims=True)
    return first, last


def _blocks(rows: Tensor, size: Tensor, filler: int) -> Tensor:
    """Cuts `(B, T)` into `(B, count, size)`, filled up at the end."""
    shape: Any = ops.shape(rows)
    batch, length = shape
    count = _count(length, size)
    rows = ops.cast(rows, "int32")
    rows = ops.pad(rows, ((0, 0), (0, count * size - length)), constant_values=filler)
    return ops.reshape(rows, (batch, count, size))


def _count(length: Tensor, size: Tensor) -> Tensor:
    return (length + size - 1) // size


def rows_that_see(
    mask: MaskParts, query_length: Tensor, key_length: Tensor
) -> Tensor | None:
    """Finds the queries that see a key, as far as padding, causality and window tell.

    Args:
        mask: The mask, spelled out; pairs and segments are ignored.
        query_length: T, an int or an integer scalar tensor.
        key_length: S, likewise.

    Returns:
        Boolean `(B or 1, T or 1)`, or `None` if every query sees one.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.blockwise.ranges import rows_that_see
    >>> from keras_mha.attention.mask_parts import MaskParts
    >>> mask = MaskParts(key_padding=np.array([[False, True, True]]), upper=0)
    >>> np.asarray(rows_that_see(mask, 3, 3)).tolist()
    [[False, True, True]]
    """
    T, S = query_length, key_length
    sees = None
    if mask.is_ordered:
        rows = ops.arange(T, dtype="int32")
        first = last = None
        if mask.lower is not None:
            first = ops.clip(rows + ops.cast(mask.lower, "int32"), 0, S)
        if mask.upper is not None:
            last = ops.clip(rows + ops.cast(mask.upper, "int32") + 1, 0, S)
        last = ops.zeros_like(rows) + S if last is None else last
        if mask.key_padding is None:
            sees = last > (0 if first is None else first)
            sees = ops.expand_dims(sees, 0)
        else:
            counts = ops.cumsum(ops.cast(mask.key_padding, "int32"), axis=1)
            counts = ops.pad(counts, ((0, 0), (1, 0)))
            seen = ops.take(counts, last, axis=1)
            if first is not None:
                seen = seen - ops.take(counts, first, axis=1)
            sees = seen > 0
    elif mask.key_padding is not None:
        sees = ops.any(mask.key_padding, axis=1, keepdims=True)
    return intersect(sees, mask.query_padding)
