"""Blockwise attention in TensorFlow's own operations, for eager calls and graphs.

On a CPU these beat XLA's code: one product, one softmax and one product for each
tile, which stays in the cache. A tile is a block of queries of some heads against
the range of keys that they may see (`tiles_tensorflow`), so memory grows with that
range, not with T x S.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size, V head size of values. In a tile b, n, k, t and s stand for the parts of
B, N, K, T and S.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from keras_mha.attention.bias import Bias, sum_distances, table
from keras_mha.attention.blockwise.loops_tensorflow import (
    array_of,
    cut_along,
    join_heads,
    loop,
    of_shape,
    pick,
    sizes_of,
)
from keras_mha.attention.blockwise.ranges import rows_that_see
from keras_mha.attention.blockwise.sums_tensorflow import (
    Keys,
    Rows,
    add_pairs,
    join_pairs,
    pair_array,
    sum_heads,
)
from keras_mha.attention.blockwise.tiles_tensorflow import (
    HIDDEN,
    Call,
    Tile,
    Tiling,
    cut_pairs,
    cut_up,
    distance_places,
    hide,
    section_at,
    tile_at,
)
from keras_mha.attention.dropout import PairNoise, draw_pair_noise, keep_pairs
from keras_mha.attention.mask_parts import (
    MaskParts,
    band,
    clear_padding,
    intersect,
    materialize,
    spell_out,
)
from keras_mha.attention.reference import wider
from keras_mha.typing import Tensor


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
    mask: MaskParts,
    bias: Bias,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Mixes the values by the similarity of queries and keys, tile by tile.

    Args are those of `keras_mha.attention.blockwise.front.attend`. Returns the mixed
    values `(B, T, N, V)`.
    """
    dtype = query.dtype
    (B, T, N), (S, K) = sizes_of(query)[:3], sizes_of(key)[1:3]
    mask = spell_out(mask, T, S)
    if mask.lower is not None and mask.upper is None:
        mask = mask._replace(upper=S)  # tiles know windows, with both their ends
    tables = mask.pairs is not None or mask.query_segments is not None
    tables = tables or (logits_soft_cap is not None and mask.key_padding is not None)
    sees = mask.query_padding if tables else rows_that_see(mask, T, S)

    wide = wider(dtype.name)
    query, key, value = [tf.cast(x, wide) for x in (query, key, value)]
    query = clear_padding(query * scale, sees)
    key = clear_padding(key, mask.key_padding)
    value = clear_padding(value, mask.key_padding)
    if mask.key_padding is not None and not tables:
        # Scores of padded keys come out of the product: no pass over the tile.
        column = (1.0 - tf.cast(mask.key_padding, wide)) * -HIDDEN
        column = column[:, :, None, None] * tf.ones_like(key[..., :1])
        key = tf.concat([key, column], axis=-1)
        query = tf.concat([query, tf.ones_like(query[..., :1])], axis=-1)
    call = Call(
        mask,
        Bias(*[None if part is None else tf.cast(part, wide) for part in bias]),
        draw_pair_noise(seed, (B, N, T), S) if dropout > 0 else None,
        dropout,
        logits_soft_cap,
        (T, S),
        N // K,
        tables,
    )
    query, key, value = [tf.transpose(x, (0, 2, 1, 3)) for x in (query, key, value)]
    mixed = _mix(query, key, value, call)
    mixed = tf.transpose(mixed, (0, 2, 1, 3))
    return tf.cast(clear_padding(mixed, sees), dtype)


