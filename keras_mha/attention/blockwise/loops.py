"""Blockwise attention on `keras.ops` alone, with shapes that XLA can compile.

A block of queries meets one block of keys after another. A running maximum and sum
stand in for the softmax, whose scores are never stored but computed again for the
gradient. Blocks that causality, window, segments or padding rule out are left out.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax";
Rabe and Staats 2021, "Self-attention does not need O(n^2) memory"; Dao 2024,
"FlashAttention-2".

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G
query heads to each of them, H head size, V head size of the values. In a block b, t
and s stand for the parts of B, T and S.

Blocks of scores are laid out transposed, `(b, K, s, G, t)`: with queries and keys
brought into the layouts that products want once, outside the loops, none of the
gradient's five products has a block of scores to transpose. Measured in XLA on a
CPU, that takes two thirds of the time of separate passes for queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from keras import backend, ops

from keras_mha.attention.bias import Bias, sum_distances, table
from keras_mha.attention.blockwise import layout
from keras_mha.attention.blockwise.ranges import key_ranges
from keras_mha.attention.dropout import PairNoise, draw_pair_noise, keep_pairs
from keras_mha.attention.gradient import with_gradient
from keras_mha.attention.mask_parts import (
    MaskParts,
    clear_padding,
    intersect,
    materialize,
    spell_out,
)
from keras_mha.attention.reference import wider
from keras_mha.typing import Shape, Tensor


class Blocks(NamedTuple):
    """Sizes of the blocks: rows of the batch (a divisor of B), queries and keys."""

    b: int
    t: int
    s: int


# Measured on two cores: longer blocks skip less of a band, shorter ones are slower.
_LONGEST = 256
# Scores of a block that holds all pairs of several rows of the batch.
_SCORES = 2**20
# Blocks of short lengths are multiples of this, for vector instructions.
_VECTOR = 8


class _Inputs(NamedTuple):
    """Holds what has a gradient, in float32 or wider, filled up to whole blocks.

    Attributes:
        query: `(B, T, N, H)`, scaled.
        key: `(B, S, K, H)`.
        value: `(B, S, K, V)`.
        bias: Laid out as the scores: `pairs` is `(B or 1, N or 1, S or 1, T or 1)`,
            and `distances` are of queries from keys, `1 - S` to `T - 1`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Bias


