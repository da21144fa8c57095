"""The runs that a file is tried with, and what the model answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tensorflow as tf

from keras_mha.export.endpoint import Endpoint
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.tokens import INPUT, endpoint_of_tokens

Arrays = Mapping[str, np.ndarray]
_BATCH = 32


class MisfitError(ValueError):
    """A file's input has another type or shape than the samples."""


@dataclass(frozen=True)
class Cases:
    """Runs of a file.

    Attributes:
        inputs: The inputs of each run; the last run is the one to time.
        expected: The model's answers to them.
        samples: The numbers of the samples in them, in order; further rows only fill
            up a batch.
    """

    inputs: tuple[Arrays, ...]
    expected: tuple[Arrays, ...]
    samples: np.ndarray

    @property
    def rows(self) -> int:
        """The number of samples."""
        return len(self.samples)

    @property
    def timed_rows(self) -> int:
        """The number of rows in the run to time."""
        return len(next(iter(self.inputs[-1].values())))

    def first(self, count: int) -> Cases:
        """Returns the runs of the first samples; all runs must be of one size."""
        runs = -(-count // self.timed_rows)
        return Cases(self.inputs[:runs], self.expected[:runs], self.samples[:count])


@dataclass(frozen=True)
class Samples:
    """The samples that a model's files are tried with.

    Attributes:
        endpoint: The model.
        arrays: Its samples by input name.
    """

    endpoint: Endpoint
    arrays: Arrays

    @cached_property
    def in_batches(self) -> Cases:
        """All samples in some batches, then only the first."""
        rows = len(next(iter(self.arrays.values())))
        cuts = [slice(i, i + _BATCH) for i in range(0, rows, _BATCH)]
        inputs = tuple(
            {name: array[cut] for name, array in self.arrays.items()}
            for cut in [*cuts, slice(1)]
        )
        expected = tuple(map(self.endpoint.answer, inputs))
        return Cases(inputs, expected, np.arange(rows))

    @property
    def are_texts(self) -> bool:
        """Whether the model takes strings."""
        return any(spec.dtype == tf.string for spec in self.endpoint.inputs.values())

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the model's outputs."""
        return tuple(self.in_batches.expected[0])


@dataclass(frozen=True)
class Opened:
    """Describes a file before it runs, as a format's `open_file` reads it.

    Attributes:
        file: The file, as its runtimes need to know it.
        cases: The runs that it is tried with.
        quantized: Whether it holds weights in less than float32.
        unread: Why a runtime of the format that does not read its kind does not.
    """

    file: File
    cases: Cases
    quantized: bool = False
    unread: str = ""


def fixed_cases(samples: Samples, shape: Sequence[int], dtype: str) -> Cases:
    """Chooses the samples that fit a file whose one input has a fixed shape.

    Integers of two axes are ids: they are padded with 0, or lose zeros at their end.
    Strings all fit.

    Args:
        samples: The model and its samples; it has one input.
        shape: Of the file's input; -1 where it is free.
        dtype: Of the file's input.

    Raises:
        MisfitError: If none fits.
    """
    ((name, array),) = samples.arrays.items()
    received = f"the samples are {array.dtype} {array.shape}"
    strings = array.dtype.kind == "O"
    if strings != (dtype == "string") or len(shape) != array.ndim:
        raise MisfitError(f"it takes {dtype} {list(shape)}; {received}")
    batch = shape[0] if shape[0] > 0 else 1
    sizes = tuple(
        free if size < 0 else size
        for size, free in zip(shape[1:], array.shape[1:], strict=True)
    )
    numbers = np.arange(len(array))
    if sizes != array.shape[1:]:
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise MisfitError(f"it takes {dtype} {list(shape)}; {received}")
        numbers = np.flatnonzero(~np.any(array[:, sizes[0] :], axis=1))
        if not len(numbers):
            raise MisfitError(f"no sample has at most {sizes[0]} ids")
        array = array[numbers, : sizes[0]]
        array = np.pad(array, ((0, 0), (0, sizes[0] - array.shape[1])))
    filled = np.concatenate([array, np.repeat(array[-1:], -len(array) % batch, axis=0)])
    typed = filled if strings else filled.astype(dtype)
    runs = [{name: typed[i : i + batch]} for i in range(0, len(typed), batch)]
    expected = _answers(samples.endpoint, {name: filled}, batch)
    return Cases(tuple(runs), tuple(expected), numbers)


def text_cases(samples: Samples, length: int) -> Cases:
    """Takes one text at a time, for a runtime that cuts it into `length` ids itself.

    Expects the model's one output, under the name `scores`, and the ids that its
    tokenizer makes.

    Raises:
        MisfitError: If the model has several outputs.
        ValueError: If it has no tokenizer, or several.
    """
    ((name, texts),) = samples.arrays.items()
    ids = endpoint_of_tokens(samples.endpoint, samples.arrays)[1][INPUT]
    # Where more ids than that are not padding, none that it can make are the same.
    too_long = np.any(ids[:, length:], axis=1)
    ids = np.pad(ids, ((0, 0), (0, max(0, length - ids.shape[1]))))[:, :length]
    ids[too_long] = -2
    answers = _answers(samples.endpoint, samples.arrays, 1)
    if len(answers[0]) != 1:
        raise MisfitError(f"the model has the outputs {sorted(answers[0])}, not one")
    expected = [
        {"scores": next(iter(answer.values())), "ids": row[np.newaxis]}
        for answer, row in zip(answers, ids, strict=True)
    ]
    inputs = [{name: text.reshape(1)} for text in np.split(texts, len(texts))]
    return Cases(tuple(inputs), tuple(expected), np.arange(len(texts)))


def _answers(endpoint: Endpoint, arrays: Arrays, batch: int) -> list[Arrays]:
    """Asks the model for its answers to the batches of its one input."""
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
    """Returns the class of each of the first rows; `None` where the answers have none.

    It is the largest of several values, or whether a single one is at least 0.5; -1
    where a value is NaN.
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