def _mix(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """`(B, N, T, H)`, `(B, K, S, H)` and `(B, K, S, V)` to `(B, N, T, V)`."""
    tiling = cut_up(query, key, call)

    # The parts of the bias are arguments, because only arguments have gradients.
    @tf.custom_gradient
    def mix(query: Any, key: Any, value: Any, *parts: Any) -> Any:
        left = iter(parts)
        bias = Bias(*[None if part is None else next(left) for part in call.bias])
        inner = call._replace(bias=bias)
        mixed = _forward(query, key, value, inner, tiling)

        def backward(upstream: Any) -> Any:
            return _backward(query, key, value, inner, tiling, mixed, upstream)

        return mixed, backward

    return mix(query, key, value, *(part for part in call.bias if part is not None))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, call: Call, tiling: Tiling
) -> Tensor:
    """Mixes the values."""
    dtype, V = query.dtype, value.shape[-1]

    def section_step(index: Any, mixed: Any) -> Any:
        section = section_at(index, tiling, call)
        tensors = section.cut(query), section.cut_keys(key), section.cut_keys(value)

        def row_step(row: Any, parts: Rows) -> Any:
            tile = tile_at(section, row, tiling, call)
            queries, keys, values, visible = _load(*tensors, tile, call)
            pairs = _probabilities(queries, keys, visible, tile, call).pairs
            if call.noise is not None:
                pairs = _drop(pairs, tile, call)
            part = _ungrouped(tf.matmul(_grouped(pairs, call), values), call)
            return (parts.write(row, _clear_blind(part, visible)),)

        parts = Rows.empty(dtype, tiling.row_tiles, V)
        (parts,) = loop(tiling.row_tiles, row_step, (parts,), parallel=2)
        return (mixed.write(index, join_heads(parts.join())),)

    mixed = array_of(dtype, tiling.sections, (None, None, V))
    (mixed,) = loop(tiling.sections, section_step, (mixed,), parallel=2)
    return tf.reshape(mixed.concat(), (*sizes_of(query)[:3], V))


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    tiling: Tiling,
    mixed: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    """Gradients of queries, keys, values and the parts of the bias that there are.

    A tile's gradient of the scores is `P * (dP - delta)`, and `delta` is the same
    for all tiles of a query: Dao et al. 2022, "FlashAttention", section 3.1.
    """
    delta = tf.reduce_sum(upstream * mixed, axis=-1, keepdims=True)

    def section_step(index: Any, state: dict[str, Any]) -> Any:
        section = section_at(index, tiling, call)
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
            tile = tile_at(section, row, tiling, call)
            results = _differentiate(*tensors, tile, call)
            inner = {
                **inner,
                "query": inner["query"].write(row, results["query"]),
                **{
                    name: inner[name].add(results[name], tile, row, call)
                    for name in ("key", "value")
                },
                **{
                    name: inner[name] + results[name]
                    for name in ("distances", "sinks")
                    if name in inner
                },
            }
            if "pairs" in inner:
                inner["pairs"] = add_pairs(
                    inner["pairs"], results["biased"], index, row, tile, tiling, call
                )
            return (inner,)

        inner = {
            "query": Rows.empty(query.dtype, tiling.row_tiles, query.shape[-1]),
            "key": Keys.empty(tensors[1], section, tiling, call),
            "value": Keys.empty(tensors[2], section, tiling, call),
            **_zeros_by_head(tensors[1], call),
            **{name: state[name] for name in state if name == "pairs"},
        }
        (inner,) = loop(tiling.row_tiles, row_step, (inner,), parallel=1)
        results = {
            "query": join_heads(inner["query"].join()),
            **{
                name: join_heads(inner[name].join(section)) for name in ("key", "value")
            },
            **{name: inner[name] for name in inner if name in ("distances", "sinks")},
        }
        return (
            {
                **{name: state[name].write(index, results[name]) for name in results},
                **{name: inner[name] for name in inner if name == "pairs"},
            },
        )

    shaped = {"query": query, "key": key, "value": value}
    by_head = [
        name for name in ("distances", "sinks") if getattr(call.bias, name) is not None
    ]
    state: dict[str, Any] = {
        **{
            name: array_of(query.dtype, tiling.sections, (None, None, like.shape[-1]))
            for name, like in shaped.items()
        },
        **{
            name: array_of(query.dtype, tiling.sections, (None, None))
            for name in by_head
        },
    }
    if call.bias.pairs is not None:
        state["pairs"] = pair_array(call, tiling)
    (state,) = loop(tiling.sections, section_step, (state,), parallel=2)
    gradients = [
        tf.reshape(state[name].concat(), sizes_of(like))
        for name, like in shaped.items()
    ]
    if call.bias.pairs is not None:
        gradients.append(join_pairs(state["pairs"], call, tiling))
    for name in by_head:
        like = getattr(call.bias, name)
        gradients.append(sum_heads(state[name], like, tiling))
    return gradients


