"""A mask taken apart into what implementations read, with parts of a kind merged.

Convention: boolean, True means attend. A mask value (`keras_mha.attention.masks`) puts
itself into the parts that say the same; the rest it leaves whole, in `others`. An
implementation names the parts that it takes, and refuses a mask that has more.

Letters: B batch, T query length, S key length, N query heads.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from keras import backend, ops

from keras_mha.attention.mask_arguments import rank_2
from keras_mha.typing import Tensor


class MaskParts(NamedTuple):
    """All that restricts one attention call, not yet spelled out pair by pair.

    Implementations read the parts they take, so that one which works block by block
    never needs the `(T, S)` table. A query attends to a key where every part allows it.

    Attributes:
        query_padding: Boolean `(B, T)`; False rows attend to nothing. Or integer
            lengths `(B,)`.
        key_padding: Boolean `(B, S)`; False keys are seen by no query. Or integer
            lengths `(B,)`.
        pairs: Boolean, broadcastable to `(B, N, T, S)`, of rank 2 to 4.
        lower: Query `i` sees keys with `j - i >= lower` only. An int or an integer
            scalar tensor.
        upper: Query `i` sees keys with `j - i <= upper` only, likewise.
        query_segments: Integers `(B or 1, T)`: which sequence each query is of.
            It sees the keys of the same sequence; negative ones see nothing.
        key_segments: Integers `(B or 1, S)`, likewise.
        others: Mask values of kinds that have no part here, or `None`.
    """

    query_padding: Tensor | None = None
    key_padding: Tensor | None = None
    pairs: Tensor | None = None
    lower: Any = None
    upper: Any = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    others: tuple[Any, ...] | None = None

    @property
    def structure(self) -> tuple[Any, ...]:
        """Returns what stays from batch to batch: which tensors exist, and the rest."""
        return tuple(
            part if part is None or isinstance(part, int) else "tensor" for part in self
        )

    @property
    def is_ordered(self) -> bool:
        """Whether it depends on the order of positions."""
        return self.lower is not None or self.upper is not None


# Nothing is hidden. Compared by identity, it spares the functions below a call.
NOTHING = MaskParts()


def untaken(mask: MaskParts, taken: Collection[str]) -> list[str]:
    """Names what a mask holds beyond the parts of these names.

    Example:

    >>> from keras_mha.attention.mask_parts import MaskParts, untaken
    >>> untaken(MaskParts(lower=-2, upper=0), taken=("upper",))
    ['lower']
    """
    names: list[str] = []
    for name, part in zip(mask._fields, mask, strict=True):
        if part is None or name in taken:
            continue
        names += [type(one).__name__ for one in part] if name == "others" else [name]
    return names


def meet(one: MaskParts, other: MaskParts) -> MaskParts:
    """Merges two masks: a pair attends where both allow it.

    Example:

    >>> from keras_mha.attention.mask_parts import MaskParts, meet
    >>> both = meet(MaskParts(upper=2), MaskParts(lower=-1, upper=3))
    >>> both.lower, both.upper
    (-1, 2)
    """
    pairs = meet_pairs(one.pairs, other.pairs)
    segmented = one
    if one.query_segments is None:
        segmented = other
    elif other.query_segments is not None:
        columns = _as_columns(rank_2(other.key_segments))
        pairs = meet_pairs(pairs, ops.logical_and(same_segment(other), columns >= 0))
    return MaskParts(
        _meet_padding(one.query_padding, other.query_padding),
        _meet_padding(one.key_padding, other.key_padding),
        pairs,
        _meet_bounds(one.lower, other.lower, max, ops.maximum),
        _meet_bounds(one.upper, other.upper, min, ops.minimum),
        segmented.query_segments,
        segmented.key_segments,
        (*(one.others or ()), *(other.others or ())) or None,
    )


def spell_padding(
    mask: MaskParts, query_length: Tensor, key_length: Tensor
) -> MaskParts:
    """Gives paddings as `(B, T)` and `(B, S)`, where they are lengths."""
    return mask._replace(
        query_padding=_spell_lengths(mask.query_padding, query_length),
        key_padding=_spell_lengths(mask.key_padding, key_length),
    )


def spell_others(
    mask: MaskParts, query_length: Tensor, key_length: Tensor, rank: int = 4
) -> MaskParts:
    """Gives masks of kinds that have no part here as pairs.

    Args:
        mask: The mask.
        query_length: T, an int or an integer scalar tensor.
        key_length: S, likewise.
        rank: That of the scores.
    """
    if mask.others is None:
        return mask
    queries = ops.arange(query_length, dtype="int32")
    keys = ops.arange(key_length, dtype="int32")
    pairs = None
    for one in mask.others:
        pairs = meet_pairs(pairs, _visible_pairs(one, queries, keys))
    if rank > 4:  # axes that do not attend stand between B and N
        pairs = _insert_axes(pairs, 4 - len(pairs.shape))
        pairs = ops.expand_dims(pairs, axis=tuple(range(1, rank - 3)))
    return mask._replace(pairs=meet_pairs(mask.pairs, pairs), others=None)


def spell_out(mask: MaskParts, query_length: Tensor, key_length: Tensor) -> MaskParts:
    """Gives paddings and segments as `(B or 1, T)`, `(B or 1, S)`; pairs rank 4.

    Places of negative segments become padding, and other kinds of masks pairs.

    Args:
        mask: The mask.
        query_length: T, an int or an integer scalar tensor.
        key_length: S, likewise.
    """
    mask = spell_others(mask, query_length, key_length)
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


def materialize(
    mask: MaskParts, query_length: Tensor, key_length: Tensor
) -> Tensor | None:
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
    >>> from keras_mha.attention.mask_parts import MaskParts, materialize
    >>> np.asarray(materialize(MaskParts(upper=0), 2, 3))[0, 0].astype(int)
    array([[1, 0, 0],
           [1, 1, 0]])
    """
    mask = spell_out(mask, query_length, key_length)
    rows, columns = mask.query_padding, mask.key_padding
    return intersect(
        None if rows is None else _as_rows(rows),
        None if columns is None else _as_columns(columns),
        band(mask, positions(query_length), positions(key_length)),
        None if mask.query_segments is None else same_segment(mask),
        mask.pairs,
    )


