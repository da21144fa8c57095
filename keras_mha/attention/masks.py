"""What may attend to what: every kind of mask meets in this one file.

Convention: boolean, True means attend. Integers count as booleans (non-zero is
True); floating masks are refused, because an additive mask read as a boolean one
would silently mean its opposite.

Letters: B batch, T query length, S key length, N query heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from keras_mha.attention.mask_arguments import (
    as_boolean,
    as_integers,
    as_lengths,
    as_pairs,
    check_integers,
    check_window,
    rank_2,
    refuse_symbolic,
)
from keras_mha.attention.numeric import plain_integer
from keras_mha.typing import Shape, Tensor


class Mask(NamedTuple):
    """All that restricts one attention call, not yet spelled out pair by pair.

    Implementations read the fields they can use, so that one which works block
    by block never needs the `(T, S)` table. A query attends to a key where every
    field allows it. Masks compose with `&`; boolean tensors join them the same way.

    Attributes:
        query_padding: Boolean `(B, T)`; False rows attend to nothing. Or integer
            lengths `(B,)`.
        key_padding: Boolean `(B, S)`; False keys are seen by no query. Or integer
            lengths `(B,)`.
        pairs: Boolean, broadcastable to `(B, N, T, S)`, of rank 2 to 4.
        is_causal: Whether query `i` is limited to keys `j <= i + offset`.
        sliding_window: Whether query `i` is limited to keys with
            `|i + offset - j| < sliding_window`. `None` means no limit.
        query_segments: Integers `(B or 1, T)`: which sequence each query is of.
            It sees the keys of the same sequence; negative ones see nothing.
        key_segments: Integers `(B or 1, S)`, likewise.
        offset: How many keys come before the first query, an int or an integer
            scalar tensor.
        keys_are_finite: Whether keys and values are known to hold neither NaN nor
            infinities where they are hidden, so that they need not be cleared.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> mask = keras_mha.CausalMask() & keras_mha.SlidingWindowMask(2)
    >>> table = mask & np.array([[True], [True], [False]])
    >>> np.asarray(keras_mha.attention.masks.materialize(table, 3, 3))[0, 0].astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 0, 0]])
    """

    query_padding: Tensor | None = None
    key_padding: Tensor | None = None
    pairs: Tensor | None = None
    is_causal: bool = False
    sliding_window: int | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    offset: Any = 0
    keys_are_finite: bool = False

    # NumPy then leaves `array & mask` to the mask.
    __array_ufunc__ = None

    @property
    def structure(self) -> tuple[bool | int | None, ...]:
        """What stays from batch to batch: which tensors there are, and the rest."""
        return tuple(
            field if field is None or isinstance(field, bool | int) else True
            for field in self
        )

    @property
    def is_ordered(self) -> bool:
        """Whether it depends on the order of positions."""
        return self.is_causal or self.sliding_window is not None

    def __and__(self, other: Any) -> Mask:
        if not isinstance(other, Mask):
            other = Mask(pairs=_as_table(other))
        if self.query_segments is not None and other.query_segments is not None:
            raise ValueError(
                "One mask can hold one `SegmentMask`: give each pair of segments an id "
                "of its own. Received: two masks that both have segments"
            )
        segmented = other if self.query_segments is None else self
        windows = [
            mask.sliding_window
            for mask in (self, other)
            if mask.sliding_window is not None
        ]
        return Mask(
            _meet_padding(self.query_padding, other.query_padding),
            _meet_padding(self.key_padding, other.key_padding),
            _meet_pairs(self.pairs, other.pairs),
            self.is_causal or other.is_causal,
            min(windows, default=None),
            segmented.query_segments,
            segmented.key_segments,
            _one_offset(self, other),
            self.keys_are_finite or other.keys_are_finite,
        )

    __rand__ = __and__


class Held:
    """A mask value that Keras takes for one argument.

    In nested arguments of a layer Keras refuses tensors beside other values.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask


def hold(value: Any) -> Any:
    """Wraps a mask value that has tensors; returns all else as it is."""
    if isinstance(value, Mask) and any(
        not isinstance(field, bool | int | type(None)) for field in value
    ):
        return Held(value)
    return value


def CausalMask(offset: Any = 0) -> Mask:  # noqa: N802 - names a kind of mask
    """Query `i` attends to keys `j <= i + offset` only.

    Args:
        offset: How many keys come before the first query: 0 aligns the first query
            with the first key. An int or an integer scalar tensor.

    Raises:
        TypeError: If `offset` is not an integer.
        ValueError: If it is not a scalar.

    Example:

    >>> import keras_mha
    >>> keras_mha.CausalMask(offset=2).is_causal
    True
    """
    return Mask(is_causal=True, offset=_as_offset(offset))


