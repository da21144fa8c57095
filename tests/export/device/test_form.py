"""The device form has the model's values, layer by layer and option by option."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mha
from keras_mha.export.device.form import (
    FORMS,
    device_form,
    layers_as_they_are,
    register_device_form,
)
from keras_mha.export.device.layers import in_place_of_call
from tests.support.layers import randomize

VOCABULARY, LENGTH, WIDTH = 23, 13, 10
Embedding = keras.layers.Embedding
Hidden = Callable[[Any], Any]


def ids() -> np.ndarray:
    """Rows with padding at the end, in the middle, and at the start."""
    rows = np.random.default_rng(5).integers(1, VOCABULARY, (5, LENGTH))
    rows[0, 7:] = 0
    rows[1, [2, 3, 11]] = 0
    rows[2, :5] = 0
    rows[3, 1:] = 0
    return rows.astype("int32")


def tagger(hidden: Hidden, embedding: Any = None) -> keras.Model:
    """Answers at every position, padding included, so that all values show."""
    given = keras.Input((None,), dtype="int32", name="ids")
    embedding = embedding or keras_mha.TokenAndPositionEmbedding(
        VOCABULARY, LENGTH, WIDTH
    )
    return randomize(keras.Model(given, hidden(embedding(given))))


def difference(model: keras.Model, **options: Any) -> float:
    expected = np.asarray(model(ids()))
    answer = np.asarray(device_form(model, **options)(ids()))
    assert answer.shape == expected.shape
    assert np.ptp(expected) > 0.1
    return float(np.max(np.abs(answer - expected)) / np.max(np.abs(expected)))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"use_bias": False},
    "sizes": {"key_dim": 3, "value_dim": 7},
    "groups": {"num_heads": 6, "key_dim": 3, "num_key_value_heads": 2},
    "rotary": {"key_dim": 4, "position": "rotary"},
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "rms": {"qk_norm": "rms"},
    "layer": {"qk_norm": "layer"},
    "soft_cap": {"logits_soft_cap": 1.5},
    "sinks": {"use_sinks": True},
    "gate": {"use_gate": True},
    "window": {"sliding_window": 3},
    "output_shape": {"output_shape": 7},
    "compiled": {"jit_compile": True},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_self_attention(options: dict[str, Any], causal: bool) -> None:
    layer = keras_mha.MultiHeadSelfAttention(**{"num_heads": 2, **options})
    model = tagger(lambda x: layer(x, use_causal_mask=causal))
    assert difference(model) < 2e-6
    assert not layers_as_they_are(model)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_of_a_tensor_to_itself(options: dict[str, Any], causal: bool) -> None:
    layer = keras_mha.MultiHeadAttention(**{"num_heads": 2, "key_dim": 5, **options})
    model = tagger(lambda x: layer(x, x, use_causal_mask=causal))
    assert difference(model) < 2e-6
    assert not layers_as_they_are(model)


STOCK: dict[str, dict[str, Any]] = {
    name: OPTIONS[name]
    for name in ("plain", "no_bias", "sizes", "gate", "window", "output_shape")
}


# In inference it only chooses Keras' other path, on which padded queries get nothing.
STOCK["dropout"] = {"dropout": 0.3}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("options", STOCK.values(), ids=STOCK)
def test_stock_attention(
    options: dict[str, Any], causal: bool, mask_zero: bool
) -> None:
    layer = keras.layers.MultiHeadAttention(**{"num_heads": 2, "key_dim": 5, **options})
    embedding = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=mask_zero)
    model = tagger(lambda x: layer(x, x, use_causal_mask=causal), embedding)
    assert difference(model) < 2e-6
    assert difference(model, target="gpu") < 2e-6
    assert not layers_as_they_are(model)


def test_stock_attention_that_returns_its_scores() -> None:
    layer = keras.layers.MultiHeadAttention(2, 5)
    embedding = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)

    def hidden(x: Any) -> Any:
        mixed, scores = layer(x, x, return_attention_scores=True)
        seen = keras.ops.max(scores, axis=(1, 3))
        return keras.ops.concatenate([mixed, keras.ops.expand_dims(seen, -1)], -1)

    assert difference(tagger(hidden, embedding)) < 2e-6


# On its other path Keras takes numbers under a half for hidden.
@pytest.mark.parametrize(("dropout", "number"), [(0.0, -1), (0.0, 2), (0.3, 2)])
def test_a_mask_of_numbers(dropout: float, number: int) -> None:
    table = np.random.default_rng(3).random((1, LENGTH, LENGTH)) < 0.6
    table = table.astype("int32") * number
    layer = keras.layers.MultiHeadAttention(2, 5, dropout=dropout)
    assert difference(tagger(lambda x: layer(x, x, attention_mask=table))) < 2e-6


@pytest.mark.parametrize(
    "layer_class", [keras_mha.MultiHeadAttention, keras.layers.MultiHeadAttention]
)
def test_attention_to_another_tensor(layer_class: type) -> None:
    layer = layer_class(num_heads=2, key_dim=5, value_dim=3)

    def hidden(x: Any) -> Any:
        return layer(x, keras.layers.Dense(7)(x), x)

    assert difference(tagger(hidden)) < 2e-6


@pytest.mark.parametrize(
    "layer_class", [keras_mha.MultiHeadAttention, keras.layers.MultiHeadAttention]
)
def test_attention_with_a_mask_of_its_own(layer_class: type) -> None:
    table = np.random.default_rng(3).random((1, LENGTH, LENGTH)) < 0.6
    layer = layer_class(num_heads=2, key_dim=5)
    assert difference(tagger(lambda x: layer(x, x, attention_mask=table))) < 2e-6


BLOCKS: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"placement": "post", "normalization": "rms", "rezero": True},
    "sandwich": {"placement": "sandwich", "gated": True, "layer_scale": 0.3},
}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize(
    "block", [keras_mha.TransformerEncoderBlock, keras_mha.TransformerDecoderBlock]
)
def test_blocks(block: type, options: dict[str, Any]) -> None:
    model = tagger(block(2, 17, **options))
    assert difference(model) < 2e-6
    assert not layers_as_they_are(model)


def test_cross_attention_in_a_decoder() -> None:
    def hidden(x: Any) -> Any:
        memory = keras_mha.TransformerEncoderBlock(2, 17)(x)
        return keras_mha.TransformerDecoderBlock(2, 17, cross_attention=True)(x, memory)

    assert difference(tagger(hidden)) < 2e-6


def test_models_in_models() -> None:
    inner = keras.Sequential(
        [
            keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True),
            keras_mha.TransformerEncoderBlock(2, 17),
            keras.layers.GlobalAveragePooling1D(keepdims=True),
        ]
    )
    given = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras.Model(given, inner(given))(given)
    model = randomize(keras.Model(given, hidden[:, 0] + hidden[:, -1, :] * 2.0))
    assert difference(model) < 2e-6
    assert not layers_as_they_are(model)


@pytest.mark.parametrize(
    "key",
    [
        (..., None, slice(2, 7, 2)),
        (slice(None), None),
        (None, slice(None), 3),
        (slice(1, 4), ..., -1),
        (slice(None), 2, None, slice(None, None, -2), None),
    ],
)
def test_items(key: Any) -> None:
    layer = keras.layers.LayerNormalization()
    model = tagger(lambda x: layer(x)[key])
    assert difference(model) < 2e-6


def test_group_normalization() -> None:
    image = keras.Input((5, 7, 6), name="image")
    model = randomize(
        keras.Model(image, keras.layers.GroupNormalization(3, epsilon=0.01)(image))
    )
    given = np.random.default_rng(3).normal(size=(2, 5, 7, 6)).astype("float32")
    expected = np.asarray(model(given))
    assert not layers_as_they_are(model)
    np.testing.assert_allclose(device_form(model)(given), expected, atol=1e-5)
    across = keras.layers.GroupNormalization(5, axis=1, name="rows")(image)
    (note,) = layers_as_they_are(keras.Model(image, across))
    assert note.endswith("it normalizes over the axis 1")


@pytest.mark.parametrize("axes", [None, (1, 2), (2,)])
def test_attention_over_several_axes(axes: tuple[int, ...] | None) -> None:
    given = keras.Input((3, 5, 4), name="grid")
    attention = keras_mha.MultiHeadAttention(2, 3, attention_axes=axes)
    model = randomize(keras.Model(given, attention(given, given)))
    rows = np.random.default_rng(3).normal(size=(2, 3, 5, 4)).astype("float32")
    np.testing.assert_allclose(device_form(model)(rows), model(rows), atol=1e-5)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_up_sampling(interpolation: str) -> None:
    image = keras.Input((5, 3, 2), name="image")
    layer = keras.layers.UpSampling2D((2, 3), interpolation=interpolation)
    model = keras.Model(image, layer(image))
    given = np.random.default_rng(3).normal(size=(2, 5, 3, 2)).astype("float32")
    np.testing.assert_allclose(device_form(model)(given), model(given), atol=1e-6)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("tie_weights", [False, True])
def test_a_table_there_and_back(tie_weights: bool, target: str) -> None:
    table = keras.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, tie_weights=tie_weights, mask_zero=True
    )
    block = BLOCK(2, 17)
    model = tagger(lambda x: table(block(x), reverse=True), table)
    assert difference(model, target=target) < 2e-6
    assert not layers_as_they_are(model)


@pytest.mark.parametrize("layer", ["LSTM", "GRU", "SimpleRNN"])
def test_recurrent_layers_take_a_step_after_another(layer: str) -> None:
    made = getattr(keras.layers, layer)(5, return_sequences=True)
    embedding = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)
    model = tagger(keras.layers.Bidirectional(made), embedding)
    assert difference(model) < 2e-6
    assert not layers_as_they_are(model)
    traced = tf.function(device_form(model)).get_concrete_function(ids())
    assert not {"While", "StatelessWhile"} & {
        op.type for op in traced.graph.get_operations()
    }
    assert made.unroll is False


def test_positions_of_packed_rows() -> None:
    given = keras.Input((None,), dtype="int32", name="ids")
    embedding = keras_mha.TokenAndPositionEmbedding(VOCABULARY, LENGTH, WIDTH)
    model = keras.Model(given, embedding(given, positions=keras.ops.mod(given, LENGTH)))
    assert difference(randomize(model)) < 2e-6


class Own(keras.Model):
    """A subclassed model, whose layers take their form too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)
        self.attention = keras_mha.MultiHeadSelfAttention(2)

    def call(self, inputs: Any) -> Any:
        return self.attention(self.embedding(inputs))


