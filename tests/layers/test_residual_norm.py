from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_mha import (
    FeedForward,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    ResidualNorm,
)
from keras_mha.layers.keras_mask import get_keras_mask
from tests.support.layers import (
    PADDING,
    PAIRS_3,
    B,
    D,
    H,
    N,
    T,
    assert_equal,
    differentiate,
    made,
    normal,
    randomize,
)

PLACEMENTS = ("pre", "post", "sandwich")
EPSILON = 1e-3


class WithLength(keras.layers.Layer):
    """Gives two outputs and takes neither a mask nor `training`."""

    def call(self, tokens: Any, factor: float = 2.0) -> Any:
        return ops.multiply(factor, ops.square(tokens)), ops.sum(tokens, axis=-1)


def normalized(layer: Any, inputs: np.ndarray) -> np.ndarray:
    """Layer or RMS normalization in NumPy float64."""
    weights = [np.asarray(weight, "float64") for weight in layer.weights]
    inputs = inputs.astype("float64")
    if isinstance(layer, keras.layers.RMSNormalization):
        square = np.square(inputs).mean(-1, keepdims=True)
        return inputs / np.sqrt(square + layer.epsilon) * weights[0]
    centered = inputs - inputs.mean(-1, keepdims=True)
    variance = np.square(centered).mean(-1, keepdims=True)
    return centered / np.sqrt(variance + layer.epsilon) * weights[0] + weights[1]


def dense(layer: Any, inputs: np.ndarray) -> np.ndarray:
    kernel, bias = (np.asarray(weight, "float64") for weight in layer.weights)
    return inputs @ kernel + bias


