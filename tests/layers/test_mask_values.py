"""Mask values in layers and models: a kind of one's own, and files that hold masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from typing_extensions import override

import keras_mha
from keras_mha import (
    CausalMask,
    Mask,
    PaddingMask,
    SegmentMask,
    SlidingWindowMask,
    TableMask,
)
from tests.support import layer_oracle

B, T, S, D, N = 2, 7, 5, 8, 2
RANDOM = np.random.default_rng(11)
X, Y = (RANDOM.normal(size=(B, n, D)).astype("float32") for n in (T, S))
SHIFT = np.array([0, 1], "int32")
PADDING = np.arange(T) < np.array([[T], [4]])


@keras.saving.register_keras_serializable(package="tests")
class ShiftedMask(Mask):
    """Query `i` sees key `j` unless `i + 2 j + shift[b]` is a multiple of 3."""

    def __init__(self, shift: Any) -> None:
        self.shift = ops.convert_to_tensor(shift, "int32")

    @override
    def visible(self, queries: Any, keys: Any) -> Any:
        places = queries[:, None] + 2 * keys
        return ops.not_equal((places + self.shift[:, None, None]) % 3, 0)

    @override
    def get_config(self) -> dict[str, Any]:
        return {"shift": ops.convert_to_numpy(self.shift)}


def shown(length: int = T, keys: int = T) -> np.ndarray:
    """What the mask says, pair by pair, `(B, T, S)`."""
    table = np.ones((B, length, keys), bool)
    for b, i, j in np.ndindex(*table.shape):
        table[b, i, j] = (i + 2 * j + SHIFT[b]) % 3 != 0
    return table


LAYERS = {
    "self": lambda **more: keras_mha.MultiHeadSelfAttention(N, **more),
    "cross": lambda **more: keras_mha.MultiHeadAttention(N, 3, **more),
    "encoder": lambda **more: keras_mha.TransformerEncoderBlock(N, 16, **more),
    "decoder": lambda **more: keras_mha.TransformerDecoderBlock(N, 16, **more),
}


def randomize(layer: keras.layers.Layer) -> None:
    random = np.random.default_rng(5)
    for weight in layer.weights:
        if "seed_generator" not in weight.path:
            weight.assign(0.3 * random.normal(size=weight.shape))


def inputs_of(name: str) -> tuple[np.ndarray, ...]:
    return (X, Y) if name == "cross" else (X,)


def with_gradients(call: Any, layer: Any, mode: str) -> list[np.ndarray]:
    """Outputs of `call(layer, shift)` and gradients of the weights."""
    import tensorflow as tf

    def step(shift: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = call(layer, shift)
            loss = tf.reduce_sum(outputs * tf.sin(outputs))
        return outputs, *tape.gradient(loss, layer.trainable_variables)

    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "xla")
    return [np.asarray(x) for x in step(tf.constant(SHIFT))]


@pytest.mark.parametrize("mode", ["eager", "graph", "xla", "boundary"])
@pytest.mark.parametrize("joined", ["alone", "joined"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_kind_of_ones_own_in_layers(name: str, joined: str, mode: str) -> None:
    """Equals the table that it stands for, forward and gradient."""
    layer = LAYERS[name](jit_compile=True if mode == "boundary" else "auto")
    arrays = inputs_of(name)
    keys = arrays[-1].shape[1]
    window = np.abs(np.arange(T)[:, None] - np.arange(keys)) < 4
    table = shown(T, keys) & (window if joined == "joined" else True)

    def by_value(layer: Any, shift: Any) -> Any:
        mask: Any = ShiftedMask(shift)
        if joined == "joined":
            mask = SlidingWindowMask(4) & mask
        return layer(*arrays, attention_mask=mask)

    def by_table(layer: Any, shift: Any) -> Any:
        del shift
        return layer(*arrays, attention_mask=table)

    layer.build(*(x.shape for x in arrays))
    randomize(layer)
    run_as = "graph" if mode == "boundary" else mode
    found, expected = (
        with_gradients(call, layer, run_as) for call in (by_value, by_table)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    if name in ("self", "cross"):
        words = {"attention_mask": table[:, None]}
        weights = layer_oracle.weights_of(layer)
        oracle, _ = layer_oracle.attention(layer, weights, *arrays, **words)
        np.testing.assert_allclose(found[0], oracle, atol=1e-5)
    if mode == "boundary":  # and without a graph around it, with another tensor
        other = by_value(layer, ops.convert_to_tensor(SHIFT[::-1].copy()))
        assert np.abs(np.asarray(other) - found[0]).max() > 0.01
        again = np.asarray(by_value(layer, ops.convert_to_tensor(SHIFT)))
        np.testing.assert_allclose(again, found[0], atol=1e-5)


def test_a_kind_of_ones_own_joins_padding_and_causality() -> None:
    layer = keras_mha.MultiHeadSelfAttention(N)
    layer.build(X.shape)
    randomize(layer)
    inputs = np.where(PADDING[..., None], X, np.nan).astype("float32")
    found = layer(
        inputs, mask=PADDING, attention_mask=ShiftedMask(SHIFT), use_causal_mask=True
    )
    expected, _ = layer_oracle.attention(
        layer,
        layer_oracle.weights_of(layer),
        X,
        mask=PADDING,
        attention_mask=shown()[:, None],
        use_causal_mask=True,
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_inner_axis_of_images_takes_a_kind_of_ones_own() -> None:
    layer = keras_mha.MultiHeadAttention(N, 3, attention_axes=(2,))
    images = RANDOM.normal(size=(B, 3, T, D)).astype("float32")
    layer.build(images.shape, images.shape)
    randomize(layer)
    found = np.asarray(layer(images, images, attention_mask=ShiftedMask(SHIFT)))
    single = keras_mha.MultiHeadAttention(N, 3)
    single.build(X.shape, X.shape)
    for one, other in zip(single.weights, layer.weights, strict=True):
        one.assign(other)
    for row in range(3):
        expected = single(images[:, row], images[:, row], attention_mask=shown())
        np.testing.assert_allclose(found[:, row], expected, atol=1e-5)
    both = keras_mha.MultiHeadAttention(N, 3, attention_axes=(1, 2))
    with pytest.raises(ValueError, match="single attention axis.*ShiftedMask"):
        both(images, images, attention_mask=ShiftedMask(SHIFT))


def test_flash_attention_refuses_a_kind_that_has_no_blocks() -> None:
    for jit_compile in (True, False):
        layer = keras_mha.MultiHeadSelfAttention(
            N, flash_attention=True, jit_compile=jit_compile
        )
        with pytest.raises(ValueError, match="ShiftedMask; these can: .*reference"):
            layer(X, attention_mask=ShiftedMask(SHIFT))


class Subclassed(keras.Model):
    """Masks in a layer's call, made anew in each."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = keras_mha.MultiHeadSelfAttention(N, jit_compile=True)

    @override
    def call(self, inputs: Any) -> Any:
        mask = ShiftedMask(SHIFT) & CausalMask(1)
        return self.mix(inputs, attention_mask=mask)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_learns_through_a_kind_of_ones_own(jit_compile: bool) -> None:
    """One step of fit moves the weights as the table does."""
    moved = []
    for mask in (ShiftedMask(SHIFT) & CausalMask(1), shown() & np.tri(T, T, 1, bool)):
        inputs = keras.Input((T, D), batch_size=B)
        layer = keras_mha.MultiHeadSelfAttention(N)
        model = keras.Model(inputs, layer(inputs, attention_mask=mask))
        randomize(model)
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        model.fit(X, np.ones_like(X), batch_size=B, epochs=2, verbose=0)
        moved.append(model.get_weights())
    for one, other in zip(*moved, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_subclassed_model_makes_masks_in_its_call() -> None:
    model = Subclassed()
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(X, X, batch_size=B, verbose=0)
    expected, _ = layer_oracle.attention(
        model.mix,
        layer_oracle.weights_of(model.mix),
        X,
        attention_mask=(shown() & np.tri(T, T, 1, bool))[:, None],
    )
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, atol=1e-5)


