from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_mha.attention.positions import (
    alibi_slopes,
    relative_position_bucket,
    rotate,
)
from keras_mha.layers.positions import ALiBi, RelativePositionBias, RotaryEmbedding
from tests.support.attention_cases import numbers

# Unequal primes, so that no axis can be taken for another.
B, T, S, N, H = 2, 5, 7, 3, 14
DISTANCES = np.arange(S) - np.arange(T)[:, None]
FAR = np.array([[-4001, -129, -128, -90, -1, 0], [1, 8, 9, 127, 128, 70001]])
ROTARY = {
    "base": 500.0,
    "fraction": 3 / 7,
    "interleaved": True,
    "scaling": "llama3",
    "scaling_factor": 8.0,
    "original_max_length": 101,
    "low_frequency_factor": 1.5,
    "high_frequency_factor": 4.5,
}
each_bias = pytest.mark.parametrize("layer_class", [ALiBi, RelativePositionBias])
needs_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs and tapes of TensorFlow"
)
needs_float64 = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX has float64 only where switched on"
)


def heads() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(B, T, N, H)).astype("float32")


def dtype_of(tensor: Any) -> str:
    return keras.backend.standardize_dtype(tensor.dtype)


def relative(**options: Any) -> RelativePositionBias:
    """A built layer with random biases."""
    layer = RelativePositionBias(N, **options)
    layer.build()
    table = np.random.default_rng(2).normal(size=(layer.num_buckets, N))
    layer.embeddings.assign(table)
    return layer


# Rotary embedding.


def test_rotary_positions_count_from_zero() -> None:
    layer = RotaryEmbedding(**ROTARY)
    expected = rotate(heads(), np.arange(T), **ROTARY)
    np.testing.assert_array_equal(numbers(layer(heads())), numbers(expected))
    assert np.abs(numbers(expected) - heads()).max() > 0.1
    assert layer.weights == []


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(
    "positions", [np.arange(T) + 9, np.stack([np.arange(T), 70001 - np.arange(T)])]
)
def test_rotary_positions_are_taken(positions: np.ndarray, dtype: str) -> None:
    layer, positions = RotaryEmbedding(**ROTARY), positions.astype(dtype)
    expected = numbers(rotate(heads(), positions, **ROTARY))
    assert np.abs(expected - numbers(layer(heads()))).max() > 0.1
    for found in (layer(heads(), positions), layer(heads(), positions=positions)):
        np.testing.assert_array_equal(numbers(found), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rotary_positions_are_not_rounded(dtype: str) -> None:
    positions = 70001 + np.arange(T)
    narrow = ops.cast(heads(), dtype)
    for policy in (dtype, f"mixed_{dtype}"):
        found = RotaryEmbedding(dtype=policy)(heads(), positions)
        assert dtype_of(found) == dtype
        np.testing.assert_array_equal(
            numbers(found), numbers(rotate(narrow, positions))
        )


@needs_float64
def test_rotary_in_float64() -> None:
    inputs = heads().astype("float64")
    found = RotaryEmbedding(dtype="float64")(inputs)
    assert dtype_of(found) == "float64"
    np.testing.assert_array_equal(numbers(found), numbers(rotate(inputs, range(T))))


@pytest.mark.parametrize("length", [None, T])
@pytest.mark.parametrize("options", [{}, ROTARY], ids=["default", "interleaved"])
def test_rotary_in_a_model(options: dict[str, Any], length: int | None) -> None:
    inputs = keras.Input((length, N, H))
    positions = keras.Input((length,), dtype="int32")
    layer = RotaryEmbedding(**options)
    outputs = [layer(inputs), layer(inputs, positions), layer(inputs, np.arange(T))]
    assert {each.shape for each in outputs} == {(None, length, N, H)}
    assert layer.compute_output_shape((B, T, N, H)) == (B, T, N, H)
    model = keras.Model([inputs, positions], outputs)
    given = np.stack([np.arange(T) + 3, np.arange(T) + 11]).astype("int32")
    found = model([heads(), given])
    for each, expected in zip(found, (range(T), given, range(T)), strict=True):
        np.testing.assert_allclose(
            numbers(each), numbers(rotate(heads(), expected, **options)), atol=1e-6
        )


def test_rotary_keeps_the_mask() -> None:
    inputs = ops.convert_to_tensor(heads())
    mask = ops.convert_to_tensor(np.arange(T) < np.array([[3], [4]]))
    inputs._keras_mask = mask
    for outputs in (
        RotaryEmbedding()(inputs),
        RotaryEmbedding()(inputs, positions=np.arange(T)),
    ):
        np.testing.assert_array_equal(numbers(outputs._keras_mask), numbers(mask))


def test_rotary_refuses_while_a_model_is_made() -> None:
    layer, inputs = RotaryEmbedding(fraction=3 / 7), keras.Input((T, N, H))
    with pytest.raises(ValueError, match=r"`inputs` must have the.*\(None, 5, 14"):
        layer(keras.Input((T, H)))
    with pytest.raises(ValueError, match="even and not zero.*H=13"):
        layer(keras.Input((T, N, 13)))
    with pytest.raises(ValueError, match="even and not zero.*H=None"):
        layer(keras.Input((T, N, None)))
    with pytest.raises(ValueError, match=r"`positions` must have.*shape \(None, 3\)"):
        layer(inputs, keras.Input((3,), dtype="int32"))
    with pytest.raises(TypeError, match="`positions` must be integers.*float32"):
        layer(inputs, keras.Input((T,)))


def test_rotary_options_are_checked() -> None:
    with pytest.raises(ValueError, match="`scaling=None` takes exactly"):
        RotaryEmbedding(scaling_factor=2.0)
    with pytest.raises(ValueError, match="`fraction` must be .*fraction=1.01"):
        RotaryEmbedding(fraction=1.01)


# ALiBi.


@pytest.mark.parametrize("num_heads", [1, 3, 8])
@pytest.mark.parametrize("distances", [DISTANCES, FAR, FAR[0], FAR[1, 2]])
def test_alibi_values(distances: np.ndarray, num_heads: int) -> None:
    slopes = alibi_slopes(num_heads).reshape(-1, *[1] * distances.ndim)
    expected = -slopes * np.abs(distances)
    found = ALiBi(num_heads)(ops.convert_to_tensor(distances, dtype="int32"))
    assert dtype_of(found) == "float32"
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-6)


