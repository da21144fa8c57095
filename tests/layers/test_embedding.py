from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import TokenAndPositionEmbedding
from tests.support.layers import PADDING, B, D, T, made

VOCABULARY, LONGEST = 19, 11
IDS = np.where(PADDING, np.random.default_rng(1).integers(1, VOCABULARY, (B, T)), 0)


def embedding(**options: Any) -> TokenAndPositionEmbedding:
    return made(TokenAndPositionEmbedding(VOCABULARY, LONGEST, D, **options), (B, T))


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("length", [1, 3, T])
def test_values_are_token_plus_position(length: int, dtype: str) -> None:
    layer = embedding()
    tokens = np.asarray(layer.token_embedding.embeddings)
    positions = np.asarray(layer.position_embedding)
    assert (tokens.shape, positions.shape) == ((VOCABULARY, D), (LONGEST, D))
    ids = IDS[:, :length]
    expected = tokens[ids] + positions[:length]
    np.testing.assert_allclose(layer(ids.astype(dtype)), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["values", "symbolic"])
def test_the_greatest_length_fits_and_one_more_does_not(kind: str) -> None:
    layer = embedding()

    def ids(length: int) -> Any:
        symbolic = keras.Input((length,), dtype="int32")
        return symbolic if kind == "symbolic" else np.ones((B, length), "int32")

    assert layer(ids(LONGEST)).shape[1:] == (LONGEST, D)
    with pytest.raises(
        ValueError, match="longer than `sequence_length`.*12.*sequence_length=11"
    ):
        layer(ids(LONGEST + 1))


def test_a_dynamic_length_that_is_too_great_fails_too() -> None:
    layer = embedding()
    traced = tf.function(layer, input_signature=[tf.TensorSpec((None, None), tf.int32)])
    np.testing.assert_allclose(traced(IDS.astype("int32")), layer(IDS), atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError):
        traced(np.ones((B, LONGEST + 1), "int32"))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 19]], r"`inputs` must be from 0 to 18, with .* inputs from 1 to 19"),
        ([[-1, 3]], "Received: inputs from -1 to 3"),
    ],
)
def test_ids_outside_the_table_are_refused_where_they_are_known(
    ids: list[list[int]], message: str
) -> None:
    layer = embedding()
    for values in (np.array(ids), tf.constant(ids)):
        with pytest.raises(ValueError, match=message):
            layer(values)
    with pytest.raises(ValueError, match=message):
        tf.function(lambda: layer(tf.constant(ids)))()
    # The greatest are no others.
    assert layer(np.array([[0, VOCABULARY - 1]])).shape == (1, 2, D)
    assert layer(np.zeros((0, 3), "int32")).shape == (0, 3, D)


@pytest.mark.parametrize("positions", [[0, LONGEST], [[-1, 0]]])
def test_positions_outside_the_table_are_refused(positions: Any) -> None:
    with pytest.raises(ValueError, match="`positions` must be from 0 to 10, with `seq"):
        embedding()(np.array([[1, 2]]), positions=np.array(positions))


@pytest.mark.parametrize("mask_zero", [True, False])
def test_zero_is_padding_where_asked_for(mask_zero: bool) -> None:
    layer = embedding(mask_zero=mask_zero)
    outputs, mask = layer(IDS), getattr(layer(IDS), "_keras_mask", None)
    if mask_zero:
        np.testing.assert_array_equal(mask, PADDING)
        np.testing.assert_array_equal(layer.compute_mask(IDS), PADDING)
    else:
        assert mask is None
    symbolic = layer(keras.Input((None,), dtype="int32"))
    assert symbolic.shape == (None, None, D)
    assert (getattr(symbolic, "_keras_mask", None) is not None) is mask_zero
    assert outputs.dtype == "float32"


def test_gradients_reach_both_tables_where_they_were_read() -> None:
    layer = embedding()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(IDS))
    tokens, positions = (
        np.asarray(tf.convert_to_tensor(gradient))
        for gradient in tape.gradient(
            loss,
            [layer.token_embedding.embeddings.value, layer.position_embedding.value],
        )
    )
    np.testing.assert_array_equal(
        tokens[:, 0], np.bincount(IDS.ravel(), minlength=VOCABULARY)
    )
    np.testing.assert_array_equal(positions[:, 0], B * (np.arange(LONGEST) < T))


def test_the_tables_are_drawn_apart_by_the_initializer_given() -> None:
    layer = TokenAndPositionEmbedding(
        VOCABULARY, VOCABULARY, D, embeddings_initializer=keras.initializers.HeNormal()
    )
    layer.build((B, T))
    tokens = np.asarray(layer.token_embedding.embeddings)
    positions = np.asarray(layer.position_embedding)
    assert np.abs(tokens - positions).max() > 0.01
    ones = TokenAndPositionEmbedding(
        VOCABULARY, LONGEST, D, embeddings_initializer="ones"
    )
    np.testing.assert_array_equal(ones(IDS), np.full((B, T, D), 2.0))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_great_ids_are_not_rounded(policy: str) -> None:
    # Ids above 2048 would not survive a cast to float16.
    big = TokenAndPositionEmbedding(5003, LONGEST, 3, dtype=policy)
    ids = np.array([[4001, 4002]])
    big.build((None, None))
    big.position_embedding.assign(np.zeros((LONGEST, 3)))
    np.testing.assert_allclose(
        keras.ops.cast(big(ids), "float32"),
        np.asarray(big.token_embedding.embeddings)[ids],
        atol=1e-3,
    )
    assert np.ptp(np.asarray(big.token_embedding.embeddings)[ids]) > 0.01


@pytest.mark.parametrize(
    "name", ["vocabulary_size", "sequence_length", "embedding_dim"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_arguments_out_of_their_domain(name: str, value: Any) -> None:
    options = {"vocabulary_size": 3, "sequence_length": 3, "embedding_dim": 3}
    with pytest.raises(
        ValueError, match=f"`{name}`, expected a positive integer. .*{name}={value}"
    ):
        TokenAndPositionEmbedding(**{**options, name: value})