SAVED = {
    "causal": CausalMask(1),
    "window": SlidingWindowMask(3, offset=ops.convert_to_tensor(1)),
    "padding": PaddingMask(np.array([6, 4]), query_lengths=np.array([T, 5])),
    "segments": SegmentMask(np.arange(T) // 3),
    "table": TableMask(shown()),
    "joined": CausalMask() & SlidingWindowMask(3) & PaddingMask([T, 4]) & shown(),
    "of ones own": ShiftedMask(SHIFT) & CausalMask(),
}


@pytest.mark.parametrize("mask", SAVED.values(), ids=SAVED)
def test_masks_in_a_saved_model(tmp_path: Path, mask: Mask) -> None:
    inputs = keras.Input((T, D), batch_size=B)
    layer = keras_mha.MultiHeadSelfAttention(N)
    model = keras.Model(inputs, layer(inputs, attention_mask=mask))
    randomize(model)
    model.save(tmp_path / "model.keras")
    again: Any = keras.saving.load_model(tmp_path / "model.keras")
    expected = np.asarray(model(X))
    np.testing.assert_allclose(again(X), expected, atol=1e-6)
    unmasked = np.asarray(layer(X))
    assert np.abs(unmasked - expected).max() > 0.01
    clone: Any = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_allclose(clone(X), expected, atol=1e-6)


@pytest.mark.parametrize("mask", SAVED.values(), ids=SAVED)
def test_masks_are_what_they_were_after_saving(mask: Mask) -> None:
    nested = {"masks": [mask, None], "one": mask}
    config = keras.saving.serialize_keras_object(nested)
    again: Any = keras.saving.deserialize_keras_object(config)
    for found in (again["one"], again["masks"][0]):
        assert type(found) is type(mask)
        tables = (
            np.asarray(each.visible(ops.arange(T), ops.arange(T)))
            for each in (found, mask)
        )
        np.testing.assert_array_equal(*tables)


def test_a_kind_without_a_config_says_what_it_needs(tmp_path: Path) -> None:
    class Nameless(Mask):
        @override
        def visible(self, queries: Any, keys: Any) -> Any:
            return queries[:, None] != keys

    inputs = keras.Input((T, D))
    outputs = keras_mha.MultiHeadSelfAttention(N)(inputs, attention_mask=Nameless())
    with pytest.raises(NotImplementedError, match="`Nameless` needs a `get_config`"):
        keras.Model(inputs, outputs).save(tmp_path / "model.keras")


def test_a_pair_of_segments_in_a_saved_model(tmp_path: Path) -> None:
    query, value = keras.Input((T, D)), keras.Input((S, D))
    rows, columns = (keras.Input((n,), dtype="int32") for n in (T, S))
    layer = keras_mha.MultiHeadAttention(N, 3)
    outputs = layer(query, value, segment_ids=(rows, columns))
    model = keras.Model([query, value, rows, columns], outputs)
    randomize(model)
    model.save(tmp_path / "model.keras")
    again: Any = keras.saving.load_model(tmp_path / "model.keras")
    ids = RANDOM.integers(0, 3, (B, T)), RANDOM.integers(0, 3, (B, S))
    expected, _ = layer_oracle.attention(
        layer, layer_oracle.weights_of(layer), X, Y, segment_ids=ids
    )
    np.testing.assert_allclose(again([X, Y, *ids]), expected, atol=1e-5)