def _differentiate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    upstream: Tensor,
    delta: Tensor,
    tile: Tile,
    call: Call,
) -> dict[str, Tensor]:
    """A tile's gradients, and that of its biased scores."""
    queries, keys, values, visible = _load(query, key, value, tile, call)
    softmax = _probabilities(queries, keys, visible, tile, call)
    upstream, delta = (
        _clear_blind(cut_along(tensor, tile.rows), visible)
        for tensor in (upstream, delta)
    )
    grouped = _grouped(upstream, call)
    dropped = softmax.pairs
    d_pairs = _ungrouped(tf.matmul(grouped, values, transpose_b=True), call)
    if call.noise is not None:
        dropped, d_pairs = (_drop(pairs, tile, call) for pairs in (dropped, d_pairs))
    biased = softmax.pairs * (d_pairs - delta)
    scores = _grouped(biased if softmax.slope is None else biased * softmax.slope, call)
    gradients = {
        "query": _ungrouped(tf.matmul(scores, keys), call),
        "key": tf.matmul(scores, _grouped(queries, call), transpose_a=True),
        "value": tf.matmul(_grouped(dropped, call), grouped, transpose_a=True),
        "biased": biased,
    }
    if call.bias.distances is not None:
        gradients["distances"] = _sum_tile_distances(biased, tile, call)
    if softmax.sinks is not None:
        gradients["sinks"] = -tf.reduce_sum(softmax.sinks * delta, axis=(0, 2))
    return gradients


