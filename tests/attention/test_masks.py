"""What may attend to what, spelled out and compared with the oracle's loops."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha.attention.masks import (
    Mask,
    as_boolean,
    as_pairs,
    clear_padding,
    intersect,
    materialize,
)
from tests.attention.cases import (
    EMPTY_ROWS,
    FULL_ROWS,
    QUERY_PADDING,
    B,
    N,
    S,
    T,
    draw,
    numbers,
    pairs,
    visible,
)

MASKS = FULL_ROWS | EMPTY_ROWS


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_materialize_equals_the_oracle(mask: Mask) -> None:
    found = materialize(mask, T, S)
    expected = visible(mask)
    if mask is MASKS["none"]:
        assert found is None
        assert expected.all()
    else:
        assert found is not None
        assert found.dtype == "bool"
        np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)
        assert not expected.all()


@pytest.mark.parametrize(("query_length", "key_length"), [(1, S), (T, 1), (S, T)])
def test_causal_and_window_align_at_the_first_positions(
    query_length: int, key_length: int
) -> None:
    found = materialize(
        Mask(is_causal=True, sliding_window=3), query_length, key_length
    )
    for t, s in np.ndindex(query_length, key_length):
        assert bool(found[0, 0, t, s]) == (s <= t and t - s < 3)


def test_lengths_may_be_tensors() -> None:
    @tf.function(input_signature=[tf.TensorSpec([None, None])])
    def table(scores: tf.Tensor) -> tf.Tensor:
        length, other = tf.shape(scores)[0], tf.shape(scores)[1]
        found = materialize(Mask(is_causal=True, sliding_window=2), length, other)
        return tf.convert_to_tensor(found)

    for shape in ((T, S), (S, T)):
        expected = np.tril(np.ones(shape)) - np.tril(np.ones(shape), -2)
        np.testing.assert_array_equal(table(tf.zeros(shape))[0, 0], expected == 1)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int32", "int64"])
def test_integers_count_as_booleans(dtype: str) -> None:
    mask = np.array([0, 1, 2, 0]).astype(dtype)
    found = as_boolean(mask, "mask")
    assert found.dtype == "bool"
    np.testing.assert_array_equal(found, [False, True, True, False])


def test_negative_integers_attend() -> None:
    np.testing.assert_array_equal(as_boolean(np.array([-1, 0]), "mask"), [True, False])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_floating_masks_are_refused(dtype: str) -> None:
    text = (
        r"`attention_mask` must be boolean or integer \(True or non-zero = attend\)\. "
        rf"Received dtype {dtype}\. Cast a 0/1 mask to `bool`; an additive mask .* "
        r"is a bias, not a mask"
    )
    with pytest.raises(TypeError, match=text):
        as_boolean(keras.ops.ones((T, S), dtype), "attention_mask")


def test_intersect() -> None:
    one, other = pairs(T, S), pairs(S, T).T
    np.testing.assert_array_equal(intersect(None, one, None, other), one & other)
    assert intersect(one) is one
    assert intersect(None, None) is None
    assert intersect() is None


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        ((T, S), (1, 1, T, S)),
        ((B, T, S), (B, 1, T, S)),
        ((1, T, S), (1, 1, T, S)),
        ((B, 1, S), (B, 1, 1, S)),
        ((B, N, T, S), (B, N, T, S)),
        ((B, 1, T, S), (B, 1, T, S)),
    ],
)
def test_as_pairs(received: tuple[int, ...], expected: tuple[int, ...]) -> None:
    mask = pairs(*received)
    found = as_pairs(mask, (B, N, T, S), 1)
    np.testing.assert_array_equal(found, mask.reshape(expected))


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        ((2, 3, 5, 7), (1, 1, 2, 3, 5, 7)),
        ((B, 2, 3, 5, 7), (B, 1, 2, 3, 5, 7)),
        ((B, N, 2, 3, 5, 7), (B, N, 2, 3, 5, 7)),
    ],
)
def test_as_pairs_of_two_axes(
    received: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    mask = pairs(*received)
    found = as_pairs(mask, (B, N, 2, 3, 5, 7), 2)
    np.testing.assert_array_equal(found, mask.reshape(expected))


def test_as_pairs_with_unknown_lengths() -> None:
    mask = pairs(B, T, S)
    found = as_pairs(mask, (None, N, None, None), 1)
    np.testing.assert_array_equal(found, mask[:, None])


@pytest.mark.parametrize("received", [(S,), (1, B, N, T, S)])
def test_masks_of_a_wrong_rank_are_refused(received: tuple[int, ...]) -> None:
    text = (
        r"`attention_mask` must have rank 2 \(T, S\), 3 \(B, T, S\) or 4 .* rank 2 to "
        rf"4\. Received: attention_mask of shape {re.escape(str(received))}"
    )
    with pytest.raises(ValueError, match=text):
        as_pairs(pairs(*received), (B, N, T, S), 1)


@pytest.mark.parametrize(
    "received", [(S, T), (T, S + 1), (N, T, S), (B, B, T, S), (T, N, T, S)]
)
def test_masks_of_a_wrong_shape_are_refused(received: tuple[int, ...]) -> None:
    text = (
        r"Every dimension of `attention_mask` must be 1 or that of the attention "
        rf"scores, .* = {re.escape(str((B, N, T, S)))}\. "
        rf"Received: attention_mask of shape {re.escape(str(received))}"
    )
    with pytest.raises(ValueError, match=text):
        as_pairs(pairs(*received), (B, N, T, S), 1)


@pytest.mark.parametrize("extra", [(), (3,)], ids=["BTD", "BT3D"])
def test_clear_padding_selects(extra: tuple[int, ...]) -> None:
    inputs = draw(B, T, *extra, 11)
    poisoned = inputs.copy()
    poisoned[~QUERY_PADDING] = np.nan
    expected = inputs.copy()
    expected[~QUERY_PADDING] = 0
    found = clear_padding(poisoned, QUERY_PADDING)
    np.testing.assert_array_equal(numbers(found), expected)
    assert clear_padding(inputs, None) is inputs


def test_clear_padding_gives_padding_no_gradient() -> None:
    inputs = tf.constant(np.where(QUERY_PADDING, 1.0, np.nan)[..., None])
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(clear_padding(inputs, QUERY_PADDING) ** 2)
    gradient = numbers(tape.gradient(loss, inputs))[..., 0]
    np.testing.assert_array_equal(gradient, np.where(QUERY_PADDING, 2.0, 0.0))
