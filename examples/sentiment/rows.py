"""Rows of token ids: batches them in few shapes, predicts them, packs them into a file.

Runs without TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np


@dataclass(frozen=True)
class Rows:
    """n rows of token ids without padding, and their labels `(n,)`."""

    ids: Sequence[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, where: np.ndarray) -> Rows:
        """Returns the rows at the integers `where`, in that order."""
        return Rows([self.ids[i] for i in where], self.labels[where])

    def __add__(self, other: Rows) -> Rows:
        labels = np.concatenate([self.labels, other.labels])
        return Rows([*self.ids, *other.ids], labels)


class Batches(keras.utils.PyDataset):
    """Batches of one size and few lengths, so that few programs are compiled.

    A batch holds rows of similar length and so little padding: within each stretch of
    64 batches, the drawn rows are sorted by length. Rows drawn again fill up the last
    batch.

    Args:
        rows: The rows.
        size: Rows in a batch.
        lengths: The lengths that batches may have, ascending. Rows are cut to the last.
        seed: Seed of the order.
        twice: Whether a batch holds each row twice.
    """

    def __init__(
        self,
        rows: Rows,
        size: int,
        lengths: Sequence[int],
        seed: int,
        twice: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.size, self.lengths, self.twice = rows, size, lengths, twice
        self._one_hot = np.eye(2, dtype=np.float32)[rows.labels]
        self._sizes = np.array([len(row) for row in rows.ids])
        self._generator = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def on_epoch_end(self) -> None:
        """Draws the next epoch's order."""
        order = self._generator.permutation(len(self.rows))
        order = np.concatenate([order, order])[: len(self) * self.size]
        stretch = 64 * self.size
        parts = [
            part[np.argsort(self._sizes[part], kind="stable")]
            for part in (order[i : i + stretch] for i in range(0, len(order), stretch))
        ]
        batches = np.concatenate(parts).reshape(len(self), self.size)
        batches = self._generator.permutation(batches)
        # Keras on TensorFlow learns from the first two which dimensions vary.
        longest = self._sizes[batches].max(axis=1)
        first = [int(longest.argmax()), int(longest.argmin())]
        others = np.delete(np.arange(len(batches)), first)
        self._batches = batches[[*dict.fromkeys(first), *others]]

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        where = self._batches[index]
        if self.twice:
            where = np.concatenate([where, where])
        ids = pad([self.rows.ids[i] for i in where], self.lengths)
        return ids, self.targets(where)

    def targets(self, where: np.ndarray) -> Any:
        """Returns the targets of the rows at `where`: one-hot labels `(size, 2)`."""
        return self._one_hot[where]


def pad(rows: Sequence[np.ndarray], lengths: Sequence[int]) -> np.ndarray:
    """Pads rows to the least of `lengths` that fits, or cuts them to the last.

    A row that is cut loses its end, but not its last token, `[SEP]`.
    """
    longest = max(len(row) for row in rows)
    length = next((size for size in lengths if size >= longest), lengths[-1])
    padded = np.zeros((len(rows), length), np.int32)
    for filled, row in zip(padded, rows, strict=True):
        tokens = row if len(row) <= length else np.append(row[: length - 1], row[-1])
        filled[: len(tokens)] = tokens
    return padded


def predict(
    model: keras.Model, rows: Rows, lengths: Sequence[int], size: int = 256
) -> Any:
    """Returns the model's outputs in the order of the rows."""
    order = np.argsort([len(row) for row in rows.ids], kind="stable")
    answers = []
    for start in range(0, len(rows), size):
        # The last row fills up the last batch, so that all have one size.
        where = order[np.minimum(np.arange(start, start + size), len(rows) - 1)]
        ids = pad([rows.ids[i] for i in where], lengths)
        answers.append(model.predict_on_batch(ids))
    places = np.argsort(order, kind="stable")
    return keras.tree.map_structure(
        lambda *parts: np.concatenate([np.asarray(part) for part in parts])[places],
        *answers,
    )


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of rows whose more probable label is right."""
    return float(np.mean(probabilities.argmax(-1) == labels))


def unpack(data: Mapping[str, np.ndarray], name: str) -> Rows:
    """Returns the rows of one set in the file."""
    ends = np.cumsum(data[f"{name}_lengths"])
    return Rows(np.split(data[f"{name}_ids"], ends[:-1]), data[f"{name}_labels"])


def pack(name: str, rows: Rows) -> dict[str, np.ndarray]:
    """Returns the arrays of one set, by their names in the file."""
    return {
        f"{name}_ids": np.concatenate(rows.ids).astype(np.int32),
        f"{name}_lengths": np.array([len(row) for row in rows.ids], np.int32),
        f"{name}_labels": np.asarray(rows.labels, np.int32),
    }
