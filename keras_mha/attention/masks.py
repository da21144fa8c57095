"""What may attend to what: every kind of mask meets in this one file.

Convention: boolean, True means attend. Integers count as booleans (non-zero is
True); floating masks are refused, because an additive mask read as a boolean one
would silently mean its opposite.

Letters: B batch, T query length, S key length, N query heads.
"""

from __future__ import annotations

from typing import NamedTuple

from keras import KerasTensor, backend, ops

from keras_mha.typing import Shape, Tensor


class Mask(NamedTuple):
    """All that restricts one attention call, not yet spelled out pair by pair.

    Implementations read the fields they can use, so that one which works block
    by block never needs the `(T, S)` table. A query attends to a key where every
    field allows it.

    Attributes:
        query_padding: Boolean `(B, T)`; False rows attend to nothing.
        key_padding: Boolean `(B, S)`; False keys are seen by no query.
        pairs: Boolean, broadcastable to `(B, N, T, S)`, of rank 4.
        is_causal: Whether query `i` is limited to keys `j <= i`.
        sliding_window: Whether query `i` is limited to keys with
            `|i - j| < sliding_window`. `None` means no limit.
    """

    query_padding: Tensor | None = None
    key_padding: Tensor | None = None
    pairs: Tensor | None = None
    is_causal: bool = False
    sliding_window: int | None = None

    @property
    def structure(self) -> tuple[bool | int | None, ...]:
        """What stays from batch to batch: which tensors there are, and the rest."""
        tensors = (self.query_padding, self.key_padding, self.pairs)
        given = (tensor is not None for tensor in tensors)
        return (*given, self.is_causal, self.sliding_window)


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
    mask: Tensor | None, score_shape: Shape, attention_rank: int
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

    Raises:
        TypeError: If `mask` is floating.
        ValueError: If the rank is out of range, or a dimension is neither 1 nor
            the scores'.
    """
    if mask is None:
        return None
    mask = as_boolean(mask, "attention_mask")
    rank, received = len(score_shape), tuple(mask.shape)
    if not 2 * attention_rank <= len(received) <= rank:
        raise ValueError(
            "`attention_mask` must have rank 2 (T, S), 3 (B, T, S) or 4 "
            f"(B, N or 1, T, S), with {attention_rank} attention axis or axes: "
            f"rank {2 * attention_rank} to {rank}. "
            f"Received: attention_mask of shape {received}"
        )
    for _ in range(rank - len(received)):
        mask = ops.expand_dims(mask, axis=-2 * attention_rank - 1)
    for have, want in zip(mask.shape, score_shape, strict=True):
        if have not in (None, 1, want) and want is not None:
            raise ValueError(
                "Every dimension of `attention_mask` must be 1 or that of the "
                f"attention scores, (B, N, T, S) = {tuple(score_shape)}. "
                f"Received: attention_mask of shape {received}"
            )
    return mask


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
    rows, columns = mask.query_padding, mask.key_padding
    return intersect(
        None if rows is None else ops.expand_dims(ops.expand_dims(rows, 1), 3),
        None if columns is None else ops.expand_dims(ops.expand_dims(columns, 1), 1),
        _band(mask.is_causal, mask.sliding_window, query_length, key_length),
        mask.pairs,
    )


def _band(
    is_causal: bool, window: int | None, query_length: Tensor, key_length: Tensor
) -> Tensor | None:
    """The part of a mask that depends on positions alone, `(1, 1, T, S)`."""
    if not is_causal and window is None:
        return None
    # float32 counts exactly up to 2**24 and, unlike int32, has GPU kernels for
    # every operation below.
    rows = ops.reshape(ops.arange(query_length, dtype="float32"), (1, 1, -1, 1))
    columns = ops.reshape(ops.arange(key_length, dtype="float32"), (1, 1, 1, -1))
    offset = rows - columns
    return intersect(
        offset >= 0 if is_causal else None,
        None if window is None else ops.abs(offset) < window,
    )


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
