"""Checks the masks that callers pass, and brings them to one form.

Letters: B batch, T query length, S key length, N query heads, D model width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import KerasTensor, backend, ops

from keras_mha.attention.numeric import plain_integer
from keras_mha.attention.values import known_values
from keras_mha.typing import Shape, Tensor


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
    >>> from keras_mha.attention.mask_arguments import as_boolean
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


def known_booleans(mask: Any) -> Any:
    """Returns a floating mask as booleans where it is known to be one.

    Its values must be known, be zeros and ones, and hold at least one 1: zeros alone
    hide nothing as an additive mask, and all as a boolean one. Everything else comes
    back as it is.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.mask_arguments import known_booleans
    >>> known_booleans(np.array([1.0, 0.0])), known_booleans(np.array([0.0, -1e9]))
    (array([ True, False]), array([ 0.e+00, -1.e+09]))
    """
    if isinstance(mask, KerasTensor) or not hasattr(mask, "dtype"):
        return mask
    if "float" not in backend.standardize_dtype(mask.dtype):
        return mask
    values = known_values(mask)
    if values is None:
        return mask
    ones = values == 1
    return ones if ones.any() and np.all(ones | (values == 0)) else mask


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
    fits = 2 <= len(received) < len(inputs)
    if fits and received != leading:
        fits = all(
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
    ids = rank_2(as_integers(ids, name, ranks))
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

    A pair is a tuple, or a list of two tensors `(B, T)` and `(B, S)`, into which
    a saved model turns it.

    Raises:
        ValueError: If `ids` is a tuple of more or fewer than two.
    """
    if isinstance(ids, list) and len(ids) == 2:
        ranks = [len(getattr(part, "shape", ())) for part in ids]
        ids = tuple(ids) if min(ranks) > 1 else ids
    if not isinstance(ids, tuple):
        return ids, ids
    if len(ids) != 2 or any(part is None for part in ids):
        raise ValueError(
            f"`{name}` must be one array, or a tuple of queries' and keys'. "
            f"Received: a tuple of {len(ids)}"
        )
    return ids


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


def as_lengths(lengths: Tensor | None, name: str) -> Tensor | None:
    """Returns lengths as int32 `(B,)`, negative ones as 0.

    Raises:
        TypeError: If they are not integers.
        ValueError: If their rank is not 1.
    """
    if lengths is None:
        return None
    refuse_symbolic(lengths, name)
    most = 2**31 - 1
    if not ops.is_tensor(lengths):
        # JAX and torch would wrap them around to int32 right away.
        lengths = np.asarray(lengths)
        if lengths.dtype.kind in "iu":
            lengths = np.clip(lengths, 0, most).astype("int32")
    lengths = check_integers(ops.convert_to_tensor(lengths), name, (1,))
    if backend.standardize_dtype(lengths.dtype) in ("uint32", "int64", "uint64"):
        lengths = ops.minimum(lengths, ops.cast(most, lengths.dtype))
    lengths = ops.maximum(lengths, ops.cast(0, lengths.dtype))
    return ops.cast(lengths, "int32")


def as_offset(offset: Any) -> Any:
    """Returns the number of keys before the first query, an int or a scalar tensor.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is not a scalar.
    """
    if isinstance(offset, bool):
        raise TypeError(f"`offset` must be an integer. Received: offset={offset}")
    number = plain_integer(offset)
    if number is not None:
        return number
    refuse_symbolic(offset, "offset")
    offset = offset if ops.is_tensor(offset) else ops.convert_to_tensor(offset)
    return ops.cast(check_integers(offset, "offset", (0,)), "int32")


def as_integers(values: Tensor, name: str, ranks: tuple[int, ...]) -> Tensor:
    """Returns integers of one of the ranks as int32; see `check_integers`."""
    values = check_integers(ops.convert_to_tensor(values), name, ranks)
    return ops.cast(values, "int32")


def refuse_symbolic(values: Any, name: str) -> None:
    """Says that a mask value holds numbers, not what stands for an input.

    Raises:
        TypeError: If `values` is a `KerasTensor`.
    """
    if isinstance(values, KerasTensor):
        raise TypeError(
            f"`{name}` must have values. Received: a symbolic KerasTensor of shape "
            f"{tuple(values.shape)}. A mask value is made where a layer or a function "
            "runs; a functional model passes a boolean tensor as `attention_mask`, "
            "such as `keras.ops.expand_dims(lengths, (1, 2)) > keras.ops.arange(S)` "
            "of shape (B, 1, S)"
        )


def check_integers(values: Tensor, name: str, ranks: tuple[int, ...]) -> Tensor:
    """Returns `values` if they are integers of one of the ranks.

    Raises:
        TypeError: If they are not integers.
        ValueError: If their rank is another.
    """
    dtype = backend.standardize_dtype(values.dtype)
    if "int" not in dtype:
        raise TypeError(f"`{name}` must be integers. Received dtype {dtype}")
    if len(values.shape) not in ranks:
        raise ValueError(
            f"`{name}` must have rank {' or '.join(map(str, ranks))}. "
            f"Received: {name} of shape {tuple(values.shape)}"
        )
    return values


def rank_2(ids: Tensor) -> Tensor:
    """Returns `(X,)` as `(1, X)`, and `(B, X)` as it is."""
    return ops.expand_dims(ids, 0) if len(ids.shape) == 1 else ids
