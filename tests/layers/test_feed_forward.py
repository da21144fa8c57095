from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha import FeedForward
from tests.support.layers import (
    B,
    D,
    T,
    assert_equal,
    differentiate,
    made,
    normal,
)

HIDDEN, OUTPUT = 17, 11


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


ACTIVATIONS = {"gelu": gelu, "silu": silu, "relu": relu}


def expected_of(layer: Any, inputs: np.ndarray, activation: Any) -> np.ndarray:
    def dense(name: str, x: np.ndarray) -> np.ndarray:
        weights = [np.asarray(w, "float64") for w in getattr(layer, name).weights]
        return x @ weights[0] + (weights[1] if len(weights) > 1 else 0)

    hidden = dense("hidden_dense", inputs)
    if layer.gated:
        hidden = activation(dense("gate_dense", inputs)) * hidden
    else:
        hidden = activation(hidden)
    return dense("output_dense", hidden)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values(activation: str, gated: bool, use_bias: bool) -> None:
    layer = made(FeedForward(HIDDEN, activation, gated, use_bias=use_bias))
    inputs = normal(B, T, D)
    expected = expected_of(layer, inputs, ACTIVATIONS[activation])
    np.testing.assert_allclose(layer(inputs), expected, atol=1e-4)
    assert len(layer.weights) == (2 + gated) * (1 + use_bias)
    if activation == "gelu":
        wrong = expected_of(layer, inputs, gelu_tanh)
        assert np.abs(wrong - expected).max() > 1e-4


def test_gelu_is_the_default_and_a_function_is_taken() -> None:
    assert FeedForward(HIDDEN).activation is keras.activations.gelu
    layer, inputs = made(FeedForward(HIDDEN, keras.ops.square)), normal(B, T, D)
    np.testing.assert_allclose(
        layer(inputs), expected_of(layer, inputs, np.square), atol=1e-4
    )


@pytest.mark.parametrize("shape", [(B, D), (B, T, D), (B, 2, T, D)])
@pytest.mark.parametrize("output_dim", [None, OUTPUT])
def test_shapes(shape: tuple[int, ...], output_dim: int | None) -> None:
    layer = made(FeedForward(HIDDEN, output_dim=output_dim), shape)
    inputs, expected = normal(*shape), (*shape[:-1], output_dim or D)
    assert layer(inputs).shape == layer.compute_output_shape(shape) == expected
    assert layer(keras.Input(shape[1:])).shape == (None, *expected[1:])
    np.testing.assert_allclose(
        layer(inputs), expected_of(layer, inputs, gelu), atol=1e-4
    )


def test_regularizers_and_initializers_act() -> None:
    layer = FeedForward(
        HIDDEN,
        gated=True,
        kernel_initializer=keras.initializers.HeNormal(),
        bias_initializer="ones",
        kernel_regularizer=keras.regularizers.L2(0.1),
        bias_regularizer=keras.regularizers.L1(0.01),
    )
    layer.build((B, T, D))
    kernels = [np.asarray(w) for w in layer.weights if w.name == "kernel"]
    biases = [np.asarray(w) for w in layer.weights if w.name == "bias"]
    assert all((bias == 1).all() for bias in biases)
    # Two kernels of one shape are drawn apart.
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    expected = sum(0.1 * np.square(kernel).sum() for kernel in kernels)
    expected += 0.01 * sum(np.abs(bias).sum() for bias in biases)
    assert float(sum(layer.losses)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_acts_on_the_hidden_values(gated: bool) -> None:
    rate, width = 0.4, 1009
    layer, twin = (
        made(FeedForward(width, "relu", gated, dropout=rate, seed=3), (B, T, 1))
        for _ in range(2)
    )
    for each in (layer, twin):
        for dense in (each.hidden_dense, each.output_dense):
            dense.kernel.assign(np.ones(dense.kernel.shape))
            dense.bias.assign(np.zeros(dense.bias.shape))
        if gated:
            each.gate_dense.kernel.assign(np.zeros((1, width)))
            each.gate_dense.bias.assign(np.ones(width))
    ones = np.ones((B, T, 1), "float32")
    np.testing.assert_allclose(layer(ones), width * ones, rtol=1e-6)
    first, second = (np.asarray(layer(ones, training=True)) for _ in range(2))
    kept = first * (1 - rate)
    np.testing.assert_allclose(kept, np.round(kept), atol=0.01)
    deviation = math.sqrt(width * rate / (1 - rate) / first.size)
    assert first.mean() == pytest.approx(width, abs=5 * deviation)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, twin(ones, training=True))


def test_rematerialized_dropout_has_the_gradients_of_the_one_applied() -> None:
    def result(layer: FeedForward) -> Any:
        return differentiate(
            lambda x: layer(x, training=True), normal(B, T, D), layer.trainable_weights
        )

    expected = result(made(FeedForward(HIDDEN, dropout=0.4, seed=3)))
    with keras.RematScope(mode="full"):
        layer = made(FeedForward(HIDDEN, dropout=0.4, seed=3))
    assert_equal(result(layer), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 0}, "`hidden_dim`, expected a positive integer.*hidden_dim=0"),
        ({"hidden_dim": 1.5}, "`hidden_dim`, expected a positive .*hidden_dim=1.5"),
        ({"output_dim": -1}, "`output_dim`, expected a positive .*output_dim=-1"),
        ({"dropout": 1}, "`dropout` must be .* 0 <= dropout < 1. .*dropout=1"),
        ({"activation": "none_such"}, "none_such"),
    ],
    ids=str,
)
def test_arguments_out_of_their_domain(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeedForward(**{"hidden_dim": HIDDEN, **options})
