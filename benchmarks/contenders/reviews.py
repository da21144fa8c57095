"""Training steps on batches of real reviews: padded, bucketed by length, packed."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
from typing_extensions import override

import keras_mha
from benchmarks.contenders import graph
from benchmarks.contenders.step import Step

DATA = Path(__file__).resolve().parents[2] / "examples" / "sentiment" / "data.py"
VOCABULARY = 8000
Batching = Literal["padded", "bucketed", "packed"]


class Encoder(keras.layers.Layer):
    """An embedding and two encoder blocks: ids `(rows, T)` in, `(rows, T, D)` out."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = keras.layers.Embedding(VOCABULARY, width)
        self.blocks = [
            keras_mha.TransformerEncoderBlock(num_heads, 4 * width) for _ in range(2)
        ]

    @override
    def call(self, ids: Any, segment_ids: Any = None) -> Any:
        outputs = self.embedding(ids)
        for block in self.blocks:
            if segment_ids is None:
                outputs = block(outputs, mask=ids != 0)
            else:
                outputs = block(outputs, segment_ids=segment_ids)
        return outputs


def training(
    how: Batching,
    *,
    batch_size: int,
    batches: int,
    width: int,
    num_heads: int,
    row: int,
) -> Step:
    """Times steps on the same reviews in batches of `batch_size`.

    Args:
        how: `"padded"`, random batches padded to their longest review; `"bucketed"`,
            the reviews sorted by length before they are cut into batches, then
            padded; `"packed"`, the random batches packed into rows.
        batch_size: Reviews in a batch.
        batches: How many batches.
        width: D.
        num_heads: N.
        row: Length of a packed row, and the longest review that is not cut.
    """
    reviews = draw_reviews(_all_lengths(), batch_size * batches, row)
    encoder = Encoder(width, num_heads)
    return graph.of_batches(encoder, arrange(how, reviews, batch_size, row), width)


def draw_reviews(lengths: np.ndarray, count: int, longest: int) -> list[np.ndarray]:
    """Draws `count` reviews without replacement, of random ids and real lengths.

    A review longer than `longest` is cut.
    """
    rng = np.random.default_rng(0)
    drawn = np.minimum(rng.choice(lengths, count, replace=False), longest)
    return [rng.integers(1, VOCABULARY, length, np.int32) for length in drawn]


def arrange(
    how: Batching, reviews: list[np.ndarray], batch_size: int, row: int
) -> list[tuple[np.ndarray, ...]]:
    """Makes the batches of `training`: ids, and segments if packed."""
    if how == "bucketed":
        reviews = sorted(reviews, key=len)
    cut = [
        reviews[start : start + batch_size]
        for start in range(0, len(reviews), batch_size)
    ]
    if how == "packed":
        return [_packed(batch, row) for batch in cut]
    return [(_padded(batch),) for batch in cut]


def _all_lengths() -> np.ndarray:
    """Returns the lengths of the sentiment example's reviews, in words and signs."""
    texts = runpy.run_path(str(DATA))["load_reviews"]().texts
    return np.array([len(text.split()) for text in texts])


def _padded(reviews: list[np.ndarray]) -> np.ndarray:
    ids = np.zeros((len(reviews), max(map(len, reviews))), np.int32)
    for row, review in zip(ids, reviews, strict=True):
        row[: len(review)] = review
    return ids


def _packed(reviews: list[np.ndarray], row: int) -> tuple[np.ndarray, ...]:
    packed = keras_mha.pack_sequences(reviews, row_length=row)
    return packed.values, packed.segment_ids
