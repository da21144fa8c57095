"""Dropout that falls alike in every mode, on elements and on pairs."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
from keras import backend, ops

from keras_mha.attention.dropout import (
    PairNoise,
    as_seed,
    check_rate,
    draw_pair_noise,
    dropout,
    keep_pairs,
)
from tests.support.attention_cases import (
    BACKEND,
    MODES,
    WIDEST,
    cast,
    numbers,
    value_and_gradients,
)

SHAPE = (7, 11, 13)
PAIRS = (2, 3, 211, 223)


def kept_pairs(seed: Any, rate: float, shape: tuple[int, ...] = PAIRS) -> np.ndarray:
    kept = keep_pairs(draw_pair_noise(seed, shape[:3], shape[3]), rate)
    return np.asarray(ops.convert_to_numpy(kept))


def in_every_mode(function: Any) -> list[np.ndarray]:
    """The value of a function of a seed, which compiled ones get as an argument."""
    return [
        value_and_gradients(
            lambda scale, seed: scale * ops.cast(function(seed), "float32"),
            cast([1.0], "float32"),
            [np.ones(ops.shape(function(as_seed(5))))],
            mode,
            constants=[as_seed(5)],
        )[0][0]
        for mode in MODES
    ]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_the_same_positions_in_every_mode(rate: float) -> None:
    ones = ops.ones(SHAPE)
    for found in in_every_mode(lambda seed: dropout(ones, rate, seed)):
        np.testing.assert_array_equal(found, numbers(dropout(ones, rate, as_seed(5))))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_the_same_pairs_in_every_mode(rate: float) -> None:
    shape = (2, 3, 11, 13)
    for found in in_every_mode(
        lambda seed: keep_pairs(draw_pair_noise(seed, shape[:3], shape[3]), rate)
    ):
        np.testing.assert_array_equal(found, kept_pairs(as_seed(5), rate, shape))
        assert abs(found.mean() - (1 - rate)) < 0.1


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_the_share_of_pairs_kept_is_right(rate: float) -> None:
    kept = kept_pairs(as_seed(3), rate)
    sigma = math.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * sigma
    # In every row and in every column too.
    for axis in (2, 3):
        counts = kept.sum(axis=axis)
        trials = kept.shape[axis]
        variance = trials * rate * (1 - rate)
        spread = 5 * variance * math.sqrt(2.5 / counts.size)
        assert abs(counts.var() - variance) < spread


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("distance", [1, 2, 64])
def test_neighbors_decide_for_themselves(rate: float, distance: int) -> None:
    dropped = ~kept_pairs(as_seed(3), rate)
    for axis in range(4):
        step = min(distance, dropped.shape[axis] - 1)
        one = np.take(dropped, range(step, dropped.shape[axis]), axis)
        other = np.take(dropped, range(dropped.shape[axis] - step), axis)
        assert abs(_correlation(one, other)) < 5 / math.sqrt(one.size)
    # Along the diagonal, where the numbers of row and column both move.
    one, other = dropped[:, :, distance:, distance:], dropped[:, :, :-distance]
    assert abs(_correlation(one, other[..., :-distance])) < 5 / math.sqrt(one.size)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def test_the_correlation_would_show() -> None:
    """The same columns dropped in each row, which a sum alone would come close to."""
    dropped = np.broadcast_to(~kept_pairs(as_seed(3), 0.5)[:, :, :1], PAIRS)
    assert _correlation(dropped[:, :, 1:], dropped[:, :, :-1]) > 0.9


def test_seeds_of_pairs_differ() -> None:
    tables = [kept_pairs(as_seed(number), 0.3) for number in range(3)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.mean(tables[one] != tables[other]) - 2 * 0.3 * 0.7) < 0.01
    np.testing.assert_array_equal(tables[1], kept_pairs(as_seed(1), 0.3))


def test_blocks_of_pairs_are_those_of_the_table() -> None:
    whole = kept_pairs(as_seed(3), 0.3)
    noise = draw_pair_noise(as_seed(3), PAIRS[:3], PAIRS[3])
    block = keep_pairs(PairNoise(noise.rows[:, 1:, 7:30], noise.columns[40:71]), 0.3)
    np.testing.assert_array_equal(
        np.asarray(ops.convert_to_numpy(block)), whole[:, 1:, 7:30, 40:71]
    )


def test_decisions_are_the_same_on_every_backend() -> None:
    """The mixing, written once more in NumPy's own 32-bit arithmetic."""
    rows, columns = np.random.default_rng(1).integers(0, 2**30, (2, 29))
    wide = (rows[:, None] + columns).astype("uint32")
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        wide = (wide ^ (wide >> np.uint32(shift))) * np.uint32(factor)
    word = "int64" if BACKEND == "torch" else "uint32"
    noise = PairNoise(*cast([rows.reshape(1, 1, -1), columns], word))
    found = np.asarray(ops.convert_to_numpy(keep_pairs(noise, 0.3)))[0, 0]
    np.testing.assert_array_equal(found, wide >= np.uint32(round(0.3 * 2**32)))


