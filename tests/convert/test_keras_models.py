"""Keras' attention swapped in whole models.

Letters: B batch, T query length, S key length, N heads, H head size, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_mha import (
    CausalMask,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    ResidualNorm,
    TransformerEncoderBlock,
)
from keras_mha.convert import StockMaskAttention, from_keras, layer_swap, to_keras
from tests.support.attention_cases import numbers, pairs
from tests.support.layers import normal, padding, randomize

Stock = layers.MultiHeadAttention
Grouped = layers.GroupQueryAttention

B, T, S, N, H, D, WORDS = 2, 5, 7, 3, 11, 13, 17
IDS = np.array([[3, 1, 4, 15, 9], [2, 6, 5, 0, 0]])
OTHER_IDS = np.array([[2, 7, 1, 8, 2, 0, 0], [1, 4, 1, 4, 0, 0, 0]])


def tokens(name: str = "ids") -> Any:
    return keras.Input((None,), dtype="int32", name=name)


def vectors(name: str = "vectors") -> Any:
    return keras.Input((None, D), name=name)


def embed(ids: Any, mask_zero: bool = True, **options: Any) -> Any:
    return layers.Embedding(WORDS, D, mask_zero=mask_zero, **options)(ids)


def given_for(model: Any) -> Any:
    made = {
        "ids": IDS,
        "other": OTHER_IDS,
        "vectors": normal(B, T, D),
        "memory": normal(B, S, D, seed=1),
        "pairs": pairs(B, T, S),
        "padding": padding(3, 5, length=T),
        "text": np.array([["a b b"], ["c a d"]]),
        "steps": normal(B, 3, T, D),
    }
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(
        lambda x: ops.convert_to_tensor(made[x.name]), inputs
    )


def answers(model: Any) -> list[np.ndarray]:
    return [numbers(each) for each in keras.tree.flatten(model(given_for(model)))]


def check_equal(
    converted: Any, model: Any, *, function: Any = from_keras, tolerance: float = 1e-5
) -> None:
    """Outputs, names, class and weights; and not one layer of Keras' is left."""
    kinds = [type(layer) for layer in converted._flatten_layers()]
    swapped: Any = (
        (Stock, Grouped)
        if function is from_keras
        else (MultiHeadAttention, MultiHeadSelfAttention)
    )
    assert not [kind for kind in kinds if kind in swapped]
    assert type(converted) is type(model)
    assert converted.name == model.name
    assert sorted(x.name for x in converted.layers) == sorted(
        x.name for x in model.layers
    )
    expected, found = answers(model), answers(converted)
    assert max(each.std() for each in expected) > 0.05
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=tolerance * size)


MODELS: dict[str, Callable[[], Any]] = {}


def model(build: Callable[[], Any]) -> Callable[[], Any]:
    def randomized() -> Any:
        return randomize(build())

    MODELS[build.__name__] = randomized
    return randomized


@model
def pooled_tokens() -> Any:
    ids = tokens()
    x = embed(ids)
    x = Stock(N, H, value_dim=7, name="mix")(x, x)
    x = layers.LayerNormalization()(x)
    return keras.Model(ids, layers.GlobalAveragePooling1D()(x), name="pooled")


@model
def two_masked_inputs() -> Any:
    ids, other = tokens(), tokens("other")
    x, y = embed(ids), embed(other)
    x = Stock(N, H, name="cross")(x, y)
    return keras.Model([ids, other], layers.GlobalAveragePooling1D()(x))


@model
def decoder() -> Any:
    x = first = vectors()
    memory = keras.Input((None, D), name="memory")
    x = x + Stock(N, H, name="own")(x, x, use_causal_mask=True)
    x = layers.LayerNormalization()(x)
    x = layers.Add()([x, Grouped(H, 6, 2, name="cross")(x, memory)])
    x = layers.Dense(19, activation="gelu")(x)[:, 1:] * 2.0
    return keras.Model({"vectors": first, "memory": memory}, {"out": x})


@model
def given_masks() -> Any:
    query, memory = vectors(), keras.Input((None, D), name="memory")
    visible = keras.Input((None, None), dtype="bool", name="pairs")
    attention = Stock(N, H, name="mix")
    mixed, scores = attention(
        query, memory, attention_mask=visible, return_attention_scores=True
    )
    hidden = np.ones((B, S), bool)
    hidden[:, 3] = False
    other = attention(
        query,
        memory,
        memory,
        value_mask=ops.convert_to_tensor(hidden),
        return_attention_scores=True,
    )
    return keras.Model([query, memory, visible], [mixed, scores, *other])


@model
def padding_as_input() -> Any:
    x, visible = vectors(), keras.Input((None,), dtype="bool", name="padding")
    mixed = Stock(N, H, name="mix")(x, x, value_mask=visible, key_mask=visible)
    return keras.Model([x, visible], mixed)


@model
def shared_attention() -> Any:
    x = first = vectors()
    attention = Stock(N, H, dropout=0.3, name="mix")
    norm = layers.BatchNormalization(name="norm")
    for _ in range(3):
        x = norm(layers.Dropout(0.1)(attention(x, x) + x))
    return keras.Model(first, x)


def encoder(name: str) -> Any:
    x = vectors(f"{name}_in")
    return keras.Model(x, Stock(N, H, name="mix")(x, x) + x, name=name)


@model
def nested_models() -> Any:
    x = first = vectors()
    block = encoder("block")
    stack = keras.Sequential([block, layers.Dense(D, name="dense")], name="stack")
    outer = vectors("outer_in")
    wrapped = keras.Model(outer, stack(outer), name="outer")
    return keras.Model(first, block(wrapped(block(x))))