def test_alibi_of_eight_heads_is_the_papers() -> None:
    found = numbers(ALiBi(8)(np.array([-1, -3])))
    np.testing.assert_array_equal(found[:, 0], -(0.5 ** np.arange(1, 9)))
    np.testing.assert_array_equal(found[:, 1], -3 * 0.5 ** np.arange(1, 9))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_alibi_rounds_once(dtype: str) -> None:
    # In the narrow dtype 4001 itself would be rounded.
    found = ALiBi(3, dtype=f"mixed_{dtype}")(FAR)
    exact = -alibi_slopes(3)[:, None, None] * np.abs(FAR)
    assert dtype_of(found) == dtype
    expected = ops.cast(exact.astype("float32"), dtype)
    np.testing.assert_array_equal(numbers(found), numbers(expected))


@needs_float64
def test_alibi_in_float64() -> None:
    found = ALiBi(5, dtype="float64")(FAR)
    exact = -alibi_slopes(5)[:, None, None] * np.abs(FAR)
    np.testing.assert_allclose(numbers(found), exact, rtol=1e-15)


# T5's relative biases.


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": False}, {"num_buckets": 6, "max_distance": 5}]
)
@pytest.mark.parametrize("distances", [DISTANCES, FAR, FAR[0], FAR[1, 2]])
def test_relative_values(distances: np.ndarray, options: dict[str, Any]) -> None:
    layer = relative(**options)
    table = numbers(layer.embeddings)
    buckets = numbers(relative_position_bucket(distances, **options)).astype(int)
    found = layer(ops.convert_to_tensor(distances, dtype="int32"))
    assert tuple(found.shape) == (N, *distances.shape)
    expected = np.moveaxis(table[buckets], -1, 0)
    np.testing.assert_array_equal(numbers(found), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_relative_in_mixed_precision(dtype: str) -> None:
    layer = relative(dtype=f"mixed_{dtype}")
    assert layer.embeddings.dtype == "float32"
    found, exact = layer(FAR), relative()(FAR)
    assert dtype_of(found) == dtype
    np.testing.assert_array_equal(numbers(found), numbers(ops.cast(exact, dtype)))


@needs_tensorflow
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_the_tables_gradient_counts_its_rows(dtype: str, mode: str) -> None:
    layer = relative(dtype=dtype)
    distances = np.arange(-1009, 1010)
    # Powers of two: their sums are exact in float32, and would not be in bfloat16.
    upstream = 2.0 ** np.random.default_rng(3).integers(-6, 3, (N, len(distances)))

    def gradient(distances: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(layer(distances), "float32") * upstream)
        return tf.convert_to_tensor(tape.gradient(loss, layer.embeddings.value))

    if mode != "eager":
        gradient = tf.function(gradient, jit_compile=mode == "xla")
    expected = np.zeros((32, N))
    buckets = numbers(relative_position_bucket(distances)).astype(int)
    np.add.at(expected, buckets, upstream.T)
    found = gradient(tf.constant(distances, "int32"))
    np.testing.assert_array_equal(numbers(found), expected)
    # No distance falls into the bucket of 0 ahead.
    assert (expected == 0).all(axis=1).tolist() == [row == 16 for row in range(32)]


def test_the_table_is_drawn_regularized_and_constrained() -> None:
    layer = RelativePositionBias(
        N,
        embeddings_initializer=keras.initializers.Constant(2.0),
        embeddings_regularizer=keras.regularizers.L2(0.25),
        embeddings_constraint="non_neg",
    )
    np.testing.assert_array_equal(numbers(layer(DISTANCES)), np.full((N, T, S), 2.0))
    assert numbers(sum(layer.losses)) == pytest.approx(0.25 * 4 * 32 * N)
    constrained = layer.embeddings.constraint(ops.full((32, N), -3.0))
    np.testing.assert_array_equal(numbers(constrained), np.zeros((32, N)))


def test_layers_of_one_initializer_are_drawn_apart() -> None:
    initializer = keras.initializers.RandomNormal()
    one, other = (
        RelativePositionBias(N, embeddings_initializer=initializer) for _ in range(2)
    )
    assert np.abs(numbers(one(DISTANCES)) - numbers(other(DISTANCES))).max() > 1e-3


def test_a_frozen_layer_stays_frozen() -> None:
    inputs = keras.Input((None,), dtype="int32")
    layer = RelativePositionBias(N, trainable=False)
    model = keras.Model(inputs, layer(inputs))
    assert len(model.weights) == 1
    assert model.trainable_variables == []


# Both biases.


@each_bias
def test_the_distances_of_a_table_are_few(layer_class: Any) -> None:
    # What attention does with a bias: T + S - 1 values in place of T * S.
    layer = layer_class(N)
    line = numbers(layer(np.arange(1 - T, S)))
    assert line.shape == (N, T + S - 1)
    table = numbers(layer(DISTANCES))
    np.testing.assert_array_equal(table, line[:, DISTANCES + T - 1])
    assert np.ptp(table) > 0.01


@each_bias
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
def test_distances_of_every_integer_kind(layer_class: Any, dtype: str) -> None:
    layer = layer_class(N)
    found, expected = layer(DISTANCES.astype(dtype)), layer(DISTANCES)
    np.testing.assert_array_equal(numbers(found), numbers(expected))


@each_bias
@pytest.mark.parametrize("shape", [(), (None,), (T, None), (2, 3, 5)])
def test_symbolic_distances(layer_class: Any, shape: tuple[int | None, ...]) -> None:
    layer = layer_class(N, dtype="mixed_float16")
    found = layer(keras.KerasTensor(shape, dtype="int32"))
    assert (tuple(found.shape), found.dtype) == ((N, *shape), "float16")
    assert tuple(layer.compute_output_shape(shape)) == (N, *shape)


@needs_tensorflow
@each_bias
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("shape", [[None], [None, None], [T, S]])
def test_biases_compiled(layer_class: Any, shape: Any, jit_compile: bool) -> None:
    layer = layer_class(N)
    distances = FAR[0] if len(shape) == 1 else DISTANCES
    function = tf.function(
        layer,
        input_signature=[tf.TensorSpec(shape, tf.int32)],
        jit_compile=jit_compile,
    )
    traced = function.get_concrete_function().outputs[0]
    assert traced.shape.as_list() == [N, *shape]
    np.testing.assert_allclose(function(distances), layer(distances), rtol=1e-6)


@each_bias
def test_distances_are_whole(layer_class: Any) -> None:
    for distances in (DISTANCES.astype("float32"), keras.Input((None,))):
        with pytest.raises(TypeError, match="`distances` must be integers.*float32"):
            layer_class(N)(distances)


@each_bias
@pytest.mark.parametrize("num_heads", [0, 1.5, None])
def test_biases_need_a_number_of_heads(layer_class: Any, num_heads: Any) -> None:
    with pytest.raises(ValueError, match=f"`num_heads`.*num_heads={num_heads}"):
        layer_class(num_heads)


def test_buckets_are_checked() -> None:
    with pytest.raises(ValueError, match="`num_buckets` must be even.*num_buckets=31"):
        RelativePositionBias(N, num_buckets=31)
    with pytest.raises(ValueError, match="`max_distance` .*at least 17.*=16"):
        RelativePositionBias(N, max_distance=16, bidirectional=False)


# Configurations and files.
