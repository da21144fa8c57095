"""The encoders of the sentiment example, and their training recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import keras
import numpy as np
import tensorflow as tf

import keras_mha
from keras_mha.text import WordpieceTokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on, except data and seed.

    The data are few: under 10,000 sentences, with twice as many different words. One
    encoder trained on them from scratch learns a good deal of chance. Several small
    ones, trained separately, learn different chance, which cancels when their
    probabilities are averaged. Random `[UNK]` tokens, dropout, weight decay, smoothed
    labels, few epochs and a moving average of the weights keep each from learning
    sentences by heart.

    Sources: Hansen and Salamon 1990, "Neural network ensembles"; Iyyer et al. 2015,
    "Deep unordered composition" (word dropout); Loshchilov and Hutter 2019, "Decoupled
    weight decay regularization"; Szegedy et al. 2016 (label smoothing).
    """

    members: int = 10
    vocabulary_size: int = 8000
    max_length: int = 128
    embedding_dim: int = 32
    num_heads: int = 4
    hidden_dim: int = 64
    blocks: int = 1
    token_dropout: float = 0.3
    embedding_dropout: float = 0.3
    dropout: float = 0.2
    head_dropout: float = 0.5
    label_smoothing: float = 0.1
    batch_size: int = 128
    epochs: int = 5
    patience: int = 2
    learning_rate: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.5
    average_momentum: float = 0.99

    def smoke(self) -> Recipe:
        """Returns a recipe that takes seconds and learns nothing useful."""
        return replace(
            self,
            members=2,
            vocabulary_size=600,
            embedding_dim=16,
            hidden_dim=16,
            epochs=2,
        )


def build_member(vocabulary_size: int, recipe: Recipe, name: str) -> keras.Sequential:
    """Builds one encoder from ids `(B, T)` to probabilities of both labels `(B, 2)`."""
    blocks = [
        keras_mha.TransformerEncoderBlock(
            recipe.num_heads,
            recipe.hidden_dim,
            dropout=recipe.dropout,
            attention_dropout=0.0,
            rezero=True,
            name=f"block_{i}",
        )
        for i in range(recipe.blocks)
    ]
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="ids"),
            keras_mha.TokenAndPositionEmbedding(
                vocabulary_size,
                recipe.max_length,
                recipe.embedding_dim,
                name="embedding",
            ),
            keras.layers.Dropout(recipe.embedding_dropout, name="embedding_dropout"),
            *blocks,
            keras.layers.GlobalAveragePooling1D(name="mean"),
            keras.layers.Dropout(recipe.head_dropout, name="mean_dropout"),
            keras.layers.Dense(2, activation="softmax", name="label"),
        ],
        name=name,
    )


def committee(
    members: Sequence[keras.Sequential], tokenizer: WordpieceTokenizer | None = None
) -> keras.Model:
    """Averages the members: takes ids `(B, T)`, or with a tokenizer strings `(B,)`.

    The model shares the members' weights.
    """
    if tokenizer is None:
        inputs = ids = keras.Input((None,), dtype="int32", name="ids")
    else:
        inputs = keras.Input((), dtype="string", name="texts")
        ids = tokenizer(inputs)
    # The same layers without the optimizers, which would be saved too.
    bare = [keras.Sequential(member.layers, name=member.name) for member in members]
    average = keras.layers.Average(name="probabilities")
    return keras.Model(inputs, average([m(ids) for m in bare]), name="sentiment")


def encode(
    texts: Sequence[str], vocabulary: list[str], max_length: int
) -> list[np.ndarray]:
    """Cuts texts into rows of ids as the model's tokenizer does, without padding."""
    padded = WordpieceTokenizer(vocabulary, max_length)(tf.constant(list(texts)))
    return [row[row != 0] for row in padded.numpy()]
