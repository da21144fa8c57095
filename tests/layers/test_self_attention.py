from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_mha import MultiHeadSelfAttention, ResidualNorm
from tests.support import reference as oracle
from tests.support.layer_oracle import visible_in_call
from tests.support.layers import (
    PADDING,
    PAIRS_2,
    PAIRS_3,
    PAIRS_4,
    B,
    D,
    H,
    N,
    Result,
    T,
    V,
    assert_equal,
    differentiate,
    made,
    normal,
    padding,
    self_attention,
    split_arrays,
    split_weights,
    stock_twin,
)

PARTS = ("query", "key", "value", "attention_output")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "value_dim": {"value_dim": V},
    "output_shape": {"output_shape": (3, 5), "value_dim": V},
    "output_size": {"output_shape": 17},
    "no_bias": {"use_bias": False, "value_dim": V},
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"use_causal_mask": True},
    "rank_2": {"attention_mask": PAIRS_2},
    "rank_3": {"attention_mask": PAIRS_3},
    "rank_4": {"attention_mask": PAIRS_4},
    "rank_4_one_head": {"attention_mask": PAIRS_4[:, :1]},
    "rank_4_one_example": {"attention_mask": PAIRS_4[:1]},
    "padding": {"mask": PADDING},
    "padding_causal": {"mask": PADDING, "use_causal_mask": True},
    "padding_rank_3": {"mask": PADDING, "attention_mask": PAIRS_3},
    "padding_rank_4": {"mask": PADDING, "attention_mask": PAIRS_4},
    "all": {"mask": PADDING, "attention_mask": PAIRS_4, "use_causal_mask": True},
    "hidden_rows": {"attention_mask": PAIRS_3 & padding(4, 0, 7)[:, :, None]},
}
CASES = [("plain", mask) for mask in MASKS] + [
    (options, "all") for options in OPTIONS if options != "plain"
]


def ours(layer: MultiHeadSelfAttention, inputs: np.ndarray, **call: Any) -> Result:
    """The layer's result, its gradients split as Keras' weights are."""
    result = differentiate(lambda x: layer(x, **call), inputs, layer.trainable_weights)
    return result._replace(weights=split_arrays(result.weights, layer))


def theirs(layer: MultiHeadSelfAttention, inputs: np.ndarray, **call: Any) -> Result:
    """The result of Keras' layer, on the path where hidden rows are right."""
    stock, visible = stock_twin(layer), visible_in_call((B, N, T, T), **call)
    return differentiate(
        lambda x: stock(x, x, attention_mask=visible, return_attention_scores=True)[0],
        inputs,
        stock.trainable_weights,
    )


@pytest.mark.parametrize(("options", "mask"), CASES)
def test_values_and_gradients_are_those_of_keras(options: str, mask: str) -> None:
    layer, call = self_attention(**OPTIONS[options]), MASKS[mask]
    inputs = normal(B, T, D)
    result = ours(layer, inputs, **call)
    assert result.outputs.shape == layer.compute_output_shape(inputs.shape)
    assert_equal(result, theirs(layer, inputs, **call))


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "none"])
def test_the_comparison_sees_a_dropped_mask(mask: str) -> None:
    layer, inputs = self_attention(), normal(B, T, D)
    with pytest.raises(AssertionError):
        assert_equal(ours(layer, inputs), theirs(layer, inputs, **MASKS[mask]))


