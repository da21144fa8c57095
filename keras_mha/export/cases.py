"""The runs that a file is tried with, and what the model answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import tensorflow as tf

from keras_mha.export.endpoint import Endpoint
from keras_mha.export.report import TensorInfo
from keras_mha.export.runtimes.descriptor import File
from keras_mha.export.samples import Arrays
from keras_mha.export.tokens import INPUT, endpoint_of_tokens

_BATCH = 32


class MisfitError(ValueError):
    """A file's inputs have other names, types or shapes than the samples."""


@dataclass(frozen=True)
class Cases:
    """Runs of a file.

    Attributes:
        inputs: The inputs of each run; the last run is the one to time.
        expected: The model's answers to them.
        samples: The numbers of the samples in them, in order; further rows only fill
            up a batch.
        timed_rows: The number of rows in the run to time.
    """

    inputs: tuple[Arrays, ...]
    expected: tuple[Arrays, ...]
    samples: np.ndarray
    timed_rows: int = 1

    @property
    def rows(self) -> int:
        """The number of samples."""
        return len(self.samples)

    def first(self, count: int) -> Cases:
        """Returns the runs of the first samples; all runs must be of one size."""
        runs = -(-count // self.timed_rows)
        return replace(
            self,
            inputs=self.inputs[:runs],
            expected=self.expected[:runs],
            samples=self.samples[:count],
        )


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
        """All samples in some batches, then only the first.

        Where the model answers batches of one size only, the first is such a batch, and
        samples that fill none are left out.
        """
        size = self.endpoint.batch_size
        rows = self.endpoint.rows(self.arrays)
        rows -= rows % (size or 1)
        step, first = size or _BATCH, size or 1
        cuts = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        inputs = tuple(
            self.endpoint.take(self.arrays, cut) for cut in [*cuts, slice(first)]
        )
        expected = tuple(map(self.endpoint.answer, inputs))
        return Cases(inputs, expected, np.arange(rows), first)

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


def fixed_cases(samples: Samples, inputs: Mapping[str, TensorInfo]) -> Cases:
    """Chooses the samples that fit a file whose inputs have fixed shapes.

    Integers of two axes are ids: they are padded with 0, or lose zeros at their end.
    Strings all fit.

    Args:
        samples: The model and its samples.
        inputs: The file's inputs by name; a size is `None` where it is free.

    Raises:
        MisfitError: If the file has other inputs, or no sample fits.
    """
    if set(inputs) != set(samples.arrays):
        raise MisfitError(
            f"it takes {sorted(inputs)}; the samples are for {sorted(samples.arrays)}"
        )
    endpoint = samples.endpoint
    shapes = {
        name: _check_fit(name, array, inputs[name], name not in endpoint.unbatched)
        for name, array in samples.arrays.items()
    }
    fits = np.full(endpoint.rows(samples.arrays), True)
    for name, shape in shapes.items():
        if name not in endpoint.unbatched:
            fits &= ~_is_cut(samples.arrays[name], shape)
    numbers = np.flatnonzero(fits)
    if not len(numbers):
        longest = max(shape[1] for shape in shapes.values() if len(shape) == 2)
        raise MisfitError(f"no sample has at most {longest} ids")
    batches = [shape[0] for n, shape in shapes.items() if n not in endpoint.unbatched]
    batch = max(batches, default=1)
    rows = filled_up(numbers, batch)
    filled = {
        name: _to_length(array, shapes[name])
        for name, array in endpoint.take(samples.arrays, rows).items()
    }
    typed = {
        name: array if array.dtype.kind == "O" else array.astype(inputs[name].dtype)
        for name, array in filled.items()
    }
    runs = [
        endpoint.take(typed, slice(i, i + batch)) for i in range(0, len(rows), batch)
    ]
    expected = _answers(endpoint, filled, batch)
    return Cases(tuple(runs), tuple(expected), numbers, batch)


def _check_fit(
    name: str, array: np.ndarray, given: TensorInfo, batched: bool
) -> tuple[int, ...]:
    """Returns the shape of the file's input for these samples, or refuses it."""
    sizes = given.shape or ()
    shape = tuple(
        (size or 1) if batched and axis == 0 else (size or free)
        for axis, (size, free) in enumerate(zip(sizes, array.shape, strict=False))
    )
    start = 1 if batched else 0
    if (
        (array.dtype.kind == "O") != (given.dtype == "string")
        or len(sizes) != array.ndim
        or (shape[start:] != array.shape[start:] and not (batched and _is_ids(array)))
    ):
        raise MisfitError(
            f"{name!r} takes {given.dtype} {list(sizes)}; the samples are "
            f"{array.dtype} {array.shape}"
        )
    return shape


def _is_cut(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Tells of each row whether it has ids beyond the file's length."""
    if not _is_ids(array):
        return np.zeros(len(array), bool)
    return np.any(array[:, shape[1] :], axis=1)


def _is_ids(array: np.ndarray) -> bool:
    return array.ndim == 2 and array.dtype.kind in "iu"


def _to_length(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pads or cuts ids to the file's length."""
    if array.shape[1:] == shape[1:]:
        return array
    array = array[:, : shape[1]]
    return np.pad(array, ((0, 0), (0, shape[1] - array.shape[1])))


def filled_up(array: np.ndarray, batch: int) -> np.ndarray:
    """Repeats the last row until the rows make whole batches."""
    return np.concatenate([array, np.repeat(array[-1:], -len(array) % batch, axis=0)])


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
    """Asks the model for its answers to the batches of its inputs."""
    rows = endpoint.rows(arrays)
    if endpoint.unbatched or endpoint.batch_size is not None:
        cuts = [slice(i, i + batch) for i in range(0, rows, batch)]
        return [endpoint.answer(endpoint.take(arrays, cut)) for cut in cuts]
    # It takes several of the batches at once: that is faster.
    step = -(-_BATCH // batch) * batch
    return [
        {output: answer[i : i + batch] for output, answer in answers.items()}
        for j in range(0, rows, step)
        for answers in [endpoint.answer(endpoint.take(arrays, slice(j, j + step)))]
        for i in range(0, min(step, rows - j), batch)
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
