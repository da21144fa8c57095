"""Values added to the scores before the softmax.

Letters: B batch, T query length, S key length, N query heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import KerasTensor, backend, ops

from keras_mha.typing import Shape, Tensor


class Bias(NamedTuple):
    """All that joins the scores of one attention call, each with a gradient.

    Attributes:
        pairs: `(B or 1, N or 1, T or 1, S or 1)`: a number for each pair.
        distances: `(N or 1, T + S - 1)`: a number for each distance of key from
            query, from `1 - T` to `S - 1`. Linear memory; blocks of the table are
            cut from it.
        sinks: `(N,)`: the score of a key that is always there and whose value is
            zero.
    """

    pairs: Tensor | None = None
    distances: Tensor | None = None
    sinks: Tensor | None = None


def as_bias(
    bias: Any,
    sinks: Tensor | None,
    query_length: Tensor,
    key_length: Tensor,
    name: str = "bias",
) -> Bias:
    """Brings the arguments of attention into the form of implementations.

    Args:
        bias: Floating tensor of rank 2 `(T, S)`, 3 `(B, T, S)` or 4
            `(B or 1, N or 1, T, S)`; or a callable that maps integer distances of
            any shape to biases `(N or 1, *shape)`, such as `ALiBi` or
            `RelativePositionBias`. It is called once, on all the distances there
            are: `j - i` for query `i` and key `j`.
        sinks: Floating `(N,)`, or `None`.
        query_length: T, an int or an integer scalar tensor.
        key_length: S, likewise.
        name: What the caller calls `bias`, for the error text.

    Raises:
        TypeError: If `bias` or `sinks` is not floating.
        ValueError: If the rank of `bias` is not 2, 3 or 4, or that of `sinks` not 1.
    """
    if sinks is not None:
        sinks = _as_floating(sinks, "sinks", (1,), "(N,)")
    if bias is None:
        return Bias(sinks=sinks)
    if not callable(bias) or isinstance(bias, KerasTensor) or ops.is_tensor(bias):
        bias = _as_floating(bias, name, (2, 3, 4), "(T, S), (B, T, S) or (B, N, T, S)")
        for _ in range(4 - len(bias.shape)):
            bias = ops.expand_dims(bias, axis=-3)
        return Bias(pairs=bias, sinks=sinks)
    return Bias(distances=bias(all_distances(query_length, key_length)), sinks=sinks)


def check_bias(bias: Bias, score_shape: Shape, name: str = "bias") -> None:
    """Refuses a bias that does not fit the scores, whose static shape is given.

    Args:
        bias: The bias.
        score_shape: `(B, N, T, S)`.
        name: What the caller calls it, for the error text.

    Raises:
        ValueError: If a dimension is neither that of the scores nor, where it may
            be, 1.
    """
    _, N, T, S = score_shape
    count = None if T is None or S is None else _greatest(T + S - 1, 0)
    for what, tensor, shape, shared in (
        (f"`{name}` must broadcast to (B, N, T, S)", bias.pairs, score_shape, range(4)),
        (
            f"What `{name}` returns must be (N or 1, T + S - 1)",
            bias.distances,
            (N, count),
            (0,),
        ),
        ("`sinks` must be (N,)", bias.sinks, (N,), ()),
    ):
        if tensor is None:
            continue
        fits = len(tensor.shape) == len(shape) and all(
            None in (have, want) or have == want or (have == 1 and axis in shared)
            for axis, (have, want) in enumerate(zip(tensor.shape, shape, strict=True))
        )
        if not fits:
            raise ValueError(
                f"{what}, here {tuple(shape)}. Received: shape {tuple(tensor.shape)}"
            )


def all_distances(query_length: Tensor, key_length: Tensor) -> Tensor:
    """Every distance of a key from a query, `(T + S - 1,)` int32, ascending.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.bias import all_distances
    >>> np.asarray(all_distances(2, 3)).tolist()
    [-1, 0, 1, 2]
    """
    count = _greatest(query_length + key_length - 1, 0)
    return ops.arange(count, dtype="int32") - (query_length - 1)


def table(distances: Tensor, query_length: Tensor, key_length: Tensor) -> Tensor:
    """Lays numbers for distances out as a table of pairs, `(N, T, S)`.

    Row `i` is `distances[:, T - 1 - i : T - 1 - i + S]`. It is read off a row of the
    numbers, repeated, whose length is one more than that of the table's rows.

    Args:
        distances: `(N, T + S - 1)`.
        query_length: T, an int or an integer scalar tensor.
        key_length: S, likewise.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.bias import table
    >>> np.asarray(table(np.array([[-1.0, 0.0, 1.0, 2.0]]), 2, 3))[0]
    array([[ 0.,  1.,  2.],
           [-1.,  0.,  1.]])
    """
    T, S = query_length, key_length
    heads = ops.shape(distances)[0]
    width = _greatest(T + S - 1, S)  # S, where there are no rows
    # The column after the last is never read; any number will do.
    ring = ops.concatenate(
        [distances[:, T - 1 :], distances[:, :1], distances[:, : T - 1]], axis=1
    )
    rows = ops.tile(ring, (1, T))[:, : T * width]
    return ops.reshape(rows, (heads, T, width))[:, :, :S]


def sum_distances(pairs: Tensor) -> Tensor:
    """Sums a table along its diagonals: the gradient of `table`.

    Args:
        pairs: `(N, T, S)`.

    Returns:
        `(N, T + S - 1)`.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.bias import sum_distances
    >>> np.asarray(sum_distances(np.arange(6.0).reshape(1, 2, 3))).tolist()
    [[3.0, 4.0, 6.0, 2.0]]
    """
    shape: Any = ops.shape(pairs)
    heads, T, S = shape
    width = T + S - 1
    rows = ops.pad(pairs, ((0, 0), (0, 0), (0, T - 1)))
    rows = ops.pad(ops.reshape(rows, (heads, T * width)), ((0, 0), (0, T)))
    ring = ops.sum(ops.reshape(rows, (heads, T, width + 1)), axis=1)
    return ops.concatenate([ring[:, S + 1 :], ring[:, :S]], axis=1)


def _greatest(one: Tensor, other: Tensor) -> Tensor:
    if isinstance(one, int) and isinstance(other, int):
        return max(one, other)
    return ops.maximum(one, other)


def _as_floating(values: Any, name: str, ranks: tuple[int, ...], shapes: str) -> Tensor:
    if not isinstance(values, KerasTensor):
        values = ops.convert_to_tensor(values)
    dtype = backend.standardize_dtype(values.dtype)
    if "float" not in dtype:
        raise TypeError(
            f"`{name}` must be floating. Received dtype {dtype}. What may not attend "
            "is a mask: pass it as `mask`."
        )
    if len(values.shape) not in ranks:
        raise ValueError(
            f"`{name}` must have the shape {shapes}. "
            f"Received: {name} of shape {tuple(values.shape)}"
        )
    return values
