"""Programs on series, tables and graphs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tests.programs.program import Program, classes, numbers

WIDTH = 12


def _encoder(inputs: Any, size: int, heads: int, inner: int) -> Any:
    x = layers.MultiHeadAttention(key_dim=size, num_heads=heads, dropout=0.1)(
        inputs, inputs
    )
    x = layers.Dropout(0.1)(x)
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    both = x + inputs
    x = layers.Conv1D(filters=inner, kernel_size=1, activation="relu")(both)
    x = layers.Conv1D(filters=inputs.shape[-1], kernel_size=1)(x)
    return layers.LayerNormalization(epsilon=1e-6)(x) + both


def time_series() -> keras.Model:
    series = keras.Input((29, 3), name="series")
    x = series
    for _ in range(2):
        x = _encoder(x, 8, 2, 5)
    x = layers.GlobalAveragePooling1D(data_format="channels_last")(x)
    x = layers.Dense(11, activation="relu")(x)
    return keras.Model(series, layers.Dense(2, activation="softmax", name="label")(x))


def forecast() -> keras.Model:
    series = keras.Input((16, 3), name="series")
    x = layers.Bidirectional(layers.LSTM(6, return_sequences=True))(series)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 6)(x, x))
    x = layers.TimeDistributed(layers.Dense(5, activation="relu"))(x)
    return keras.Model(series, layers.Dense(4, name="next")(layers.Flatten()(x)))


def tabular() -> keras.Model:
    numeric = {n: keras.Input((1,), name=n) for n in ("age", "income")}
    kind = {n: keras.Input((1,), dtype="int32", name=n) for n in ("job", "town")}
    columns = [layers.Embedding(7, WIDTH)(x) for x in kind.values()]
    x = layers.Concatenate(axis=1)(columns)
    for _ in range(2):
        mixed = layers.MultiHeadAttention(3, WIDTH, dropout=0.1)(x, x)
        x = layers.LayerNormalization(epsilon=1e-6)(layers.Add()([mixed, x]))
    values = layers.Concatenate()(list(numeric.values()))
    values = layers.BatchNormalization()(values)
    x = layers.Concatenate()([layers.Flatten()(x), values])
    x = layers.Dense(13, activation=keras.activations.selu)(x)
    outputs = layers.Dense(1, activation="sigmoid", name="buys")(x)
    return keras.Model({**numeric, **kind}, outputs)


def _rows(rng: np.random.Generator, n: int) -> dict[str, Any]:
    return {
        "age": rng.uniform(9, 90, size=(n, 1)).astype("float32"),
        "income": numbers(1)(rng, n),
        "job": classes(7, 1)(rng, n),
        "town": classes(7, 1)(rng, n),
    }


@keras.saving.register_keras_serializable("programs")
class GraphAttention(layers.Layer):
    """Attention between the neighbors of a graph, by its matrix of edges."""

    def __init__(self, heads: int, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads, self.width = heads, width
        self.attention = layers.MultiHeadAttention(heads, width)
        self.norm = layers.LayerNormalization()

    def call(self, inputs: tuple[Any, Any]) -> Any:
        nodes, edges = inputs
        near = ops.greater(edges + ops.eye(7), 0)
        return self.norm(nodes + self.attention(nodes, nodes, attention_mask=near))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {**config, "heads": self.heads, "width": self.width}


def graph_attention() -> keras.Model:
    nodes, edges = keras.Input((7, 5), name="nodes"), keras.Input((7, 7), name="edges")
    x = layers.Dense(WIDTH)(nodes)
    for _ in range(2):
        x = GraphAttention(2, 6)((x, edges))
    return keras.Model((nodes, edges), layers.Dense(3, name="kinds")(x))


PROGRAMS = (
    Program(
        time_series,
        numbers(29, 3),
        classes(2),
        {"loss": "sparse_categorical_crossentropy"},
    ),
    Program(forecast, numbers(16, 3), numbers(4), {"loss": "mse"}),
    Program(tabular, _rows, classes(2, 1), {"loss": "binary_crossentropy"}),
    Program(
        graph_attention,
        lambda rng, n: (
            numbers(7, 5)(rng, n),
            (rng.random((n, 7, 7)) < 0.3).astype("float32"),
        ),
        classes(3, 7),
        {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
    ),
)
