"""What may attend to what: every kind of mask meets in this one file.

Convention: boolean, True means attend. Integers count as booleans (non-zero is
True); floating masks are refused, because an additive mask read as a boolean one
would silently mean its opposite.

Letters: B batch, T query length, S key length, N query heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from keras import KerasTensor, backend, ops

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
        _as_lengths(query_lengths, "query_lengths"),
        _as_lengths(key_lengths, "key_lengths"),
    )


def check_window(size: Any, name: str) -> int:
    """Returns the size of a window if it is a positive integer.

    Raises:
        ValueError: Otherwise.
    """
    number = plain_integer(size)
    if number is None or number < 1:
        raise ValueError(
            f"`{name}` must be a positive integer. Received: {name}={size!r}"
        )
    return number


def as_boolean(mask: Tensor, name: str) -> Tensor:
    """Returns `mask` as a boolean tensor, refusing floating ones.

    Args:
        mask: Boolean or integer tensor of any shape; non-zero means attend.
        name: The argument's name, for the error text.

    Raises:
        TypeError: If `mask` is floating.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.masks import as_boolean
    >>> np.asarray(as_boolean(np.array([2, 0]), "mask")).tolist()
    [True, False]
    """
    if not isinstance(mask, KerasTensor):
        mask = ops.convert_to_tensor(mask)
    dtype = backend.standardize_dtype(mask.dtype)
    if "float" in dtype:
        raise TypeError(
            f"`{name}` must be boolean or integer (True or non-zero = attend). "
            f"Received dtype {dtype}. Cast a 0/1 mask to `bool`; an additive mask "
            "(0 = attend, large negative = hide) is a bias, not a mask: pass "
            f"`{name} > threshold` instead."
        )
    return mask if dtype == "bool" else ops.not_equal(mask, 0)


def as_padding(mask: Tensor | None, inputs: Shape, name: str) -> Tensor | None:
    """Returns a padding mask as a boolean tensor, if it fits its inputs.

    Args:
        mask: Boolean or integer, `(B, T)`, or `None`. For inputs of more dimensions
            it may have as many of their leading ones.
        inputs: Static shape of the inputs, `(B, T, ..., D)`.
        name: The argument's name, for the error text.

    Raises:
        TypeError: If `mask` is floating.
        ValueError: If it has not the leading dimensions of the inputs, two or more.
    """
    if mask is None:
        return None
    mask = as_boolean(mask, name)
    received = tuple(mask.shape)
    leading = tuple(inputs)[: len(received)]
    fits = 2 <= len(received) < len(inputs) and all(
        None in pair or pair[0] == pair[1]
        for pair in zip(received, leading, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must have the leading dimensions (B, T) of its inputs, whose "
            f"shape is {tuple(inputs)}. Received: {name} of shape {received}"
        )
    return mask


def as_segments(
    ids: Tensor | None, inputs: Shape, name: str, ranks: tuple[int, ...] = (2,)
) -> Tensor | None:
    """Returns segment ids as int32 `(B, T)`, if they fit their inputs.

    Args:
        ids: Integers `(B, T)` or `(1, T)`, or `None`.
        inputs: Static shape of the inputs, `(B, T, ..., D)`.
        name: The argument's name, for the error text.
        ranks: The ranks that are taken; 1 is `(T,)`, for all rows.

    Raises:
        TypeError: If the ids are not integers.
        ValueError: If they have not the leading dimensions of the inputs.
    """
    if ids is None:
        return None
    ids = _rank_2(_as_integers(ids, name, ranks))
    (have, length), (want, wanted) = tuple(ids.shape), tuple(inputs)[:2]
    if (have not in (None, 1, want) and want is not None) or (
        None not in (length, wanted) and length != wanted
    ):
        raise ValueError(
            f"`{name}` must have the leading dimensions (B, T) of its inputs, whose "
            f"shape is {tuple(inputs)}. Received: {name} of shape {(have, length)}"
        )
    return ids


def as_pair(ids: Any, name: str) -> tuple[Any, Any]:
    """Returns segment ids of queries and of keys, from a pair or from one for both.

    Raises:
        ValueError: If `ids` is a tuple of more or fewer than two.
    """
    if not isinstance(ids, tuple):
        return ids, ids
    if len(ids) != 2 or any(part is None for part in ids):
        raise ValueError(
            f"`{name}` must be one array, or a tuple of queries' and keys'. "
            f"Received: a tuple of {len(ids)}"
        )
    return ids


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


def as_pairs(
    mask: Tensor | None,
    score_shape: Shape,
    attention_rank: int,
    name: str = "attention_mask",
) -> Tensor | None:
    """Gives an attention mask the rank of the scores, as Keras does.

    Missing dimensions are inserted just before the attention dimensions: with one
    attention axis, `(T, S)` becomes `(1, 1, T, S)` and `(B, T, S)` becomes
    `(B, 1, T, S)`.

    Args:
        mask: Boolean or integer mask of rank `2 * attention_rank` up to the scores'
            rank, or `None`.
        score_shape: Static shape of the scores, `(B, ..., N, T..., S...)`.
        attention_rank: Number of attention axes.
        name: The argument's name, for the error text.

    Raises:
        TypeError: If `mask` is floating.
        ValueError: If the rank is out of range, or a dimension is neither 1 nor
            the scores'.
    """
    if mask is None:
        return None
    mask = as_boolean(mask, name)
    rank, received = len(score_shape), tuple(mask.shape)
    if not 2 * attention_rank <= len(received) <= rank:
        raise ValueError(
            f"`{name}` must have rank 2 (T, S), 3 (B, T, S) or 4 "
            f"(B, N or 1, T, S), with {attention_rank} attention axis or axes: "
            f"rank {2 * attention_rank} to {rank}. "
            f"Received: {name} of shape {received}"
        )
    for _ in range(rank - len(received)):
        mask = ops.expand_dims(mask, axis=-2 * attention_rank - 1)
    for have, want in zip(mask.shape, score_shape, strict=True):
        if have not in (None, 1, want) and want is not None:
            raise ValueError(
                f"Every dimension of `{name}` must be 1 or that of the "
                f"attention scores, (B, N, T, S) = {tuple(score_shape)}. "
                f"Received: {name} of shape {received}"
            )
    return mask


def spell_out(mask: Mask, query_length: Tensor, key_length: Tensor) -> Mask:
    """Gives paddings and segments as `(B or 1, T)`, `(B or 1, S)`; pairs rank 4.

    Places of negative segments become padding.

    Args:
        mask: The mask.
        query_length: T, an int or an integer scalar tensor.
        key_length: S, likewise.
    """
    rows, columns = mask.query_segments, mask.key_segments
    rows = None if rows is None else _rank_2(rows)
    columns = None if columns is None else _rank_2(columns)
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


def _rank_2(ids: Tensor) -> Tensor:
    return ops.expand_dims(ids, 0) if len(ids.shape) == 1 else ids


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
    offset = offset if ops.is_tensor(offset) else ops.convert_to_tensor(offset)
    return _check_integers(offset, "offset", (0,))


def _as_table(mask: Any) -> Tensor:
    mask = as_boolean(mask, "mask")
    if len(mask.shape) < 2:
        raise ValueError(
            "What joins a mask by `&` must be another one, or have rank 2 (T, S), 3 "
            f"(B, T, S) or 4 (B, N or 1, T, S). Received: shape {tuple(mask.shape)}"
        )
    return mask


def _as_ids(ids: Tensor, name: str) -> Tensor:
    return _as_integers(ids, name, (1, 2))


def _as_lengths(lengths: Tensor | None, name: str) -> Tensor | None:
    if lengths is None:
        return None
    most = 2**31 - 1
    if not ops.is_tensor(lengths):
        # JAX and torch would wrap them around to int32 right away.
        lengths = np.asarray(lengths)
        if lengths.dtype.kind in "iu":
            lengths = np.clip(lengths, 0, most).astype("int32")
    lengths = _check_integers(ops.convert_to_tensor(lengths), name, (1,))
    if backend.standardize_dtype(lengths.dtype) in ("uint32", "int64", "uint64"):
        lengths = ops.minimum(lengths, ops.cast(most, lengths.dtype))
    lengths = ops.maximum(lengths, ops.cast(0, lengths.dtype))
    return ops.cast(lengths, "int32")


def _as_integers(values: Tensor, name: str, ranks: tuple[int, ...]) -> Tensor:
    values = _check_integers(ops.convert_to_tensor(values), name, ranks)
    return ops.cast(values, "int32")


def _check_integers(values: Tensor, name: str, ranks: tuple[int, ...]) -> Tensor:
    dtype = backend.standardize_dtype(values.dtype)
    if "int" not in dtype:
        raise TypeError(f"`{name}` must be integers. Received dtype {dtype}")
    if len(values.shape) not in ranks:
        raise ValueError(
            f"`{name}` must have rank {' or '.join(map(str, ranks))}. "
            f"Received: {name} of shape {tuple(values.shape)}"
        )
    return values


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