@model
def wrapped_model() -> Any:
    steps = keras.Input((3, T, D), name="steps")
    inner = keras.Sequential([encoder("inner"), layers.Dense(7)], name="stack")
    return keras.Model(steps, layers.TimeDistributed(inner, name="each")(steps))


@model
def residual_of_ours() -> Any:
    x = first = vectors()
    x = ResidualNorm(Stock(N, H, name="mix"), name="residual")(x, x)
    return keras.Model(first, x)


@model
def sequence_of_layers() -> Any:
    return keras.Sequential(
        [keras.Input((None, D), name="vectors"), encoder("block"), layers.Dense(3)],
        name="sequence",
    )


@model
def sequence_without_input() -> Any:
    made = keras.Sequential([layers.Dense(D), encoder("block")], name="sequence")
    made.build((None, None, D))
    x = vectors()
    return keras.Model(x, made(x))


@model
def operations() -> Any:
    x = first = vectors()
    x = Stock(N, H, name="mix")(ops.concatenate([x, -x], axis=1), x)
    x = ops.reshape(x, (-1, 2 * T, D)) / ops.sqrt(ops.cast(D, "float32"))
    x = ops.softmax(ops.transpose(x, (0, 2, 1)), axis=-1) @ ops.expand_dims(x, 1)[:, 0]
    x = ops.where(x > 0, x, 2.0 * x)
    return keras.Model(first, [ops.mean(x, axis=1), ops.einsum("btd,bsd->bts", x, x)])


@model
def other_layers_with_weights() -> Any:
    ids = tokens()
    x = layers.Bidirectional(layers.LSTM(5, return_sequences=True))(
        embed(ids, mask_zero=False)
    )
    x = Stock(N, H, name="mix")(x, x)
    x = layers.GRU(7, return_sequences=True)(x)
    x = layers.Conv1D(D, 3, padding="same")(layers.GroupNormalization(7)(x))
    x = TransformerEncoderBlock(N, 17, key_dim=H, name="block")(x)
    return keras.Model(ids, x)


@model
def mixed_precision() -> Any:
    x = first = vectors()
    x = Stock(N, H, name="mix", dtype="mixed_bfloat16")(x, x)
    return keras.Model(first, layers.Dense(3, dtype="float32")(x))