def test_seeds_differ() -> None:
    one, other = (numbers(dropout(ops.ones(SHAPE), 0.5, as_seed(i))) for i in range(2))
    assert 0.4 < np.mean(one != other) < 0.6


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9, 0.999])
def test_the_share_dropped_is_the_rate(rate: float) -> None:
    count = 100_000
    dropped = numbers(dropout(ops.ones(count), rate, as_seed(3))) == 0
    sigma = math.sqrt(rate * (1 - rate) / count)
    assert abs(dropped.mean() - rate) < 5 * sigma
    # Neighbours decide for themselves.
    both = (dropped[1:] & dropped[:-1]).mean()
    assert abs(both - rate**2) < 5 * math.sqrt(rate**2 / count)


@pytest.mark.parametrize("dtype", sorted({"float16", "bfloat16", "float32", WIDEST}))
def test_what_stays_is_scaled(dtype: str) -> None:
    (inputs,) = cast([np.arange(1, 101) / 32], dtype)
    found = dropout(inputs, 0.75, as_seed(3))
    assert backend.standardize_dtype(found.dtype) == dtype
    kept = numbers(found) != 0
    assert 0 < kept.sum() < 50
    np.testing.assert_array_equal(numbers(found)[kept], 4 * numbers(inputs)[kept])


def test_what_is_dropped_may_be_nan() -> None:
    dropped = numbers(dropout(ops.ones(50), 0.5, as_seed(3))) == 0
    (inputs,) = cast([np.where(dropped, np.nan, 1.0)], "float32")
    found = numbers(dropout(inputs, 0.5, as_seed(3)))
    np.testing.assert_array_equal(found, np.where(dropped, 0.0, 2.0))


def test_noise_shape_decides_together() -> None:
    found = numbers(dropout(ops.ones(SHAPE), 0.5, as_seed(3), noise_shape=(7, 1, 13)))
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :1], SHAPE))
    assert 0.3 < (found[:, 0] == 0).mean() < 0.7


def test_the_gradient_goes_where_values_stay() -> None:
    (outputs,), (gradient,) = value_and_gradients(
        lambda x: dropout(x, 0.5, as_seed(3)), [ops.ones(SHAPE)], [np.ones(SHAPE)]
    )
    np.testing.assert_array_equal(gradient, outputs)
    assert 0.4 < np.mean(gradient == 2.0) < 0.6


def test_a_seed_generator_gives_the_seed() -> None:
    generators = [keras.random.SeedGenerator(7) for _ in range(2)]
    first, again = (dropout(ops.ones(SHAPE), 0.5, g.next()) for g in generators)
    np.testing.assert_array_equal(numbers(first), numbers(again))
    second = dropout(ops.ones(SHAPE), 0.5, as_seed(generators[0]))
    assert np.any(numbers(second) != numbers(first))


def test_seeds_are_integers_generators_or_tensors() -> None:
    generator, twin = (keras.random.SeedGenerator(7) for _ in range(2))
    np.testing.assert_array_equal(numbers(as_seed(generator)), numbers(twin.next()))
    seed = as_seed(7)
    assert as_seed(seed) is seed
    assert np.any(numbers(as_seed(8)) != numbers(seed))
    np.testing.assert_array_equal(numbers(as_seed(-1)), [2**31 - 1, 0])


@pytest.mark.parametrize("seed", [1.5, "7", True, (1, 2), np.ones((1, 2))])
def test_other_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(TypeError, match="`seed` must be an integer, a `keras.random"):
        as_seed(seed)


@pytest.mark.parametrize("rate", [0, 0.0, 0.5, 0.999])
def test_rates_below_one_pass(rate: float) -> None:
    assert check_rate(rate, "dropout") == rate
    assert isinstance(check_rate(rate, "dropout"), float)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, math.nan, "0.5", None, True])
def test_other_rates_are_refused(rate: Any) -> None:
    text = rf"`stays` must be a number with 0 <= stays < 1\. Received: stays={rate}"
    with pytest.raises(ValueError, match=text):
        check_rate(rate, "stays")
