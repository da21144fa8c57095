"""Classifiers as ONNX files in ONNX Runtime, in one thread."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

import keras_mha
from benchmarks.contenders.step import Step
from keras_mha.export import export_onnx

VOCABULARY, CLASSES, BLOCKS = 8000, 3, 2


def classifier(
    *,
    layers: Literal["keras_mha", "keras"],
    exporter: Literal["export_onnx", "tf2onnx"],
    shape: tuple[int, int, int],
    num_heads: int,
    hidden_dim: int,
) -> Step:
    """Times a run on ids `(B, T)`, of which the last fifth of each row is padding.

    Args:
        layers: `"keras_mha"` or `"keras"`: the library of the model's blocks.
        exporter: `"export_onnx"`, or `"tf2onnx"` for its plain conversion.
        shape: `(B, T, D)`.
        num_heads: N.
        hidden_dim: Width of the feed-forward networks.
    """
    B, T, D = shape
    model = _stock(D, num_heads, hidden_dim)
    if layers == "keras_mha":
        model = _ours(T, D, num_heads, hidden_dim)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (B, T)).astype("int32")
    ids[:, T - T // 5 :] = 0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.onnx")
        if exporter == "tf2onnx":
            _convert_plainly(model, path)
        else:
            export_onnx(model, path, samples=ids)
        session = _open(path)
    return Step(lambda: session.run(None, {"ids": ids}))


def _stock(D: int, num_heads: int, hidden_dim: int) -> keras.Model:
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras.layers.Embedding(VOCABULARY, D, mask_zero=True)(ids)
    for _ in range(BLOCKS):
        normal = keras.layers.LayerNormalization()(hidden)
        attention = keras.layers.MultiHeadAttention(num_heads, D // num_heads)
        hidden = keras.layers.Add()([hidden, attention(normal, normal)])
        normal = keras.layers.LayerNormalization()(hidden)
        # Plain tf2onnx cannot convert GELU.
        network = keras.layers.Dense(hidden_dim, activation="relu")(normal)
        hidden = keras.layers.Add()([hidden, keras.layers.Dense(D)(network)])
    return _with_head(ids, hidden)


def _ours(T: int, D: int, num_heads: int, hidden_dim: int) -> keras.Model:
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras_mha.TokenAndPositionEmbedding(VOCABULARY, T, D)(ids)
    for _ in range(BLOCKS):
        block = keras_mha.TransformerEncoderBlock(
            num_heads, hidden_dim, activation="relu"
        )
        hidden = block(hidden)
    return _with_head(ids, hidden)


def _with_head(ids: Any, hidden: Any) -> keras.Model:
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    head = keras.layers.Dense(CLASSES, activation="softmax", name="probabilities")
    model = keras.Model(ids, head(pooled))
    generator = np.random.default_rng(1)
    for weight in model.weights:  # biases of zeros would be folded away
        weight.assign(generator.normal(scale=0.05, size=weight.shape))
    return model


def _convert_plainly(model: keras.Model, path: Path) -> None:
    import onnx
    import tf2onnx

    def answer(ids: Any) -> Any:
        return model(ids, training=False)

    converted, _ = tf2onnx.convert.from_function(
        tf.function(answer, autograph=False),
        input_signature=[tf.TensorSpec((None, None), tf.int32, name="ids")],
        opset=18,
    )
    onnx.save(converted, str(path))


def _open(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
