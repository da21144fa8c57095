"""Blockwise attention in TensorFlow's own operations, for eager calls and graphs.

On a CPU these beat XLA's code: one product, one softmax and one product for each
tile, which stays in the cache. A tile is a block of queries of some heads against
the range of keys that they may see, so memory grows with that range, not with T x S.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size, V head size of values. In a tile b, n, k, t and s stand for the parts of
B, N, K, T and S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_mha.attention.bias import Bias, sum_distances, table
from keras_mha.attention.blocks import key_ranges, rows_that_see
from keras_mha.attention.dropout import PairNoise, draw_pair_noise, keep_pairs
from keras_mha.attention.masks import (
    Mask,
    band,
    clear_padding,
    intersect,
    materialize,
    spell_out,
)
from keras_mha.attention.reference import wider
from keras_mha.typing import Tensor

_HIDDEN = 1e30
# Scores in a tile. Measured on two cores: half or twice as many are slower.
_TILE = 2**20
# Queries in a block, at most where an order hides keys, and at least where keys are
# many: fewer are slower, more take more memory.
_ROWS = 256
_FEWEST_ROWS = 64


class _Call(NamedTuple):
    """What stays the same for all tiles of one call.

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

    mask: Mask
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
        return self.is_prefix and not self.mask.is_causal

    @property
    def is_prefix(self) -> bool:
        """Whether every range of keys begins with the first key."""
        mask = self.mask
        return (
            mask.query_padding is None
            and mask.key_padding is None
            and mask.query_segments is None
            and mask.sliding_window is None
        )


class _Tiling(NamedTuple):
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


class _Section(NamedTuple):
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


class _Tile(NamedTuple):
    """Some queries of a section, and the range of keys that they may see.

    Attributes:
        section: The section.
        rows: The queries.
        columns: The keys.
        hidden: What a window hides, `(t, s)`; or `None`.
        later: The tiling's.
    """

    section: _Section
    rows: slice
    columns: slice
    hidden: Tensor | None = None
    later: Tensor | None = None

    @property
    def lengths(self) -> tuple[Any, Any]:
        """T and s."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


class _Probabilities(NamedTuple):
    """The softmax of a tile, and what its gradient needs.

    Attributes:
        pairs: `(b, n, t, s)`.
        sinks: `(b, n, t, 1)`, or `None`.
        slope: Derivative of the soft cap, `(b, n, t, s)`, or `None`.
    """

    pairs: Tensor
    sinks: Tensor | None = None
    slope: Tensor | None = None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    bias: Bias,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Mixes the values by the similarity of queries and keys, tile by tile.

    Args are those of `keras_mha.attention.blockwise.attend`. Returns the mixed
    values `(B, T, N, V)`.
    """
    dtype = query.dtype
    (B, T, N), (S, K) = _sizes(query)[:3], _sizes(key)[1:3]
    mask = spell_out(mask, T, S)
    tables = mask.pairs is not None or mask.query_segments is not None
    tables = tables or (logits_soft_cap is not None and mask.key_padding is not None)
    sees = mask.query_padding if tables else rows_that_see(mask, T, S)

    wide = wider(dtype.name)
    query, key, value = (tf.cast(x, wide) for x in (query, key, value))
    query = clear_padding(query * scale, sees)
    key = clear_padding(key, mask.key_padding)
    value = clear_padding(value, mask.key_padding)
    if mask.key_padding is not None and not tables:
        # Scores of padded keys come out of the product: no pass over the tile.
        column = (1.0 - tf.cast(mask.key_padding, wide)) * -_HIDDEN
        column = column[:, :, None, None] * tf.ones_like(key[..., :1])
        key = tf.concat([key, column], axis=-1)
        query = tf.concat([query, tf.ones_like(query[..., :1])], axis=-1)
    call = _Call(
        mask,
        Bias(*(None if part is None else tf.cast(part, wide) for part in bias)),
        draw_pair_noise(seed, (B, N, T), S) if dropout > 0 else None,
        dropout,
        logits_soft_cap,
        (T, S),
        N // K,
        tables,
    )
    query, key, value = (tf.transpose(x, (0, 2, 1, 3)) for x in (query, key, value))
    mixed = _mix(query, key, value, call)
    mixed = tf.transpose(mixed, (0, 2, 1, 3))
    return tf.cast(clear_padding(mixed, sees), dtype)