@pytest.mark.parametrize("place", range(4))
def test_the_comparison_sees_a_changed_weight(place: int) -> None:
    layer, inputs = self_attention(), normal(B, T, D)
    expected = theirs(layer, inputs)
    weight = layer.weights[place]
    changed = np.array(weight)
    # The first column of the fused bias is a query's, so that it counts.
    changed.flat[0] += 0.1
    weight.assign(changed)
    with pytest.raises(AssertionError):
        assert_equal(ours(layer, inputs), expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_scores_are_those_of_keras(options: str) -> None:
    layer, inputs = self_attention(**OPTIONS[options]), normal(B, T, D)
    call = MASKS["all"]
    outputs, scores = layer(inputs, return_attention_scores=True, **call)
    _, expected = stock_twin(layer)(
        inputs,
        inputs,
        attention_mask=visible_in_call((B, N, T, T), **call),
        return_attention_scores=True,
    )
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    np.testing.assert_array_equal(outputs, layer(inputs, **call))


@pytest.mark.parametrize("rank", [2, 3])
def test_masks_that_inputs_carry_act_as_in_keras(rank: int) -> None:
    # Keras' own reading of the masks, at real positions; see fault 1 for the rest.
    layer, pairs = self_attention(), {2: PAIRS_2, 3: PAIRS_3}[rank]
    inputs = np.where(PADDING[..., None], normal(B, T, D), 0.0).astype("float32")
    masked = keras.layers.Masking()(inputs)
    expected = stock_twin(layer)(masked, masked, attention_mask=pairs)
    outputs = layer(keras.layers.Masking()(inputs), attention_mask=pairs)
    np.testing.assert_allclose(
        np.asarray(outputs)[PADDING], np.asarray(expected)[PADDING], atol=1e-5
    )


# Arguments.


def test_key_dim_defaults_to_an_even_share() -> None:
    layer = made(MultiHeadSelfAttention(num_heads=3), (B, T, 15))
    assert layer.key_dim is None
    assert tuple(layer.qkv_dense.kernel.shape) == (15, 3, 15)
    explicit = MultiHeadSelfAttention(num_heads=3, key_dim=5)
    explicit.build((B, T, 15))
    explicit.set_weights(layer.get_weights())
    inputs = normal(B, T, 15)
    np.testing.assert_array_equal(layer(inputs), explicit(inputs))


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="`key_dim=None` .* divisible by `num_heads`. Received: inputs of width "
        "13 and num_heads=2",
    ):
        MultiHeadSelfAttention(num_heads=2)(normal(B, T, D))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "`num_heads`, expected a positive integer.*num_heads=0"),
        ({"num_heads": 2.0}, "`num_heads`, expected a positive .*num_heads=2.0"),
        ({"num_heads": True}, "`num_heads`, expected a positive .*num_heads=True"),
        ({"key_dim": -1}, "`key_dim`, expected a positive integer.*key_dim=-1"),
        ({"value_dim": 0}, "`value_dim`, expected a positive integer.*value_dim=0"),
        ({"dropout": 1.0}, "`dropout` must be .* 0 <= dropout < 1. .*dropout=1.0"),
        ({"dropout": -0.1}, "`dropout` must be .* 0 <= dropout < 1. .*dropout=-0.1"),
        ({"dropout": "much"}, "`dropout` must be a number .*dropout=much"),
        ({"output_shape": 0}, "`output_shape`, expected a positive .*output_shape=0"),
        ({"output_shape": (3, 0)}, "`output_shape`, expected .*output_shape=0"),
        ({"output_shape": ()}, r"Invalid `output_shape`: \(\)"),
        ({"output_shape": "wide"}, "Invalid `output_shape`: wide"),
        ({"output_shape": 1.5}, "Invalid `output_shape`: 1.5"),
        ({"jit_compile": "yes"}, "`jit_compile` must be True, .*jit_compile='yes'"),
        ({"jit_compile": None}, "`jit_compile` must be True, .*jit_compile=None"),
    ],
    ids=str,
)
def test_arguments_out_of_their_domain(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiHeadSelfAttention(**{"num_heads": N, **options})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((T,), r"rank 2 \(T, S\), 3 .*attention_mask of shape \(7,\)"),
        ((1, B, N, T, T), r"rank 2 to 4.*attention_mask of shape \(1, 3, 2, 7, 7\)"),
        ((T, T + 1), r"1 or that of the attention scores.*of shape \(7, 8\)"),
        ((B + 1, T, T), r"\(3, 2, 7, 7\).*attention_mask of shape \(4, 7, 7\)"),
        ((B, N + 1, T, T), r"attention_mask of shape \(3, 3, 7, 7\)"),
    ],
)
def test_attention_masks_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        self_attention()(normal(B, T, D), attention_mask=np.ones(shape, bool))


@pytest.mark.parametrize("shape", [(B, T + 1), (B + 1, T), (T,), (B, T, 1)])
def test_padding_masks_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`mask`.*Received: mask of shape"):
        self_attention()(normal(B, T, D), mask=np.ones(shape, bool))


