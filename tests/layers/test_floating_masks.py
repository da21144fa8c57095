"""Floating masks: zeros and ones that are known count as booleans, others raise.

As an additive mask, zeros hide nothing; as a boolean one they hide all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import MultiHeadAttention, MultiHeadSelfAttention
from tests.support.layers import normal, randomize

B, T, N, H, D = 3, 7, 2, 5, 13
INPUTS = normal(B, T, D)
TABLE = np.tril(np.random.default_rng(1).random((B, T, T)) < 0.7)
FLOATS = TABLE.astype("float32")


def layer_of(layer_class: Any = MultiHeadSelfAttention, **options: Any) -> Any:
    layer = layer_class(N, H, **options)
    layer.build(*[INPUTS.shape] * (1 + (layer_class is MultiHeadAttention)))
    randomize(layer)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda floats: floats,
        lambda floats: floats.astype("float64"),
        lambda floats: floats.astype("float16"),
        tf.constant,
    ],
    ids=["numpy", "float64", "float16", "tensor"],
)
def test_zeros_and_ones_are_a_mask(make: Any) -> None:
    layer = layer_of()
    expected = layer(INPUTS, attention_mask=TABLE)
    np.testing.assert_array_equal(layer(INPUTS, attention_mask=make(FLOATS)), expected)
    assert np.abs(expected - layer(INPUTS)).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("execution", ["eager", "graph", "xla", "constant"])
def test_constants_of_a_graph_are_known(dtype: str, execution: str) -> None:
    layer = layer_of(MultiHeadAttention, dtype=dtype)

    def call(inputs: Any, mask: Any) -> Any:
        return layer(inputs, inputs, attention_mask=mask)

    def floating(inputs: Any) -> Any:
        return call(inputs, tf.constant(FLOATS) if execution == "constant" else FLOATS)

    def boolean(inputs: Any) -> Any:
        return call(inputs, TABLE)

    functions = [floating, boolean]
    if execution != "eager":
        is_compiled = execution == "xla"
        functions = [tf.function(each, jit_compile=is_compiled) for each in functions]
    answers = [np.asarray(function(INPUTS)) for function in functions]
    np.testing.assert_array_equal(*answers)
    bare = np.asarray(layer(INPUTS, INPUTS), "float32")
    assert np.abs(answers[0].astype("float32") - bare).max() > 0.1


def test_a_functional_model_holds_one(tmp_path: Path) -> None:
    inputs = keras.Input((T, D), batch_size=B)
    layer = layer_of()
    model = keras.Model(inputs, layer(inputs, attention_mask=FLOATS))
    expected = layer(INPUTS, attention_mask=TABLE)
    np.testing.assert_allclose(model.predict(INPUTS, verbose=0), expected, atol=1e-5)
    model.save(tmp_path / "m.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(loaded(INPUTS), expected, atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [
        (FLOATS - 1) * 1e9,
        np.zeros_like(FLOATS),
        FLOATS * 0.5,
        FLOATS * 2,
        -FLOATS,
        np.where(TABLE, FLOATS, np.nan),
        np.where(TABLE, FLOATS, -np.inf),
    ],
    ids=["additive", "zeros", "halves", "twos", "negative", "nan", "-inf"],
)
@pytest.mark.parametrize("layer_class", [MultiHeadSelfAttention, MultiHeadAttention])
def test_other_numbers_raise(layer_class: Any, mask: np.ndarray) -> None:
    inputs = [INPUTS] * (1 + (layer_class is MultiHeadAttention))
    with pytest.raises(TypeError, match="`attention_mask` must be boolean.*is a bias"):
        layer_of(layer_class)(*inputs, attention_mask=mask)


def test_numbers_that_are_not_known_raise() -> None:
    layer = layer_of()

    @tf.function
    def call(mask: Any) -> Any:
        return layer(INPUTS, attention_mask=mask)

    with pytest.raises(TypeError, match="must be boolean or integer"):
        call(tf.constant(FLOATS))
    with pytest.raises(TypeError, match="must be boolean or integer"):
        layer(INPUTS, attention_mask=keras.Input((T, T), batch_size=B))
