"""Copies of models, object by object.

Letters: B batch, T length, D width.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_mha.twin import own_variable, put, retrace, twin
from tests.support.layers import normal, randomize

B, T, D = 2, 3, 5


class Plain:
    """An object of a user that Keras knows nothing of."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer


class Many(layers.Layer):
    """Holds the same layer, and others, in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(D, name="dense")
        self.listed = [self.dense, layers.Dense(D, name="listed")]
        self.named = {"dense": self.dense, "pair": (self.dense, 3)}
        self.ordered = OrderedDict(first=self.dense)
        self.plain = Plain(self.dense)
        self.method = self.dense.call
        self.part = functools.partial(self.apply, self.dense)
        self.inner = lambda x: 2 * self.dense(x)
        self.compiled = tf.function(self.applied)
        self.constant = np.arange(D)
        self.raw = tf.Variable(1.5)
        self.random = keras.random.SeedGenerator(3)
        self.mean = keras.metrics.Mean()
        self.optimizer = keras.optimizers.SGD(0.1)

    def build(self, shape: Any) -> None:
        for layer in self.listed:
            layer.build(shape)

    @staticmethod
    def apply(layer: Any, x: Any) -> Any:
        return layer(x)

    def applied(self, x: Any) -> Any:
        return self.dense(x)

    def call(self, x: Any) -> Any:
        called = [self.method, self.part, self.inner, self.compiled, self.plain.layer]
        return sum(function(x) for function in called) + self.listed[1](x) * self.raw


def holding() -> Any:
    x = keras.Input((T, D))
    return randomize(keras.Model(x, Many()(x)))


@pytest.mark.parametrize("own", [False, True])
def test_everything_that_holds_a_layer_holds_its_copy(own: bool) -> None:
    model = holding()
    copied = twin(model, copy_variable=own_variable if own else None)
    x = normal(B, T, D)
    expected = np.asarray(model(x))
    np.testing.assert_allclose(copied(x), expected, atol=1e-6)
    one, other = model.layers[1], copied.layers[1]
    dense = other.dense
    assert dense is not one.dense
    assert (dense.kernel is one.dense.kernel) == (not own)
    held = [
        other.listed[0],
        *(other.named["dense"], other.named["pair"][0]),
        *(other.ordered["first"], other.plain.layer, other.part.args[0]),
        other.method.__self__,
    ]
    assert all(each is dense for each in held)
    assert type(other.listed) is type(one.listed)
    assert (other.raw is one.raw) == (not own)
    assert (other.random is one.random) == (not own)
    assert (other.mean is one.mean) == (not own)
    assert other.optimizer is not one.optimizer or not own
    if own:
        for weight in copied.weights:
            weight.assign(weight * 0)
        assert not np.asarray(copied(x)).any()  # by its own functions
        np.testing.assert_array_equal(model(x), expected)


def test_a_copy_tracks_what_is_put_into_it() -> None:
    class Open(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.stack = []

        def call(self, x: Any) -> Any:
            return functools.reduce(lambda x, layer: layer(x), self.stack, x)

        def build(self, shape: Any) -> None:
            for layer in self.stack:
                layer.build(shape)

    model = Open()
    copied = twin(model, copy_variable=own_variable)
    copied.stack.append(layers.Dense(D))
    copied.last = layers.Dense(D)
    assert [type(layer) for layer in copied.layers] == [layers.Dense] * 2
    assert copied(normal(B, D)).shape == (B, D)
    assert not model.layers
    assert not model.stack


def test_a_copy_is_not_compiled() -> None:
    model = holding()
    model.compile("adam", "mse", metrics=["mae"])
    x = normal(B, T, D)
    model.fit(x, x, verbose=0)
    model.predict(x, verbose=0)
    copied = twin(model, copy_variable=own_variable)
    assert not copied.compiled
    assert not hasattr(copied, "optimizer")
    for weight in copied.weights:
        weight.assign(weight * 0)
    assert not copied.predict(x, verbose=0).any()
    copied.compile("adam", "mse", metrics=["mae"])
    assert set(copied.fit(x, x, verbose=0).history) == {"loss", "mae", "mean"}
    assert model.compiled


def test_variables_keep_what_they_are_for() -> None:
    layer = layers.Dense(
        D, kernel_constraint="non_neg", kernel_regularizer="l2", name="named"
    )
    layer.build((None, D))
    layer.bias.trainable = False
    for variable in layer.weights:
        made = own_variable(variable)
        for name in ("path", "dtype", "trainable", "constraint", "regularizer"):
            assert getattr(made, name) == getattr(variable, name), name
        np.testing.assert_array_equal(made, variable)
        assert made.value is not variable.value
    assert own_variable(layer.kernel, "float16").dtype == "float16"


def test_a_configuration_tells_the_calls_of_a_copy() -> None:
    model = holding()
    for copied in (twin(model), twin(model, copy_variable=own_variable)):
        nodes = [x["inbound_nodes"] for x in copied.get_config()["layers"]]
        assert nodes == [x["inbound_nodes"] for x in model.get_config()["layers"]]


def test_a_graph_is_traced_again_with_what_is_in_it_now() -> None:
    x = keras.Input((T, D))
    dense = layers.Dense(D, name="dense")
    inner = keras.Model(x, dense(x), name="inner")
    model = keras.Model(x, ops.tanh(inner(dense(x))))

    def replace(layer: Any, twins: Any) -> Any:
        del twins
        return layers.Dense(7, name="wide") if layer is dense else None

    other = twin(inner, replace=replace)
    retrace(other)
    assert other.output.shape == (None, T, 7)
    assert [layer.name for layer in other.layers[1:]] == ["wide"]
    assert inner.output.shape == (None, T, D)
    copied = twin(model, copy_variable=own_variable)
    retrace(copied)
    given = normal(B, T, D)
    np.testing.assert_allclose(copied(given), model(given), atol=1e-6)
    assert copied.get_layer("inner").layers[1] is copied.get_layer("dense")


def test_a_part_takes_the_place_of_another() -> None:
    layer = holding().layers[1]
    new = layers.Dense(D, name="new")
    new.build((None, D))
    put(layer, "dense", new)
    assert layer.dense is new
    assert new in layer._layers
    assert "dense" not in [x.name for x in layer._layers]
    with pytest.raises(ValueError, match="cannot add new elements of state"):
        layer.another = layers.Dense(3)
