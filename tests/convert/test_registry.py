"""Converters that users register.

Letters: B batch, T length, N heads, H head size, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_mha
from keras_mha.convert import from_keras, register_converter, registry
from tests.support.layers import normal, randomize

B, T, N, H, D = 2, 5, 3, 7, 11


class Mixer(layers.Layer):
    """Attention of a user, with a layer of Keras' inside that nothing calls."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner = layers.MultiHeadAttention(N, H)

    def build(self, input_shape: Any) -> None:
        shape = (input_shape[-1], N, H)
        self.kernels = [self.add_weight(shape=shape, name=name) for name in "qkv"]
        self.last = self.add_weight(shape=(N, H, input_shape[-1]), name="last")

    def call(self, inputs: Any) -> Any:
        heads = [ops.einsum("btd,dnh->btnh", inputs, k) for k in self.kernels]
        mixed = ops.dot_product_attention(*heads)
        return ops.einsum("btnh,nhd->btd", mixed, self.last)


def convert(mixer: Mixer) -> Any:
    layer = keras_mha.MultiHeadSelfAttention(N, H, use_bias=False, name=mixer.name)
    layer.build((None, None, D))
    kernels = np.concatenate([np.asarray(kernel) for kernel in mixer.kernels], axis=-1)
    layer.set_weights([kernels, np.asarray(mixer.last)])
    return layer


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(registry._CONVERTERS)
    yield
    registry._CONVERTERS.clear()
    registry._CONVERTERS.update(before)


class Holder(keras.Model):
    """A model that calls it in code."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()

    def call(self, inputs: Any) -> Any:
        return inputs + self.mixer(inputs)


@pytest.mark.parametrize("kind", ["layer", "graph", "code"])
def test_a_registered_class_is_converted(kind: str) -> None:
    register_converter(Mixer, convert)
    x = keras.Input((T, D))
    original: Any = {
        "layer": Mixer,
        "graph": lambda: keras.Model(x, Mixer(name="mixer")(x)),
        "code": Holder,
    }[kind]()
    given = normal(B, T, D)
    original(given)
    randomize(original)
    converted = from_keras(original)
    kinds = [type(layer) for layer in converted._flatten_layers()]
    assert keras_mha.MultiHeadSelfAttention in kinds
    assert Mixer not in kinds
    assert np.asarray(original(given)).std() > 0.05
    np.testing.assert_allclose(converted(given), original(given), atol=1e-5)


def test_a_subclass_is_not_of_the_class() -> None:
    class Other(Mixer):
        pass

    register_converter(Mixer, convert)
    converted = from_keras(keras.Sequential([keras.Input((T, D)), Other()]))
    assert type(converted.layers[0]) is Other
    assert type(converted.layers[0].inner) is keras_mha.MultiHeadAttention


def test_a_converter_that_returns_no_layer_is_refused() -> None:
    register_converter(Mixer, lambda _: 3)
    with pytest.raises(TypeError, match="must return a layer.*3 for layer 'mine'"):
        from_keras(Mixer(name="mine"))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((Mixer(), convert), "`layer_class`.*Received: <Mixer"),
        ((int, convert), "`layer_class`.*Received: <class 'int'>"),
        ((Mixer, "convert"), "`function`.*Received: 'convert'"),
    ],
)
def test_what_cannot_be_registered_is_refused(given: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        register_converter(*given)