class Scaled(layers.Layer):
    """A layer of a user, registered nowhere."""

    def __init__(self, factor: float, function: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factor = factor
        self.dense = layers.Dense(D, activation=function)

    def build(self, input_shape: Any) -> None:
        self.dense.build(input_shape)
        self.offset = self.add_weight(shape=(D,), name="offset")

    def call(self, inputs: Any) -> Any:
        return self.factor * self.dense(inputs) + self.offset

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        function = layers.Dense(1, activation=self.dense.activation).get_config()
        return {
            **super().get_config(),
            "factor": self.factor,
            "function": function["activation"],
        }


def swish_twice(x: Any) -> Any:
    return ops.silu(ops.silu(x))


@model
def layers_of_users() -> Any:
    x = first = vectors()
    x = Scaled(3.0, name="scaled")(x)
    x = Stock(N, H, name="mix")(x, x)
    x = layers.Lambda(lambda x: x * 2.0, name="twice")(x)
    x = layers.Dense(7, activation=swish_twice, name="dense")(x)
    x = layers.TimeDistributed(Scaled(2.0), name="each")(layers.Dense(D)(x))
    return keras.Model(first, x)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_original(name: str) -> None:
    original = MODELS[name]()
    # In two bytes the order of additions counts.
    tolerance = 3e-2 if name == "mixed_precision" else 1e-5
    converted = from_keras(original)
    check_equal(converted, original, tolerance=tolerance)
    if name != "other_layers_with_weights":  # a block of ours has no like in Keras
        back = to_keras(converted)
        check_equal(back, original, function=to_keras, tolerance=tolerance)


@pytest.mark.parametrize("name", ["pooled_tokens", "nested_models", "wrapped_model"])
def test_the_comparison_sees_weights_that_are_not_copied(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(variable: Any, dtype: Any) -> Any:
        del dtype
        return keras.Variable(ops.zeros(variable.shape), dtype=variable.dtype)

    monkeypatch.setattr(layer_swap, "own_variable", empty)
    original = MODELS[name]()
    with pytest.warns(UserWarning, match="the answers differ"):
        converted = from_keras(original)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_equal(converted, original)


@pytest.mark.parametrize("name", ["decoder", "shared_attention", "nested_models"])
def test_the_original_is_as_it_was_and_shares_nothing(name: str) -> None:
    original = MODELS[name]()
    expected = answers(original)
    nodes = [len(x._inbound_nodes) for x in original.operations]
    converted = from_keras(original)
    assert not {id(x) for x in original.variables} & {
        id(x) for x in converted.variables
    }
    assert not {id(x) for x in original._flatten_layers()} & {
        id(x) for x in converted._flatten_layers()
    }
    for weight in converted.weights:
        weight.assign(weight * 0)
    assert [len(x._inbound_nodes) for x in original.operations] == nodes
    for found, wanted in zip(answers(original), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_shared_layers_stay_shared() -> None:
    for name in ("shared_attention", "nested_models"):
        original = MODELS[name]()
        converted = from_keras(original)
        assert len(converted.weights) == len(original.weights)
        assert [x.path for x in converted.weights] == [x.path for x in original.weights]
    block = converted.get_layer("block")
    assert converted.get_layer("outer").get_layer("stack").layers[0] is block


def test_training_goes_on_as_it_would() -> None:
    original = MODELS["nested_models"]()
    original.compile(keras.optimizers.SGD(0.01), "mse")
    converted = from_keras(original)
    assert not converted.compiled
    converted.compile(keras.optimizers.SGD(0.01), "mse")
    x, y = normal(B, T, D), normal(B, T, D, seed=3)
    for each in (original, converted):
        each.fit(x, y, epochs=2, verbose=0)
    for found, wanted in zip(
        converted.get_weights(), original.get_weights(), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_converted_model_is_saved_and_loaded(tmp_path: Path) -> None:
    converted = from_keras(MODELS["wrapped_model"]())
    converted.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for found, wanted in zip(answers(loaded), answers(converted), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


# What else layers hold.


def test_vocabularies_and_statistics_are_copied() -> None:
    text = keras.Input((1,), dtype="string", name="text")
    vectorize = layers.TextVectorization(output_sequence_length=T)
    vectorize.adapt(["a b c", "c d e"])
    x = layers.Embedding(11, D)(vectorize(text))
    normalize = layers.Normalization()
    normalize.adapt(normal(31, D) * 3 + 2)
    x = Stock(N, H)(normalize(x), x)
    original = randomize(keras.Model(text, x))
    normalize.adapt(normal(31, D) * 3 + 2)  # randomized too
    check_equal(from_keras(original), original)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("mode", ["int8", "lora"])
def test_quantized_and_adapted_models(mode: str) -> None:
    original = MODELS["nested_models"]()
    if mode == "int8":
        original.quantize("int8")
    else:
        block = original.get_layer("block")
        dense = original.get_layer("outer").get_layer("stack").get_layer("dense")
        for each in (block.get_layer("mix").key_dense, dense):
            each.enable_lora(2)
            each.lora_kernel_b.assign(normal(*each.lora_kernel_b.shape))
    converted = from_keras(original)
    check_equal(converted, original)
    assert len(converted.weights) == len(original.weights)
    assert len(converted.trainable_weights) == len(original.trainable_weights)


def test_low_rank_factors_that_no_configuration_tells() -> None:
    x = first = vectors()
    own = MultiHeadSelfAttention(N, H, name="own")
    x = Stock(N, H)(own(x), x)
    original = randomize(keras.Model(first, x))
    own.enable_lora(2)
    randomize(original)
    check_equal(from_keras(original), original)


def test_what_is_frozen_stays_frozen() -> None:
    original = MODELS["nested_models"]()
    original.get_layer("block").trainable = False
    stack = original.get_layer("outer").get_layer("stack")
    stack.get_layer("dense").bias.trainable = False
    converted = from_keras(original)
    trained = [x.path for x in original.trainable_weights]
    assert [x.path for x in converted.trainable_weights] == trained
    assert trained == ["stack/dense/kernel"]
    assert not converted.get_layer("block").trainable
    original.trainable = False
    assert not from_keras(original).trainable_weights
    attention = MODELS["pooled_tokens"]()
    attention.get_layer("mix").value_dense.trainable = False
    trained = [x.path for x in attention.trainable_weights]
    assert [x.path for x in from_keras(attention).trainable_weights] == trained
    wrapped = MODELS["wrapped_model"]()
    mix = wrapped.get_layer("each").layer.layers[0].get_layer("mix")
    mix.trainable = False
    assert len(from_keras(wrapped).trainable_weights) == 2


def test_optional_inputs_stay_optional() -> None:
    x = vectors()
    visible = keras.Input((None,), dtype="bool", name="padding", optional=True)

    class Maybe(layers.Layer):
        def call(self, inputs: Any, visible: Any = None) -> Any:
            return inputs if visible is None else inputs * 2.0

    mixed = Stock(N, H)(x, x)
    original = randomize(keras.Model([x, visible], Maybe()(mixed, visible)))
    converted = from_keras(original)
    given = [ops.convert_to_tensor(normal(B, T, D)), None]
    np.testing.assert_allclose(converted(given), original(given), atol=1e-5)


# Classes.


class Trained(keras.Model):
    """A functional model with a method of its own."""

    def answer(self) -> int:
        return 42


class Sized(keras.Model):
    """A functional model that makes its own graph."""

    def __init__(self, size: int) -> None:
        x = vectors()
        super().__init__(x, layers.Dense(size)(Stock(N, H, name="mix")(x, x)))


class Subclassed(keras.Model):
    """A model whose layers are called in code."""

    def __init__(self) -> None:
        super().__init__(name="own")
        self.mix = Stock(N, H, name="mix")

    def call(self, inputs: Any) -> Any:
        return self.mix(inputs, inputs)


class Holder(layers.Layer):
    """A layer that makes its attention itself, as most code of users does."""

    def __init__(self, attention: Any = Stock, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mix = attention(N, H, name="mix")

    def build(self, input_shape: Any) -> None:
        self.mix.build(input_shape, input_shape)

    def call(self, inputs: Any) -> Any:
        return self.mix(inputs, inputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


def test_a_class_of_functional_models_stays() -> None:
    x = vectors()
    original = randomize(Trained(x, Stock(N, H)(x, x), name="trained"))
    converted = from_keras(original)
    check_equal(converted, original)
    assert converted.answer() == 42


def test_a_model_with_a_constructor_of_its_own() -> None:
    original = randomize(Sized(3))
    check_equal(from_keras(original), original)


@pytest.mark.parametrize("build", [True, False])
def test_a_subclassed_model(build: bool) -> None:
    original = Subclassed()
    x = normal(B, T, D)
    if build:
        original(x)
        randomize(original)
    converted = from_keras(original)
    assert type(converted) is Subclassed
    assert type(converted.mix) is MultiHeadAttention
    assert type(original.mix) is Stock
    assert converted.built == build
    if not build:
        original(x)
        randomize(original)
        converted(x)
        converted.set_weights(original.get_weights())
    assert numbers(original(x)).std() > 0.05
    np.testing.assert_allclose(converted(x), original(x), atol=1e-5)


@pytest.mark.parametrize("function", [from_keras, to_keras])
@pytest.mark.parametrize("kind", ["alone", "wrapped", "in a model", "in a list"])
def test_attention_inside_layers_of_users(
    kind: str, function: Any, tmp_path: Path
) -> None:
    old, new = Stock, MultiHeadAttention
    if function is to_keras:
        old, new = new, old
    shape = (3, T, D) if kind == "wrapped" else (T, D)
    x = keras.Input(shape)
    layer: Any = {
        "alone": lambda: Holder(old, name="holder"),
        "wrapped": lambda: layers.TimeDistributed(Holder(old), name="holder"),
        "in a model": lambda: Outer(old),
        "in a list": lambda: Stack(old),
    }[kind]()
    original = randomize(keras.Model(x, layer(x)))
    converted = function(original)
    kinds = [type(each) for each in converted._flatten_layers()]
    assert new in kinds
    assert old not in kinds
    given = normal(2, *shape)
    expected = numbers(original(given))
    assert expected.std() > 0.05
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(converted(given), expected, atol=tolerance)
    assert [x.path for x in converted.weights] == [x.path for x in original.weights]
    # Weights fit the same files.
    original.save_weights(tmp_path / "old.weights.h5")
    for weight in converted.weights:
        weight.assign(weight * 0)
    converted.load_weights(tmp_path / "old.weights.h5")
    np.testing.assert_allclose(converted(given), expected, atol=tolerance)


def test_a_layer_of_a_user_without_a_model() -> None:
    x = normal(B, T, D)
    original = Holder(Stock)
    original(x)
    randomize(original)
    converted = from_keras(original)
    assert type(converted) is Holder
    np.testing.assert_allclose(converted(x), original(x), atol=1e-5)


class Outer(keras.Model):
    """A subclassed model around functional ones and parts used twice."""

    def __init__(self, attention: Any = Stock) -> None:
        super().__init__()
        x = vectors("inner")
        self.tied = attention(N, H)
        self.graph = keras.Model(x, self.tied(x, x, use_causal_mask=True))
        self.parts = {"first": Holder(attention), "rest": (layers.Dense(D), self.tied)}

    def call(self, inputs: Any) -> Any:
        dense, tied = self.parts["rest"]
        x = self.graph(dense(self.parts["first"](inputs)))
        return x + tied(x, inputs)


class Pair:
    """A plain object that holds layers."""

    def __init__(self, attention: Any) -> None:
        self.attention, self.norm = attention, layers.LayerNormalization()


class Stack(layers.Layer):
    """Layers in containers, in a plain object and in functions."""

    def __init__(self, attention: Any = Stock) -> None:
        super().__init__()
        self.blocks = []
        for _ in range(2):
            self.blocks.append(attention(N, H))
        last = attention(N, H)
        self.pair = Pair(last)
        self.held = last, self.pair.norm  # where Keras sees them
        self.scale = functools.partial(ops.multiply, 0.7)
        self.mix = lambda x: last(x, x)

    def call(self, inputs: Any) -> Any:
        for block in self.blocks:
            inputs = inputs + block(inputs, inputs)
        return self.pair.norm(self.scale(self.mix(inputs)))


class Patches(layers.Layer):
    """A constructor without `**kwargs`, and no configuration."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.dense = layers.Dense(D)

    def call(self, images: Any) -> Any:
        patches = ops.image.extract_patches(images, self.size)
        return self.dense(ops.reshape(patches, (-1, 6, 3 * self.size**2)))


def test_layers_with_plain_constructors() -> None:
    image = keras.Input((4, 6, 3))
    x = Patches(2)(image)
    original = randomize(keras.Model(image, Stock(N, H)(x, x)))
    given = normal(2, 4, 6, 3)
    np.testing.assert_allclose(from_keras(original)(given), original(given), atol=1e-5)


@pytest.mark.parametrize("function", [ops.gelu, ops.silu])
def test_functions_are_the_same_functions(function: Any) -> None:
    # The name of `ops.gelu` says another form of it to Keras.
    x = vectors()
    dense = layers.Dense(7, activation=function, name="dense")
    original = randomize(keras.Model(x, dense(3 * Stock(N, H)(x, x))))
    converted = from_keras(original)
    assert converted.get_layer("dense").activation is function
    check_equal(converted, original)


class Counted(keras.Model):
    """A model with a step, a metric, an optimizer and a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = Stock(N, H)
        self.tracker = keras.metrics.Mean(name="own_loss")
        self.random = keras.random.SeedGenerator(7)

    @property
    def metrics(self) -> list[Any]:
        return [self.tracker]

    def call(self, inputs: Any) -> Any:
        return self.mix(inputs, inputs)

    def compile(self, own: Any, **kwargs: Any) -> None:
        super().compile(**kwargs)
        self.own = own

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        noise = keras.random.normal(ops.shape(x), stddev=0.01, seed=self.random)
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(self(x + noise, training=True) - y))
        weights = self.trainable_weights
        self.own.apply(tape.gradient(loss, weights), weights)
        self.tracker.update_state(loss)
        return {"own_loss": self.tracker.result()}


def test_a_model_with_a_step_of_its_own_is_fitted() -> None:
    x, y = normal(B, T, D), normal(B, T, D, seed=3)
    original = Counted()
    original(x)
    randomize(original)
    original.compile(keras.optimizers.SGD(0.1))
    original.fit(x, y, verbose=0)
    original.tracker.reset_state()
    before = original.get_weights()
    converted = from_keras(original)
    assert not converted.compiled
    assert not hasattr(converted, "optimizer")
    assert converted.tracker is not original.tracker
    converted.compile(keras.optimizers.SGD(0.1))
    told = converted.fit(x, y, epochs=2, verbose=0).history["own_loss"]
    assert told[1] < told[0]
    assert float(original.tracker.result()) == 0
    for weight, expected in zip(original.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)
    # Both go on from the same state of the generator.
    again = original.fit(x, y, epochs=2, verbose=0).history["own_loss"]
    np.testing.assert_allclose(told, again, rtol=1e-5)


class Dense3(keras.Model):
    """A model of a user without attention."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(D, name="dense")

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}


def test_models_that_hold_no_attention_are_kept() -> None:
    x = first = vectors()
    x = Dense3(name="own")(Stock(N, H, name="mix")(x, x))
    original = randomize(keras.Model(first, x))
    converted = from_keras(original)
    check_equal(converted, original)
    assert type(converted.get_layer("own")) is Dense3


class Several(keras.Model):
    """A model of a user whose layers Keras names."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stack = [layers.Dense(D, activation="tanh") for _ in range(11)]

    def call(self, inputs: Any) -> Any:
        for dense in self.stack:
            inputs = inputs + dense(inputs)
        return inputs

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}


def test_layers_that_keras_names_keep_their_order() -> None:
    # Of eleven names in a row some have a figure more, and come first in the alphabet.
    x = first = vectors()
    x = Several(name="own")(Stock(N, H, name="mix")(x, x))
    original = randomize(keras.Model(first, x))
    check_equal(from_keras(original), original)


def test_random_numbers_go_on_where_they_were() -> None:
    x = first = vectors()
    x = layers.Dropout(0.5, name="drop")(Stock(N, H)(x, x))
    original = keras.Model(first, x)
    ones = ops.ones((B, T, D))
    original.get_layer("drop")(ones, training=True)
    dropped = [
        numbers(each.get_layer("drop")(ones, training=True))
        for each in (from_keras(original), original)
    ]
    np.testing.assert_array_equal(*dropped)


def test_subclasses_of_keras_attention_are_kept() -> None:
    class Own(Stock):
        pass

    x = first = vectors()
    x = Own(N, H, name="own")(x, x)
    x = Stock(N, H, name="mix")(x, x)
    original = randomize(keras.Model(first, x))
    converted = from_keras(original)
    assert type(converted.get_layer("own")) is Own
    assert type(converted.get_layer("mix")) is MultiHeadAttention
    np.testing.assert_allclose(answers(converted)[0], answers(original)[0], atol=1e-5)


def test_a_model_with_nothing_to_convert_is_refused() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)], name="plain")
    for function in (from_keras, to_keras):
        with pytest.raises(ValueError, match="nothing to convert.*'plain'.*Sequential"):
            function(model)


def test_a_layer_shared_with_the_inside_of_a_wrapper() -> None:
    steps = keras.Input((3, T, D), name="steps")
    inner = encoder("inner")
    each = layers.TimeDistributed(inner, name="each")(steps)
    original = keras.Model(steps, each + ops.expand_dims(inner(steps[:, 0]), 1))
    converted = from_keras(randomize(original))
    check_equal(converted, original)
    assert converted.get_layer("each").layer is converted.get_layer("inner")


# Where Keras' layer is at fault.


def test_masks_that_keras_loses_are_kept() -> None:
    """Keras' layer takes the masks off its inputs, so that the next one sees none."""

    def attend_twice(**call: Any) -> Any:
        x, other = vectors(), tokens("other")
        memory = embed(other)
        first = Stock(N, H, name="first")(x, memory)
        visible = dict.fromkeys(call, other != 0)
        second = Stock(N, H, name="second")(first, memory, **visible)
        return randomize(keras.Model([x, other], [first, second]))

    original, told = attend_twice(), attend_twice(value_mask=True)
    with pytest.warns(UserWarning, match="'second' no longer attend to padding"):
        converted = from_keras(original)
    found, given, right = map(answers, (converted, original, told))
    np.testing.assert_allclose(found[0], given[0], atol=1e-5)
    np.testing.assert_allclose(found[1], right[1], atol=1e-5)
    assert np.abs(found[1] - given[1]).max() > 0.05
    kept = from_keras(original, masks="as_keras")
    for one, other in zip(answers(kept), given, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def blocks(joined: str, count: int = 2, mask_zero: bool = True) -> Any:
    """A classifier of blocks, as people write them."""
    ids = tokens()
    x = embed(ids, mask_zero=mask_zero, embeddings_initializer="normal")
    for i in range(count):
        mixed = Stock(N, H, name=f"mix{i}")(x, x)
        x = layers.Add()([x, mixed]) if joined == "Add" else x + mixed
        x = layers.LayerNormalization()(x)
    x = layers.GlobalAveragePooling1D()(x)
    return randomize(keras.Model(ids, layers.Dense(3, "softmax", name="label")(x)))


def test_a_warning_tells_where_answers_change() -> None:
    added = blocks("Add")
    with pytest.warns(
        UserWarning, match="'label' by up to 0.*'mix1' no longer"
    ) as told:
        from_keras(added)
    assert told[0].filename == __file__
    assert "as_keras" in str(told[0].message)
    # `+` keeps no mask: the pooling reads what stands at padding.
    for count in (1, 2):
        with pytest.warns(UserWarning, match="'mix0' give queries that are padding"):
            from_keras(blocks("+", count))


def test_a_warning_tells_what_a_saved_copy_does_not_keep() -> None:
    class Block(layers.Layer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.supports_masking = True
            self.mix = Stock(N, H)

        def call(self, inputs: Any) -> Any:
            return inputs + self.mix(inputs, inputs)

    ids = tokens()
    block = Block(name="block")
    x = ops.mean(block(embed(ids)), axis=1)
    with pytest.warns(UserWarning, match="again when a saved copy is loaded: 'block'"):
        from_keras(randomize(keras.Model(ids, x)))


def test_no_warning_where_nothing_changes() -> None:
    for quiet in (blocks("+", mask_zero=False), blocks("Add", mask_zero=False)):
        check_equal(from_keras(quiet), quiet)
    from_keras(blocks("Add", count=1), samples=np.array([[3, 1, 4], [1, 5, 9]]))


def test_models_that_answer_at_random_are_not_compared() -> None:
    class Noise(layers.Layer):
        def call(self, inputs: Any) -> Any:
            return inputs + tf.random.normal(tf.shape(inputs))

    x = vectors()
    noisy = Noise()(x)
    from_keras(keras.Model(x, Stock(N, H)(noisy, noisy)))


@pytest.mark.parametrize("kind", ["arrays", "lists", "flat", "wrong"])
def test_samples_in_the_structure_of_the_inputs(kind: str) -> None:
    x, memory = vectors(), keras.Input((None, D), name="memory")
    mixed = Stock(N, H)(x, memory)
    original = keras.Model({"vectors": x, "memory": memory}, mixed)
    samples: Any = {"vectors": normal(B, T, D), "memory": normal(B, S, D)}
    if kind == "lists":
        samples = {name: array.tolist() for name, array in samples.items()}
    if kind == "flat":
        samples = [samples["vectors"], samples["memory"]]
        original = keras.Model([x, memory], mixed)
    if kind == "wrong":
        with pytest.raises(ValueError, match="^`samples`.*type ndarray.*'memory'"):
            from_keras(original, samples=samples["vectors"])
    else:
        from_keras(original, samples=samples)


def test_augmentation_makes_no_difference() -> None:
    # Keras' layer also turns on the dropout after it, unless it is told otherwise.
    image = keras.Input((4, 6, 3))
    x = layers.RandomFlip()(image)
    x = layers.Reshape((12, 6))(x)
    from_keras(keras.Model(image, Stock(N, H, dropout=0.5)(x, x)))


def test_tables_and_their_weights_are_not_shared() -> None:
    text = keras.Input((1,), dtype="string", name="text")
    vectorize = layers.TextVectorization(output_mode="tf_idf", name="text_vectors")
    vectorize.adapt(["a b c", "c d d"])
    x = layers.Reshape((1, 5))(vectorize(text))
    original = randomize(keras.Model(text, Stock(N, H)(x, x)))
    expected = answers(original)[0]
    converted = from_keras(original)
    np.testing.assert_allclose(answers(converted)[0], expected, atol=1e-5)
    converted.get_layer("text_vectors").adapt(["p q r", "r r q s"])
    np.testing.assert_array_equal(answers(original)[0], expected)
    assert np.abs(answers(converted)[0] - expected).max() > 0.01


def test_samples_are_what_is_compared() -> None:
    original = blocks("Add")
    full = np.array([[3, 1, 4], [1, 5, 9]])
    from_keras(original, samples=full)
    padded = np.array([[3, 1, 4], [1, 5, 0], [2, 7, 1]])
    expected = answers(original)[0]
    with pytest.warns(UserWarning, match="For `samples`.*in 1 of 3 rows") as told:
        converted = from_keras(original, samples=padded)
    size = np.abs(numbers(converted(padded)) - numbers(original(padded))).max()
    assert f"by up to {size:.2g}" in str(told[0].message)
    np.testing.assert_array_equal(answers(original)[0], expected)


@pytest.mark.parametrize("joined", ["Add", "+"])
def test_the_answers_of_the_original_are_kept_on_request(
    joined: str, tmp_path: Path
) -> None:
    original = blocks(joined)
    kept = from_keras(original, masks="as_keras")
    assert type(kept.get_layer("mix0")) is StockMaskAttention
    ids = np.array([[3, 1, 4, 15, 9], [2, 6, 5, 0, 0], [7, 0, 0, 0, 0]])
    np.testing.assert_allclose(kept(ids), original(ids), atol=1e-5)
    kept.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(ids), original(ids), atol=1e-5)
    back = to_keras(kept)
    np.testing.assert_allclose(back(ids), original(ids), atol=1e-5)


def test_the_leak_that_comes_back_is_told() -> None:
    original = blocks("Add")
    with pytest.warns(UserWarning, match="no longer attend to padding"):
        converted = from_keras(original)
    with pytest.warns(UserWarning, match="'mix1' attend to padding now"):
        back = to_keras(converted)
    np.testing.assert_allclose(answers(back)[0], answers(original)[0], atol=1e-5)


KEPT: dict[str, Any] = {
    "plain": {},
    "scores": {"return_attention_scores": True},
    "causal": {"use_causal_mask": True},
    "pairs": {"attention_mask": pairs(B, T, T).astype("float32")},
    "query": {"query_mask": np.array([[1, 0, 1, 1, 1], [1, 1, 0, 0, 0]], bool)},
    "value": {"value_mask": np.array([[0, 0, 0, 0, 0], [1, 1, 0, 1, 0]], bool)},
}


@pytest.mark.filterwarnings("ignore:.*was passed an input with a mask")
@pytest.mark.parametrize("call", KEPT)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", [Stock, Grouped])
def test_masks_of_keras_in_every_call(kind: Any, dropout: float, call: str) -> None:
    ids = tokens()
    x = embed(ids)
    sizes = (N, H) if kind is Stock else (H, 6, 2)
    attention = kind(*sizes, dropout=dropout, name="mix")
    options = {
        name: ops.convert_to_tensor(each) if isinstance(each, np.ndarray) else each
        for name, each in KEPT[call].items()
    }
    mixed = keras.tree.flatten(attention(x, x, **options))
    original = randomize(keras.Model(ids, [*mixed, attention(x, mixed[0])]))
    kept = from_keras(original, masks="as_keras")
    for one, other in zip(answers(kept), answers(original), strict=True):
        assert other.std() > 0.05
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_other_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="`masks`.*Received: masks='keep'"):
        from_keras(Stock(N, H), masks="keep")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64", "bfloat16"])
def test_a_copy_of_another_dtype(policy: str) -> None:
    original = MODELS["pooled_tokens"]()
    converted = from_keras(original, dtype=policy)
    wanted = keras.dtype_policies.get(policy)
    assert converted.output.dtype == wanted.compute_dtype
    for weight, expected in zip(converted.weights, original.weights, strict=True):
        assert weight.dtype == wanted.variable_dtype
        np.testing.assert_allclose(
            numbers(ops.cast(weight, "float32")),
            numbers(expected),
            rtol=1e-2 if policy == "bfloat16" else 0,
        )
    expected = numbers(original(IDS))
    found = numbers(ops.cast(converted(IDS), "float32"))
    far = np.abs(found - expected).mean() / np.abs(expected).mean()
    assert far < (1e-5 if policy == "float64" else 0.05)
    if policy == "mixed_bfloat16":
        back = from_keras(to_keras(converted), dtype="float32")
        check_equal(back, original)


def test_a_model_of_ours_in_another_dtype(tmp_path: Path) -> None:
    ids = tokens()
    x = TransformerEncoderBlock(N, 17, key_dim=6, position="rotary")(embed(ids))
    x = MultiHeadAttention(N, H, dtype="mixed_bfloat16")(x, x)
    original = randomize(keras.Model(ids, layers.GlobalAveragePooling1D()(x)))
    half = from_keras(original, dtype="mixed_bfloat16")
    assert half.output.dtype == half(IDS).dtype == "bfloat16"
    back = from_keras(half, dtype="float32")
    back.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")
    for each in (back, loaded):
        policies = {x.dtype_policy.name for x in each._flatten_layers()}
        assert policies == {"float32"}
    expected = numbers(original(IDS))
    np.testing.assert_allclose(loaded(IDS), back(IDS), atol=1e-5)
    np.testing.assert_allclose(back(IDS), expected, atol=0.05 * np.abs(expected).max())
    with pytest.raises(ValueError, match="nothing to convert"):
        from_keras(original)


@pytest.mark.parametrize("dtype", ["int8", "float33", 7])
def test_what_is_no_policy_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="`dtype`.*Received: dtype="):
        from_keras(Stock(N, H), dtype=dtype)


def test_weights_can_be_shared() -> None:
    original = MODELS["nested_models"]()
    converted = from_keras(original, copy=False)
    check_equal(converted, original)
    assert [id(x) for x in converted.weights] == [id(x) for x in original.weights]
    assert not {id(x) for x in converted._flatten_layers()} & {
        id(x) for x in original._flatten_layers()
    }
    with pytest.raises(ValueError, match="cannot be shared.*dtype='bfloat16'"):
        from_keras(original, copy=False, dtype="bfloat16")
    from_keras(original, copy=False, dtype="mixed_bfloat16")


def test_queries_that_see_no_key_differ_on_purpose() -> None:
    ids = tokens()
    x = embed(ids)
    mixed = Stock(N, H, name="mix")(x, x)
    original = randomize(keras.Model(ids, mixed))
    # No warning: the output says by its mask that this is padding.
    found, given = answers(from_keras(original))[0], answers(original)[0]
    np.testing.assert_allclose(found[IDS > 0], given[IDS > 0], atol=1e-5)
    bias = numbers(original.get_layer("mix").output_dense.bias)
    np.testing.assert_allclose(found[IDS == 0], np.broadcast_to(bias, (2, D)))
    assert np.abs(given[IDS == 0] - bias).max() > 0.05


@pytest.mark.parametrize("inside", [False, True])
def test_a_floating_attention_mask_is_refused_by_the_name_of_the_layer(
    inside: bool,
) -> None:
    class Causal(layers.Layer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.mix = Stock(N, H)

        def call(self, inputs: Any) -> Any:
            mask = ops.tril(ops.ones((1, T, T))) * ops.ones_like(inputs[:, :1, :1])
            return self.mix(inputs, inputs, attention_mask=mask)

    query, mask = keras.Input((T, D), name="vectors"), keras.Input((T, T), name="mask")
    if inside:
        original = keras.Model(query, Causal(name="named")(query))
    else:
        mixed = Stock(N, H, name="named")(query, query, attention_mask=mask)
        original = keras.Model([query, mask], mixed)
    with pytest.raises(
        TypeError, match="^A call .* layer 'named' .* convert: `attention_mask` must"
    ) as raised:
        from_keras(original)
    assert "Arguments received" not in str(raised.value)
    if inside:
        kept = from_keras(original, masks="as_keras")
        given = normal(B, T, D)
        np.testing.assert_allclose(kept(given), original(given), atol=1e-5)


# Back to Keras.


def sequence(*first: Any) -> Any:
    return keras.Sequential(
        [
            *first,
            MultiHeadSelfAttention(N, H, name="mix"),
            layers.Dense(D, activation=swish_twice, name="dense"),
            layers.GlobalAveragePooling1D(name="mean"),
        ],
        name="sequence",
    )


def check_sequence(converted: Any, original: Any) -> None:
    """A model of the same name, layers, weights and outputs, but not Sequential."""
    assert type(converted) is type(encoder("functional"))
    assert converted.name == "sequence"
    names = [x.name for x in converted.layers if type(x) is not layers.InputLayer]
    assert names == [x.name for x in original.layers]
    assert type(converted.get_layer("mix")) is Stock
    trained = [x.path for x in converted.trainable_weights]
    assert any(path.endswith("dense/kernel") for path in trained)
    assert not any(path.endswith("dense/bias") for path in trained)


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
@pytest.mark.parametrize("inside", [False, True])
def test_a_sequential_model_that_would_call_with_two_inputs(inside: bool) -> None:
    original = sequence(tokens(), layers.Embedding(WORDS, D, mask_zero=True))
    original.get_layer("dense").bias.trainable = False
    if inside:
        ids = tokens()
        original = keras.Model(ids, layers.Dense(3, name="last")(original(ids)))
    randomize(original)
    converted = to_keras(original)
    if inside:
        assert type(converted) is type(original)
        pair = [each.get_layer("sequence") for each in (converted, original)]
    else:
        pair = [converted, original]
    check_sequence(*pair)
    ids = ops.convert_to_tensor(IDS)
    expected = numbers(original(ids))
    assert expected.std() > 0.05
    np.testing.assert_allclose(numbers(converted(ids)), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
def test_masks_reach_attention_in_a_sequential_model() -> None:
    ids = tokens()
    original = randomize(keras.Model(ids, sequence()(embed(ids))))
    given = ops.convert_to_tensor(IDS)
    expected = numbers(original(given))
    np.testing.assert_allclose(numbers(to_keras(original)(given)), expected, atol=1e-5)
    blind = to_keras(keras.Model(ids, sequence()(embed(ids, mask_zero=False))))
    blind.set_weights(to_keras(original).get_weights())
    assert np.abs(numbers(blind(given)) - expected).max() > 0.01


def test_a_sequential_model_that_is_not_built_is_refused() -> None:
    with pytest.raises(ValueError, match="must be built.*'sequence'.*not built"):
        to_keras(sequence())


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
def test_self_attention_is_called_with_two_inputs() -> None:
    ids = tokens()
    x = embed(ids)
    x = MultiHeadSelfAttention(N, H, name="mix")(x, use_causal_mask=True)
    x = MultiHeadSelfAttention(
        6, H, num_key_value_heads=2, use_gate=True, name="grouped"
    )(x)
    original = randomize(keras.Model(ids, layers.GlobalAveragePooling1D()(x)))
    converted = to_keras(original)
    check_equal(converted, original, function=to_keras)
    assert type(converted.get_layer("mix")) is Stock
    assert type(converted.get_layer("grouped")) is Grouped


def test_masks_that_self_attention_is_given() -> None:
    x, visible = vectors(), keras.Input((None,), dtype="bool", name="padding")
    table = np.tril(np.ones((T, T), bool))
    mixed, scores = MultiHeadSelfAttention(N, H)(
        x, mask=visible, attention_mask=table, return_attention_scores=True
    )
    original = randomize(keras.Model([x, visible], [mixed, scores]))
    converted = to_keras(original)
    seen = given_for(original)[1].numpy()
    found, expected = answers(converted), answers(original)
    np.testing.assert_allclose(found[0][seen], expected[0][seen], atol=1e-5)
    for b in range(B):
        rows = seen[b]
        np.testing.assert_allclose(
            found[1][b][:, rows], expected[1][b][:, rows], atol=1e-5
        )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ({"segment_ids": np.zeros((B, T), int)}, "`segment_ids`"),
        ({"attention_bias": np.zeros((T, T), "float32")}, "`attention_bias`"),
        ({"head_mask": np.ones(N, "float32")}, "`head_mask`"),
        ({"attention_mask": CausalMask()}, "`attention_mask`"),
    ],
)
@pytest.mark.parametrize("layer_class", [MultiHeadAttention, MultiHeadSelfAttention])
def test_calls_that_keras_lacks_are_refused(
    layer_class: Any, call: dict[str, Any], match: str
) -> None:
    x = vectors()
    inputs = [x] if layer_class is MultiHeadSelfAttention else [x, x]
    model = keras.Model(x, layer_class(N, H, name="mix")(*inputs, **call))
    with pytest.raises(ValueError, match=f"'mix' called with {match}"):
        to_keras(model)


@pytest.mark.parametrize(
    "holder",
    [
        lambda: TransformerEncoderBlock(N, 7, key_dim=H, name="holder"),
        lambda: ResidualNorm(MultiHeadSelfAttention(N, H), name="holder"),
    ],
)
def test_self_attention_inside_others_is_refused(holder: Any) -> None:
    x = vectors()
    with pytest.raises(TypeError, match="'holder'.*MultiHeadSelfAttention"):
        to_keras(keras.Model(x, holder()(x)))


def test_options_that_configurations_leave_out_carry_over_inside_wrappers() -> None:
    x, steps = vectors(), keras.Input((3, T, D), name="steps")
    inner = keras.Model(x, Stock(N, H, flash_attention=True, name="mix")(x, x))
    each = layers.TimeDistributed(inner, name="each")
    converted = from_keras(keras.Model(steps, each(steps)))
    swapped = converted.get_layer("each").layer.get_layer("mix")
    assert swapped.get_config()["flash_attention"] is True


def test_attention_inside_a_residual_is_swapped() -> None:
    x = first = vectors()
    x = ResidualNorm(MultiHeadAttention(N, H, name="mix"), name="residual")(x, x)
    original = randomize(keras.Model(first, x))
    converted = to_keras(original)
    check_equal(converted, original, function=to_keras)
    assert type(converted.get_layer("residual").sublayer) is Stock
