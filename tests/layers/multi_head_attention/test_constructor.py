"""The constructor of MultiHeadAttention: configuration, properties, errors."""

from __future__ import annotations

import itertools
import re
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import MultiHeadAttention
from tests.support.attention_cases import numbers
from tests.support.layers import made
from tests.support.multi_head_attention import (
    DQ,
    DV,
    SHAPES,
    B,
    H,
    N,
    S,
    Stock,
    T,
    V,
    inputs,
    layer_of,
)

# Every argument of Keras' layer, none at its default.
KERAS_ARGUMENTS: dict[str, Any] = {
    "num_heads": 2,
    "key_dim": 5,
    "value_dim": 3,
    "dropout": 0.25,
    "use_bias": False,
    "output_shape": (7, 2),
    "attention_axes": (1,),
    "sliding_window": 3,
    "flash_attention": False,
    "kernel_initializer": keras.initializers.HeNormal(),
    "bias_initializer": keras.initializers.Ones(),
    "kernel_regularizer": keras.regularizers.L2(0.5),
    "bias_regularizer": keras.regularizers.L1(0.5),
    "activity_regularizer": keras.regularizers.L2(0.25),
    "kernel_constraint": keras.constraints.NonNeg(),
    "bias_constraint": keras.constraints.MaxNorm(3.0),
    "use_gate": True,
    "seed": 7,
}


def test_the_config_of_keras_is_understood() -> None:
    config = Stock(**KERAS_ARGUMENTS).get_config()
    found = MultiHeadAttention.from_config(config).get_config()
    assert {name: found[name] for name in config} == config


def test_properties() -> None:
    layer = layer_of("all")
    assert (layer.num_heads, layer.key_dim, layer.value_dim) == (N, H, V)
    assert layer_of().value_dim == H
    assert (layer.dropout, layer.use_bias, layer.attention_axes) == (0.3, True, None)
    assert layer.jit_compile == "auto"
    names = [
        getattr(layer, f"{n}_dense").name for n in ("query", "key", "value", "output")
    ]
    assert names == ["query", "key", "value", "attention_output"]


@pytest.mark.parametrize(
    "name", ["num_heads", "key_dim", "value_dim", "sliding_window"]
)
@pytest.mark.parametrize("bad", [0, -2, 1.5, "3", True])
def test_sizes_must_be_positive_integers(name: str, bad: Any) -> None:
    text = (
        rf"Received an invalid value for argument `{name}`, expected a positive "
        rf"integer.*Received: {name}={bad!r}"
    )
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(**{"num_heads": N, "key_dim": H, name: bad})


@pytest.mark.parametrize("bad", [8.0, "8", (), {}])
def test_output_shape_must_be_sizes(bad: Any) -> None:
    text = rf"Invalid `output_shape`: {re.escape(str(bad))}\. .* tuple or list of them"
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, output_shape=bad)


@pytest.mark.parametrize("bad", [0, -1, (3, 0), (2.0,)])
def test_output_sizes_must_be_positive(bad: Any) -> None:
    with pytest.raises(
        ValueError, match=r"`output_shape`, expected a positive integer"
    ):
        MultiHeadAttention(N, H, output_shape=bad)


@pytest.mark.parametrize("bad", [1.0, "1", {1}, (1.0,)])
def test_attention_axes_must_be_integers(bad: Any) -> None:
    text = (
        r"`attention_axes` must be an int, or a list or tuple of ints\. "
        rf"Received: attention_axes={re.escape(str(bad))}"
    )
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, attention_axes=bad)


@pytest.mark.parametrize("axes", [0, 2, -1, (1, -2), ()])
def test_attention_axes_must_be_inner_axes(axes: Any) -> None:
    text = r"`attention_axes` must name different axes .* Received: attention_axes="
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, attention_axes=axes).build(*SHAPES)


@pytest.mark.parametrize("bad", [-0.1, 1.0, "half", None])
def test_dropout_must_be_a_rate(bad: Any) -> None:
    text = (
        rf"`dropout` must be a number with 0 <= dropout < 1\. Received: dropout={bad}"
    )
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, dropout=bad)


@pytest.mark.parametrize("bad", ["yes", None, 1])
def test_jit_compile_has_three_values(bad: Any) -> None:
    text = (
        rf"`jit_compile` must be True, False or 'auto'\. Received: jit_compile={bad!r}"
    )
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, jit_compile=bad)


def test_flash_attention_has_three_values() -> None:
    for value in (True, False, None):
        config = MultiHeadAttention(N, H, flash_attention=value).get_config()
        assert config["flash_attention"] is value
    text = r"`flash_attention` must be True or False\. Received: .*'yes'"
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H, flash_attention="yes")


def test_initializers_are_not_shared() -> None:
    layer = MultiHeadAttention(
        N,
        H,
        use_gate=True,
        output_shape=DQ,
        kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
        bias_initializer="random_normal",
    )
    layer.build((B, T, DQ), (B, S, DQ))
    weights = [numbers(weight).ravel() for weight in layer.weights]
    for one, other in itertools.combinations(weights, 2):
        size = min(one.size, other.size)
        assert np.all(one[:size] != other[:size])
    # And Keras' spread: the same for any shape.
    assert 0.015 < numbers(layer.query_dense.kernel).std() < 0.025


@pytest.mark.parametrize("kind", ["kernel", "bias"])
def test_constraints_and_regularizers_reach_every_projection(kind: str) -> None:
    layer = MultiHeadAttention(
        N,
        H,
        use_gate=True,
        **{
            f"{kind}_constraint": "non_neg",
            f"{kind}_regularizer": keras.regularizers.L2(1),
        },
    )
    made(layer, *SHAPES)
    weights = [w for w in layer.weights if w.name == kind]
    others = [w for w in layer.weights if w.name != kind]
    assert len(weights) == len(others) == 5
    assert all(isinstance(w.constraint, keras.constraints.NonNeg) for w in weights)
    assert all(w.constraint is None for w in others)
    squares = sum(float(np.sum(numbers(w) ** 2)) for w in weights)
    np.testing.assert_allclose(sum(map(float, layer.losses)), squares, rtol=1e-5)


def test_supports_jit_follows_jit_compile() -> None:
    for value in (True, False, "auto"):
        layer = MultiHeadAttention(N, H, jit_compile=value)
        assert layer.supports_jit == (value is not False)


def test_sizes_may_be_numpy_integers() -> None:
    layer = MultiHeadAttention(np.int64(N), np.int32(H))
    assert (type(layer.num_heads), type(layer.key_dim)) == (int, int)
    assert layer(*inputs()).shape == (B, T, DQ)


def test_initializers_may_be_functions() -> None:
    def ones(shape: Any, dtype: Any = None) -> Any:
        return tf.ones(shape, dtype)

    layer = MultiHeadAttention(2, 3, kernel_initializer=ones)
    layer.build((B, T, DQ), (B, S, DV))
    assert np.all(numbers(layer.query_dense.kernel) == 1)
