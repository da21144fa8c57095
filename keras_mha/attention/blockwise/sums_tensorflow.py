"""Joins and sums what the tiles of TensorFlow's blockwise attention return.

Letters: B batch, T query length, S key length, N query heads. In a tile b, n, k, t and
s stand for the parts of B, N, K, T and S.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from keras_mha.attention.blockwise.loops_tensorflow import array_of, cut_along, sizes_of
from keras_mha.attention.blockwise.tiles_tensorflow import Call, Section, Tile, Tiling
from keras_mha.typing import Tensor


class Rows(NamedTuple):
    """Blocks of queries to be laid end to end.

    Attributes:
        array: `(t, b, n, X)` each, for an array joins the first axis. `()` where
            there is one block only.
        only: That block, `(b, n, t, X)`.
    """

    array: Any = ()
    only: Any = ()

    @classmethod
    def empty(cls, dtype: Any, count: Any, width: int | None) -> Rows:
        """Room for `count` blocks."""
        if isinstance(count, int) and count == 1:
            return cls()
        return cls(array_of(dtype, count, (None, None, None, width)))

    def write(self, row: Any, part: Tensor) -> Rows:
        """Puts `(b, n, t, X)` into its place."""
        if isinstance(self.array, tuple):
            return Rows(only=part)
        return Rows(self.array.write(row, tf.transpose(part, (2, 0, 1, 3))))

    def join(self) -> Tensor:
        """Returns `(b, n, T, X)`."""
        if isinstance(self.array, tuple):
            return self.only
        return tf.transpose(self.array.concat(), (1, 2, 0, 3))


class Keys(NamedTuple):
    """A gradient of keys or values, summed up over the blocks of queries.

    Blocks come last first. Keys past the range of a block are then complete, for
    ranges never step back, and are put aside.

    Attributes:
        held: `(b, k, s, X)`: keys from where the last block that was added begins.
            `()` before there is any.
        done: What is complete, piece by piece.
    """

    held: Any = ()
    done: Rows = Rows()

    @classmethod
    def empty(cls, like: Tensor, section: Section, tiling: Tiling, call: Call) -> Keys:
        """Nothing yet, for a section's keys or values `like`."""
        count = tiling.row_tiles
        if isinstance(count, int) and count == 1:
            return cls()
        b, k, length, width = sizes_of(like)
        if not call.is_prefix:
            length -= section.last[-1]
        # One piece more, for what is held at the end, or only that piece.
        done = Rows.empty(like.dtype, 1 if call.is_whole else count + 1, width)
        return cls(tf.zeros((b, k, length, width), like.dtype), done)

    def add(self, part: Tensor, tile: Tile, row: Any, call: Call) -> Keys:
        """Adds what a tile gives to its range of keys."""
        first, last, length = tile.columns.start, tile.columns.stop, call.lengths[1]
        if call.is_whole:
            return Keys(part if isinstance(self.held, tuple) else self.held + part)
        if isinstance(self.done.array, tuple):
            around = ((0, 0), (0, 0), (first, length - last), (0, 0))
            return Keys(tf.pad(part, around))
        start = 0
        if not call.is_prefix:
            section = tile.section
            start = tf.concat([section.first, section.last[-1:]], axis=0)[row + 1]
        done = self.done.write(row + 1, cut_along(self.held, slice(last - start, None)))
        held = cut_along(self.held, slice(last - start))
        if call.is_prefix:
            return Keys(held + part, done)
        new = start - first
        joined = [cut_along(part, slice(new)), held + cut_along(part, slice(new, None))]
        return Keys(tf.concat(joined, axis=2), done)

    def join(self, section: Section) -> Tensor:
        """Returns `(b, k, S, X)`."""
        if isinstance(self.done.array, tuple):
            return self.held
        held = self.held
        if section.first is not None:
            held = tf.pad(held, ((0, 0), (0, 0), (section.first[0], 0), (0, 0)))
        return self.done.write(0, held).join()


def sum_heads(sums: tf.TensorArray, like: Tensor, tiling: Tiling) -> Tensor:
    """Sums sections' `(n or 1, X)` over the batch, and lays heads under each other."""
    stacked = sums.stack()
    rows, width = sizes_of(stacked)[1:]
    stacked = tf.reshape(stacked, (-1, tiling.head_tiles * rows, width))
    joined = tf.reduce_sum(stacked, axis=0)
    if like.shape[0] == 1:
        joined = tf.reduce_sum(joined, axis=0, keepdims=True)
    shape: Any = tf.shape(like)
    return tf.reshape(joined, shape)


def _pair_places(call: Call, tiling: Tiling) -> tuple[Any, ...]:
    """How many tiles the batch, the heads and the queries of a bias make."""
    tiles = (
        tiling.sections // tiling.head_tiles,
        tiling.head_tiles,
        tiling.row_tiles,
    )
    whole = (size == 1 for size in call.bias.pairs.shape)
    return tuple(1 if one else count for one, count in zip(whole, tiles, strict=False))


def pair_array(call: Call, tiling: Tiling) -> tf.TensorArray:
    """An array for a bias' gradient, `(t or 1, n or 1, S or 1)` for each tile."""
    batch, heads, rows = _pair_places(call, tiling)
    return array_of(call.bias.pairs.dtype, batch * heads * rows, (None, None, None))


def add_pairs(
    sums: tf.TensorArray,
    d_biased: Tensor,
    index: Any,
    row: Any,
    tile: Tile,
    tiling: Tiling,
    call: Call,
) -> tf.TensorArray:
    """Adds a tile's gradient of the biased scores to that of the bias."""
    shape = call.bias.pairs.shape
    for axis in (1, 2, 3):
        if shape[axis] == 1:
            d_biased = tf.reduce_sum(d_biased, axis=axis, keepdims=True)
    # The batch is one row here, or all of its rows have the same bias.
    part = tf.transpose(tf.reduce_sum(d_biased, axis=0), (1, 0, 2))
    if shape[3] != 1:
        after = call.lengths[1] - tile.columns.stop
        part = tf.pad(part, ((0, 0), (0, 0), (tile.columns.start, after)))
    # One place for all tiles along an axis where the bias has one element; the first
    # tile to come fills it. Blocks of queries come last first.
    last_row = tiling.row_tiles - 1
    numbers = (index // tiling.head_tiles, index % tiling.head_tiles, row)
    place, is_new = 0, tf.constant(value=True)
    for axis, (number, start) in enumerate(zip(numbers, (0, 0, last_row), strict=True)):
        if shape[axis] == 1:
            is_new = tf.logical_and(is_new, tf.equal(number, start))
        else:
            place = place * _pair_places(call, tiling)[axis] + number
    part = tf.cond(is_new, lambda: part, lambda: part + sums.read(place))
    return sums.write(place, part)


def join_pairs(sums: tf.TensorArray, call: Call, tiling: Tiling) -> Tensor:
    """Lays the tiles' gradients of the bias side by side."""
    batch, heads, _ = _pair_places(call, tiling)
    rows = sums.concat()
    n, s = sizes_of(rows)[1:]
    rows = tf.reshape(rows, (batch, heads, -1, n, s))
    rows = tf.transpose(rows, (0, 1, 3, 2, 4))
    return tf.reshape(rows, sizes_of(call.bias.pairs))