def expected_of(layer: Any, inputs: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """The three formulas of the docstring, around a dense layer."""
    if layer.placement == "post":
        joined = inputs + scale * dense(layer.sublayer, inputs)
        return normalized(layer.norm, joined)
    branch = dense(layer.sublayer, normalized(layer.norm, inputs))
    if layer.placement == "sandwich":
        branch = normalized(layer.output_norm, branch)
    return inputs + scale * branch


# Formulas.


@pytest.mark.parametrize("normalization", ["layer", "rms"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_formulas(placement: str, normalization: str) -> None:
    layer = made(
        ResidualNorm(keras.layers.Dense(D), placement, normalization, epsilon=EPSILON)
    )
    assert layer.norm.epsilon == EPSILON
    inputs = normal(B, T, D)
    expected = expected_of(layer, inputs)
    np.testing.assert_allclose(layer(inputs), expected, atol=1e-5)
    for weight in layer.weights:  # each counts
        before = np.array(weight)
        changed = before.copy()
        changed.flat[0] += 1.0
        weight.assign(changed)
        assert np.abs(layer(inputs) - expected).max() > 1e-3
        weight.assign(before)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_normalization_layer_given_is_used(placement: str) -> None:
    norm = keras.layers.LayerNormalization(epsilon=EPSILON, name="mine")
    layer = made(ResidualNorm(keras.layers.Dense(D), placement, norm))
    assert layer.norm is norm
    assert layer.norm.epsilon == EPSILON
    if placement == "sandwich":
        assert layer.output_norm.epsilon == EPSILON
        assert layer.output_norm.name != "mine"
        assert layer.output_norm.gamma is not norm.gamma
    inputs = normal(B, T, D)
    np.testing.assert_allclose(layer(inputs), expected_of(layer, inputs), atol=1e-5)


class Unsaid(keras.layers.Layer):
    """A normalization of a user that does not say that it keeps masks."""

    def call(self, inputs: Any) -> Any:
        return inputs / keras.ops.sqrt(
            keras.ops.mean(inputs**2, axis=-1, keepdims=True)
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", [keras.layers.RMSNormalization, Unsaid])
def test_masks_survive_any_normalization(placement: str, kind: type) -> None:
    ids = keras.Input((None,), dtype="int32")
    table = keras.layers.Embedding(9, D, mask_zero=True)
    layer = ResidualNorm(keras.layers.Dense(D), placement, kind())
    model = keras.Model(ids, keras.layers.GlobalAveragePooling1D()(layer(table(ids))))
    randomize(model)
    padded = np.array([[5, 3, 0, 0, 0]])
    np.testing.assert_allclose(model(padded), model(padded[:, :2]), atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rezero_starts_as_no_branch(placement: str) -> None:
    layer = ResidualNorm(keras.layers.Dense(D), placement, rezero=True)
    inputs = normal(B, T, D)
    outputs = layer(inputs)
    assert tuple(layer.scale.shape) == ()
    expected = normalized(layer.norm, inputs) if placement == "post" else inputs
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    layer.scale.assign(0.7)
    np.testing.assert_allclose(
        layer(inputs), expected_of(layer, inputs, 0.7), atol=1e-5
    )
    result = differentiate(layer, inputs, [layer.scale])
    assert result.weights[0] != 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_layer_scale_scales_each_feature(placement: str) -> None:
    layer = ResidualNorm(keras.layers.Dense(D), placement, layer_scale=0.3)
    inputs = normal(B, T, D)
    outputs = layer(inputs)
    np.testing.assert_array_equal(layer.scale, np.full(D, 0.3, "float32"))
    np.testing.assert_allclose(outputs, expected_of(layer, inputs, 0.3), atol=1e-5)
    scale = normal(D, seed=8)
    layer.scale.assign(scale)
    np.testing.assert_allclose(
        layer(inputs), expected_of(layer, inputs, scale), atol=1e-5
    )


# Sublayers.


def test_further_outputs_are_returned_as_they_are() -> None:
    layer, inputs = ResidualNorm(WithLength()), normal(B, T, D)
    joined, sums = layer(inputs, factor=3.0)
    branch = normalized(layer.norm, inputs)
    np.testing.assert_allclose(joined, inputs + 3 * branch**2, atol=1e-4)
    np.testing.assert_allclose(sums, branch.sum(-1), atol=1e-4)
    by_name, _ = layer(inputs=inputs)
    np.testing.assert_allclose(by_name, inputs + 2 * branch**2, atol=1e-4)
    symbolic = layer(keras.Input((T, D)))
    assert [tuple(each.shape) for each in symbolic] == [(None, T, D), (None, T)]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_self_attention_gets_its_arguments(placement: str) -> None:
    attention = MultiHeadSelfAttention(N, H)
    layer, inputs = made(ResidualNorm(attention, placement)), normal(B, T, D)
    call = {
        "mask": PADDING,
        "attention_mask": PAIRS_3,
        "use_causal_mask": True,
        "return_attention_scores": True,
    }
    joined, scores = layer(inputs, **call)
    branch = inputs if placement == "post" else layer.norm(inputs)
    mixed, expected_scores = attention(branch, **call)
    if placement == "sandwich":
        mixed = layer.output_norm(mixed)
    expected = inputs + mixed
    if placement == "post":
        expected = layer.norm(expected)
    np.testing.assert_allclose(joined, expected, atol=1e-6)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    np.testing.assert_array_equal(
        layer(inputs, mask=PADDING, attention_mask=PAIRS_3, use_causal_mask=True),
        joined,
    )


@pytest.mark.parametrize(
    "made_by", [MultiHeadAttention, keras.layers.MultiHeadAttention]
)
@pytest.mark.parametrize("mode", ["eager", "functional"])
def test_cross_attention_gets_its_value(mode: str, made_by: Any) -> None:
    attention = made_by(N, H)
    layer = ResidualNorm(attention)
    inputs, value = normal(B, T, D), normal(B, 5, 11, seed=1)
    layer(inputs, value=value)
    randomize(layer)
    if mode == "eager":
        outputs, scores = layer(inputs, value=value, return_attention_scores=True)
        np.testing.assert_allclose(layer(inputs, value), outputs, atol=1e-5)
    else:
        symbolic = keras.Input((T, D)), keras.Input((5, 11))
        symbolic_outputs = layer(
            symbolic[0], value=symbolic[1], return_attention_scores=True
        )
        assert symbolic_outputs[0].shape == (None, T, D)
        outputs, scores = keras.Model(symbolic, symbolic_outputs)([inputs, value])
    mixed, expected_scores = attention(
        layer.norm(inputs), value, return_attention_scores=True
    )
    np.testing.assert_allclose(outputs, inputs + mixed, atol=1e-5)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "functional"])
def test_masks_of_cross_attention_are_read_from_both_inputs(mode: str) -> None:
    masking = keras.layers.Masking()
    attention = MultiHeadAttention(N, H)
    layer = ResidualNorm(attention)
    inputs = np.where(PADDING[..., None], normal(B, T, D), 0).astype("float32")
    kept = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    value = np.where(kept[..., None], normal(B, 5, D, seed=1), 0).astype("float32")
    layer(inputs, value=value)
    randomize(layer)
    if mode == "eager":
        outputs = layer(masking(inputs), value=masking(value))
        np.testing.assert_array_equal(outputs._keras_mask, PADDING)
    else:
        symbolic = keras.Input((T, D)), keras.Input((5, D))
        made_outputs = layer(masking(symbolic[0]), value=masking(symbolic[1]))
        outputs = keras.Model(symbolic, made_outputs)([inputs, value])
    mixed = attention(layer.norm(inputs), value, query_mask=PADDING, value_mask=kept)
    np.testing.assert_allclose(outputs, inputs + mixed, atol=1e-5)
    without = attention(layer.norm(inputs), value)
    assert np.abs(mixed - without).max() > 0.01


@pytest.mark.parametrize(
    "sublayer",
    [
        lambda: keras.layers.Dense(D),
        lambda: keras.layers.Conv1D(D, 3, padding="same"),
        lambda: keras.layers.Dropout(0.5),
        lambda: keras.layers.Activation("tanh"),
        lambda: keras.layers.UnitNormalization(axis=-1),
        lambda: keras.layers.LSTM(D, return_sequences=True),
        lambda: keras.Sequential([keras.layers.Dense(5), keras.layers.Dense(D)]),
        lambda: FeedForward(17),
        lambda: ResidualNorm(keras.layers.Dense(D)),
    ],
    ids=lambda make: type(make()).__name__,
)
def test_any_layer_can_be_a_sublayer(sublayer: Any) -> None:
    layer, inputs = ResidualNorm(sublayer()), normal(B, T, D)
    expected = inputs + np.asarray(layer(inputs) - inputs)
    branch = layer.sublayer(layer.norm(inputs))
    np.testing.assert_allclose(expected, inputs + branch, atol=1e-5)
    symbolic = keras.Input((T, D))
    model = keras.Model(symbolic, layer(symbolic))
    np.testing.assert_allclose(model(inputs), expected, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 4])
def test_other_ranks(rank: int) -> None:
    shape = (B, 3, T, D)[-rank:]
    layer = made(ResidualNorm(keras.layers.Dense(D)), shape)
    inputs = normal(*shape)
    np.testing.assert_allclose(layer(inputs), expected_of(layer, inputs), atol=1e-5)


# Masks.


@pytest.mark.parametrize("normalization", ["layer", "rms"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mode", ["eager", "functional", "graph"])
def test_the_mask_reaches_sublayer_and_outputs(
    mode: str, placement: str, normalization: str
) -> None:
    attention = MultiHeadSelfAttention(N, H)
    layer = made(ResidualNorm(attention, placement, normalization))
    masking = keras.layers.Masking()
    inputs = np.where(PADDING[..., None], normal(B, T, D), 0).astype("float32")
    expected = layer(inputs, mask=PADDING)
    assert np.abs(expected - layer(inputs))[PADDING].max() > 0.01
    if mode == "functional":
        symbolic = keras.Input((None, D))
        made_outputs = layer(masking(symbolic))
        assert made_outputs._keras_mask is not None
        outputs = keras.Model(symbolic, made_outputs)(inputs)
    elif mode == "graph":
        outputs = tf.function(lambda x: layer(masking(x)))(inputs)
    else:
        masked = masking(inputs)
        outputs = layer(masked)
        np.testing.assert_array_equal(outputs._keras_mask, PADDING)
        np.testing.assert_array_equal(masked._keras_mask, PADDING)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_padding_changes_no_real_position(placement: str) -> None:
    layer = made(ResidualNorm(MultiHeadSelfAttention(N, H), placement))
    inputs = normal(B, T, D)
    poisoned = np.where(PADDING[..., None], inputs, np.float32(np.nan))
    outputs = layer(poisoned, mask=PADDING)
    expected = layer(inputs, mask=PADDING)
    np.testing.assert_allclose(
        np.asarray(outputs)[PADDING], np.asarray(expected)[PADDING], atol=1e-6
    )


# Dropout and stochastic depth.

ONES = np.ones((101, T, D), "float32")


def branch_of(layer: ResidualNorm, inputs: np.ndarray = ONES) -> np.ndarray:
    """What joins the residual in training."""
    return np.asarray(layer(inputs, training=True)) - inputs


def one_branch(**options: Any) -> ResidualNorm:
    """A layer whose branch is one everywhere."""
    one = keras.layers.Dense(D, kernel_initializer="zeros", bias_initializer="ones")
    return ResidualNorm(one, **options)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_dropout_drops_elements_and_rescales(rate: float) -> None:
    branch = branch_of(one_branch(dropout=rate, seed=3))
    kept = np.isclose(branch, 1 / (1 - rate), atol=1e-5)
    assert (kept | (np.abs(branch) < 1e-6)).all()
    deviation = np.sqrt(rate * (1 - rate) / branch.size)
    assert kept.mean() == pytest.approx(1 - rate, abs=5 * deviation)
    assert 0 < kept[0].mean() < 1


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_stochastic_depth_skips_examples_and_rescales(rate: float) -> None:
    branch = branch_of(one_branch(stochastic_depth=rate, seed=3))
    flat = branch.reshape(len(ONES), -1)
    np.testing.assert_allclose(flat, np.broadcast_to(flat[:, :1], flat.shape))
    kept = np.isclose(flat[:, 0], 1 / (1 - rate), atol=1e-5)
    assert (kept | (np.abs(flat[:, 0]) < 1e-6)).all()
    deviation = np.sqrt(rate * (1 - rate) / len(ONES))
    assert kept.mean() == pytest.approx(1 - rate, abs=4 * deviation)


@pytest.mark.parametrize("name", ["dropout", "stochastic_depth"])
def test_the_seed_decides_and_inference_drops_nothing(name: str) -> None:
    first, twin, other = (one_branch(**{name: 0.5, "seed": s}) for s in (3, 3, 4))
    draws = [branch_of(first) for _ in range(2)]
    assert not np.array_equal(*draws)
    np.testing.assert_array_equal(draws[0], branch_of(twin))
    assert not np.array_equal(draws[0], branch_of(other))
    np.testing.assert_allclose(first(ONES), ONES + 1, atol=1e-6)
    compiled = tf.function(lambda x: twin(x, training=True), jit_compile=True)
    np.testing.assert_allclose(compiled(ONES) - ONES, draws[1], atol=1e-6)


def test_both_together_differ_from_each() -> None:
    branch = branch_of(one_branch(dropout=0.5, stochastic_depth=0.5, seed=3))
    values = np.unique(np.round(branch, 4))
    np.testing.assert_allclose(values, [0.0, 4.0])
    skipped = (branch.reshape(len(ONES), -1) == 0).all(axis=1).mean()
    assert 0.3 < skipped < 0.7


@pytest.mark.parametrize("mode", ["training", "fit"])
def test_dropout_of_the_sublayer_acts_in_training(mode: str) -> None:
    layer = ResidualNorm(keras.layers.Dropout(0.5, seed=3))
    inputs = normal(B, T, D)
    if mode == "training":
        assert not np.allclose(layer(inputs, training=True), layer(inputs))
        return
    symbolic = keras.Input((T, D))
    model = keras.Model(symbolic, layer(symbolic))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    losses = model.fit(inputs, inputs, epochs=2, verbose=0).history["loss"]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rematerialized_dropout_has_the_gradients_of_the_one_applied(
    placement: str,
) -> None:
    def result(layer: ResidualNorm) -> Any:
        return differentiate(
            lambda x: layer(x, mask=PADDING, training=True),
            normal(B, T, D),
            layer.trainable_weights,
        )

    def layer() -> ResidualNorm:
        return made(
            ResidualNorm(
                MultiHeadSelfAttention(N, H, dropout=0.3, seed=1),
                placement,
                dropout=0.3,
                stochastic_depth=0.3,
                seed=2,
            )
        )

    expected = result(layer())
    with keras.RematScope(mode="full"):
        rematerialized = layer()
    assert_equal(result(rematerialized), expected)


# Precision.


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_mixed_precision(placement: str) -> None:
    policy = "mixed_float16"
    mixed, wide = (
        made(
            ResidualNorm(
                keras.layers.Dense(D, dtype=dtype),
                placement,
                layer_scale=0.3,
                dtype=dtype,
            )
        )
        for dtype in (policy, "float32")
    )
    outputs = mixed(normal(B, T, D))
    assert outputs.dtype == "float16"
    assert {weight.dtype for weight in mixed.weights} == {"float32"}
    np.testing.assert_allclose(
        ops.cast(outputs, "float32"), wide(normal(B, T, D)), atol=0.03
    )


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sublayer": "dense"}, TypeError, "`sublayer` must be a .*dense of type str"),
        ({"placement": "before"}, ValueError, r"\['pre', 'post', 'sandw.*'before'"),
        ({"normalization": "batch"}, ValueError, r"\['layer', 'rms'\].*'batch'"),
        ({"normalization": 3}, TypeError, "`normalization` must be .*normalization=3"),
        ({"normalization": None}, TypeError, "`normalization` must be .*=None"),
        ({"dropout": 1.0}, ValueError, "0 <= dropout < 1. Received: dropout=1.0"),
        ({"stochastic_depth": -1}, ValueError, "0 <= stochastic_depth < 1.*=-1"),
        ({"layer_scale": "x"}, ValueError, "`layer_scale` must be a pos.*='x'"),
        ({"layer_scale": float("nan")}, ValueError, "`layer_scale` must be .*=nan"),
        ({"epsilon": -1.0}, ValueError, "`epsilon` must be a positive.*epsilon=-1.0"),
        ({"seed": 1.5}, ValueError, "`seed` must be an integer or None.*seed=1.5"),
        (
            {"layer_scale": 0.1, "rezero": True},
            ValueError,
            "`layer_scale` and `rezero` .*layer_scale=0.1, rezero=True",
        ),
        (
            {"normalization": keras.layers.LayerNormalization(), "epsilon": 0.1},
            ValueError,
            "`epsilon` belongs to .*epsilon=0.1",
        ),
    ],
    ids=str,
)
def test_arguments_out_of_their_domain(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ResidualNorm(**{"sublayer": keras.layers.Dense(D), **options})


@pytest.mark.parametrize(
    "sublayer", [keras.layers.Dense(D + 1), keras.layers.GlobalAveragePooling1D()]
)
def test_a_sublayer_that_changes_the_shape_is_refused(sublayer: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"first output has the shape.*'{sublayer.name}' .*7, 13\)"
    ):
        ResidualNorm(sublayer)(normal(B, T, D))


def test_the_mask_that_a_sublayer_sets_stays_on_the_outputs() -> None:
    inputs = tf.constant(normal(2, 3, 5))
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    for placement in ("pre", "post", "sandwich"):
        block = ResidualNorm(MultiHeadAttention(2, 3), placement)
        outputs = block(inputs, inputs, query_mask=mask)
        np.testing.assert_array_equal(get_keras_mask(outputs), mask)


def test_normalizations_train_alike_when_rematerialized() -> None:
    inputs = tf.constant(normal(7, 3, 5))

    def gradients(scope: Any) -> list[np.ndarray]:
        keras.utils.set_random_seed(3)
        with scope:
            norm = keras.layers.BatchNormalization()
            block = ResidualNorm(FeedForward(11), "sandwich", norm)
            block.build(inputs.shape)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(block(inputs, training=True) ** 3)
        return [np.asarray(g) for g in tape.gradient(loss, block.trainable_weights)]

    plain = gradients(contextlib.nullcontext())
    again = gradients(keras.RematScope(mode="full"))
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_activity_regularizers_are_refused_when_rematerialized() -> None:
    with keras.RematScope(mode="full"):
        layer = MultiHeadAttention(2, 3, activity_regularizer="l2")
    inputs = tf.constant(normal(2, 3, 5))
    with pytest.raises(ValueError, match="`keras.RematScope`.*`activity_regularizer`"):
        layer(inputs, inputs)