class _Call(NamedTuple):
    """The rest of a call.

    Attributes:
        mask: The mask, spelled out and filled up; `pairs` as in the bias.
        noise: What dropout decides by, filled up, or `None`.
        first: First block of keys for each block of queries, `(B / b or 1, T / t)`.
        last: The one after the last, likewise.
        key_length: S, filled up.
        blocks: Sizes of the blocks.
        cap: Bound of the scores before the bias, or `None`.
        dropout: Share of the probabilities to drop.
    """

    mask: MaskParts
    noise: PairNoise | None
    first: Tensor
    last: Tensor
    key_length: Any
    blocks: Blocks
    cap: float | None
    dropout: float

    def key_blocks(self, place: layout.Place) -> tuple[Tensor, Tensor]:
        """First block of keys for a block of queries, and the one after the last."""
        index = {"b": (place["b"][0], 1), "t": (place["t"][0], 1)}
        ends = (
            layout.cut(ends, "bt", index, broadcasts=True)
            for ends in (self.first, self.last)
        )
        first, last = (ops.reshape(end, ()) for end in ends)
        return first, last

    def span(
        self, distances: Tensor, place: layout.Place
    ) -> tuple[list[Any], list[Any]]:
        """Start and size of the part of `_Inputs.bias.distances` that a block has."""
        (row, t), (column, s) = place["t"], place["s"]
        start = self.key_length - (column + 1) * s + row * t
        return [0, start], [layout.shape(distances)[0], s + t - 1]

    def visible(self, place: layout.Place, heads: int) -> Tensor | None:
        """Which pairs of a block count, broadcastable to `(b, K, s, G, t)`."""
        mask = self.mask
        (row, t), (column, s) = place["t"], place["s"]
        shift = row * t - column * s
        block = mask._replace(
            query_padding=layout.cut_mask(mask.query_padding, "bt", place),
            key_padding=layout.cut_mask(mask.key_padding, "bs", place),
            pairs=None,
            query_segments=layout.cut_mask(mask.query_segments, "bt", place),
            key_segments=layout.cut_mask(mask.key_segments, "bs", place),
            lower=None if mask.lower is None else mask.lower + shift,
            upper=None if mask.upper is None else mask.upper + shift,
        )
        visible = materialize(block, t, s)
        visible = intersect(
            None if visible is None else ops.swapaxes(visible, 2, 3),
            layout.cut_mask(mask.pairs, "bnst", place),
        )
        return None if visible is None else layout.as_scores(visible, heads)

    def drop(self, weights: Tensor, place: layout.Place) -> Tensor:
        """Applies dropout to a block `(b, K, s, G, t)`: the same pairs every time."""
        if self.noise is None:
            return weights
        b, K, _, G, t = layout.shape(weights)
        rows = ops.reshape(layout.cut(self.noise.rows, "bnt", place), (b, K, 1, G * t))
        transposed = PairNoise(layout.cut(self.noise.columns, "s", place), rows)
        keeps = keep_pairs(transposed, self.dropout)
        raised = weights * (1.0 / (1.0 - self.dropout))
        return layout.clear(raised, ops.reshape(keeps, layout.shape(weights)))

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        bias: Bias,
        visible: Tensor | None,
        place: layout.Place,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of a block, `(b, K, s, G, t)`, and the slope of the soft cap.

        Args:
            query: `(b, K, H, G, t)`.
            key: `(b, K, s, H)`.
            bias: The whole bias.
            visible: As above.
            place: Where the block lies.
        """
        (b, K, _, G, t), s = layout.shape(query), self.blocks.s
        scores = ops.reshape(ops.matmul(key, layout.join(query)), (b, K, s, G, t))
        slope = None
        if self.cap is not None:
            bounded = ops.tanh(scores * (1.0 / self.cap))
            scores, slope = bounded * self.cap, 1.0 - bounded * bounded
        if bias.pairs is not None:
            block = layout.cut(bias.pairs, "bnst", place, broadcasts=True)
            scores = scores + layout.as_scores(block, K)
        if bias.distances is not None:
            distances = ops.slice(bias.distances, *self.span(bias.distances, place))
            block = ops.expand_dims(table(distances, s, t), 0)
            scores = scores + layout.as_scores(block, K)
        if visible is not None:
            scores = ops.where(visible, scores, layout.lowest(scores.dtype))
        # Masks and biases of unknown shape make the sum lose its static shape.
        return ops.reshape(scores, (b, K, s, G, t)), slope


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
    blocks: Blocks | None = None,
) -> Tensor:
    """Mixes the values; see `keras_mha.attention.blockwise.front.attend`.

    Args:
        query: `(B, T, N, H)`.
        key: `(B, S, K, H)`.
        value: `(B, S, K, V)`.
        mask: What may attend to what.
        bias: What joins the scores.
        scale: Factor of the scores.
        logits_soft_cap: Bound of the scores before the bias.
        dropout: Share of the probabilities to drop.
        seed: Seed tensor `(2,)`; needed where `dropout > 0`.
        blocks: Sizes of the blocks. Defaults to what was measured to be fast.

    Returns:
        The mixed values `(B, T, N, V)` in the dtype of `query`.
    """
    dtype = backend.standardize_dtype(query.dtype)
    wide = wider(dtype)
    (B, T, N, _), S = layout.shape(query), layout.shape(key)[1]
    blocks = blocks or _choose_blocks((B, N, T, S))
    lengths = {
        "t": (T, layout.round_up(T, blocks.t)),
        "s": (S, layout.round_up(S, blocks.s)),
    }
    mask = spell_out(mask, T, S)
    first, last = key_ranges(mask, T, S, blocks.t)
    query = clear_padding(ops.cast(query, wide) * scale, mask.query_padding)
    key = clear_padding(ops.cast(key, wide), mask.key_padding)
    value = clear_padding(ops.cast(value, wide), mask.key_padding)
    noise = draw_pair_noise(seed, (B, N, T), S) if dropout > 0 else None
    inputs = _Inputs(
        _fill_up(query, "btnh", lengths),
        _fill_up(key, "bskh", lengths),
        _fill_up(value, "bskv", lengths),
        _fill_up_bias(bias, lengths, wide),
    )
    call = _Call(
        _fill_up_mask(mask, lengths),
        noise
        and PairNoise(
            _fill_up(noise.rows, "bnt", lengths), _fill_up(noise.columns, "s", lengths)
        ),
        layout.of_rows(first, blocks.b, ops.min) // blocks.s,
        (layout.of_rows(last, blocks.b, ops.max) + blocks.s - 1) // blocks.s,
        lengths["s"][1],
        blocks,
        logits_soft_cap,
        dropout,
    )
    mixed = with_gradient(_mix, inputs, call)
    return ops.cast(mixed[:, :T], dtype)


def _choose_blocks(sizes: tuple[Any, Any, Any, Any]) -> Blocks:
    """Chooses blocks for `(B, N, T, S)` that need little filling up.

    Rows of the batch share a block where it holds all their pairs; otherwise each
    leaves out its own blocks of keys.
    """
    B, N, T, S = sizes
    t, s = (
        layout.round_up(layout.count(length, layout.count(length, _LONGEST)), _VECTOR)
        if isinstance(length, int) and length > 0
        else _LONGEST
        for length in (T, S)
    )
    rows = 1
    if all(isinstance(size, int) for size in sizes) and max(T - t, S - s) <= 0:
        fitting = range(1, _SCORES // (N * t * s) + 1)
        rows = max((b for b in fitting if B % b == 0), default=1)
    return Blocks(rows, t, s)


def _fill_up(x: Tensor, letters: str, lengths: Mapping[str, tuple[Any, Any]]) -> Tensor:
    """Fills axes up with zeros; those that broadcast stay as they are.

    Args:
        x: A tensor, or `None`.
        letters: One for each axis.
        lengths: The length there is and the one wanted, by the letters of axes.
    """
    if x is None:
        return None
    missing = []
    for dim, letter in zip(layout.shape(x), letters, strict=True):
        length, wanted = lengths.get(letter, (dim, dim))
        full = dim == length
        if not isinstance(full, bool):
            full = ops.cast(full, "int32")
        missing.append((0, (wanted - length) * full))
    return ops.pad(x, missing)


def _fill_up_bias(
    bias: Bias, lengths: Mapping[str, tuple[Any, Any]], dtype: str
) -> Bias:
    """Fills a bias up, widens it, and turns its distances to those from keys."""
    pairs, distances, sinks = (
        None if part is None else ops.cast(part, dtype) for part in bias
    )
    pairs = layout.transpose(_fill_up(pairs, "bnts", lengths))
    if distances is not None:
        (T, filled_T), (S, filled_S) = lengths["t"], lengths["s"]
        around = ((0, 0), (filled_T - T, filled_S - S))
        distances = ops.flip(ops.pad(distances, around), axis=1)
    return Bias(pairs, distances, sinks)


def _fill_up_mask(mask: MaskParts, lengths: Mapping[str, tuple[Any, Any]]) -> MaskParts:
    """Fills a mask up, and hides the keys that were added."""
    S, wanted = lengths["s"]
    padding = _fill_up(mask.key_padding, "bs", lengths)
    if padding is None and not (isinstance(S, int) and wanted == S):
        padding = ops.expand_dims(ops.arange(wanted, dtype="int32") < S, 0)
    return mask._replace(
        query_padding=_fill_up(mask.query_padding, "bt", lengths),
        key_padding=padding,
        pairs=layout.transpose(_fill_up(mask.pairs, "bnts", lengths)),
        query_segments=_fill_up(mask.query_segments, "bt", lengths),
        key_segments=_fill_up(mask.key_segments, "bs", lengths),
    )


def _mix(inputs: _Inputs, call: _Call) -> tuple[Tensor, Callable[[Tensor], _Inputs]]:
    """`(B, T, N, V)`, and the function that maps its gradient to those of `inputs`."""
    mixed, normalizer, sees = _forward(inputs, call)

    def backward(upstream: Tensor) -> _Inputs:
        return _backward(inputs, call, mixed, normalizer, sees, upstream)

    return layout.from_columns(mixed), backward


def _forward(inputs: _Inputs, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """Mixes the values.

    Returns:
        The mixed values `(B, K, V, G, T)`; and for each query, `(B, K, 1, G, T)`, the
        logarithm of the sum of its exponential scores, and whether it sees a key.
    """
    (b, t, s), K = call.blocks, inputs.key.shape[2]
    query = layout.columns(inputs.query, K)
    key = ops.transpose(inputs.key, (0, 2, 1, 3))
    value = ops.transpose(inputs.value, (0, 2, 3, 1))
    B, _, _, G, T = layout.shape(query)
    V, dtype = layout.shape(value)[2], query.dtype

    def query_step(step: Tensor, *whole: Tensor) -> tuple[Tensor, ...]:
        place = _query_place(step, T, call.blocks)
        columns = layout.cut(query, "bkhgt", place)

        def key_step(
            index: Tensor, mixed: Tensor, highest: Tensor, total: Tensor
        ) -> tuple[Tensor, ...]:
            here = {**place, "s": (index, s)}
            visible = call.visible(here, K)
            values = layout.clear_unseen(layout.cut(value, "bkvs", here), visible, 2)
            scores, _ = call.scores(
                columns, layout.cut(key, "bksh", here), inputs.bias, visible, here
            )
            higher = ops.maximum(highest, ops.max(scores, axis=2, keepdims=True))
            weights, fade = ops.exp(scores - higher), ops.exp(highest - higher)
            total = total * fade + ops.sum(weights, axis=2, keepdims=True)
            product = ops.matmul(values, layout.join(call.drop(weights, here)))
            mixed = mixed * fade + ops.reshape(product, (b, K, V, G, t))
            return mixed, higher, total

        parts = (
            ops.zeros((b, K, V, G, t), dtype),
            # Higher than a hidden score, whose exponential is then zero.
            ops.full((b, K, 1, G, t), layout.lowest(dtype) / 2, dtype),
            ops.zeros((b, K, 1, G, t), dtype),
        )
        parts = layout.loop(*call.key_blocks(place), key_step, parts)
        return tuple(
            layout.put(all_parts, "bkvgt", place, part)
            for all_parts, part in zip(whole, parts, strict=True)
        )

    whole = tuple(ops.zeros((B, K, size, G, T), dtype) for size in (V, 1, 1))
    mixed, highest, total = layout.loop(0, (B // b) * (T // t), query_step, whole)
    # Not `total > 0`, which is False for NaN: NaN must stay NaN.
    sees = ops.not_equal(total, 0)
    if inputs.bias.sinks is not None:
        sinks = ops.reshape(inputs.bias.sinks, (1, K, 1, G, 1))
        higher = ops.maximum(highest, sinks)
        fade = ops.exp(highest - higher)
        mixed, highest = mixed * fade, higher
        total = total * fade + ops.exp(sinks - higher)
    total = ops.where(ops.equal(total, 0), ops.ones_like(total), total)
    return mixed / total, highest + ops.log(total), sees


def _backward(
    inputs: _Inputs,
    call: _Call,
    mixed: Tensor,
    normalizer: Tensor,
    sees: Tensor,
    upstream: Tensor,
) -> _Inputs:
    """Computes the probabilities again, and all gradients from them.

    With `P` the probabilities, the gradient of the scores is `P * (dP - delta)`.
    `delta`, the sum of `P * dP` over the keys, is that of the output times its own
    gradient over the head: Dao et al. 2022, "FlashAttention", appendix B.2.
    """
    (b, t, s), K, bias = call.blocks, inputs.key.shape[2], inputs.bias
    query, outer = (
        layout.clear(layout.columns(x, K), sees) for x in (inputs.query, upstream)
    )
    query_rows, outer_rows = (ops.transpose(x, (0, 1, 3, 4, 2)) for x in (query, outer))
    key, value = (ops.transpose(x, (0, 2, 1, 3)) for x in (inputs.key, inputs.value))
    key_columns = ops.transpose(inputs.key, (0, 2, 3, 1))
    delta = ops.sum(outer * mixed, axis=2, keepdims=True)
    B, _, H, G, T = layout.shape(query)

    def query_step(
        step: Tensor, d_query: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        place = _query_place(step, T, call.blocks)
        columns, outer_columns, norm, offset = (
            layout.cut(x, "bkhgt", place) for x in (query, outer, normalizer, delta)
        )
        rows, outer_block = (
            ops.reshape(layout.cut(x, "bkgth", place), (b, K, G * t, x.shape[-1]))
            for x in (query_rows, outer_rows)
        )

        def key_step(
            index: Tensor,
            d_columns: Tensor,
            d_key: Tensor,
            d_value: Tensor,
            d_pairs: Tensor,
            d_distances: Tensor,
        ) -> tuple[Tensor, ...]:
            here = {**place, "s": (index, s)}
            visible = call.visible(here, K)
            keys, values = (
                layout.clear_unseen(layout.cut(x, "bksh", here), visible, 3)
                for x in (key, value)
            )
            scores, slope = call.scores(columns, keys, bias, visible, here)
            weights = ops.exp(scores - norm)
            product = ops.matmul(layout.join(call.drop(weights, here)), outer_block)
            d_value = layout.add(d_value, "bksv", here, product)
            d_weights = ops.matmul(values, layout.join(outer_columns))
            d_weights = ops.reshape(d_weights, (b, K, s, G, t))
            d_scores = weights * (call.drop(d_weights, here) - offset)
            if bias.pairs is not None:
                d_pairs = _add_pairs(d_pairs, here, d_scores)
            if bias.distances is not None:
                d_distances = _add_distances(d_distances, call, here, d_scores)
            d_scores = layout.join(d_scores if slope is None else d_scores * slope)
            d_key = layout.add(d_key, "bksh", here, ops.matmul(d_scores, rows))
            keys = layout.clear_unseen(
                layout.cut(key_columns, "bkhs", here), visible, 2
            )
            product = ops.reshape(ops.matmul(keys, d_scores), (b, K, H, G, t))
            return d_columns + product, d_key, d_value, d_pairs, d_distances

        state = (ops.zeros((b, K, H, G, t), query.dtype), *others)
        d_columns, *sums = layout.loop(*call.key_blocks(place), key_step, state)
        return layout.put(d_query, "bkhgt", place, d_columns), *sums

    # An absent part of the bias keeps its place in the loops' state.
    parts = (0.0 if part is None else part for part in bias[:2])
    state = tuple(ops.zeros_like(x) for x in (query, key, value, *parts))
    d_query, d_key, d_value, d_pairs, d_distances = layout.loop(
        0, (B // b) * (T // t), query_step, state
    )
    d_sinks = None
    if bias.sinks is not None:
        weights = ops.exp(ops.reshape(bias.sinks, (1, K, 1, G, 1)) - normalizer)
        d_sinks = ops.reshape(ops.sum(weights * -delta, axis=(0, 2, 4)), (K * G,))
    return _Inputs(
        layout.from_columns(d_query),
        ops.transpose(d_key, (0, 2, 1, 3)),
        ops.transpose(d_value, (0, 2, 1, 3)),
        Bias(d_pairs, d_distances, d_sinks),
    )


def _add_pairs(total: Tensor, place: layout.Place, gradient: Tensor) -> Tensor:
    """Adds what a block `(b, K, s, G, t)` gives to the gradient of `Bias.pairs`."""
    b, K, s, G, t = layout.shape(gradient)
    gradient = ops.transpose(gradient, (0, 1, 3, 2, 4))
    gradient = ops.reshape(gradient, (b, K * G, s, t))
    starts, sizes = layout.extent(total, "bnst", place, broadcasts=True)
    sums = ops.slice(total, starts, sizes) + _sum_to(gradient, sizes)
    return ops.slice_update(total, starts, sums)


def _add_distances(
    total: Tensor, call: _Call, place: layout.Place, gradient: Tensor
) -> Tensor:
    """Adds what a block `(b, K, s, G, t)` gives to that of `Bias.distances`."""
    _, K, s, G, t = layout.shape(gradient)
    gradient = ops.transpose(ops.sum(gradient, axis=0), (0, 2, 1, 3))
    gradient = ops.reshape(gradient, (K * G, s, t))
    gradient = _sum_to(gradient, (layout.shape(total)[0], s, t))
    start, size = call.span(total, place)
    sums = ops.slice(total, start, size) + sum_distances(gradient)
    return ops.slice_update(total, start, sums)


def _sum_to(x: Tensor, sizes: Shape) -> Tensor:
    """Sums axes down to `sizes`, each of which is 1 or the size of its axis."""
    for axis, size in enumerate(sizes):
        shape = layout.shape(x)
        split = (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
        x = ops.sum(ops.reshape(x, split), axis=axis)
    return x


def _query_place(step: Tensor, length: Any, blocks: Blocks) -> layout.Place:
    """Where a block of queries lies: the blocks of one row, then of the next."""
    count = length // blocks.t
    return {"b": (step // count, blocks.b), "t": (step % count, blocks.t)}