def test_a_subclassed_model() -> None:
    model = Own()
    model(ids())
    assert difference(randomize(model)) < 2e-6


def test_a_model_without_configuration() -> None:
    """Layers in lists and dictionaries, and one whose constructor cannot be called."""

    class Stack(keras.Model):
        def __init__(self, depth: int, secret: Any) -> None:
            super().__init__()
            del secret
            self.embedding = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)
            self.blocks = [keras_mha.MultiHeadSelfAttention(2) for _ in range(depth)]
            self.heads = {"dense": keras.layers.Dense(3), "norm": (self.blocks[0],)}
            self.last = self.finish

        def finish(self, x: Any) -> Any:
            return self.heads["dense"](self.heads["norm"][0](x))

        def call(self, inputs: Any) -> Any:
            x = self.embedding(inputs)
            for block in self.blocks:
                x = block(x)
            return self.last(x)

    model = Stack(2, object())
    model(ids())
    assert difference(randomize(model)) < 2e-6
    copied = device_form(model)
    assert copied.heads["norm"][0] is copied.blocks[0] is not model.blocks[0]
    assert copied.last.__self__ is copied


def snapshot(model: keras.Model) -> list[tuple[Any, ...]]:
    """Every attribute of every layer and operation, containers with their items."""
    operations = {id(one): one for one in model._flatten_layers()}
    for layer in model._flatten_layers():
        functional = getattr(layer, "_functional", None) or layer
        operations |= {id(one): one for one in getattr(functional, "operations", ())}

    def items(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: items(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set):
            return [items(item) for item in value]
        return id(value)

    return [
        (id(one), type(one), items(vars(one)), id(type(one).call))
        for one in operations.values()
    ]


def test_the_model_stays_as_it_is_for_other_threads() -> None:
    seen: list[tuple[Any, Any]] = []
    is_built: list[bool] = []

    class Watching(keras.layers.Layer):
        """Calls the whole model, in another thread, whenever it is traced."""

        def call(self, inputs: Any) -> Any:
            if is_built and tf.inside_function():
                thread = threading.Thread(
                    target=lambda: seen.append((snapshot(model), model(ids()).numpy()))
                )
                thread.start()
                thread.join()
            return inputs

    def hidden(x: Any) -> Any:
        x = keras_mha.MultiHeadAttention(2, 5)(x, x)
        x = keras.layers.MultiHeadAttention(2, 5)(x, x)
        pooled = keras.layers.GlobalAveragePooling1D()(BLOCK(2, 17)(x))
        return Watching()(pooled[:, ::-1])

    model = tagger(hidden, keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True))
    is_built.append(True)
    expected, before = model(ids()).numpy(), snapshot(model)
    copied = device_form(model)
    traced = tf.function(copied.__call__, autograph=False)
    answer = traced(tf.constant(ids())).numpy()
    assert len(seen) == 1
    during, answered = seen[0]
    assert before == during == snapshot(model)
    np.testing.assert_array_equal(answered, expected)
    assert 0 < np.max(np.abs(answer - expected)) < 2e-6 * np.max(np.abs(expected))


