"""Scalars of NumPy are arguments as Python's are; booleans are not numbers."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from keras import ops

from keras_mha import (
    CausalMask,
    SlidingWindowMask,
    dot_product_attention,
    pack_sequences,
)
from keras_mha.attention import positions
from keras_mha.attention.numeric import plain_integer, plain_number

HEADS = np.random.default_rng(1).normal(size=(2, 5, 3, 4)).astype("float32")
INTEGERS = (np.int8, np.int32, np.int64, np.uint8, np.uint64)
FLOATS = (np.float16, np.float32, np.float64)


def attend(**options: Any) -> np.ndarray:
    if "dropout" in options:
        options = {"seed": 3, **options}
    return np.asarray(dot_product_attention(HEADS, HEADS, HEADS, **options))


def embed(**options: Any) -> np.ndarray:
    scaling = "linear" if "scaling_factor" in options else None
    if "frequency" in str(options) or "original_max_length" in options:
        scaling = "llama3"
        options = {
            "scaling_factor": 8,
            "original_max_length": 64,
            "low_frequency_factor": 1,
            "high_frequency_factor": 4,
            **options,
        }
    turned = positions.rotate(HEADS, np.arange(5), scaling=scaling, **options)
    return np.asarray(turned)


def sort(**options: Any) -> np.ndarray:
    distances = np.arange(-20, 20)
    return np.asarray(positions.relative_position_bucket(distances, **options))


def pack(**options: Any) -> np.ndarray:
    return pack_sequences([[1, 2], [3]], **{"row_length": 4, **options}).segment_ids


WHOLE: dict[str, tuple[Callable[..., Any], int]] = {
    "sliding_window": (attend, 2),
    "seed": (lambda seed: attend(dropout=0.5, seed=seed), 5),
    "size": (lambda size: attend(mask=SlidingWindowMask(size)), 3),
    "offset": (lambda offset: attend(mask=CausalMask(offset)), 2),
    "num_heads": (positions.alibi_slopes, 3),
    "num_buckets": (sort, 8),
    "max_distance": (sort, 17),
    "row_length": (pack, 3),
    "num_rows": (pack, 2),
    "original_max_length": (embed, 32),
}
# Each is exact in float16.
REAL: dict[str, tuple[Callable[..., Any], float]] = {
    "scale": (attend, 0.75),
    "logits_soft_cap": (attend, 1.5),
    "dropout": (attend, 0.375),
    "base": (embed, 100.0),
    "fraction": (embed, 0.5),
    "scaling_factor": (embed, 2.5),
    "low_frequency_factor": (embed, 1.5),
    "high_frequency_factor": (embed, 3.5),
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", WHOLE)
def test_numpys_integers_are_integers(name: str, kind: Any) -> None:
    function, value = WHOLE[name]
    expected = function(**{name: value})
    np.testing.assert_array_equal(function(**{name: kind(value)}), expected)


@pytest.mark.parametrize("kind", [*FLOATS, Fraction])
@pytest.mark.parametrize("name", REAL)
def test_numpys_numbers_are_numbers(name: str, kind: Any) -> None:
    function, value = REAL[name]
    expected = function(**{name: value})
    np.testing.assert_array_equal(function(**{name: kind(value)}), expected)


@pytest.mark.parametrize("kind", INTEGERS)
def test_numpys_integers_are_numbers_too(kind: Any) -> None:
    np.testing.assert_array_equal(attend(scale=kind(2)), attend(scale=2.0))


@pytest.mark.parametrize("value", [True, np.True_])
@pytest.mark.parametrize("name", [*WHOLE, *REAL])
def test_booleans_are_neither(name: str, value: Any) -> None:
    function, _ = {**WHOLE, **REAL}[name]
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must be"):
        function(**{name: value})


@pytest.mark.parametrize("value", [2.0, np.float32(2), np.float64(2)])
@pytest.mark.parametrize("name", WHOLE)
def test_floats_are_no_integers(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must be"):
        WHOLE[name][0](**{name: value})


@pytest.mark.parametrize("value", [np.nan, np.float32("inf"), 10**400, "1", 1j])
@pytest.mark.parametrize("name", REAL)
def test_numbers_are_finite_and_real(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        REAL[name][0](**{name: value})


def test_what_is_kept_is_pythons() -> None:
    window = SlidingWindowMask(np.int64(3), np.int32(2))
    assert window == SlidingWindowMask(3, 2)
    assert [type(window.sliding_window), type(window.offset)] == [int, int]
    options = positions.RotaryOptions(np.float32(100), np.float64(0.5))
    assert [type(options.base), type(options.fraction)] == [float, float]
    assert type(plain_integer(np.uint8(3))) is int
    assert type(plain_number(np.float16(3))) is float


def test_masks_with_the_same_offset_meet_whoever_made_it() -> None:
    both: Any = CausalMask(np.int64(2)) & SlidingWindowMask(3, 2)
    assert both.offset == 2
    assert not ops.is_tensor(both.offset)
