"""Small models with random weights, all sizes different primes.

Letters: B batch, T length, N query heads, H head size, D width.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import keras_mha
from tests.layers.helpers import randomize

B, T, N, H, D, CLASSES, VOCABULARY = 5, 7, 3, 2, 11, 2, 13
LENGTHS = np.array([5, 7, 2, 3, 6])
REAL = np.arange(T) < LENGTHS[:, None]
IDS = np.random.default_rng(1).integers(1, VOCABULARY, (B, T)) * REAL
LABELS = np.array([1, 0, 1, 1, 0])


def classifier(
    *heads: int, name: str = "classifier", **options: Any
) -> keras.Sequential:
    """Ids `(B, T)`, 0 padding, to probabilities, through a block for each number."""
    blocks = [
        keras_mha.TransformerEncoderBlock(
            count, 17, key_dim=H, name=f"block_{i}", **options
        )
        for i, count in enumerate(heads)
    ]
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="ids"),
            keras_mha.TokenAndPositionEmbedding(VOCABULARY, T, D, name="embedding"),
            *blocks,
            keras.layers.GlobalAveragePooling1D(name="mean"),
            keras.layers.Dense(CLASSES, activation="softmax", name="label"),
        ],
        name=name,
    )
    randomize(model)
    return model


def path_of(block: int) -> str:
    return f"block_{block}/attention/self_attention"