def test_a_weight_assigned_in_the_model_is_assigned_in_its_form() -> None:
    model = tagger(keras_mha.TransformerEncoderBlock(2, 17))
    copied = device_form(model)
    before = np.asarray(copied(ids()))
    randomize(model, seed=11)
    after = np.asarray(copied(ids()))
    assert np.max(np.abs(after - before)) > 0.1
    np.testing.assert_allclose(after, model(ids()), atol=1e-5)


# Queries that are padding.


BLOCK = keras_mha.TransformerEncoderBlock


@pytest.mark.parametrize("padding", [0, 1, 22])
def test_padding_counts_nowhere_whatever_its_id(padding: int) -> None:
    """Where all positions are read, padded ones too, by a layer that drops masks."""
    given = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH)(given)
    hidden = BLOCK(2, 17)(hidden, mask=keras.ops.not_equal(given, padding))
    highest = keras.ops.max(hidden, axis=1)
    model = randomize(keras.Model(given, keras.layers.Dense(3)(highest)))
    rows = np.where(ids() == 0, padding, ids()).astype("int32")
    expected = np.asarray(model(rows))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(device_form(model)(rows), expected, atol=1e-5)


# What has no form.


class Doubled(keras.layers.LayerNormalization):
    """Overrides `call`, so the form of its base would be wrong."""

    def call(self, inputs: Any) -> Any:
        return keras.ops.multiply(super().call(inputs), 2.0)


