"""Checks that a server may put rows of different requests into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from keras_mha.export.parity import check_parity

Arrays = Mapping[str, np.ndarray]


def padded(arrays: Arrays) -> dict[str, np.ndarray]:
    """Fills a batch up as TF Serving does, with copies of its first row.

    Filled to the next power of two, and by one row at least.
    """
    rows = len(next(iter(arrays.values())))
    missing = _filled_rows(rows) - rows
    return {
        name: np.concatenate([array, np.repeat(array[:1], missing, axis=0)])
        for name, array in arrays.items()
    }


def _filled_rows(rows: int) -> int:
    return 1 << rows.bit_length()


def check_batching(
    together: Arrays,
    filled: Arrays,
    singles: Sequence[Arrays],
    *,
    rows: int,
    tolerance: float,
) -> float:
    """Compares what a file answers to the same rows in different batches.

    Args:
        together: Its answers to some rows in one batch.
        filled: To the same, filled up by `padded`.
        singles: To the first rows, one at a time.
        rows: How many there are.
        tolerance: Largest absolute difference allowed.

    Returns:
        The largest difference.

    Raises:
        ValueError: If an output has not one row for each of the batch, or a value
            depends on the other rows.

    Example:

    >>> import numpy as np
    >>> from keras_mha.export.saved_model.batching import check_batching
    >>> batch = {"p": np.array([0.25, 0.5])}
    >>> filled = {"p": np.array([0.25, 0.5, 0.25, 0.25])}
    >>> single = {"p": np.array([0.25])}
    >>> check_batching(batch, filled, [single], rows=2, tolerance=1e-6)
    0.0
    """
    for name, array in together.items():
        sizes = [answer[name].shape[:1] for answer in (together, filled)]
        if sizes != [(rows,), (_filled_rows(rows),)]:
            raise ValueError(
                "Every output of `model` must have the batch as its first dimension, "
                f"or a server could not batch requests. Received: output {name!r} of "
                f"shape {array.shape} for {rows} rows, and {filled[name].shape} for "
                f"{_filled_rows(rows)}"
            )
    difference = check_parity(
        [together, *(_rows(together, i, i + 1) for i in range(len(singles)))],
        [_rows(filled, 0, rows), *singles],
        tolerance=np.inf,  # judged below, in other words
        samples=rows,
        runtime="",
        runtime_version="",
    ).max_absolute_difference
    if difference > tolerance:
        raise ValueError(
            "The answer of `model` to a row must not depend on the other rows of its "
            "batch, or a server could not batch requests. Received: answers that "
            f"differ by {difference:.3g}; `tolerance` is {tolerance:.3g}"
        )
    return difference


def _rows(arrays: Arrays, start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: array[start:stop] for name, array in arrays.items()}
