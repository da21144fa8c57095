"""Biases of distances that a user writes, as `position` of layers and blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from typing_extensions import override

import keras_mha


@keras.saving.register_keras_serializable(package="tests")
def nearer(distances: Any) -> Any:
    """Biases of two heads, not symmetric."""
    steps: Any = ops.cast(distances, "float32")
    sizes: Any = ops.abs(steps)
    return ops.stack([0.3 * steps, -0.2 * sizes])


def nameless(distances: Any) -> Any:
    """The same, not registered."""
    return nearer(distances)


@keras.saving.register_keras_serializable(package="tests")
class Scaled(keras_mha.DistanceBias):
    """A learned bias of one's own, with an argument of its own."""

    def __init__(self, num_heads: int, power: float = 1.0, **kwargs: Any) -> None:
        super().__init__(num_heads, **kwargs)
        self.power = power

    @override
    def build(self, distances_shape: Any = None) -> None:
        self.scale = self.add_weight(
            name="scale_of_heads", shape=(self.num_heads,), initializer="ones"
        )

    @override
    def call(self, distances: Any) -> Any:
        sizes = ops.abs(ops.cast(distances, "float32")) ** self.power
        return -self.scale[:, None] * sizes

    @override
    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "power": self.power}


def _layers_with(position: Any) -> list[tuple[Any, tuple[np.ndarray, ...]]]:
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(2, n, 8)).astype("float32") for n in (5, 7))
    return [
        (keras_mha.MultiHeadSelfAttention(2, position=position), (x,)),
        (keras_mha.MultiHeadAttention(2, 3, position=position), (x, y)),
        (keras_mha.TransformerEncoderBlock(2, 16, position=position), (x,)),
        (keras_mha.TransformerDecoderBlock(2, 16, position=position), (x,)),
    ]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("position", [nearer, nameless, Scaled(2, 0.5)])
def test_a_bias_of_ones_own(position: Any, place: int) -> None:
    """Equals the same numbers given as `attention_bias`."""
    layer, arrays = _layers_with(position)[place]
    plain, _ = _layers_with(None)[place]
    distances = np.arange(arrays[-1].shape[1]) - np.arange(5)[:, None]
    if isinstance(position, Scaled):
        bias = np.stack([-np.sqrt(np.abs(distances))] * 2).astype("float32")
    else:
        bias = np.asarray(nearer(distances))
    found = layer(*arrays)
    plain.build(*(array.shape for array in arrays))
    for own, other in zip(
        plain.weights,
        [w for w in layer.weights if w.name != "scale_of_heads"],
        strict=True,
    ):
        own.assign(other)
    expected = plain(*arrays, attention_bias=bias[None])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(np.asarray(found) - np.asarray(plain(*arrays))).max() > 1e-3


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("position", [nearer, Scaled(2, 0.5)])
def test_a_bias_of_ones_own_is_saved(tmp_path: Path, position: Any, place: int) -> None:
    layer, arrays = _layers_with(position)[place]
    inputs = [keras.Input(array.shape[1:]) for array in arrays]
    model = keras.Model(inputs, layer(*inputs))
    model.save(tmp_path / "model.keras")
    again: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again(list(arrays)), model(list(arrays)), atol=1e-6)


def test_a_function_without_a_name_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    layer, arrays = _layers_with(nameless)[0]
    copied = layer.__class__.from_config(layer.get_config())  # a copy needs no name
    copied.build(arrays[0].shape)
    copied.set_weights(_built(layer, arrays).get_weights())
    np.testing.assert_allclose(copied(*arrays), layer(*arrays), atol=1e-6)
    inputs = keras.Input(arrays[0].shape[1:])
    with pytest.raises(ValueError, match="must be registered.*position=<function"):
        keras.Model(inputs, layer(inputs)).save(tmp_path / "model.keras")


def _built(layer: Any, arrays: tuple[np.ndarray, ...]) -> Any:
    layer.build(*(array.shape for array in arrays))
    return layer
