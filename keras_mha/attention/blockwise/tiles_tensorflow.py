"""How TensorFlow's blockwise attention is cut up into tiles.

A tile is a block of queries of some heads against the range of keys that they may see.
Tiles of the same heads make a section.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size. In a tile b, n, k, t and s stand for the parts of B, N, K, T and S.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from keras_mha.attention.bias import Bias
from keras_mha.attention.blockwise.loops_tensorflow import (
    count_blocks,
    greatest_divisor,
    least,
    most,
    pick,
    sizes_of,
)
from keras_mha.attention.blockwise.ranges import key_ranges
from keras_mha.attention.dropout import PairNoise
from keras_mha.attention.mask_parts import MaskParts, band
from keras_mha.typing import Tensor

HIDDEN = 1e30
# Scores in a tile. Measured on two cores: half or twice as many are slower.
_TILE = 2**20
# Queries in a block, at most where an order hides keys, and at least where keys are
# many: fewer are slower, more take more memory.
_ROWS = 256
_FEWEST_ROWS = 64


class Call(NamedTuple):
    """Holds what all tiles of one call share.

    Attributes:
        mask: The mask, spelled out.
        bias: What joins the scores.
        noise: What dropout decides by, or `None`.
        dropout: Share of the probabilities to drop.
        cap: Bound of the scores before the bias, or `None`.
        lengths: T and S.
        groups: N / K, query heads to a key head.
        tables: Whether tiles spell out all that hides a pair. Otherwise only
            causality and window are left to them: padded keys have very low scores
            by a column of their own, and rows that see nothing are cleared after.
    """

    mask: MaskParts
    bias: Bias
    noise: PairNoise | None
    dropout: float
    cap: float | None
    lengths: tuple[Any, Any]
    groups: Any
    tables: bool

    @property
    def is_whole(self) -> bool:
        """Whether every block of queries may see all keys."""
        return self.is_prefix and self.mask.upper is None

    @property
    def is_prefix(self) -> bool:
        """Whether every range of keys begins with the first key."""
        mask = self.mask
        return (
            mask.query_padding is None
            and mask.key_padding is None
            and mask.query_segments is None
            and mask.lower is None
        )


class Tiling(NamedTuple):
    """How a call is cut up.

    Attributes:
        batch: Rows of the batch in a tile: one, unless the tile holds all heads.
        heads: Key heads in a tile; divides K.
        rows: Queries in a tile.
        head_tiles: Tiles that the heads make.
        sections: Tiles that batch and heads make together.
        row_tiles: Tiles that the queries make.
        first: First key of each block of queries, `(B or 1, row_tiles)`.
        last: The one after the last, likewise.
        band: What a window hides of the keys around any block of queries,
            `(rows, X)`; `None` if there is none, or tiles spell out what they hide.
        later: As many very low numbers as causality hides of a tile, `(X,)`; `None`
            if a window does so too, or tiles spell out what they hide.
    """

    batch: Any
    heads: Any
    rows: Any
    head_tiles: Any
    sections: Any
    row_tiles: Any
    first: Tensor
    last: Tensor
    band: Tensor | None
    later: Tensor | None


class Section(NamedTuple):
    """Some rows of the batch and some heads, with all their queries and keys.

    Attributes:
        batch: The rows of the batch.
        heads: The query heads.
        key_heads: The key heads.
        sizes: How many rows and query heads, as far as is known.
        key_sizes: How many rows and key heads, likewise.
        first: First key of each block of queries; `None` if it is the first of all.
        last: The one after its last; `None` if it is the last of all.
    """

    batch: slice
    heads: slice
    key_heads: slice
    sizes: tuple[int | None, int | None]
    key_sizes: tuple[int | None, int | None]
    first: Any = None
    last: Any = None

    def cut(self, tensor: Tensor) -> Tensor:
        """Cuts `(B, N, ...)`."""
        return self._sized(tensor[self.batch, self.heads], self.sizes)

    def cut_keys(self, tensor: Tensor) -> Tensor:
        """Cuts `(B, K, ...)`."""
        return self._sized(tensor[self.batch, self.key_heads], self.key_sizes)

    @staticmethod
    def _sized(tensor: Tensor, sizes: tuple[int | None, int | None]) -> Tensor:
        if not tf.executing_eagerly():
            tensor.set_shape((*sizes, *tensor.shape[2:]))
        return tensor


class Tile(NamedTuple):
    """Some queries of a section, and the range of keys that they may see.

    Attributes:
        section: The section.
        rows: The queries.
        columns: The keys.
        hidden: What a window hides, `(t, s)`; or `None`.
        later: The tiling's.
    """

    section: Section
    rows: slice
    columns: slice
    hidden: Tensor | None = None
    later: Tensor | None = None

    @property
    def lengths(self) -> tuple[Any, Any]:
        """T and s."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def cut_up(query: Tensor, key: Tensor, call: Call) -> Tiling:
    """Chooses tiles of about `_TILE` scores."""
    B, _, T, _ = sizes_of(query)
    K, S = sizes_of(key)[1:3]
    mask, width = call.mask, _width(call.mask)
    # One block of queries, if it is small: their gradients then need no summing up.
    # Small blocks leave out more of what an order hides.
    rows = _ROWS
    if width is None:
        rows = most(_TILE // most(S, 1), _FEWEST_ROWS)
    if mask.is_ordered:
        rows = least(rows, _ROWS)
    rows = most(least(rows, T), 1)
    span = S if width is None else least(S, rows + width)
    pairs = most(_TILE // (call.groups * rows * most(span, 1)), 1)
    batch = most(pairs // K, 1)
    if not isinstance(batch, int) or batch > 1:
        batch = most(least(B, batch), 1)
    if call.bias.pairs is not None and call.bias.pairs.shape[0] != 1:
        batch = 1  # tiles of one size, whose gradients can be laid side by side
    heads = greatest_divisor(K, pairs)
    first, last = (_one_or_more(ends) for ends in key_ranges(mask, T, S, rows))
    window_hides = later = None
    if mask.is_ordered and not call.tables:
        if width is None:
            count = batch * heads * call.groups * rows * least(rows, S)
            later = tf.fill((count,), tf.constant(-HIDDEN, query.dtype))
        else:
            window_hides = _window_band(rows, width, query.dtype)
    return Tiling(
        batch,
        heads,
        rows,
        K // heads,
        most(count_blocks(B, batch), 1) * (K // heads),
        most(count_blocks(T, rows), 1),
        first,
        last,
        window_hides,
        later,
    )


def _width(mask: MaskParts) -> Any:
    """How many keys of a window stand before the last one, or `None` without one."""
    if mask.lower is None or mask.upper is None:
        return None
    return most(mask.upper - mask.lower, 0)


def _window_band(rows: Any, width: Any, dtype: Any) -> Tensor:
    """Marks the keys that a window hides from each of `rows` queries, `(rows, X)`."""
    queries = tf.cast(tf.range(rows), "float32")
    keys = tf.cast(tf.range(rows + width), "float32")
    window = MaskParts(lower=0, upper=width)
    return hide(band(window, queries, keys), dtype)[0, 0]


def section_at(index: Any, tiling: Tiling, call: Call) -> Section:
    """The section of that number: all heads of the first rows, then the next rows."""
    start = index // tiling.head_tiles * tiling.batch
    batch = slice(start, start + tiling.batch)
    start = index % tiling.head_tiles * tiling.heads
    key_heads = slice(start, start + tiling.heads)
    heads = slice(start * call.groups, (start + tiling.heads) * call.groups)
    rows, shared, groups = (
        size if isinstance(size, int) else None
        for size in (tiling.batch, tiling.heads, call.groups)
    )
    if rows != 1:
        rows = None  # the last may have fewer
    wide = None if shared is None or groups is None else shared * groups
    section = Section(batch, heads, key_heads, (rows, wide), (rows, shared))
    if call.is_whole:
        return section
    # Bounded, because no row of an empty batch tells.
    first = tf.minimum(
        tf.reduce_min(pick(tiling.first, batch), axis=0), call.lengths[1]
    )
    last = tf.maximum(tf.reduce_max(pick(tiling.last, batch), axis=0), 0)
    first, last = _in_order(first, last)
    if call.is_prefix:  # also where a block sees nothing
        first = tf.zeros_like(first)
    return section._replace(first=first, last=last)


def _in_order(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Widens ranges so that neither end ever steps back, nor leaves a gap."""
    numbers = tf.range(tf.size(first))
    later = numbers[:, None] <= numbers
    first = tf.reduce_min(tf.where(later, first, first.dtype.max), axis=1)
    last = tf.reduce_max(tf.where(later, last[:, None], first[0]), axis=0)
    first = tf.minimum(first, tf.concat([first[:1], last[:-1]], axis=0))
    return first, tf.maximum(first, last)


def tile_at(section: Section, row: Any, tiling: Tiling, call: Call) -> Tile:
    """The tile of a section's block of queries of that number."""
    start = row * tiling.rows
    rows = slice(start, least(start + tiling.rows, call.lengths[0]))
    if section.first is None:
        return Tile(section, rows, slice(0, call.lengths[1]))
    first, last = section.first[row], section.last[row]
    tile = Tile(section, rows, slice(first, last))
    if tiling.band is None:
        return tile._replace(later=tiling.later)
    start += tf.cast(call.mask.lower, "int32")
    begin = tf.clip_by_value(start, first, last)
    skipped = tf.maximum(begin - start, 0)
    hidden = tiling.band[: tile.lengths[0], skipped : skipped + last - begin]
    if call.mask.key_padding is not None:
        # Ranges are stretched over padding between them.
        hidden = tf.pad(hidden, ((0, 0), (begin - first, 0)))
    return tile._replace(hidden=hidden)


def _one_or_more(ends: Tensor) -> Tensor:
    """Gives a sequence without queries one block of none."""
    missing = tf.maximum(1 - tf.shape(ends)[1], 0)
    return tf.pad(ends, tf.stack([[0, 0], [0, missing]]))


def distance_places(tile: Tile, call: Call) -> tuple[Any, Any]:
    """The places of a tile's distances among all there are."""
    first = tile.columns.start - tile.rows.stop + call.lengths[0]
    return first, first + sum(tile.lengths) - 1


def cut_pairs(pairs: Tensor, tile: Tile) -> Tensor:
    """Cuts `(B or 1, N or 1, T or 1, S or 1)`."""
    section = tile.section
    for axis, places in enumerate(
        (section.batch, section.heads, tile.rows, tile.columns)
    ):
        pairs = pick(pairs, places, axis)
    return pairs


def hide(visible: Tensor, dtype: Any) -> Tensor:
    """Returns the numbers that make scores of hidden pairs too low to count."""
    return (tf.cast(visible, dtype) - 1.0) * HIDDEN
