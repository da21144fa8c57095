"""Draws inputs that were no samples, to try a file with.

Letters: B batch, T length.

A file may be right on the samples and wrong elsewhere: where they hold no padding, all
have one length, or leave values out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_mha.export.endpoint import Endpoint
from keras_mha.export.samples import Arrays

_MOST_ROWS = 32
_PADDING = np.arange(4)  # what stands for padding in most vocabularies
_LARGEST = 2**31


def drawn_cases(
    endpoint: Endpoint, arrays: Arrays, *, seed: int = 0
) -> tuple[list[Arrays], list[Arrays]]:
    """Draws up to three runs, and asks the model for its answers.

    - Other values, at each place within the range of the samples' there: integers from
      all between, floats blended of two samples' values, strings of another row.
    - The same, where rows of ids and series end in padding: 0, and in some rows 1, 2
      or 3, which are padding in some vocabularies.
    - Half as long, where the model leaves sizes free.

    Inputs without a batch dimension stay as they are, and so does the first place of a
    row where all samples have the same value there, as in masks. What the model itself
    refuses is left out.

    Args:
        endpoint: The model; its sizes may be narrower than the model's own.
        arrays: Its samples by input name; 32 rows of them count.
        seed: Of the values.

    Returns:
        The inputs of each run, and the model's answers.

    Example:

    >>> import keras, numpy as np
    >>> from keras_mha.export.drawn import drawn_cases
    >>> from keras_mha.export.endpoint import describe
    >>> ids = keras.Input((None,), dtype="int32", name="ids")
    >>> model = keras.Model(ids, keras.layers.Embedding(9, 3)(ids))
    >>> cases, answers = drawn_cases(*describe(model, [[2, 8, 3, 5], [6, 3, 4, 2]]))
    >>> [case["ids"].shape for case in cases], len(answers)
    ([(2, 4), (2, 4), (2, 2)], 3)
    >>> cases[1]["ids"][:, -1].tolist()  # padding
    [0, 1]
    """
    generator = np.random.default_rng(seed)
    some = endpoint.take(arrays, slice(endpoint.batch_size or _MOST_ROWS))
    others = {
        name: array if name in endpoint.unbatched else _other_values(array, generator)
        for name, array in some.items()
    }
    lengths = generator.random(endpoint.rows(some))
    padded = {
        name: array
        if name in endpoint.unbatched
        else _padded(array, some[name], lengths)
        for name, array in others.items()
    }
    cases, answers = [], []
    candidates = [others]
    if not all(np.array_equal(padded[name], others[name]) for name in others):
        candidates.append(padded)
    half = halved(endpoint, others)
    if any(half[name].shape != others[name].shape for name in others):
        candidates.append(half)
    for case in candidates:
        answer = endpoint.answer_or_none(case)
        if answer is not None:
            cases.append(case)
            answers.append(answer)
    return cases, answers


def halved(endpoint: Endpoint, case: Arrays) -> dict[str, np.ndarray]:
    """Cuts inputs to half of every size that is free; the batch stays."""

    def half(name: str) -> tuple[slice, ...]:
        sizes = zip(endpoint.inputs[name].shape, case[name].shape, strict=True)
        return tuple(
            slice((size + 1) // 2 if free is None and axis else size)
            for axis, (free, size) in enumerate(sizes)
        )

    return {name: case[name][half(name)] for name in case}


def _other_values(array: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws values within the range of the samples', at each place."""
    if array.dtype.kind == "O":
        return _shuffled(array, generator)
    if array.dtype.kind != "f":
        return _integers(array, generator)
    if not np.isfinite(array).all():
        return _shuffled(array, generator)
    if _is_whole(array):
        return _integers(array, generator)
    share = generator.random(array.shape)
    one, other = _shuffled(array, generator), _shuffled(array, generator)
    return (share * one + (1 - share) * other).astype(array.dtype)


def _shuffled(array: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Exchanges the rows' values, at each place in another order."""
    order = np.argsort(generator.random(array.shape), axis=0)
    return np.take_along_axis(array, order, axis=0)


def _integers(array: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    wide = array.astype(np.int64)
    low, high = wide.min(axis=0), wide.max(axis=0)
    if np.array_equal(low, high):  # one row, or equal ones
        low, high = np.full_like(low, wide.min()), np.full_like(high, wide.max())
        if low.ndim:
            low[0] = high[0] = wide[0, 0]
    drawn: Any = generator.integers(low, high, array.shape, endpoint=True)
    return drawn.astype(array.dtype)


def _is_whole(array: np.ndarray) -> bool:
    """Returns whether an array holds integers, of whatever type."""
    if array.dtype.kind == "f":
        return bool(np.all((np.rint(array) == array) & (np.abs(array) < _LARGEST)))
    return array.dtype.kind in "iub"


def _padded(array: np.ndarray, samples: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Ends rows of ids `(B, T)`, and of series `(B, T, ...)`, in padding.

    Args:
        array: What to pad.
        samples: Padding is not above the largest value that they have at a place.
        lengths: The share of each row that stays.
    """
    whole = _is_whole(samples)
    if array.ndim != (2 if whole else 3) or array.shape[1] < 2:
        return array
    stays = 1 + (lengths * (array.shape[1] - 1)).astype(int)
    is_padding = np.arange(array.shape[1]) >= stays[:, np.newaxis]
    if not whole:
        return np.where(is_padding[..., np.newaxis], 0, array).astype(array.dtype)
    padding = np.resize(_PADDING, len(array))[:, np.newaxis]
    padding = np.where(padding <= samples.max(axis=0), padding, 0)
    return np.where(is_padding, padding, array).astype(array.dtype)
