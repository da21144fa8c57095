from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha.export.saved_model.new_axes import expand_new_axes

X = np.arange(2 * 3 * 5, dtype="float32").reshape(2, 3, 5)
NEW = None


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x[:, NEW],
        lambda x: x[NEW, :, NEW, NEW],
        lambda x: x[:, :, NEW, ::2],
        lambda x: x[..., NEW],
        lambda x: x[NEW, ..., NEW, 1:, NEW],
        lambda x: x[1, NEW, ..., 2, NEW],
        lambda x: x[:, -1, NEW, NEW, 1:4],
        lambda x: x[NEW, ..., 3],
    ],
)
def test_values_stay(tmp_path: Path, take: Any) -> None:
    module: Any = tf.Module()
    spec = tf.TensorSpec((None, None, 5), name="x")
    module.take = tf.function(take, input_signature=[spec])
    path = tmp_path / "model"
    signature = module.take.get_concrete_function()
    tf.saved_model.save(module, str(path), signatures=signature)
    expand_new_axes(path)
    loaded: Any = tf.saved_model.load(str(path))
    (got,) = loaded.signatures["serving_default"](x=tf.constant(X)).values()
    np.testing.assert_array_equal(got, take(X))
    nodes = [
        node
        for function in loaded.signatures["serving_default"]
        .graph.as_graph_def()
        .library.function
        for node in function.node_def
    ]
    assert {node.op for node in nodes} >= {"ExpandDims", "StridedSlice"}
    assert not any(node.attr["new_axis_mask"].i for node in nodes)


def test_a_slice_whose_bounds_are_not_constant_stays(tmp_path: Path) -> None:
    module: Any = tf.Module()
    spec = tf.TensorSpec((None, None, 5), name="x")
    module.take = tf.function(
        lambda x: x[: tf.shape(x)[1] // 2, None], input_signature=[spec]
    )
    path = tmp_path / "model"
    signature = module.take.get_concrete_function()
    tf.saved_model.save(module, str(path), signatures=signature)
    expand_new_axes(path)
    loaded: Any = tf.saved_model.load(str(path))
    (got,) = loaded.signatures["serving_default"](x=tf.constant(X)).values()
    np.testing.assert_array_equal(got, X[:1, None])


def test_masks_with_new_axes_are_served_by_tflite(tmp_path: Path) -> None:
    from keras_mha.export import export_saved_model

    ids = keras.Input((None,), dtype="int32", name="ids")
    real: Any = keras.ops.cast(keras.ops.not_equal(ids, 0), "float32")
    table = keras.layers.Embedding(20, 4)(ids)
    model = keras.Model(ids, keras.layers.Multiply(name="y")([table, real[:, :, None]]))
    samples = np.array([[3, 4, 0], [1, 0, 0]])
    report = export_saved_model(model, tmp_path, samples=samples, with_tflite=True)
    assert report.tflite is not None
    assert report.tflite.parity.max_absolute_difference <= 1e-6
