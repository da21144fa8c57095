"""Dropout that falls alike in eager, graph and XLA execution."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha.attention.dropout import check_rate, dropout
from tests.attention.cases import numbers

SEED = np.array([11, 13], "uint32")
SHAPE = (7, 11, 13)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_the_same_positions_in_eager_graph_and_xla(rate: float) -> None:
    inputs = tf.ones(SHAPE)

    def function(seed: tf.Tensor) -> Any:
        return dropout(inputs, rate, seed)

    for seed in (SEED, SEED + np.uint32(1)):
        eager = numbers(function(tf.constant(seed)))
        for jit_compile in (False, True):
            compiled = tf.function(function, jit_compile=jit_compile)
            np.testing.assert_array_equal(numbers(compiled(tf.constant(seed))), eager)


def test_seeds_differ() -> None:
    one, other = (dropout(tf.ones(SHAPE), 0.5, SEED + np.uint32(i)) for i in range(2))
    assert 0.4 < np.mean(numbers(one) != numbers(other)) < 0.6


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9, 0.999])
def test_the_share_dropped_is_the_rate(rate: float) -> None:
    count = 100_000
    dropped = numbers(dropout(tf.ones(count), rate, SEED)) == 0
    sigma = math.sqrt(rate * (1 - rate) / count)
    assert abs(dropped.mean() - rate) < 5 * sigma
    # Neighbours decide for themselves.
    both = (dropped[1:] & dropped[:-1]).mean()
    assert abs(both - rate**2) < 5 * math.sqrt(rate**2 / count)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_stays_is_scaled(dtype: str) -> None:
    inputs = tf.cast(tf.range(1, 101) / 32, dtype)
    found = dropout(inputs, 0.75, SEED)
    assert found.dtype == dtype
    kept = numbers(found) != 0
    assert 0 < kept.sum() < 50
    np.testing.assert_array_equal(numbers(found)[kept], 4 * numbers(inputs)[kept])


def test_what_is_dropped_may_be_nan() -> None:
    dropped = numbers(dropout(tf.ones(50), 0.5, SEED)) == 0
    found = dropout(tf.constant(np.where(dropped, np.nan, 1.0)), 0.5, SEED)
    np.testing.assert_array_equal(numbers(found), np.where(dropped, 0.0, 2.0))


def test_noise_shape_decides_together() -> None:
    found = numbers(dropout(tf.ones(SHAPE), 0.5, SEED, noise_shape=(7, 1, 13)))
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1], SHAPE))
    assert 0.3 < (found[:, 0] == 0).mean() < 0.7


def test_the_gradient_goes_where_values_stay() -> None:
    inputs = tf.ones(SHAPE)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = dropout(inputs, 0.5, SEED)
    np.testing.assert_array_equal(tape.gradient(outputs, inputs), outputs)


def test_a_seed_generator_gives_the_seed() -> None:
    generators = [keras.random.SeedGenerator(7) for _ in range(2)]
    first, again = (dropout(tf.ones(SHAPE), 0.5, g.next()) for g in generators)
    np.testing.assert_array_equal(first, again)
    second = dropout(tf.ones(SHAPE), 0.5, generators[0].next())
    assert np.any(numbers(second) != numbers(first))


@pytest.mark.parametrize("rate", [0, 0.0, 0.5, 0.999])
def test_rates_below_one_pass(rate: float) -> None:
    assert check_rate(rate, "dropout") == rate
    assert isinstance(check_rate(rate, "dropout"), float)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, math.nan, "0.5", None, True])
def test_other_rates_are_refused(rate: Any) -> None:
    text = rf"`stays` must be a number with 0 <= stays < 1\. Received: stays={rate}"
    with pytest.raises(ValueError, match=text):
        check_rate(rate, "stays")