def SlidingWindowMask(size: int, offset: Any = 0) -> Mask:  # noqa: N802 - as above
    """Query `i` attends to keys `j` with `|i + offset - j| < size` only.

    Together with `CausalMask`, `0 <= i + offset - j < size`.

    Source: Beltagy et al. 2020, "Longformer: the long-document transformer".

    Args:
        size: Positions in the window, on either side, the query's own included.
        offset: How many keys come before the first query.

    Raises:
        TypeError: If `offset` is not an integer.
        ValueError: If `size` is not a positive integer, or `offset` not a scalar.

    Example:

    >>> import keras_mha
    >>> (keras_mha.CausalMask() & keras_mha.SlidingWindowMask(256)).sliding_window
    256
    """
    return Mask(sliding_window=check_window(size, "size"), offset=_as_offset(offset))


def SegmentMask(  # noqa: N802 - as above
    query_ids: Tensor, key_ids: Tensor | None = None
) -> Mask:
    """Queries attend to the keys of their own segment only.

    For sequences packed side by side into rows; see `pack_sequences`.

    Args:
        query_ids: Integers `(T,)` or `(B, T)`. Negative ones are places without a
            token: they attend to nothing and are seen by nobody.
        key_ids: Integers `(S,)` or `(B, S)`. Defaults to `query_ids`.

    Raises:
        TypeError: If the ids are not integers.
        ValueError: If their rank is neither 1 nor 2.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> from keras_mha.attention.masks import materialize
    >>> mask = keras_mha.SegmentMask(np.array([0, 0, 1]))
    >>> np.asarray(materialize(mask, 3, 3))[0, 0].astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [0, 0, 1]])
    """
    query_ids = _as_ids(query_ids, "query_ids")
    key_ids = query_ids if key_ids is None else _as_ids(key_ids, "key_ids")
    return Mask(query_segments=query_ids, key_segments=key_ids)


def PaddingMask(  # noqa: N802 - as above
    key_lengths: Tensor | None = None, query_lengths: Tensor | None = None
) -> Mask:
    """Hides what comes after the length of each sequence.

    A length counts as far as there are positions: one beyond S or T hides nothing,
    and a negative one hides all, as 0 does.

    Args:
        key_lengths: Integers `(B,)`: keys from there on are seen by no query.
        query_lengths: Integers `(B,)`: queries from there on attend to nothing.

    Raises:
        TypeError: If the lengths are not integers.
        ValueError: If their rank is not 1.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> from keras_mha.attention.masks import materialize
    >>> mask = keras_mha.PaddingMask(np.array([2, 1]))
    >>> np.asarray(materialize(mask, 1, 3))[:, 0, 0].astype(int)
    array([[1, 1, 0],
           [1, 0, 0]])
    """
    return Mask(
        as_lengths(query_lengths, "query_lengths"),
        as_lengths(key_lengths, "key_lengths"),
    )


def with_table(mask: Mask, table: Any, score_shape: Shape, attention_rank: int) -> Mask:
    """Joins what a layer was given as `attention_mask` to its other masks.

    Args:
        mask: The other masks.
        table: See `as_pairs`; or a mask value.
        score_shape: Static shape of the scores, `(B, ..., N, T..., S...)`.
        attention_rank: Number of attention axes.
    """
    table = table.mask if isinstance(table, Held) else table
    if isinstance(table, Mask):
        check_fit(table, score_shape, "attention_mask")
        pairs = as_pairs(table.pairs, score_shape, attention_rank)
        return mask & table._replace(pairs=pairs)
    return mask._replace(pairs=as_pairs(table, score_shape, attention_rank))


