"""Small TFLite files, good and bad on purpose, for the tests of the lint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import Builder

from keras_mha.export.runtimes import tflite_schema
from keras_mha.export.tflite.edit import give_narrow_tables_one_scale
from keras_mha.export.tflite.graph import Contents, contents_of

Shape = Sequence[int | None]


def values(*shape: int, seed: int = 5) -> np.ndarray:
    """Random constants: sizes that are unequal primes show wrong orders of axes."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def convert(
    function: Callable[..., Any],
    inputs: Mapping[str, tuple[Shape, tf.DType]],
    **settings: Any,
) -> bytes:
    """Converts a function of named tensors to a file with the output `y`.

    Args:
        function: Called with the tensors in order.
        inputs: Shape and type of each.
        settings: Attributes of the converter.
    """
    specs = [tf.TensorSpec(shape, kind, name) for name, (shape, kind) in inputs.items()]
    module = tf.Module()
    module.run = tf.function(
        lambda *tensors: {"y": function(*tensors)},
        input_signature=specs,
        autograph=False,
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [module.run.get_concrete_function()], module
    )
    for name, value in settings.items():
        setattr(converter, name, value)
    return converter.convert()


def lookup() -> bytes:
    """Rows of a narrow int8 table `(223, D)` by ids `(1, S)`, each row with a scale."""
    table = values(223, D)
    return convert(
        lambda ids: (tf.one_hot(tf.reshape(ids, (S,)), 223) @ table)[None],
        {"ids": ((1, S), tf.int32)},
        optimizations=[tf.lite.Optimize.DEFAULT],
    )


def on(shape: Shape, kind: tf.DType = tf.float32) -> dict[str, tuple[Shape, tf.DType]]:
    """One input `x`."""
    return {"x": (shape, kind)}


def edited(content: bytes, edit: Callable[[Any], None]) -> bytes:
    """The file after `edit` changed its model, a `schema.ModelT`."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    edit(model)
    builder = Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def contents(content: bytes) -> Contents:
    """What a file holds, read in this process."""
    return contents_of(tflite_schema.read(content))


def with_one_scale(content: bytes) -> bytes:
    """The file with its narrow tables rounded by one scale, where they can be."""
    model = tflite_schema.unpack(content)
    return tflite_schema.pack(model) if give_narrow_tables_one_scale(model) else content


S, N, H, V = 7, 2, 3, 11
D = N * H


def classify(ids: Any) -> Any:
    """Ids (1, S) to probabilities (1, 2), in the form that every runtime takes."""
    mask = tf.cast(tf.minimum(ids, 1), tf.float32)
    vectors = tf.one_hot(tf.reshape(ids, (S,)), V) @ values(V, D)
    vectors = tf.reshape(vectors, (1, S, D)) * tf.reshape(mask, (1, S, 1))
    vectors += values(1, S, D, seed=6)
    queries, keys, heads = (
        tf.transpose(
            tf.reshape(
                vectors @ values(D, D, seed=i) + values(D, seed=i), (1, S, N, H)
            ),
            (0, 2, 1, 3),
        )
        for i in (1, 2, 3)
    )
    scores = tf.matmul(queries, keys, transpose_b=True)
    weights = tf.nn.softmax(scores + (tf.reshape(mask, (1, 1, 1, S)) - 1) * 1e4)
    attended = tf.transpose(weights @ heads, (0, 2, 1, 3))
    hidden = (
        tf.nn.gelu(tf.reshape(attended, (1, S, D)) @ values(D, D, seed=4)) + vectors
    )
    pooled = tf.reshape(hidden[:, 0:1, :], (1, D))
    return tf.nn.softmax(pooled @ (values(D, 2, seed=8) / 8) + values(2, seed=9))


def masked_attention(vectors: Any) -> Any:
    """Vectors (1, S, D) attending to the first five of themselves."""
    queries, keys, heads = (vectors @ values(D, D, seed=i) for i in (1, 2, 3))
    mask = np.where(np.arange(S) < 5, 0.0, -1e4).astype("float32").reshape(1, 1, S)
    scores = tf.matmul(queries, keys, transpose_b=True) + mask
    return tf.nn.softmax(scores) @ heads


def int8_settings() -> dict[str, Any]:
    """The converter's settings for all of a graph on (1, S, D) in int8."""
    generator = np.random.default_rng(3)
    rows = generator.normal(size=(20, 1, S, D)).astype("float32")
    return {
        "optimizations": [tf.lite.Optimize.DEFAULT],
        "representative_dataset": lambda: ({"x": row} for row in rows),
    }
