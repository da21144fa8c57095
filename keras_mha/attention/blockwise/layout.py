"""Cuts tensors into blocks, and lays blocks out for products.

Axes are named by letters: b, t and s are those that are cut. Others: n query heads, k
key/value heads, g query heads to each of these, h and v sizes of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from keras import backend, ops

from keras_mha.typing import Tensor

# Index and size of a block along the axes that are cut, by their letters.
Place: TypeAlias = Mapping[str, tuple[Any, Any]]


def extent(
    x: Tensor, letters: str, place: Place, *, broadcasts: bool = False
) -> tuple[list[Any], list[Any]]:
    """Start and size of a block along each axis of a tensor.

    Args:
        x: The tensor.
        letters: One for each axis.
        place: Where the block lies.
        broadcasts: Whether axes may be of length 1 instead; those are not cut.
    """
    starts, sizes = [], []
    for dim, letter in zip(shape(x), letters, strict=True):
        index, size = place.get(letter, (0, dim))
        start = index * size
        if broadcasts and isinstance(dim, int):
            start, size = (start, size) if dim > 1 else (0, 1)
        elif broadcasts:
            size = ops.minimum(dim, size)
            start = ops.minimum(start, dim - size)
        starts.append(start)
        sizes.append(size)
    return starts, sizes


def cut(x: Tensor, letters: str, place: Place, *, broadcasts: bool = False) -> Tensor:
    """Cuts a block out of a tensor whose axes have these letters."""
    return ops.slice(x, *extent(x, letters, place, broadcasts=broadcasts))


def cut_mask(x: Tensor | None, letters: str, place: Place) -> Tensor | None:
    """Cuts a block out of a mask whose axes may be of length 1."""
    return None if x is None else cut(x, letters, place, broadcasts=True)


def put(x: Tensor, letters: str, place: Place, block: Tensor) -> Tensor:
    """Puts a block into its place."""
    return ops.slice_update(x, extent(x, letters, place)[0], block)


def add(x: Tensor, letters: str, place: Place, block: Tensor) -> Tensor:
    """Adds a block to the values in its place."""
    return put(x, letters, place, cut(x, letters, place) + block)


def loop(
    first: Any,
    last: Any,
    step: Callable[..., tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Applies `step(index, *state)` for each index from `first` up to `last`."""
    index = ops.cast(first, "int32")
    result: Any = ops.while_loop(
        lambda index, *_: index < last,
        lambda index, *state: (index + 1, *step(index, *state)),
        (index, *state),
    )
    return tuple(result[1:])


def columns(x: Tensor, heads: int) -> Tensor:
    """`(B, T, N, H)` to `(B, K, H, G, T)`."""
    B, T, N, H = shape(x)
    x = ops.reshape(x, (B, T, heads, N // heads, H))
    return ops.transpose(x, (0, 2, 4, 3, 1))


def from_columns(x: Tensor) -> Tensor:
    """`(B, K, H, G, T)` to `(B, T, N, H)`."""
    B, K, H, G, T = shape(x)
    return ops.reshape(ops.transpose(x, (0, 4, 1, 3, 2)), (B, T, K * G, H))


def join(x: Tensor) -> Tensor:
    """`(b, K, X, G, t)` to `(b, K, X, G * t)`: the columns of one product."""
    b, K, X, G, t = shape(x)
    return ops.reshape(x, (b, K, X, G * t))


def as_scores(block: Tensor, heads: int) -> Tensor:
    """`(b, n, s, t)` to `(b, k, s, g, t)`, where every axis may be 1."""
    b, n, s, t = shape(block)
    shared = least(n, heads)
    block = ops.reshape(block, (b, shared, n // shared, s, t))
    return ops.transpose(block, (0, 1, 3, 2, 4))


def transpose(pairs: Tensor | None) -> Tensor | None:
    """`(B, N, T, S)` to the layout of scores, `(B, N, S, T)`, and back."""
    return None if pairs is None else ops.swapaxes(pairs, 2, 3)


def clear(x: Tensor, counts: Tensor) -> Tensor:
    """Zeroes what does not count, by selection: `0 * NaN` would be NaN."""
    # `where` may lose a static shape to that of `counts`.
    return ops.reshape(ops.where(counts, x, ops.zeros_like(x)), shape(x))


def clear_unseen(x: Tensor, visible: Tensor | None, axis: int) -> Tensor:
    """Zeroes keys or values that no query of the block sees.

    Args:
        x: Rank 4, with the keys along one of the last two axes.
        visible: `(b, k, s, g, t)`, or `None`.
        axis: The other of the last two.
    """
    if visible is None:
        return x
    return clear(x, ops.expand_dims(ops.any(visible, axis=(3, 4)), axis))


def of_rows(ends: Tensor, rows: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduces `(B or 1, X)` to `(B / b or 1, X)`."""
    batch, count = shape(ends)
    together = least(batch, rows)
    return reduce(ops.reshape(ends, (batch // together, together, count)), axis=1)


def shape(x: Tensor) -> tuple[Any, ...]:
    """Returns sizes, as ints where known; Keras annotates them as `None`."""
    sizes: Any = ops.shape(x)
    return tuple(sizes)


def least(one: Any, other: Any) -> Any:
    """The lesser of two sizes: an int if both are, so that shapes stay static."""
    if isinstance(one, int) and isinstance(other, int):
        return min(one, other)
    return ops.minimum(one, other)


def count(length: Any, size: Any) -> Any:
    """How many blocks of a size a length makes."""
    return (length + size - 1) // size


def round_up(length: Any, size: int) -> Any:
    """The length of whole blocks that a length needs."""
    return count(length, size) * size


def lowest(dtype: Any) -> float:
    """A finite number that hides a score: rows of -inf would turn into NaN."""
    return float(np.finfo(backend.standardize_dtype(dtype)).min)