def check_fit(mask: Mask, score_shape: Shape, name: str) -> None:
    """Refuses padding and segments that do not fit the scores.

    Args:
        mask: The mask.
        score_shape: Static shape of the scores, `(B, ..., N, T..., S...)`.
        name: What the caller calls the mask, for the error text.

    Raises:
        ValueError: If a shape does not fit, or there are other axes than one of
            positions, whose lengths or segments could not be told.
    """
    parts = (
        (mask.query_padding, "query padding", -2),
        (mask.query_segments, "query segments", -2),
        (mask.key_padding, "key padding", -1),
        (mask.key_segments, "key segments", -1),
    )
    for tensor, what, axis in parts:
        if tensor is None:
            continue
        if len(score_shape) != 4:
            raise ValueError(
                f"The {what} of `{name}` need inputs (B, T, D): over other axes it is "
                "not said what they count. Received: attention scores of shape "
                f"{tuple(score_shape)}"
            )
        B, length = score_shape[0], score_shape[axis]
        shape = tuple(tensor.shape)
        is_lengths = len(shape) == 1 and "padding" in what
        batch = shape[0] if len(shape) == 2 or is_lengths else 1
        fits = batch == 1 if "segments" in what else False
        if not (fits or _fit(batch, B)) or not (is_lengths or _fit(shape[-1], length)):
            raise ValueError(
                f"The {what} of `{name}` must fit B={B}, T={score_shape[-2]} and "
                f"S={score_shape[-1]}. Received: shape {shape}"
            )


def spell_padding(mask: Mask, query_length: Tensor, key_length: Tensor) -> Mask:
    """Gives paddings as `(B, T)` and `(B, S)`, where they are lengths."""
    return mask._replace(
        query_padding=_spell_lengths(mask.query_padding, query_length),
        key_padding=_spell_lengths(mask.key_padding, key_length),
    )


def _fit(one: int | None, other: int | None) -> bool:
    return one is None or other is None or one == other


def intersect(*masks: Tensor | None) -> Tensor | None:
    """Returns the logical AND of the masks that are given, or `None`.

    One of fewer dimensions than another holds for all of the other's last ones.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.masks import intersect
    >>> both = intersect(np.array([True, True]), None, np.array([True, False]))
    >>> np.asarray(both).tolist()
    [True, False]
    """
    given = [mask for mask in masks if mask is not None]
    rank = max((len(mask.shape) for mask in given), default=0)
    merged = None
    for mask in given:
        missing = tuple(range(len(mask.shape), rank))
        expanded = ops.expand_dims(mask, axis=missing) if missing else mask
        merged = expanded if merged is None else ops.logical_and(merged, expanded)
    return merged


def spell_out(mask: Mask, query_length: Tensor, key_length: Tensor) -> Mask:
    """Gives paddings and segments as `(B or 1, T)`, `(B or 1, S)`; pairs rank 4.

    Places of negative segments become padding.

    Args:
        mask: The mask.
        query_length: T, an int or an integer scalar tensor.
        key_length: S, likewise.
    """
    rows, columns = mask.query_segments, mask.key_segments
    rows = None if rows is None else rank_2(rows)
    columns = None if columns is None else rank_2(columns)
    pairs = mask.pairs
    if pairs is not None:
        pairs = _insert_axes(pairs, 4 - len(pairs.shape))
    return mask._replace(
        query_padding=intersect(
            _spell_lengths(mask.query_padding, query_length),
            None if rows is None else rows >= 0,
        ),
        key_padding=intersect(
            _spell_lengths(mask.key_padding, key_length),
            None if columns is None else columns >= 0,
        ),
        pairs=pairs,
        query_segments=rows,
        key_segments=columns,
    )


def materialize(mask: Mask, query_length: Tensor, key_length: Tensor) -> Tensor | None:
    """Spells a mask out pair by pair.

    Args:
        mask: The mask.
        query_length: T, an int or an integer scalar tensor.
        key_length: S, likewise.

    Returns:
        A boolean tensor of rank 4, broadcastable to `(B, N, T, S)`, or `None` if
        nothing is hidden.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.masks import Mask, materialize
    >>> np.asarray(materialize(Mask(is_causal=True), 2, 3))[0, 0].astype(int)
    array([[1, 0, 0],
           [1, 1, 0]])
    """
    mask = spell_out(mask, query_length, key_length)
    rows, columns = mask.query_padding, mask.key_padding
    return intersect(
        None if rows is None else _as_rows(rows),
        None if columns is None else _as_columns(columns),
        band(mask, positions(query_length), positions(key_length)),
        same_segment(mask),
        mask.pairs,
    )


def positions(length: Tensor) -> Tensor:
    """The numbers of positions, `(length,)`.

    float32 counts exactly up to 2**24 and, unlike int32, has GPU kernels for every
    operation on TensorFlow.
    """
    return ops.arange(length, dtype="float32")


