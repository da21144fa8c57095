"""Checks that a server may put rows of different requests into one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keras_mha.export.endpoint import Endpoint
from keras_mha.export.parity import Arrays, check_parity
from keras_mha.layers.arguments import check_flag

_ANYWAY = "Pass `batching=False` to export it for a server that batches no requests."


def choose_batching(batching: bool | None, endpoint: Endpoint) -> bool:
    """Returns whether a server may batch requests, as far as the inputs tell.

    Raises:
        ValueError: If `batching` is not what it may be, or is set where an input has
            no batch dimension; or if the model answers batches of one size only, and
            `batching` is not False.
    """
    whole = sorted(endpoint.unbatched)
    if batching is None:
        batching = not whole
    if not check_flag(batching, "batching"):
        return False
    if whole:
        raise ValueError(
            "With `batching=True` every input of `model` must have a batch dimension. "
            f"Received: {whole} without one"
        )
    if endpoint.batch_size is not None:
        raise ValueError(
            "`model` must answer batches of any size, or a server could not batch "
            f"requests. Received: one for batches of {endpoint.batch_size} rows only. "
            f"{_ANYWAY}"
        )
    return True


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
    alone = [singles[0]] if singles else []
    for name in together:
        shapes = [answer[name].shape for answer in (together, filled, *alone)]
        counts = (rows, _filled_rows(rows), 1)
        batched = all(
            shape[:1] == (count,) for shape, count in zip(shapes, counts, strict=False)
        )
        if not batched or len({shape[1:] for shape in shapes}) != 1:
            raise ValueError(
                "Every output of `model` must have the batch as its first dimension, "
                "and as no other, or a server could not batch requests: its rows would "
                f"depend on each other. Received: output {name!r} of shape {shapes[0]} "
                f"for {rows} rows, and {shapes[1]} for {_filled_rows(rows)}. {_ANYWAY}"
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
        sizes = [np.abs(a) for a in together.values() if a.dtype.kind == "f"]
        largest = max(float(np.max(size, initial=0.0)) for size in sizes or [[]])
        raise ValueError(
            "The answer of `model` to a row must not depend on the other rows of its "
            "batch, or a server could not batch requests. Received: answers that "
            f"differ by {difference:.3g}, where values are as large as {largest:.3g}; "
            f"`tolerance` is {tolerance:.3g}. {_ANYWAY}"
        )
    return difference


def _rows(arrays: Arrays, start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: array[start:stop] for name, array in arrays.items()}
