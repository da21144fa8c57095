"""Small models with random weights, all sizes different primes.

Letters: B batch, T length, N query heads, H head size, D width.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

import keras_mha
from keras_mha.models import BertEncoder
from tests.support.layers import randomize

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


def bert_encoder(**options: Any) -> BertEncoder:
    """Of two blocks, with random weights; its width is a multiple of 11 heads."""
    sizes = {"embedding_dim": 33, "num_heads": 11, **options}
    encoder = BertEncoder(
        VOCABULARY, T, num_layers=2, hidden_dim=17, name="bert", **sizes
    )
    encoder.build()
    randomize(encoder)
    return encoder


def bert_classifier(encoder: BertEncoder) -> keras.Model:
    """Ids `(B, T)`, 0 padding, to probabilities; Functional."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = encoder({"input_ids": ids, "attention_mask": ops.not_equal(ids, 0)})
    pooled = keras.layers.GlobalAveragePooling1D(name="mean")(hidden)
    label = keras.layers.Dense(CLASSES, activation="softmax", name="label")
    model = keras.Model(ids, label(pooled), name="classifier")
    randomize(label)
    return model


def path_of(block: int) -> str:
    return f"block_{block}/attention/self_attention"