def band(mask: Mask, rows: Tensor, columns: Tensor) -> Tensor | None:
    """The part of a mask that depends on positions alone.

    Args:
        mask: The mask; causality, window and offset count.
        rows: Numbers of the queries, `(T,)` float32.
        columns: Numbers of the keys, `(S,)` float32.

    Returns:
        Boolean `(1, 1, T, S)`, or `None` if nothing is hidden.
    """
    if not mask.is_ordered:
        return None
    rows = rows + ops.cast(mask.offset, "float32")
    distance = ops.reshape(rows, (1, 1, -1, 1)) - ops.reshape(columns, (1, 1, 1, -1))
    window = mask.sliding_window
    return intersect(
        distance >= 0 if mask.is_causal else None,
        None if window is None else ops.abs(distance) < window,
    )


def same_segment(mask: Mask) -> Tensor | None:
    """Whether query and key are of one segment, `(B or 1, 1, T, S)`."""
    if mask.query_segments is None:
        return None
    return ops.equal(_as_rows(mask.query_segments), _as_columns(mask.key_segments))


def _as_rows(mask: Tensor) -> Tensor:
    return ops.expand_dims(ops.expand_dims(mask, 1), 3)


def _as_columns(mask: Tensor) -> Tensor:
    return ops.expand_dims(ops.expand_dims(mask, 1), 1)


def _is_lengths(padding: Tensor) -> bool:
    return len(padding.shape) == 1


def _spell_lengths(padding: Tensor | None, length: Tensor) -> Tensor | None:
    if padding is None or not _is_lengths(padding):
        return padding
    return ops.arange(length, dtype="int32") < ops.expand_dims(padding, 1)


def _meet_padding(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    if _is_lengths(one) and _is_lengths(other):
        return ops.minimum(one, other)
    length = ops.shape(other if _is_lengths(one) else one)[1]
    return intersect(_spell_lengths(one, length), _spell_lengths(other, length))


def _meet_pairs(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    rank = max(len(one.shape), len(other.shape))
    one, other = (_insert_axes(mask, rank - len(mask.shape)) for mask in (one, other))
    return ops.logical_and(one, other)


def _insert_axes(mask: Tensor, count: int) -> Tensor:
    for _ in range(count):
        mask = ops.expand_dims(mask, axis=-3)
    return mask


def _one_offset(one: Mask, other: Mask) -> Any:
    if not one.is_ordered or not other.is_ordered:
        return one.offset if one.is_ordered else other.offset
    numbers = isinstance(one.offset, int) and isinstance(other.offset, int)
    same = one.offset == other.offset if numbers else one.offset is other.offset
    if not same:
        raise ValueError(
            "Masks that depend on the order of positions must have the same `offset`. "
            f"Received: offset={one.offset} and offset={other.offset}"
        )
    return one.offset


def _as_offset(offset: Any) -> Any:
    if isinstance(offset, bool):
        raise TypeError(f"`offset` must be an integer. Received: offset={offset}")
    number = plain_integer(offset)
    if number is not None:
        return number
    refuse_symbolic(offset, "offset")
    offset = offset if ops.is_tensor(offset) else ops.convert_to_tensor(offset)
    return check_integers(offset, "offset", (0,))


def _as_table(mask: Any) -> Tensor:
    mask = as_boolean(mask, "mask")
    if len(mask.shape) < 2:
        raise ValueError(
            "What joins a mask by `&` must be another one, or have rank 2 (T, S), 3 "
            f"(B, T, S) or 4 (B, N or 1, T, S). Received: shape {tuple(mask.shape)}"
        )
    return mask


def _as_ids(ids: Tensor, name: str) -> Tensor:
    refuse_symbolic(ids, name)
    return as_integers(ids, name, (1, 2))


def clear_padding(inputs: Tensor, padding: Tensor | None) -> Tensor:
    """Replaces padded positions by zeros, so that not even NaN there can spread.

    Selection, not multiplication: `0 * NaN` is NaN, and would reach the kernels'
    gradients from positions that do not count.

    Args:
        inputs: Tensor `(B, ..., D)`.
        padding: Boolean mask, the leading dimensions of `inputs`, or `None`.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.masks import clear_padding
    >>> clean = clear_padding(np.array([[[1.0], [np.nan]]]), np.array([[True, False]]))
    >>> np.asarray(clean).ravel().tolist()
    [1.0, 0.0]
    """
    if padding is None:
        return inputs
    missing = len(inputs.shape) - len(padding.shape)
    for _ in range(missing):
        padding = ops.expand_dims(padding, axis=-1)
    return ops.where(padding, inputs, ops.zeros_like(inputs))
