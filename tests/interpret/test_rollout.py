"""Attention rollout against the paper's formula, position by position.

Letters: B batch, N query heads, T length.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.interpret import attention_rollout
from tests.support.layers import randomize

B, T, LENGTHS = 3, 7, (5, 7, 2)
HEADS = (2, 3, 5)
REAL = np.arange(T) < np.array(LENGTHS)[:, None]


def random_maps(real: np.ndarray | None = None) -> list[np.ndarray]:
    """Rows that sum to one over what is real, zeros for padding; one map a layer."""
    generator = np.random.default_rng(0)
    maps = []
    for heads in HEADS:
        scores = generator.random((B, heads, T, T)) ** 3
        if real is not None:
            scores = scores * real[:, None, :, None] * real[:, None, None, :]
        sums = scores.sum(-1, keepdims=True)
        maps.append(scores / np.where(sums == 0, 1, sums))
    return maps


def rolled_out(maps: list[np.ndarray], lengths: tuple[int, ...], share: float) -> Any:
    """One example, one layer, one position at a time, over real positions alone."""
    flow = np.zeros((B, T, T))
    for b, length in enumerate(lengths):
        inputs = np.eye(length)  # what each position is made of, before any layer
        for scores in maps:
            outputs = np.zeros_like(inputs)
            for i in range(length):
                weights = [
                    share * (i == j) + (1 - share) * scores[b, :, i, j].mean()
                    for j in range(length)
                ]
                for j in range(length):
                    outputs[i] += weights[j] / sum(weights) * inputs[j]
            inputs = outputs
        flow[b, :length, :length] = inputs
    return flow


@pytest.mark.parametrize("share", [0.5, 0.2, 0, 1])
def test_the_oracle_without_padding(share: float) -> None:
    maps = random_maps()
    flow = attention_rollout(maps, residual=share)
    np.testing.assert_allclose(flow, rolled_out(maps, (T,) * B, share), atol=1e-12)
    np.testing.assert_allclose(flow.sum(-1), 1)


def test_half_is_the_default() -> None:
    maps = random_maps()
    np.testing.assert_array_equal(
        attention_rollout(maps), attention_rollout(maps, residual=0.5)
    )


def test_the_order_of_the_layers_counts() -> None:
    maps = random_maps()
    swapped = attention_rollout(maps[::-1])
    assert np.abs(attention_rollout(maps) - swapped).max() > 1e-2


@pytest.mark.parametrize("kind", [bool, int])
def test_padding_is_left_out(kind: type) -> None:
    maps = random_maps(REAL)
    flow = attention_rollout(maps, padding_mask=REAL.astype(kind))
    np.testing.assert_allclose(flow, rolled_out(maps, LENGTHS, 0.5), atol=1e-12)
    assert not flow[~REAL].any()
    assert not flow.transpose(0, 2, 1)[~REAL].any()


def test_queries_of_padding_that_attend_are_left_out_too() -> None:
    maps = random_maps()  # padding attends, and is attended to
    flow = attention_rollout(maps, padding_mask=REAL)
    np.testing.assert_allclose(flow, rolled_out(maps, LENGTHS, 0.5), atol=1e-12)


def test_without_a_mask_padding_keeps_its_own_input() -> None:
    maps = random_maps(REAL)
    flow = attention_rollout(maps)
    np.testing.assert_array_equal(flow[~REAL], np.tile(np.eye(T), (B, 1, 1))[~REAL])
    masked = attention_rollout(maps, padding_mask=REAL)
    np.testing.assert_allclose(flow[REAL], masked[REAL])


def test_maps_of_a_model_with_sinks_and_padding() -> None:
    ids = keras.Input((None,), dtype="int32")
    vectors = keras_mha.TokenAndPositionEmbedding(11, 7, 13)(ids)
    for place in range(2):
        vectors = keras_mha.TransformerEncoderBlock(
            2, 17, key_dim=5, use_sinks=True, name=f"block_{place}"
        )(vectors)
    model = keras.Model(ids, vectors)
    randomize(model)
    tokens = np.random.default_rng(2).integers(1, 11, (B, T)) * REAL
    maps = keras_mha.attention_maps(model, tokens)
    flow = attention_rollout(maps, padding_mask=REAL)
    wide = [scores.astype(float) for scores in maps.values()]
    expected = rolled_out(wide, LENGTHS, 0.5)
    np.testing.assert_allclose(flow, expected, atol=1e-12)
    np.testing.assert_allclose(flow.sum(-1)[REAL], 1)


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        ([], {}, "one map or more"),
        ({"cross": np.ones((2, 3, 5, 7))}, {}, "map 'cross' of shape .2, 3, 5, 7."),
        ([np.ones((2, 5, 5))], {}, "each .B, N, T, T."),
        ([np.ones((2, 3, 5, 5)), np.ones((2, 3, 7, 7))], {}, "one B and one T"),
        ([np.ones((2, 3, 5, 5))], {"residual": 1.5}, "from 0 to 1. Received: 1.5"),
        ([np.ones((2, 3, 5, 5))], {"residual": True}, "from 0 to 1"),
        ([np.ones((2, 3, 5, 5))], {"padding_mask": np.ones((2, 3), int)}, r"= .2, 5."),
        ([np.ones((2, 3, 5, 5))], {"padding_mask": np.ones((2, 5))}, "float64"),
        ([np.zeros((2, 3, 5, 5))], {"residual": 0}, "row of zeros"),
    ],
)
def test_wrong_arguments(maps: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_rollout(maps, **options)