@pytest.mark.parametrize("shape", [(T, D), (B, T, D, 1)])
def test_inputs_must_have_rank_3(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must have the shape \(B, T, D\)"):
        MultiHeadSelfAttention(N, H)(np.ones(shape, "float32"))


def test_another_width_than_that_of_the_first_call_is_refused() -> None:
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have"):
        self_attention()(normal(B, T, D + 1))


@pytest.mark.parametrize("name", ["mask", "attention_mask"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_floating_masks_are_refused(name: str, dtype: str) -> None:
    numbers = np.ones((B, T)) if name == "mask" else np.full((T, T), 0.5)
    with pytest.raises(
        TypeError,
        match=f"`{name}` must be boolean or integer .*Received dtype .*`bool`.*bias",
    ):
        self_attention()(normal(B, T, D), **{name: ops.cast(numbers, dtype)})


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_integer_masks_mean_their_non_zero_positions(dtype: str) -> None:
    layer, inputs = self_attention(), normal(B, T, D)
    outputs = layer(
        inputs,
        mask=3 * PADDING.astype(dtype),
        attention_mask=2 * PAIRS_3.astype(dtype),
    )
    expected = layer(inputs, mask=PADDING, attention_mask=PAIRS_3)
    np.testing.assert_array_equal(outputs, expected)


# Initial values.


def test_each_part_starts_as_a_projection_of_its_own() -> None:
    # Glorot's limit by the fans of each part alone; 2 H + V would give 0.053.
    width, heads, key_dim, value_dim = 211, 7, 37, 101
    layer = MultiHeadSelfAttention(heads, key_dim, value_dim)
    layer.build((None, None, width))
    parts = np.split(layer.qkv_dense.kernel.numpy(), (37, 74), axis=-1)
    for part, size in zip(parts, (key_dim, key_dim, value_dim), strict=True):
        limit = np.sqrt(6 / (width + heads * size))
        assert 0.999 * limit < np.abs(part).max() <= limit
        assert part.std() == pytest.approx(limit / np.sqrt(3), rel=0.01)
        assert part.mean() == pytest.approx(0.0, abs=0.01 * limit)
    flat = [part[..., :37].ravel() for part in parts]
    assert np.abs(np.corrcoef(flat) - np.eye(3)).max() < 0.02
    assert not layer.qkv_dense.bias.numpy().any()


@pytest.mark.parametrize(
    "initializer",
    [
        keras.initializers.GlorotUniform(seed=3),
        keras.initializers.HeNormal(seed=3),
        keras.initializers.VarianceScaling(0.3, "fan_out", "uniform", seed=3),
        keras.initializers.RandomNormal(seed=3),
        keras.initializers.Orthogonal(seed=3),
    ],
    ids=lambda initializer: type(initializer).__name__,
)
def test_a_seeded_initializer_gives_what_it_gives_in_keras(initializer: Any) -> None:
    layer = MultiHeadSelfAttention(N, H, V, kernel_initializer=initializer)
    layer.build((B, T, D))
    stock = keras.layers.MultiHeadAttention(N, H, V, kernel_initializer=initializer)
    stock.build((B, T, D), (B, T, D))
    split = split_arrays(layer.get_weights(), layer)
    for one, other in zip(split, stock.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bias_initializer_regularizers_and_constraints_act() -> None:
    layer = MultiHeadSelfAttention(
        N,
        H,
        bias_initializer="ones",
        kernel_regularizer=keras.regularizers.L2(0.1),
        bias_regularizer=keras.regularizers.L1(0.01),
        kernel_constraint=keras.constraints.NonNeg(),
        bias_constraint=keras.constraints.MaxNorm(0.5),
    )
    layer.build((B, T, D))
    kernels, biases = layer.get_weights()[::2], layer.get_weights()[1::2]
    assert all((bias == 1).all() for bias in biases)
    expected = sum(0.1 * np.square(kernel).sum() for kernel in kernels)
    expected += sum(0.01 * np.abs(bias).sum() for bias in biases)
    assert float(sum(layer.losses)) == pytest.approx(expected, rel=1e-5)
    assert [type(weight.constraint) for weight in layer.weights] == [
        keras.constraints.NonNeg,
        keras.constraints.MaxNorm,
    ] * 2


def test_weights_have_names_by_what_they_do() -> None:
    layer = MultiHeadSelfAttention(N, H, dropout=0.1, name="attention")
    layer(normal(B, T, D))
    assert [weight.path for weight in layer.trainable_weights] == [
        "attention/qkv/kernel",
        "attention/qkv/bias",
        "attention/attention_output/kernel",
        "attention/attention_output/bias",
    ]


# Symbolic shapes.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [None, T])
def test_symbolic_shapes_are_those_of_values(options: str, length: int | None) -> None:
    layer = MultiHeadSelfAttention(N, H, **OPTIONS[options])
    inputs = keras.Input((length, D))
    outputs, scores = layer(inputs, return_attention_scores=True)
    assert scores.shape == (None, N, length, length)
    assert outputs.shape == (None, length, *layer.compute_output_shape((B, T, D))[2:])
    model = keras.Model(inputs, [outputs, scores])
    values = model(normal(B, T, D))
    assert values[0].shape == layer.compute_output_shape((B, T, D))
    assert values[1].shape == (B, N, T, T)


# Masks that the inputs carry.

WRAPPINGS = ("bare", "wrapped")
VOCABULARY = 19
IDS = np.where(PADDING, np.random.default_rng(1).integers(1, VOCABULARY, (B, T)), 0)


def embedded(wrapping: str) -> tuple[keras.layers.Layer, keras.layers.Layer]:
    """An embedding that masks id 0, and attention, with random weights."""
    embedding = made(keras.layers.Embedding(VOCABULARY, D, mask_zero=True), (B, T))
    attention = MultiHeadSelfAttention(N, H)
    layer = attention if wrapping == "bare" else ResidualNorm(attention)
    return embedding, made(layer)


@pytest.mark.parametrize("rank", [None, 2, 3, 4])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("mode", ["eager", "functional", "functional_pairs"])
def test_masks_are_read_from_the_inputs(
    mode: str, wrapping: str, rank: int | None
) -> None:
    embedding, layer = embedded(wrapping)
    pairs = {None: None, 2: PAIRS_2, 3: PAIRS_3, 4: PAIRS_4}[rank]
    plain = np.asarray(embedding(IDS))
    expected = np.asarray(layer(plain, mask=PADDING, attention_mask=pairs))
    unmasked = np.asarray(layer(plain, attention_mask=pairs))
    assert np.abs(expected - unmasked)[PADDING].max() > 0.01

    ids = keras.Input((None,), dtype="int32")
    if mode == "eager":
        outputs = layer(embedding(IDS), attention_mask=pairs)
    elif mode == "functional" or pairs is None:
        model = keras.Model(ids, layer(embedding(ids), attention_mask=pairs))
        outputs = model(IDS)
    else:
        symbolic = keras.Input(batch_shape=pairs.shape, dtype="bool")
        made_outputs = layer(embedding(ids), attention_mask=symbolic)
        outputs = keras.Model([ids, symbolic], made_outputs)([IDS, pairs])
    np.testing.assert_allclose(outputs, expected, atol=1e-6)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("pairs", [None, PAIRS_2], ids=["none", "2"])
def test_outputs_and_inputs_carry_the_mask(
    wrapping: str, pairs: np.ndarray | None
) -> None:
    embedding, layer = embedded(wrapping)
    inputs = embedding(IDS)
    outputs = layer(inputs, attention_mask=pairs)
    for tensor in (outputs, inputs):
        np.testing.assert_array_equal(tensor._keras_mask, PADDING)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_an_explicit_mask_takes_the_place_of_the_carried_one(wrapping: str) -> None:
    embedding, layer = embedded(wrapping)
    mask = padding(2, 3, 5)
    outputs = layer(embedding(IDS), mask=mask)
    expected = layer(np.asarray(embedding(IDS)), mask=mask)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    np.testing.assert_array_equal(outputs._keras_mask, mask)


# Padding.


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30, -7.0])
@pytest.mark.parametrize("mask", ["padding", "padding_causal", "all"])
def test_padding_changes_no_real_position(poison: float, mask: str) -> None:
    layer, inputs = self_attention(), normal(B, T, D)
    poisoned = np.where(PADDING[..., None], inputs, np.float32(poison))
    clean = differentiate(
        lambda x: layer(x, **MASKS[mask]), inputs, layer.trainable_weights
    )
    result = differentiate(
        lambda x: layer(x, **MASKS[mask]), poisoned, layer.trainable_weights
    )
    assert_equal(result, clean, tolerance=1e-6)
    assert all(np.isfinite(array).all() for array in result.weights)
    assert not result.inputs[~PADDING].any()
    assert result.inputs[PADDING].any()


@pytest.mark.parametrize("poison", [np.nan, 1e30])
def test_longer_padding_changes_no_real_position(poison: float) -> None:
    layer, inputs = self_attention(), normal(B, T, D)
    tail = np.full((B, 4, D), poison, "float32")
    outputs = layer(
        np.concatenate([inputs, tail], axis=1), mask=padding(5, 7, 3, length=T + 4)
    )
    expected = layer(inputs, mask=PADDING)
    np.testing.assert_allclose(outputs[:, :T], expected, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, 1e30])
def test_keys_that_no_query_sees_change_nothing(poison: float) -> None:
    # Position 3 is hidden by the attention mask alone; its own query sees nothing.
    layer, inputs = self_attention(), normal(B, T, D)
    seen = np.arange(T) != 3
    pairs = seen[:, None] & seen[None, :]
    inputs[:, 3] = poison
    outputs = np.asarray(layer(inputs, attention_mask=pairs))
    expected = np.asarray(layer(inputs[:, seen]))
    np.testing.assert_allclose(outputs[:, seen], expected, atol=1e-6)
    np.testing.assert_allclose(
        outputs[:, 3], np.broadcast_to(layer.output_dense.bias, (B, D)), atol=1e-6
    )


@pytest.mark.parametrize("how", ["padding", "pairs", "both"])
def test_a_row_that_sees_no_key_gives_the_bias_and_no_gradient(how: str) -> None:
    layer, inputs = self_attention(), normal(B, T, D)
    mask, pairs = padding(0, 7, 3), np.ones((B, T, T), bool)
    pairs[0] = False
    call = {
        "padding": {"mask": mask},
        "pairs": {"attention_mask": pairs},
        "both": {"mask": mask, "attention_mask": pairs},
    }[how]
    result = differentiate(lambda x: layer(x, **call), inputs, layer.trainable_weights)
    bias = np.asarray(layer.output_dense.bias)
    np.testing.assert_allclose(
        result.outputs[0], np.broadcast_to(bias, (T, D)), atol=1e-6
    )
    assert not result.inputs[0].any()
    assert result.inputs[1].any()
    _, scores = layer(inputs, return_attention_scores=True, **call)
    assert not np.asarray(scores)[0].any()
    assert all(np.isfinite(array).all() for array in result.weights)


# Precision.


def test_large_inputs_stay_finite_in_float16() -> None:
    # Keras' layer gives NaN here: its product overflows before it is scaled.
    inputs = 60 * normal(B, T, 64)
    layer = MultiHeadSelfAttention(4, dtype="mixed_float16")
    layer.build(inputs.shape)
    result = differentiate(layer, inputs, layer.trainable_weights)
    assert np.isfinite(result.outputs).all()
    assert np.isfinite(result.inputs).all()
    wide = MultiHeadSelfAttention(4)
    wide.build(inputs.shape)
    wide.set_weights(layer.get_weights())
    error = np.abs(result.outputs - wide(inputs)).max()
    assert error < 0.02 * np.abs(wide(inputs)).max()


def test_float64_is_computed_in_float64() -> None:
    layer = self_attention(dtype="float64")
    inputs = np.random.default_rng(0).normal(size=(B, T, D))
    outputs = layer(inputs)
    names = [f"{part}/{kind}" for part in PARTS for kind in ("kernel", "bias")]
    weights = dict(zip(names, split_weights(layer), strict=True))
    expected, _ = oracle.multi_head_attention(weights, inputs, inputs)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-13)


