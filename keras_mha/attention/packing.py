"""Sequences of different lengths packed into dense rows, and back.

A batch padded to its longest sequence spends most of its work on padding. Packed,
several sequences share a row, and each token attends only within its own: the segment
ids say which one that is, the positions where in it the token stands.

Packing plans and copies on the host, in NumPy, as part of the input pipeline. Unpacking
is a gather in `keras.ops`, part of the model.

Letters: B sequences, T their padded length, R rows, L row length.

Source: Krell et al. 2021, "Efficient sequence packing without cross-contamination:
accelerating large language models without impacting performance". Rows are filled
first-fit decreasing (Johnson 1973, "Near-optimal bin packing algorithms"), which needs
at most 11/9 of the fewest rows possible, and one more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_mha.attention.mask_parts import clear_padding
from keras_mha.attention.numeric import plain_integer
from keras_mha.typing import Tensor

Array = NDArray[Any]


class PackedSequences(NamedTuple):
    """A packed batch, as `pack_sequences` returns it.

    Being a tuple of arrays, it passes through `tf.data` and into models as it is:
    `tf.data.Dataset.from_tensors((packed, labels))` for one batch. Lists of arrays
    given to `fit` and `predict` must have as many rows each, which R and B are not.

    Attributes:
        values: `(R, L, ...)`; the pad value in places without a token.
        segment_ids: int32 `(R, L)`; 1, 2, ... number the sequences of a row from left
            to right, -1 marks places without a token, which attend to nothing.
        positions: int32 `(R, L)`; a token's place in its own sequence, from 0.
        index: int32 `(B, T)`; where in the `R * L` places, row after row, each token
            of the padded layout went; -1 where it has no token.
    """

    values: Tensor
    segment_ids: Tensor
    positions: Tensor
    index: Tensor

    def pack(self, other: Any, pad_value: float = 0) -> Array:
        """Lays out another array of the same sequences in the same way.

        For what comes with each token, such as its label or weight.

        Args:
            other: List of arrays or `tf.RaggedTensor` with the lengths of the packed
                sequences, or a padded array `(B, T, ...)`.
            pad_value: Value of places without a token.

        Returns:
            Array `(R, L, ...)`.

        Raises:
            ValueError: If the lengths, or B and T, are not those of the packed
                sequences, or the dtype of `other` cannot hold `pad_value`.

        Example:

        >>> from keras_mha.attention.packing import pack_sequences
        >>> packed = pack_sequences([[5, 6], [7, 8, 9]], row_length=6)
        >>> packed.pack([[1, 2], [3, 4, 5]], pad_value=-1)
        array([[ 3,  4,  5,  1,  2, -1]])
        """
        index = np.asarray(self.index)
        ragged = _ragged_tokens(other, "other")
        if ragged is None:
            padded = np.asarray(other)
            if padded.shape[:2] != index.shape:
                raise ValueError(
                    "`other` must have the leading dimensions (B, T) of the packed "
                    f"sequences, {index.shape}. Received: other of shape {padded.shape}"
                )
            tokens = padded[index >= 0]
        else:
            tokens, received = ragged
            lengths = (index >= 0).sum(axis=1)
            if not np.array_equal(received, lengths):
                raise ValueError(
                    "`other` must have the lengths of the packed sequences, "
                    f"{lengths.tolist()}. Received: {received.tolist()}"
                )
        return _place(tokens, index, np.shape(self.segment_ids), pad_value)


def pack_sequences(
    sequences: Any,
    lengths: Any = None,
    *,
    row_length: int,
    num_rows: int | None = None,
    pad_value: float = 0,
) -> PackedSequences:
    """Packs sequences into rows of `row_length` tokens, without splitting any.

    Runs on the host, for a `keras.utils.PyDataset` or `tf.data.Dataset.from_generator`.
    In the model, attention takes the `segment_ids`, so that a token sees its own
    sequence only, embeddings of positions take the `positions`, and `unpack_sequences`
    brings the outputs back to `(B, T, ...)`, to be pooled or compared with labels.

    Args:
        sequences: List of B arrays `(length, ...)`, which may be empty; a
            `tf.RaggedTensor` with one ragged dimension; or a padded array
            `(B, T, ...)`, with `lengths`.
        lengths: For a padded array, integers `(B,)`, or a boolean mask `(B, T)`, True
            for tokens. Those of a mask may stand anywhere; packed they close up.
        row_length: L, the tokens in a row; no sequence may be longer.
        num_rows: R. Defaults to as many as are needed, at least one. Rows that are
            given but not needed stay empty.
        pad_value: Value in `values` of places without a token.

    Returns:
        The packed batch. T is that of the padded array; of a list or ragged tensor it
        is the longest length, or `row_length` if `num_rows` is given. So with
        `num_rows`, no shape depends on the lengths, and XLA compiles once.

    Raises:
        TypeError: If `lengths` is neither integer nor boolean.
        ValueError: If `sequences`, `lengths`, `row_length` or `num_rows` is not as
            described, a sequence is longer than `row_length`, the sequences do not fit
            in `num_rows`, or their dtype cannot hold `pad_value`.

    Example:

    >>> from keras_mha.attention.packing import pack_sequences
    >>> packed = pack_sequences([[5, 6], [7, 8, 9, 10], [11]], row_length=5)
    >>> packed.values
    array([[ 7,  8,  9, 10, 11],
           [ 5,  6,  0,  0,  0]])
    >>> packed.segment_ids
    array([[ 1,  1,  1,  1,  2],
           [ 1,  1, -1, -1, -1]], dtype=int32)
    >>> packed.positions
    array([[0, 1, 2, 3, 0],
           [0, 1, 0, 0, 0]], dtype=int32)
    >>> packed.index
    array([[ 5,  6, -1, -1],
           [ 0,  1,  2,  3],
           [ 4, -1, -1, -1]], dtype=int32)
    """
    row_length = _check_size(row_length, "row_length")
    if num_rows is not None:
        num_rows = _check_size(num_rows, "num_rows")
    ragged = _ragged_tokens(sequences, "sequences")
    if ragged is None:
        padded = np.asarray(sequences)
        present = _presence(padded, lengths)
        tokens, counts = padded[present], present.sum(axis=1)
        _check_longest(counts, row_length)
    else:
        if lengths is not None:
            raise ValueError(
                "`lengths` goes with a padded array (B, T, ...); a list or ragged "
                f"tensor has its own. Received: lengths={lengths}"
            )
        tokens, counts = ragged
        _check_longest(counts, row_length)
        width = counts.max(initial=0) if num_rows is None else row_length
        present = np.arange(width) < counts[:, None]

    rows, offsets, segments = _first_fit_decreasing(counts, row_length)
    needed = int(rows.max(initial=0)) + 1
    if num_rows is not None and needed > num_rows:
        raise ValueError(
            f"The sequences need {needed} rows of {row_length} tokens. "
            f"Received: num_rows={num_rows}"
        )
    shape = (num_rows or needed, row_length)

    starts = np.cumsum(counts) - counts
    positions = np.arange(len(tokens)) - np.repeat(starts, counts)
    index = np.full(present.shape, -1, np.int32)
    index[present] = np.repeat(rows * row_length + offsets, counts) + positions
    return PackedSequences(
        values=_place(tokens, index, shape, pad_value),
        segment_ids=_place(
            np.repeat(segments, counts).astype(np.int32), index, shape, pad_value=-1
        ),
        positions=_place(positions.astype(np.int32), index, shape),
        index=index,
    )


def unpack_sequences(packed: Tensor, index: Tensor) -> Tensor:
    """Takes packed tokens back to the padded layout.

    Places without a token become zeros by selection: whatever stands in the packed
    padding, NaN too, neither reaches the result nor gets a gradient.

    Args:
        packed: Tensor `(R, L, ...)`, such as a model's outputs on packed rows.
        index: The field of `PackedSequences`, integer `(B, T)`; or some of its
            columns: `index[:, :1]` fetches each sequence's first token.

    Returns:
        Tensor `(B, T, ...)`. `index >= 0` is its padding mask, as for
        `GlobalAveragePooling1D()(unpacked, mask=index >= 0)`.

    Example:

    >>> import numpy as np
    >>> from keras_mha.attention.packing import pack_sequences, unpack_sequences
    >>> packed = pack_sequences([[5, 6], [7, 8, 9, 10], [11]], row_length=5)
    >>> np.asarray(unpack_sequences(packed.values, packed.index)).tolist()
    [[5, 6, 0, 0], [7, 8, 9, 10], [11, 0, 0, 0]]
    """
    places = ops.reshape(packed, (-1, *ops.shape(packed)[2:]))
    # -1 fetches the last place, as anywhere in Keras, until the selection clears it.
    tokens = ops.take(places, index, axis=0)
    return clear_padding(tokens, ops.greater_equal(index, 0))


def _ragged_tokens(sequences: Any, name: str) -> tuple[Array, Array] | None:
    """All tokens `(total, ...)` and the lengths `(B,)`; `None` for a padded array."""
    if hasattr(sequences, "row_lengths"):  # a tf.RaggedTensor
        if sequences.ragged_rank != 1:
            raise ValueError(
                f"`{name}` must have one ragged dimension, the length. "
                f"Received: {sequences.ragged_rank} ragged dimensions"
            )
        return np.asarray(sequences.values), np.asarray(sequences.row_lengths())
    # NumPy keeps sequences of unequal lengths as an array of objects.
    objects = isinstance(sequences, np.ndarray) and sequences.dtype == object
    if not objects and not isinstance(sequences, list | tuple):
        return None
    arrays = [np.asarray(sequence) for sequence in sequences]
    if not arrays or any(array.ndim == 0 for array in arrays):
        raise ValueError(
            f"`{name}` must hold one array (length, ...) or more. Received: {sequences}"
        )
    # `[]` has neither the dtype nor the trailing dimensions of the others.
    filled = [array for array in arrays if len(array)] or arrays
    if len({array.shape[1:] for array in filled}) > 1:
        raise ValueError(
            f"`{name}` must agree in every dimension after the length. "
            f"Received: shapes {[array.shape for array in arrays]}"
        )
    return np.concatenate(filled), np.array([len(array) for array in arrays])


def _presence(padded: Array, lengths: Any) -> Array:
    """Where the padded array has tokens, boolean `(B, T)`."""
    if padded.ndim < 2 or lengths is None:
        raise ValueError(
            "`sequences` must be a list of arrays, a ragged tensor, or a padded array "
            "(B, T, ...) with `lengths`. "
            f"Received: sequences of shape {padded.shape}, lengths={lengths}"
        )
    lengths, (B, T) = np.asarray(lengths), padded.shape[:2]
    if lengths.dtype.kind not in "bui":
        raise TypeError(
            "`lengths` must be integers (B,) or a boolean mask (B, T). "
            f"Received: lengths of dtype {lengths.dtype}"
        )
    is_mask = lengths.dtype == bool
    if lengths.shape != ((B, T) if is_mask else (B,)):
        raise ValueError(
            f"`lengths` must be integers (B,) = {(B,)} or a boolean mask (B, T) = "
            f"{(B, T)}. Received: {lengths.dtype} of shape {lengths.shape}"
        )
    if is_mask:
        return lengths
    if np.any((lengths < 0) | (lengths > T)):
        raise ValueError(
            f"`lengths` must be from 0 to T = {T}. Received: lengths={lengths.tolist()}"
        )
    return np.arange(T) < lengths[:, None]


def _first_fit_decreasing(
    lengths: Array, row_length: int
) -> tuple[Array, Array, Array]:
    """Row, offset in the row and segment id of each sequence, all `(B,)`.

    Longest first, each goes to the first row with room for it. Empty ones come last, so
    that they take no segment id from a sequence with tokens.
    """
    rows, offsets, segments = np.zeros((3, len(lengths)), np.int64)
    room = np.full(len(lengths), row_length)
    held = np.zeros(len(lengths), np.int64)
    for i in np.argsort(-lengths, kind="stable"):
        row = np.argmax(room >= lengths[i])
        held[row] += 1
        rows[i], offsets[i], segments[i] = row, row_length - room[row], held[row]
        room[row] -= lengths[i]
    return rows, offsets, segments


def _place(
    tokens: Array, index: Array, shape: tuple[int, ...], pad_value: float = 0
) -> Array:
    """Writes `tokens`, in the order of `index`, into rows of `shape`, (R, L)."""
    with np.errstate(invalid="ignore"):
        pad = np.asarray(pad_value).astype(tokens.dtype)
    if tokens.dtype.kind in "bui" and pad != pad_value:
        raise ValueError(
            f"`pad_value` must be a value of the tokens' dtype, {tokens.dtype}. "
            f"Received: pad_value={pad_value}"
        )
    places = np.full((shape[0] * shape[1], *tokens.shape[1:]), pad)
    places[index[index >= 0]] = tokens
    return places.reshape(*shape, *tokens.shape[1:])


def _check_size(size: Any, name: str) -> int:
    number = plain_integer(size)
    if number is None or number < 1:
        raise ValueError(f"`{name}` must be an integer, 1 or more. Received: {size!r}")
    return number


def _check_longest(lengths: Array, row_length: int) -> None:
    if lengths.max(initial=0) > row_length:
        i = int(np.argmax(lengths))
        raise ValueError(
            f"`row_length` must be at least the longest sequence's {lengths[i]} tokens "
            f"(number {i}, from 0). Received: row_length={row_length}"
        )