def positions(length: Tensor) -> Tensor:
    """The numbers of positions, `(length,)`.

    float32 counts exactly up to 2**24 and, unlike int32, has GPU kernels for every
    operation on TensorFlow.
    """
    return ops.arange(length, dtype="float32")


def band(mask: MaskParts, rows: Tensor, columns: Tensor) -> Tensor | None:
    """Spells out the part of a mask that depends on positions only.

    Args:
        mask: The mask; its bounds count.
        rows: Numbers of the queries, `(T,)` float32.
        columns: Numbers of the keys, `(S,)` float32.

    Returns:
        Boolean `(1, 1, T, S)`, or `None` if nothing is hidden.
    """
    if not mask.is_ordered:
        return None
    distance = ops.reshape(columns, (1, 1, 1, -1)) - ops.reshape(rows, (1, 1, -1, 1))
    return intersect(
        None if mask.lower is None else distance >= _as_float(mask.lower),
        None if mask.upper is None else distance <= _as_float(mask.upper),
    )


def same_segment(mask: MaskParts) -> Tensor:
    """Whether query and key are of one segment, `(B or 1, 1, T, S)`."""
    rows, columns = rank_2(mask.query_segments), rank_2(mask.key_segments)
    return ops.equal(_as_rows(rows), _as_columns(columns))


def intersect(*masks: Tensor | None) -> Tensor | None:
    """Returns the logical AND of masks, or `None` if all of them are.

    One of fewer dimensions than another holds for all of the other's last ones.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.mask_parts import intersect
    >>> both = intersect(np.array([True, True]), None, np.array([True, False]))
    >>> np.asarray(both).tolist()
    [True, False]
    """
    present = [mask for mask in masks if mask is not None]
    if len(present) < 2:
        return present[0] if present else None
    rank = max([len(mask.shape) for mask in present])
    merged = None
    for mask in present:
        missing = tuple(range(len(mask.shape), rank))
        expanded = ops.expand_dims(mask, axis=missing) if missing else mask
        merged = expanded if merged is None else ops.logical_and(merged, expanded)
    return merged


def clear_padding(inputs: Tensor, padding: Tensor | None) -> Tensor:
    """Replaces padded positions by zeros, so that not even NaN there can spread.

    Selection, not multiplication: `0 * NaN` is NaN, and would reach the kernels'
    gradients from positions that do not count.

    Args:
        inputs: Tensor `(B, ..., D)`.
        padding: Boolean mask, the leading dimensions of `inputs`, or `None`.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.mask_parts import clear_padding
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


def _visible_pairs(mask: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """Calls a mask of another kind for all pairs, and checks what it returns."""
    pairs: Any = ops.convert_to_tensor(mask.visible(queries, keys))
    shape, lengths = tuple(pairs.shape), (queries.shape[0], keys.shape[0])
    fits = 2 <= len(shape) <= 4 and all(
        have in (None, 1, want) or want is None
        for have, want in zip(shape[-2:], lengths, strict=True)
    )
    if backend.standardize_dtype(pairs.dtype) != "bool" or not fits:
        raise ValueError(
            f"`{type(mask).__name__}.visible` must return booleans (T, S), (B, T, S) "
            f"or (B, N, T, S), each dimension its own or 1; here T, S = {lengths}. "
            f"Received: {backend.standardize_dtype(pairs.dtype)} of shape {shape}"
        )
    return pairs


def _as_rows(mask: Tensor) -> Tensor:
    return ops.expand_dims(ops.expand_dims(mask, 1), 3)


def _as_columns(mask: Tensor) -> Tensor:
    return ops.expand_dims(ops.expand_dims(mask, 1), 1)


def _as_float(bound: Any) -> Any:
    return float(bound) if isinstance(bound, int) else ops.cast(bound, "float32")


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


def meet_pairs(one: Any, other: Any) -> Any:
    """Returns the logical AND of tables of pairs, of rank 2 to 4, or `None`."""
    if one is None or other is None:
        return other if one is None else one
    rank = max(len(one.shape), len(other.shape))
    one, other = (_insert_axes(mask, rank - len(mask.shape)) for mask in (one, other))
    return ops.logical_and(one, other)


def _meet_bounds(one: Any, other: Any, of_ints: Any, of_tensors: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    whole = isinstance(one, int) and isinstance(other, int)
    return of_ints(one, other) if whole else of_tensors(one, other)


def _insert_axes(mask: Tensor, count: int) -> Tensor:
    for _ in range(count):
        mask = ops.expand_dims(mask, axis=-3)
    return mask
