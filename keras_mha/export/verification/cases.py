"""The runs that a file is given, and what the model answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keras_mha.export.endpoint import Endpoint
from keras_mha.export.tokens import INPUT, after_tokenizer

Arrays = Mapping[str, np.ndarray]
_BATCH = 32


class MisfitError(ValueError):
    """A file's input has another type or shape than the samples."""


@dataclass(frozen=True)
class Cases:
    """Runs of a file.

    Attributes:
        given: The inputs of each run; the last run is the one to time.
        wanted: The model's answers to them.
        kept: The numbers of the samples in them, in order; further rows only fill up.
    """

    given: tuple[Arrays, ...]
    wanted: tuple[Arrays, ...]
    kept: np.ndarray

    @property
    def rows(self) -> int:
        """How many samples there are."""
        return len(self.kept)

    @property
    def timed_rows(self) -> int:
        """How many rows the run to time has."""
        return len(next(iter(self.given[-1].values())))

    def first(self, samples: int) -> Cases:
        """The runs of the first samples alone; all runs must be of one size."""
        runs = -(-samples // self.timed_rows)
        return Cases(self.given[:runs], self.wanted[:runs], self.kept[:samples])


def free_cases(endpoint: Endpoint, arrays: Arrays) -> Cases:
    """All samples in some batches, then the first alone."""
    rows = len(next(iter(arrays.values())))
    cuts = [slice(i, i + _BATCH) for i in range(0, rows, _BATCH)]
    given = tuple(
        {name: array[cut] for name, array in arrays.items()}
        for cut in [*cuts, slice(1)]
    )
    return Cases(given, tuple(map(endpoint.answer, given)), np.arange(rows))


def fixed_cases(
    endpoint: Endpoint, arrays: Arrays, shape: Sequence[int], dtype: str
) -> Cases:
    """The samples that fit a file whose one input has a fixed shape.

    Integers of two axes are ids: they are padded with 0, or lose zeros at their end.
    Strings all fit.

    Args:
        endpoint: The model.
        arrays: Its samples.
        shape: Of the file's input; -1 where it is free.
        dtype: Of the file's input.

    Raises:
        MisfitError: If none fits.
    """
    ((name, array),) = arrays.items()
    received = f"the samples are {array.dtype} {array.shape}"
    strings = array.dtype.kind == "O"
    if strings != (dtype == "string") or len(shape) != array.ndim:
        raise MisfitError(f"it takes {dtype} {list(shape)}; {received}")
    batch = shape[0] if shape[0] > 0 else 1
    sizes = tuple(
        given if size < 0 else size
        for size, given in zip(shape[1:], array.shape[1:], strict=True)
    )
    kept = np.arange(len(array))
    if sizes != array.shape[1:]:
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise MisfitError(f"it takes {dtype} {list(shape)}; {received}")
        kept = np.flatnonzero(~np.any(array[:, sizes[0] :], axis=1))
        if not len(kept):
            raise MisfitError(f"no sample has at most {sizes[0]} ids")
        array = array[kept, : sizes[0]]
        array = np.pad(array, ((0, 0), (0, sizes[0] - array.shape[1])))
    filled = np.concatenate([array, np.repeat(array[-1:], -len(array) % batch, axis=0)])
    own = filled if strings else filled.astype(dtype)
    runs = [{name: own[i : i + batch]} for i in range(0, len(own), batch)]
    wanted = _answers(endpoint, {name: filled}, batch)
    return Cases(tuple(runs), tuple(wanted), kept)


def text_cases(endpoint: Endpoint, arrays: Arrays, length: int) -> Cases:
    """Each text alone, for a runtime that cuts texts into `length` ids itself.

    Besides the model's one output, under the name `scores`, the ids are wanted that
    its own tokenizer makes.

    Raises:
        MisfitError: If the model has several outputs.
        ValueError: If it has no tokenizer, or several.
    """
    ((name, texts),) = arrays.items()
    ids = after_tokenizer(endpoint, arrays)[1][INPUT]
    # Where more ids than that are not padding, none that it can make are the same.
    too_long = np.any(ids[:, length:], axis=1)
    ids = np.pad(ids, ((0, 0), (0, max(0, length - ids.shape[1]))))[:, :length]
    ids[too_long] = -2
    answers = _answers(endpoint, arrays, 1)
    if len(answers[0]) != 1:
        raise MisfitError(f"the model has the outputs {sorted(answers[0])}, not one")
    wanted = [
        {"scores": next(iter(answer.values())), "ids": row[np.newaxis]}
        for answer, row in zip(answers, ids, strict=True)
    ]
    given = [{name: text.reshape(1)} for text in np.split(texts, len(texts))]
    return Cases(tuple(given), tuple(wanted), np.arange(len(texts)))


def _answers(endpoint: Endpoint, arrays: Arrays, batch: int) -> list[Arrays]:
    """The model's answers to the batches of its one input."""
    ((name, array),) = arrays.items()
    # It takes several of the batches at once: that is faster.
    step = -(-_BATCH // batch) * batch
    return [
        {output: answer[i : i + batch] for output, answer in answers.items()}
        for j in range(0, len(array), step)
        for answers in [endpoint.answer({name: array[j : j + step]})]
        for i in range(0, len(array[j : j + step]), batch)
    ]


def labels_of(answers: Sequence[Arrays], rows: int) -> np.ndarray | None:
    """The class of each of the first rows; `None` where that is not what is answered.

    It is the largest of several values, or whether a single one is at least 0.5; -1
    where a value is no number.
    """
    if len(answers[0]) != 1:
        return None
    ((name, first),) = answers[0].items()
    if first.ndim != 2 or first.dtype.kind != "f":
        return None
    values = np.concatenate([answer[name] for answer in answers])[:rows]
    several = first.shape[1] > 1
    labels = np.argmax(values, axis=1) if several else values[:, 0] >= 0.5
    return np.where(np.isnan(values).any(axis=1), -1, labels)