# Dropout.


def dropped_shares(layer: MultiHeadSelfAttention, inputs: np.ndarray) -> np.ndarray:
    """How much of the attention is kept, read from values that are all one."""
    return np.asarray(layer(inputs, training=True))


def counting_layer(rate: float, seed: int | None = 3) -> MultiHeadSelfAttention:
    """A layer whose outputs count the kept keys: uniform scores, values of one."""
    layer = MultiHeadSelfAttention(1, 1, dropout=rate, output_shape=1, seed=seed)
    layer.build((None, None, 1))
    zero, one = np.zeros((1, 1, 3), "float32"), np.ones((1, 1, 1), "float32")
    values = np.array([[0, 0, 1]], "float32")
    for weight, array in zip(
        layer.trainable_weights, (zero, values, one, np.zeros(1)), strict=True
    ):
        weight.assign(array)
    return layer


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_dropout_drops_a_share_of_the_scores_and_rescales(rate: float) -> None:
    length = 101
    shares = dropped_shares(counting_layer(rate), normal(7, length, 1))
    kept = shares * length * (1 - rate)
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    deviation = np.sqrt(rate / (1 - rate) / shares.size / length)
    assert shares.mean() == pytest.approx(1.0, abs=5 * deviation)
    assert shares.std() == pytest.approx(np.sqrt(rate / (1 - rate) / length), rel=0.15)


def test_returned_scores_are_those_before_dropout() -> None:
    layer = self_attention(dropout=0.5, seed=3)
    inputs = normal(B, T, D)
    _, trained = layer(inputs, training=True, return_attention_scores=True)
    _, scores = layer(inputs, return_attention_scores=True)
    np.testing.assert_array_equal(trained, scores)


def test_static_and_dynamic_lengths_give_equal_values() -> None:
    layer = self_attention()
    traced = tf.function(
        lambda x, m: layer(x, mask=m, use_causal_mask=True),
        input_signature=[
            tf.TensorSpec((None, None, D)),
            tf.TensorSpec((None, None), tf.bool),
        ],
    )
    inputs = normal(B, T, D)
    expected = layer(inputs, mask=PADDING, use_causal_mask=True)
    np.testing.assert_allclose(traced(inputs, PADDING), expected, atol=1e-6)
