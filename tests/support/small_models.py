"""Small models with random non-zero weights, biases included.

Letters: B batch, T length, N query heads, H head size, D width.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_mha
from keras_mha.models import BertEncoder
from keras_mha.text import WordpieceTokenizer
from tests.support.layers import randomize

B, T, N, H, D, CLASSES, NUM_IDS = 5, 7, 3, 2, 11, 2, 13
LENGTHS = np.array([5, 7, 2, 3, 6])
REAL = np.arange(T) < LENGTHS[:, None]
IDS = np.random.default_rng(1).integers(1, NUM_IDS, (B, T)) * REAL
LABELS = np.array([1, 0, 1, 1, 0])

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "##ly", "movie", "a"]
TEXTS = ["good movie", "a badly bad movie", "\u00dcber GOOD \U0001f3ac", "", "bad\0bad"]

# As texts that users send: nothing, unknown words, a whole book, control characters,
# broken UTF-8, right-to-left letters, emoji with joiners.
HOSTILE = [
    "",
    "qqqq wwww",
    "good movie " * 9091,
    "bad\x00\x01\x1b[31m\r\n\tmovie",
    b"good \xff\xfe\xc3 movie",
    "\u202e\u05e1\u05e8\u05d8 \u0637\u064a\u0628 good",
    "\U0001f3ac\U0001f468\u200d\U0001f469\u200d\U0001f467 bad",
]


def dense_model() -> keras.Model:
    """Features (B, 3) to probabilities (B, 2)."""
    return randomize(
        keras.Sequential(
            [
                keras.Input((3,), name="features"),
                keras.layers.Dense(5, activation="gelu"),
                keras.layers.Dense(2, activation="softmax", name="probabilities"),
            ]
        )
    )


def features(rows: int = 5) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(rows, 3)).astype("float32")


def ids_model(**kwargs: Any) -> keras.Model:
    """Ids (B, T) to probabilities (B, 3), of stock layers."""
    ids = keras.Input((None,), dtype="int32", name="ids", **kwargs)
    vectors = keras.layers.Embedding(11, 6, mask_zero=True)(ids)
    attended = keras.layers.MultiHeadAttention(2, 5)(vectors, vectors)
    pooled = keras.layers.GlobalAveragePooling1D()(attended)
    head = keras.layers.Dense(3, activation="softmax", name="probabilities")
    return randomize(keras.Model(ids, head(pooled)))


class CompiledSoftmax(keras.layers.Layer):
    """Softmax inside a function that must be compiled by XLA."""

    def call(self, inputs: Any) -> Any:
        compiled = tf.function(tf.nn.softmax, jit_compile=True, autograph=False)
        return compiled(inputs)


def compiled_model() -> keras.Model:
    inputs = keras.Input((3,), name="features")
    hidden = keras.layers.Dense(5)(inputs)
    return randomize(keras.Model(inputs, CompiledSoftmax(name="probabilities")(hidden)))


def text_model() -> keras.Model:
    """Strings (B,) to probabilities (B, 3)."""
    texts = keras.Input((), dtype="string", name="text")
    tokenizer = WordpieceTokenizer(VOCABULARY, max_length=6)
    classify = ids_model()
    probabilities = keras.layers.Identity(name="probabilities")
    return keras.Model(texts, probabilities(classify(tokenizer(texts))))


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
            keras_mha.TokenAndPositionEmbedding(NUM_IDS, T, D, name="embedding"),
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
    encoder = BertEncoder(NUM_IDS, T, num_layers=2, hidden_dim=17, name="bert", **sizes)
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