def _mix(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    """`(B, N, T, H)`, `(B, K, S, H)` and `(B, K, S, V)` to `(B, N, T, V)`."""
    tiling = _cut_up(query, key, call)

    # The parts of the bias are arguments, because only arguments have gradients.
    @tf.custom_gradient
    def mix(query: Any, key: Any, value: Any, *parts: Any) -> Any:
        left = iter(parts)
        bias = Bias(*(None if part is None else next(left) for part in call.bias))
        inner = call._replace(bias=bias)
        mixed = _forward(query, key, value, inner, tiling)

        def backward(upstream: Any) -> Any:
            return _backward(query, key, value, inner, tiling, mixed, upstream)

        return mixed, backward

    return mix(query, key, value, *(part for part in call.bias if part is not None))


def _cut_up(query: Tensor, key: Tensor, call: _Call) -> _Tiling:
    """Chooses tiles of about `_TILE` scores, of at most 512 queries."""
    B, _, T, _ = _sizes(query)
    K, S = _sizes(key)[1:3]
    mask, window = call.mask, call.mask.sliding_window
    # One block of queries, if it is small: their gradients then need no summing up.
    # Small blocks leave out more of what an order hides.
    rows = _ROWS
    if window is None:
        rows = _most(_TILE // _most(S, 1), _FEWEST_ROWS)
    if mask.is_ordered:
        rows = _least(rows, _ROWS)
    rows = _most(_least(rows, T), 1)
    span = S if window is None else _least(S, rows + 2 * window)
    pairs = _most(_TILE // (call.groups * rows * _most(span, 1)), 1)
    batch = _most(pairs // K, 1)
    if not isinstance(batch, int) or batch > 1:
        batch = _most(_least(B, batch), 1)
    if call.bias.pairs is not None and call.bias.pairs.shape[0] != 1:
        batch = 1  # tiles of one size, whose gradients can be laid side by side
    heads = _divisor(K, pairs)
    first, last = (_one_or_more(ends) for ends in key_ranges(mask, T, S, rows))
    window_hides = later = None
    if mask.is_ordered and not call.tables:
        if window is None:
            count = batch * heads * call.groups * rows * _least(rows, S)
            later = tf.fill((count,), tf.constant(-_HIDDEN, query.dtype))
        else:
            window_hides = _band(mask, rows, query.dtype)
    return _Tiling(
        batch,
        heads,
        rows,
        K // heads,
        _most(_count(B, batch), 1) * (K // heads),
        _most(_count(T, rows), 1),
        first,
        last,
        window_hides,
        later,
    )


def _band(mask: Mask, rows: Any, dtype: Any) -> Tensor:
    """What a window hides of the keys that any of `rows` queries sees, `(rows, X)`."""
    before = mask.sliding_window - 1
    width = rows + before + (0 if mask.is_causal else before)
    queries = tf.cast(tf.range(rows), "float32")
    keys = tf.cast(tf.range(width) - before, "float32")
    return _hide(band(mask._replace(offset=0), queries, keys), dtype)[0, 0]


def _forward(
    query: Tensor, key: Tensor, value: Tensor, call: _Call, tiling: _Tiling
) -> Tensor:
    """Mixes the values."""
    dtype, V = query.dtype, value.shape[-1]

    def section_step(index: Any, mixed: Any) -> Any:
        section = _section(index, tiling, call)
        tensors = section.cut(query), section.cut_keys(key), section.cut_keys(value)

        def row_step(row: Any, parts: _Rows) -> Any:
            tile = _tile(section, row, tiling, call)
            queries, keys, values, visible = _load(*tensors, tile, call)
            pairs = _probabilities(queries, keys, visible, tile, call).pairs
            if call.noise is not None:
                pairs = _drop(pairs, tile, call)
            part = _ungrouped(tf.matmul(_grouped(pairs, call), values), call)
            return (parts.write(row, _clear_blind(part, visible)),)

        parts = _Rows.empty(dtype, tiling.row_tiles, V)
        (parts,) = _loop(tiling.row_tiles, row_step, (parts,), parallel=2)
        return (mixed.write(index, _flat(parts.join())),)

    mixed = _array(dtype, tiling.sections, (None, None, V))
    (mixed,) = _loop(tiling.sections, section_step, (mixed,), parallel=2)
    return tf.reshape(mixed.concat(), (*_sizes(query)[:3], V))


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: _Call,
    tiling: _Tiling,
    mixed: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    """Gradients of queries, keys, values and the parts of the bias that there are.

    A tile's gradient of the scores is `P * (dP - delta)`, and `delta` is the same
    for all tiles of a query: Dao et al. 2022, "FlashAttention", section 3.1.
    """
    delta = tf.reduce_sum(upstream * mixed, axis=-1, keepdims=True)

    def section_step(index: Any, state: dict[str, Any]) -> Any:
        section = _section(index, tiling, call)
        tensors = (
            section.cut(query),
            section.cut_keys(key),
            section.cut_keys(value),
            section.cut(upstream),
            section.cut(delta),
        )

        def row_step(step: Any, inner: dict[str, Any]) -> Any:
            # The last block first, for `_add_keys`.
            row = tiling.row_tiles - 1 - step
            tile = _tile(section, row, tiling, call)
            found = _differentiate(*tensors, tile, call)
            inner = {
                **inner,
                "query": inner["query"].write(row, found["query"]),
                **{
                    name: inner[name].add(found[name], tile, row, call)
                    for name in ("key", "value")
                },
                **{
                    name: inner[name] + found[name]
                    for name in ("distances", "sinks")
                    if name in inner
                },
            }
            if "pairs" in inner:
                inner["pairs"] = _add_pairs(
                    inner["pairs"], found["biased"], index, row, tile, tiling, call
                )
            return (inner,)

        inner = {
            "query": _Rows.empty(query.dtype, tiling.row_tiles, query.shape[-1]),
            "key": _Keys.empty(tensors[1], section, tiling, call),
            "value": _Keys.empty(tensors[2], section, tiling, call),
            **_zeros_by_head(tensors[1], call),
            **{name: state[name] for name in state if name == "pairs"},
        }
        (inner,) = _loop(tiling.row_tiles, row_step, (inner,), parallel=1)
        found = {
            "query": _flat(inner["query"].join()),
            **{name: _flat(inner[name].join(section)) for name in ("key", "value")},
            **{name: inner[name] for name in inner if name in ("distances", "sinks")},
        }
        return (
            {
                **{name: state[name].write(index, found[name]) for name in found},
                **{name: inner[name] for name in inner if name == "pairs"},
            },
        )

    shaped = {"query": query, "key": key, "value": value}
    by_head = [
        name for name in ("distances", "sinks") if getattr(call.bias, name) is not None
    ]
    state: dict[str, Any] = {
        **{
            name: _array(query.dtype, tiling.sections, (None, None, like.shape[-1]))
            for name, like in shaped.items()
        },
        **{
            name: _array(query.dtype, tiling.sections, (None, None)) for name in by_head
        },
    }
    if call.bias.pairs is not None:
        state["pairs"] = _pair_array(call, tiling)
    (state,) = _loop(tiling.sections, section_step, (state,), parallel=2)
    gradients = [
        tf.reshape(state[name].concat(), _sizes(like)) for name, like in shaped.items()
    ]
    if call.bias.pairs is not None:
        gradients.append(_join_pairs(state["pairs"], call, tiling))
    for name in by_head:
        like = getattr(call.bias, name)
        gradients.append(_join_heads(state[name], like, tiling))
    return gradients


def _differentiate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    upstream: Tensor,
    delta: Tensor,
    tile: _Tile,
    call: _Call,
) -> dict[str, Tensor]:
    """A tile's gradients, and that of its biased scores."""
    queries, keys, values, visible = _load(query, key, value, tile, call)
    found = _probabilities(queries, keys, visible, tile, call)
    upstream, delta = (
        _clear_blind(_along(tensor, tile.rows), visible) for tensor in (upstream, delta)
    )
    grouped = _grouped(upstream, call)
    kept = found.pairs
    d_pairs = _ungrouped(tf.matmul(grouped, values, transpose_b=True), call)
    if call.noise is not None:
        kept, d_pairs = (_drop(pairs, tile, call) for pairs in (kept, d_pairs))
    biased = found.pairs * (d_pairs - delta)
    scores = _grouped(biased if found.slope is None else biased * found.slope, call)
    gradients = {
        "query": _ungrouped(tf.matmul(scores, keys), call),
        "key": tf.matmul(scores, _grouped(queries, call), transpose_a=True),
        "value": tf.matmul(_grouped(kept, call), grouped, transpose_a=True),
        "biased": biased,
    }
    if call.bias.distances is not None:
        gradients["distances"] = _sum_tile_distances(biased, tile, call)
    if found.sinks is not None:
        gradients["sinks"] = -tf.reduce_sum(found.sinks * delta, axis=(0, 2))
    return gradients


class _Rows(NamedTuple):
    """Blocks of queries to be laid end to end.

    Attributes:
        array: `(t, b, n, X)` each, for an array joins the first axis. `()` where
            there is but one block.
        only: That block, `(b, n, t, X)`.
    """

    array: Any = ()
    only: Any = ()

    @classmethod
    def empty(cls, dtype: Any, count: Any, width: int | None) -> _Rows:
        """Room for `count` blocks."""
        if isinstance(count, int) and count == 1:
            return cls()
        return cls(_array(dtype, count, (None, None, None, width)))

    def write(self, row: Any, part: Tensor) -> _Rows:
        """Puts `(b, n, t, X)` into its place."""
        if isinstance(self.array, tuple):
            return _Rows(only=part)
        return _Rows(self.array.write(row, tf.transpose(part, (2, 0, 1, 3))))

    def join(self) -> Tensor:
        """Returns `(b, n, T, X)`."""
        if isinstance(self.array, tuple):
            return self.only
        return tf.transpose(self.array.concat(), (1, 2, 0, 3))


class _Keys(NamedTuple):
    """A gradient of keys or values, summed up over the blocks of queries.

    Blocks come last first. Keys past the range of a block are then complete, for
    ranges never step back, and are put aside.

    Attributes:
        held: `(b, k, s, X)`: keys from where the last block that was added begins.
            `()` before there is any.
        done: What is complete, piece by piece.
    """

    held: Any = ()
    done: _Rows = _Rows()

    @classmethod
    def empty(
        cls, like: Tensor, section: _Section, tiling: _Tiling, call: _Call
    ) -> _Keys:
        """Nothing yet, for a section's keys or values `like`."""
        count = tiling.row_tiles
        if isinstance(count, int) and count == 1:
            return cls()
        b, k, length, width = _sizes(like)
        if not call.is_prefix:
            length -= section.last[-1]
        # One piece more, for what is held at the end, or that piece alone.
        done = _Rows.empty(like.dtype, 1 if call.is_whole else count + 1, width)
        return cls(tf.zeros((b, k, length, width), like.dtype), done)

    def add(self, part: Tensor, tile: _Tile, row: Any, call: _Call) -> _Keys:
        """Adds what a tile gives to its range of keys."""
        first, last, length = tile.columns.start, tile.columns.stop, call.lengths[1]
        if call.is_whole:
            return _Keys(part if isinstance(self.held, tuple) else self.held + part)
        if isinstance(self.done.array, tuple):
            around = ((0, 0), (0, 0), (first, length - last), (0, 0))
            return _Keys(tf.pad(part, around))
        start = 0
        if not call.is_prefix:
            section = tile.section
            start = tf.concat([section.first, section.last[-1:]], axis=0)[row + 1]
        done = self.done.write(row + 1, _along(self.held, slice(last - start, None)))
        held = _along(self.held, slice(last - start))
        if call.is_prefix:
            return _Keys(held + part, done)
        new = start - first
        joined = [_along(part, slice(new)), held + _along(part, slice(new, None))]
        return _Keys(tf.concat(joined, axis=2), done)

    def join(self, section: _Section) -> Tensor:
        """Returns `(b, k, S, X)`."""
        if isinstance(self.done.array, tuple):
            return self.held
        held = self.held
        if section.first is not None:
            held = tf.pad(held, ((0, 0), (0, 0), (section.first[0], 0), (0, 0)))
        return self.done.write(0, held).join()


def _section(index: Any, tiling: _Tiling, call: _Call) -> _Section:
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
    section = _Section(batch, heads, key_heads, (rows, wide), (rows, shared))
    if call.is_whole:
        return section
    # Bounded, because no row of an empty batch tells.
    first = tf.minimum(
        tf.reduce_min(_pick(tiling.first, batch), axis=0), call.lengths[1]
    )
    last = tf.maximum(tf.reduce_max(_pick(tiling.last, batch), axis=0), 0)
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


def _tile(section: _Section, row: Any, tiling: _Tiling, call: _Call) -> _Tile:
    start = row * tiling.rows
    rows = slice(start, _least(start + tiling.rows, call.lengths[0]))
    if section.first is None:
        return _Tile(section, rows, slice(0, call.lengths[1]))
    first, last = section.first[row], section.last[row]
    tile = _Tile(section, rows, slice(first, last))
    if tiling.band is None:
        return tile._replace(later=tiling.later)
    start += tf.cast(call.mask.offset, "int32") - (call.mask.sliding_window - 1)
    begin = tf.clip_by_value(start, first, last)
    skipped = tf.maximum(begin - start, 0)
    hidden = tiling.band[: tile.lengths[0], skipped : skipped + last - begin]
    if call.mask.key_padding is not None:
        # Ranges are stretched over padding between them.
        hidden = tf.pad(hidden, ((0, 0), (begin - first, 0)))
    return tile._replace(hidden=hidden)


def _load(
    query: Tensor, key: Tensor, value: Tensor, tile: _Tile, call: _Call
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Cuts a tile's `(b, n, t, H)`, `(b, k, s, H)` and `(b, k, s, V)` off a section's.

    Also returns what of it is visible, where tiles spell it out. Queries that see
    nothing, and keys that none of them sees, are zero then.
    """
    queries = _along(query, tile.rows)
    keys, values = (
        tensor if call.is_whole else _along(tensor, tile.columns)
        for tensor in (key, value)
    )
    if not call.tables:
        return queries, keys, values, None
    visible = _visible(tile, call)
    seen = tf.reduce_any(visible, axis=2)
    if seen.shape[1] != 1:
        b, _, s = _sizes(seen)
        seen = tf.reduce_any(tf.reshape(seen, (b, -1, call.groups, s)), axis=2)
    seen = seen[..., None]
    keys, values = (tf.where(seen, x, tf.zeros_like(x)) for x in (keys, values))
    return _clear_blind(queries, visible), keys, values, visible


def _visible(tile: _Tile, call: _Call) -> Tensor:
    """All that the mask says of a tile, `(b or 1, n or 1, t, s)`."""
    mask, batch = call.mask, tile.section.batch

    def cut(tensor: Tensor | None, places: slice) -> Tensor | None:
        return None if tensor is None else _pick(tensor, batch)[:, places]

    part = mask._replace(
        query_padding=cut(mask.query_padding, tile.rows),
        key_padding=cut(mask.key_padding, tile.columns),
        pairs=None if mask.pairs is None else _cut_pairs(mask.pairs, tile),
        query_segments=cut(mask.query_segments, tile.rows),
        key_segments=cut(mask.key_segments, tile.columns),
        is_causal=False,
        sliding_window=None,
    )
    rows, columns = (
        tf.cast(tf.range(places.start, places.stop), "float32")
        for places in (tile.rows, tile.columns)
    )
    visible = materialize(part, *tile.lengths)
    visible = intersect(visible, band(mask, rows, columns))
    return tf.broadcast_to(visible, (*_sizes(visible)[:2], *tile.lengths))


def _probabilities(
    query: Tensor, key: Tensor, visible: Any, tile: _Tile, call: _Call
) -> _Probabilities:
    bias, slope = call.bias, None
    query = _grouped(query, call)
    scores = _ungrouped(tf.matmul(query, key, transpose_b=True), call)
    if call.cap is not None:
        bounded = tf.tanh(scores * (1.0 / call.cap))
        scores, slope = bounded * call.cap, 1.0 - bounded * bounded
    if visible is not None:
        scores += _hide(visible, scores.dtype)
    elif tile.hidden is not None:
        scores += tile.hidden
    elif tile.later is not None:
        scores = _hide_later(scores, tile, call)
    if bias.pairs is not None:
        scores += _cut_pairs(bias.pairs, tile)
    if bias.distances is not None:
        numbers = _pick(bias.distances, tile.section.heads)
        scores += table(numbers[:, slice(*_distances(tile, call))], *tile.lengths)
    if bias.sinks is None:
        return _Probabilities(tf.nn.softmax(scores), None, slope)
    sinks = bias.sinks[tile.section.heads][:, None, None]
    sinks = tf.broadcast_to(sinks, (*_sizes(scores)[:3], 1))
    found: Any = tf.nn.softmax(tf.concat([scores, sinks], axis=-1))
    return _Probabilities(found[..., :-1], found[..., -1:], slope)


def _hide_later(scores: Tensor, tile: _Tile, call: _Call) -> Tensor:
    """Hides the keys that come after each query of a tile, on its last diagonals.

    A graph changes the scores where they are, since nothing else reads them.
    """
    t, s = tile.lengths
    first = tile.rows.start + tf.cast(call.mask.offset, "int32") - tile.columns.start
    first, last = tf.maximum(first + 1, 1 - t), tf.minimum(first + t - 1, s - 1)

    def hide() -> Tensor:
        longest = tf.minimum(t + tf.minimum(last, 0), s - tf.maximum(first, 0))
        # A single diagonal has no axis of diagonals. TensorFlow does not foresee that
        # where it does not know their number, and must not know the rank then.
        count = tf.fill((tf.cast(first < last, "int32"),), last - first + 1)
        shape = tf.concat([[*_sizes(scores)[:2]], count, [longest]], axis=0)
        hidden = tf.reshape(tile.later[: tf.reduce_prod(shape)], shape)
        hidden = _of_shape(hidden, None)
        return tf.linalg.set_diag(scores, hidden, k=tf.stack([first, last]))

    return tf.cond(first <= last, hide, lambda: scores)


def _hide(visible: Tensor, dtype: Any) -> Tensor:
    """What makes scores of hidden pairs so low that they do not count."""
    return (tf.cast(visible, dtype) - 1.0) * _HIDDEN


def _drop(pairs: Tensor, tile: _Tile, call: _Call) -> Tensor:
    """Drops what dropout drops of a tile, and scales the rest."""
    section = tile.section
    noise = PairNoise(
        call.noise.rows[section.batch, section.heads, tile.rows],
        call.noise.columns[tile.columns],
    )
    kept = tf.cast(keep_pairs(noise, call.dropout), pairs.dtype)
    return pairs * (kept * (1.0 / (1.0 - call.dropout)))


def _clear_blind(rows: Tensor, visible: Tensor | None) -> Tensor:
    """Zeroes what belongs to queries that see nothing, in `(b, n, t, ...)`."""
    if visible is None:
        return rows
    sees = tf.reduce_any(visible, axis=3, keepdims=True)
    return tf.where(sees, rows, tf.zeros_like(rows))


def _distances(tile: _Tile, call: _Call) -> tuple[Any, Any]:
    """The places of a tile's distances among all there are."""
    first = tile.columns.start - tile.rows.stop + call.lengths[0]
    return first, first + sum(tile.lengths) - 1


def _sum_tile_distances(d_biased: Tensor, tile: _Tile, call: _Call) -> Tensor:
    """A tile's gradient of the numbers for distances, `(n or 1, T + S - 1)`."""
    if call.bias.distances.shape[0] == 1:
        d_biased = tf.reduce_sum(d_biased, axis=1, keepdims=True)
    found = sum_distances(tf.reduce_sum(d_biased, axis=0))
    start, end = _distances(tile, call)
    return tf.pad(found, ((0, 0), (start, sum(call.lengths) - 1 - end)))


def _zeros_by_head(key: Tensor, call: _Call) -> dict[str, Tensor]:
    """Where a section of keys sums up the gradients of distances and sinks."""
    heads = _sizes(key)[1] * call.groups
    zeros = {}
    if call.bias.distances is not None:
        rows = 1 if call.bias.distances.shape[0] == 1 else heads
        zeros["distances"] = tf.zeros((rows, sum(call.lengths) - 1), key.dtype)
    if call.bias.sinks is not None:
        zeros["sinks"] = tf.zeros((heads, 1), key.dtype)
    return zeros


def _join_heads(found: tf.TensorArray, like: Tensor, tiling: _Tiling) -> Tensor:
    """Sums sections' `(n or 1, X)` over the batch, and lays heads under each other."""
    stacked = found.stack()
    rows, width = _sizes(stacked)[1:]
    stacked = tf.reshape(stacked, (-1, tiling.head_tiles * rows, width))
    joined = tf.reduce_sum(stacked, axis=0)
    if like.shape[0] == 1:
        joined = tf.reduce_sum(joined, axis=0, keepdims=True)
    shape: Any = tf.shape(like)
    return tf.reshape(joined, shape)


def _cut_pairs(pairs: Tensor, tile: _Tile) -> Tensor:
    """Cuts `(B or 1, N or 1, T or 1, S or 1)`."""
    section = tile.section
    for axis, places in enumerate(
        (section.batch, section.heads, tile.rows, tile.columns)
    ):
        pairs = _pick(pairs, places, axis)
    return pairs


def _pair_places(call: _Call, tiling: _Tiling) -> tuple[Any, ...]:
    """How many tiles the batch, the heads and the queries of a bias make."""
    tiles = (
        tiling.sections // tiling.head_tiles,
        tiling.head_tiles,
        tiling.row_tiles,
    )
    whole = (size == 1 for size in call.bias.pairs.shape)
    return tuple(1 if one else count for one, count in zip(whole, tiles, strict=False))


def _pair_array(call: _Call, tiling: _Tiling) -> tf.TensorArray:
    """An array for a bias' gradient, `(t or 1, n or 1, S or 1)` for each tile."""
    batch, heads, rows = _pair_places(call, tiling)
    return _array(call.bias.pairs.dtype, batch * heads * rows, (None, None, None))


def _add_pairs(
    found: tf.TensorArray,
    d_biased: Tensor,
    index: Any,
    row: Any,
    tile: _Tile,
    tiling: _Tiling,
    call: _Call,
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
    part = tf.cond(is_new, lambda: part, lambda: part + found.read(place))
    return found.write(place, part)


def _join_pairs(found: tf.TensorArray, call: _Call, tiling: _Tiling) -> Tensor:
    """Lays the tiles' gradients of the bias side by side."""
    batch, heads, _ = _pair_places(call, tiling)
    rows = found.concat()
    n, s = _sizes(rows)[1:]
    rows = tf.reshape(rows, (batch, heads, -1, n, s))
    rows = tf.transpose(rows, (0, 1, 3, 2, 4))
    return tf.reshape(rows, _sizes(call.bias.pairs))


def _one_or_more(ends: Tensor) -> Tensor:
    """Gives a sequence without queries one block of none."""
    missing = tf.maximum(1 - tf.shape(ends)[1], 0)
    return tf.pad(ends, tf.stack([[0, 0], [0, missing]]))


def _pick(tensor: Tensor, places: slice, axis: int = 0) -> Tensor:
    """Cuts along an axis, unless its one element is for all."""
    if tensor.shape[axis] == 1:
        return tensor
    return tensor[(*([slice(None)] * axis), places)]


def _along(tensor: Tensor, places: slice) -> Tensor:
    """Cuts `(b, n, t, X)` along its length: nothing is copied if that comes first."""
    if tuple(tensor.shape[:2]) != (1, 1):
        return tensor[:, :, places]
    return tf.reshape(tensor, _sizes(tensor)[2:])[places][None, None]


def _grouped(rows: Tensor, call: _Call) -> Tensor:
    """`(b, n, t, X)` to `(b, k, n / k * t, X)`: what shares keys, in one product."""
    if call.groups == 1:
        return rows
    b, n, t, width = _sizes(rows)
    return tf.reshape(rows, (b, n // call.groups, call.groups * t, width))


def _ungrouped(rows: Tensor, call: _Call) -> Tensor:
    if call.groups == 1:
        return rows
    b, k, length, width = _sizes(rows)
    return tf.reshape(rows, (b, k * call.groups, length // call.groups, width))


def _flat(part: Tensor) -> Tensor:
    """`(b, n, T, X)` to `(b * n, T, X)`."""
    b, n, T, width = _sizes(part)
    return tf.reshape(part, (b * n, T, width))


def _array(dtype: Any, size: Any, shape: tuple[int | None, ...]) -> tf.TensorArray:
    return tf.TensorArray(
        dtype, size=size, element_shape=shape, infer_shape=False, clear_after_read=False
    )


def _loop(count: Any, step: Callable[..., Any], state: Any, parallel: int) -> Any:
    """Runs `step(index, *state)` for each index; one step needs no loop."""
    if isinstance(count, int) and count == 1:
        return step(0, *state)

    def body(index: Any, *state: Any) -> Any:
        found = step(index, *state)
        return index + 1, *tf.nest.map_structure(_as_before, state, found)

    _, *state = tf.while_loop(
        lambda index, *_: index < count,
        body,
        (tf.constant(0), *tf.nest.map_structure(_of_any_length, state)),
        parallel_iterations=parallel,
    )
    return state


def _of_any_length(tensor: Any) -> Any:
    """Forgets the length of `(b, k, s, X)`, which changes from step to step."""
    if isinstance(tensor, tf.TensorArray) or len(tensor.shape) < 4:
        return tensor
    return _of_shape(tensor, (*tensor.shape[:2], None, tensor.shape[-1]))


def _of_shape(tensor: Tensor, shape: tuple[int | None, ...] | None) -> Tensor:
    """Lets a graph know no more of a shape than this."""
    if tf.executing_eagerly():
        return tensor
    return tf.raw_ops.PlaceholderWithDefault(
        input=tensor,
        shape=tf.TensorShape(shape).as_proto(),  # pyright: ignore[reportArgumentType]
    )


def _as_before(before: Any, tensor: Any) -> Any:
    if not isinstance(tensor, tf.TensorArray) and not tf.executing_eagerly():
        tensor.set_shape(before.shape)
    return tensor


def _sizes(tensor: Tensor) -> tuple[Any, ...]:
    """Dimensions as integers where they are known, else as scalars."""
    dynamic = tf.shape(tensor)
    return tuple(
        dynamic[axis] if size is None else size
        for axis, size in enumerate(tensor.shape)
    )


def _least(one: Any, other: Any) -> Any:
    if isinstance(one, int) and isinstance(other, int):
        return min(one, other)
    return tf.minimum(one, other)


def _most(one: Any, other: Any) -> Any:
    if isinstance(one, int) and isinstance(other, int):
        return max(one, other)
    return tf.maximum(one, other)


def _count(length: Any, size: Any) -> Any:
    return (length + size - 1) // size


def _divisor(number: int, most: Any) -> Any:
    """The greatest divisor of `number` that is not more than `most`."""
    divisors = [i for i in range(1, number + 1) if number % i == 0]
    if isinstance(most, int):
        return max(i for i in divisors if i <= most)
    return tf.reduce_max(tf.where(tf.constant(divisors) <= most, divisors, 1))