def test_a_subclass_with_a_call_of_its_own_stays_as_it_is() -> None:
    model = tagger(Doubled(name="twice"))
    assert layers_as_they_are(model) == ("layer 'twice' (Doubled) has no device form",)
    assert difference(model) < 2e-6


@pytest.mark.parametrize(
    "base", [keras_mha.MultiHeadAttention, keras.layers.MultiHeadAttention]
)
def test_attention_of_other_scores_stays_as_it_is(base: Any) -> None:
    class Sharper(base):
        """Computes attention as its base does, with queries twice as long."""

        def _compute_attention(self, query: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._compute_attention(query * 2.0, *args, **kwargs)

    layer = Sharper(2, 5, name="sharper")
    model = tagger(lambda x: layer(x, x))
    assert layers_as_they_are(model) == (
        "layer 'sharper' (Sharper) stays as it is: it overrides `_compute_attention`",
    )
    assert difference(model) < 2e-6


def test_a_layer_says_why_it_stays_as_it_is() -> None:
    first = keras.layers.LayerNormalization(axis=1, name="across")
    given = keras.Input((LENGTH,), dtype="int32", name="ids")
    embedded = keras.layers.Embedding(VOCABULARY, WIDTH)(given)
    model = randomize(keras.Model(given, first(embedded)))
    assert layers_as_they_are(model) == (
        "layer 'across' (LayerNormalization) stays as it is: it normalizes over the "
        "axes [1]",
    )
    assert difference(model) < 2e-6


def test_a_form_is_registered() -> None:
    class Cube(keras.layers.Layer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.supports_masking = True

        def call(self, inputs: Any) -> Any:
            return inputs**3

    model = tagger(Cube(name="cube"))
    assert layers_as_they_are(model) == ("layer 'cube' (Cube) has no device form",)
    register_device_form(
        Cube, lambda layer: in_place_of_call(layer, lambda x: x * x * x)
    )
    try:
        assert not layers_as_they_are(model)
        assert difference(model) < 2e-6
        register_device_form(
            Cube, lambda layer: in_place_of_call(layer, lambda x: x * x)
        )
        assert difference(model) > 1e-2
    finally:
        del FORMS[Cube]


@pytest.mark.parametrize(
    ("layer_class", "form", "text"),
    [
        (keras.layers.Dense(3), list, "`layer_class` must be a subclass of .*Dense"),
        (dict, list, "`layer_class` must be a subclass.*<class 'dict'>"),
        (keras.layers.Dense, "call", "`form` must be a function.*Received: 'call'"),
        (keras.layers.Dense, None, "`form` must be a function.*Received: None"),
    ],
)
def test_what_is_no_form_is_refused(layer_class: Any, form: Any, text: str) -> None:
    before = dict(FORMS)
    with pytest.raises(TypeError, match=text):
        register_device_form(layer_class, form)
    assert before == FORMS


# Layers that Keras quantized, and low-rank factors.


def dense_stack(x: Any) -> Any:
    x = keras_mha.MultiHeadAttention(2, 4)(x, x)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    return keras.layers.Dense(7, activation="tanh")(BLOCK(2, 17, key_dim=4)(x))


def test_int8_layers_are_dequantized_exactly() -> None:
    model = tagger(dense_stack)
    plain = tagger(dense_stack)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dense | keras.layers.EinsumDense | Embedding):
            layer.quantize("int8", type_check=False)
    # The same rounding by hand, without Keras' rounding of activations.
    pairs = zip(model._flatten_layers(), plain._flatten_layers(), strict=True)
    rounded = 0
    for layer, twin in pairs:
        if layer.quantization_mode is None:
            continue
        rounded += 1
        weight = twin.embeddings if hasattr(twin, "embeddings") else twin._kernel
        values = np.asarray(weight)
        axes = (-1,) if hasattr(twin, "embeddings") else _summed(twin)
        scale = np.abs(values).max(axis=axes, keepdims=True) / 127
        weight.assign(np.round(values / scale) * scale)
    assert rounded == 14
    answer = np.asarray(device_form(model)(ids()))
    expected = np.asarray(plain(ids()))
    assert np.max(np.abs(answer - expected)) < 1e-4
    assert np.max(np.abs(np.asarray(model(ids())) - expected)) > 1e-4


def _summed(layer: Any) -> tuple[int, ...]:
    """The axes of a kernel that its product sums over."""
    if not hasattr(layer, "equation"):
        return (0,)
    kernel = layer.equation.split("->")[0].split(",")[1]
    return tuple(
        axis
        for axis, letter in enumerate(kernel)
        if letter not in layer.equation.split("->")[1]
    )


def test_low_rank_factors_are_merged() -> None:
    attention = keras_mha.MultiHeadSelfAttention(2)
    dense = keras.layers.Dense(7)
    model = tagger(lambda x: dense(attention(x)))
    attention.enable_lora(3, targets=("query", "key"))
    attention.output_dense.enable_lora(2)
    dense.enable_lora(2)
    assert difference(randomize(model)) < 2e-6


def test_other_quantization_is_refused() -> None:
    model = tagger(keras.layers.Dense(7, name="four"))
    model.get_layer("four").quantize("int4")
    with pytest.raises(ValueError, match=r"layer 'four' \(Dense\) .*'int4'"):
        layers_as_they_are(model)