def _load(
    query: Tensor, key: Tensor, value: Tensor, tile: Tile, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Cuts a tile's `(b, n, t, H)`, `(b, k, s, H)` and `(b, k, s, V)` off a section's.

    Also returns what of it is visible, where tiles spell it out. Queries that see
    nothing, and keys that none of them sees, are zero then.
    """
    queries = cut_along(query, tile.rows)
    keys, values = key, value
    if not call.is_whole:
        keys, values = cut_along(key, tile.columns), cut_along(value, tile.columns)
    if not call.tables:
        return queries, keys, values, None
    visible = _visible(tile, call)
    seen = tf.reduce_any(visible, axis=2)
    if seen.shape[1] != 1:
        b, _, s = sizes_of(seen)
        seen = tf.reduce_any(tf.reshape(seen, (b, -1, call.groups, s)), axis=2)
    seen = seen[..., None]
    keys, values = (tf.where(seen, x, tf.zeros_like(x)) for x in (keys, values))
    return _clear_blind(queries, visible), keys, values, visible


def _visible(tile: Tile, call: Call) -> Tensor:
    """All that the mask says of a tile, `(b or 1, n or 1, t, s)`."""
    mask, batch = call.mask, tile.section.batch

    def cut(tensor: Tensor | None, places: slice) -> Tensor | None:
        return None if tensor is None else pick(tensor, batch)[:, places]

    part = mask._replace(
        query_padding=cut(mask.query_padding, tile.rows),
        key_padding=cut(mask.key_padding, tile.columns),
        pairs=None if mask.pairs is None else cut_pairs(mask.pairs, tile),
        query_segments=cut(mask.query_segments, tile.rows),
        key_segments=cut(mask.key_segments, tile.columns),
        lower=None,
        upper=None,
    )
    rows, columns = (
        tf.cast(tf.range(places.start, places.stop), "float32")
        for places in (tile.rows, tile.columns)
    )
    visible = materialize(part, *tile.lengths)
    visible = intersect(visible, band(mask, rows, columns))
    return tf.broadcast_to(visible, (*sizes_of(visible)[:2], *tile.lengths))


def _probabilities(
    query: Tensor, key: Tensor, visible: Any, tile: Tile, call: Call
) -> _Probabilities:
    bias, slope = call.bias, None
    query = _grouped(query, call)
    scores = _ungrouped(tf.matmul(query, key, transpose_b=True), call)
    if call.cap is not None:
        bounded = tf.tanh(scores * (1.0 / call.cap))
        scores, slope = bounded * call.cap, 1.0 - bounded * bounded
    if visible is not None:
        scores += hide(visible, scores.dtype)
    elif tile.hidden is not None:
        scores += tile.hidden
    elif tile.later is not None:
        scores = _hide_later(scores, tile, call)
    if bias.pairs is not None:
        scores += cut_pairs(bias.pairs, tile)
    if bias.distances is not None:
        numbers = pick(bias.distances, tile.section.heads)
        scores += table(numbers[:, slice(*distance_places(tile, call))], *tile.lengths)
    if bias.sinks is None:
        return _Probabilities(tf.nn.softmax(scores), None, slope)
    sinks = bias.sinks[tile.section.heads][:, None, None]
    sinks = tf.broadcast_to(sinks, (*sizes_of(scores)[:3], 1))
    joined: Any = tf.nn.softmax(tf.concat([scores, sinks], axis=-1))
    return _Probabilities(joined[..., :-1], joined[..., -1:], slope)


def _hide_later(scores: Tensor, tile: Tile, call: Call) -> Tensor:
    """Hides the keys that come after each query of a tile, on its last diagonals.

    A graph changes the scores where they are, since nothing else reads them.
    """
    t, s = tile.lengths
    first = tile.rows.start + tf.cast(call.mask.upper, "int32") - tile.columns.start
    first, last = tf.maximum(first + 1, 1 - t), tf.minimum(first + t - 1, s - 1)

    def changed() -> Tensor:
        longest = tf.minimum(t + tf.minimum(last, 0), s - tf.maximum(first, 0))
        # A single diagonal has no axis of diagonals. TensorFlow does not foresee that
        # where it does not know their number, and must not know the rank then.
        count = tf.fill((tf.cast(first < last, "int32"),), last - first + 1)
        shape = tf.concat([[*sizes_of(scores)[:2]], count, [longest]], axis=0)
        hidden = tf.reshape(tile.later[: tf.reduce_prod(shape)], shape)
        hidden = of_shape(hidden, None)
        return tf.linalg.set_diag(scores, hidden, k=tf.stack([first, last]))

    return tf.cond(first <= last, changed, lambda: scores)


def _drop(pairs: Tensor, tile: Tile, call: Call) -> Tensor:
    """Drops what dropout drops of a tile, and scales the rest."""
    section = tile.section
    noise = PairNoise(
        call.noise.rows[section.batch, section.heads, tile.rows],
        call.noise.columns[tile.columns],
    )
    keeps = tf.cast(keep_pairs(noise, call.dropout), pairs.dtype)
    return pairs * (keeps * (1.0 / (1.0 - call.dropout)))


def _clear_blind(rows: Tensor, visible: Tensor | None) -> Tensor:
    """Zeroes what belongs to queries that see nothing, in `(b, n, t, ...)`."""
    if visible is None:
        return rows
    sees = tf.reduce_any(visible, axis=3, keepdims=True)
    return tf.where(sees, rows, tf.zeros_like(rows))


def _sum_tile_distances(d_biased: Tensor, tile: Tile, call: Call) -> Tensor:
    """A tile's gradient of the numbers for distances, `(n or 1, T + S - 1)`."""
    if call.bias.distances.shape[0] == 1:
        d_biased = tf.reduce_sum(d_biased, axis=1, keepdims=True)
    sums = sum_distances(tf.reduce_sum(d_biased, axis=0))
    start, end = distance_places(tile, call)
    return tf.pad(sums, ((0, 0), (start, sum(call.lengths) - 1 - end)))


def _zeros_by_head(key: Tensor, call: Call) -> dict[str, Tensor]:
    """Where a section of keys sums up the gradients of distances and sinks."""
    heads = sizes_of(key)[1] * call.groups
    zeros = {}
    if call.bias.distances is not None:
        rows = 1 if call.bias.distances.shape[0] == 1 else heads
        zeros["distances"] = tf.zeros((rows, sum(call.lengths) - 1), key.dtype)
    if call.bias.sinks is not None:
        zeros["sinks"] = tf.zeros((heads, 1), key.dtype)
    return zeros


def _grouped(rows: Tensor, call: Call) -> Tensor:
    """`(b, n, t, X)` to `(b, k, n / k * t, X)`: what shares keys, in one product."""
    if call.groups == 1:
        return rows
    b, n, t, width = sizes_of(rows)
    return tf.reshape(rows, (b, n // call.groups, call.groups * t, width))


def _ungrouped(rows: Tensor, call: Call) -> Tensor:
    if call.groups == 1:
        return rows
    b, k, length, width = sizes_of(rows)
    return tf.reshape(rows, (b, k * call.groups, length // call.groups, width))
