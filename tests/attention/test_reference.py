"""The reference implementation against the NumPy float64 oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from keras_mha.attention.masks import Mask
from keras_mha.attention.reference import attend
from tests import reference as oracle
from tests.attention.cases import (
    EMPTY_ROWS,
    FULL_ROWS,
    KEY_PADDING,
    QUERY_PADDING,
    B,
    H,
    N,
    S,
    T,
    V,
    cast,
    check_gradients,
    draw,
    gradients,
    heads,
    numbers,
    visible,
)

MASKS = FULL_ROWS | EMPTY_ROWS
TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "float16": 3e-3, "bfloat16": 3e-2}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@each_mask
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward_equals_the_oracle(mask: Mask, dtype: str) -> None:
    arrays = cast(heads(), dtype)
    # From the rounded numbers: what is left is the implementation's own error.
    expected = oracle.attend(*map(numbers, arrays), visible=visible(mask))
    found = attend(*arrays, mask=mask)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(numbers(one), other, atol=TOLERANCE[dtype])


@each_mask
def test_gradients_equal_the_oracles_differences(mask: Mask) -> None:
    check_gradients(
        lambda *arrays: attend(*arrays, mask=mask)[0],
        lambda *arrays: oracle.attend(*arrays, visible=visible(mask))[0],
        heads(),
    )


@pytest.mark.parametrize("name", sorted(MASKS.keys() - {"none"}))
def test_the_comparison_fails_without_the_mask(name: str) -> None:
    expected, _ = oracle.attend(*heads(), visible=visible(MASKS[name]))
    found, _ = attend(*cast(heads(), "float64"), mask=Mask())
    assert np.abs(numbers(found) - expected).max() > 1e-2


@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
def test_the_gradient_check_fails_for_a_wrong_gradient(place: int) -> None:
    def wrong(*arrays: Any) -> Any:
        altered = list(arrays)
        altered[place] = altered[place] * 1.001
        return attend(*altered, mask=Mask(is_causal=True))[0]

    shown = visible(Mask(is_causal=True))
    with pytest.raises(AssertionError):
        check_gradients(wrong, lambda *a: oracle.attend(*a, visible=shown)[0], heads())


@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_a_query_that_sees_no_key_gets_zeros_and_no_gradient(name: str) -> None:
    mask = EMPTY_ROWS[name]
    empty = ~visible(mask).any(axis=-1)  # (B, N, T)
    assert empty.any()
    arrays = cast(heads(), "float32")
    found, scores = attend(*arrays, mask=mask)
    assert np.all(numbers(found).transpose(0, 2, 1, 3)[empty] == 0)
    assert np.all(numbers(scores)[empty] == 0)
    upstream = np.zeros((B, N, T, V))
    upstream[empty] = draw(B, N, T, V)[empty]
    for gradient in gradients(
        lambda *a: attend(*a, mask=mask)[0], arrays, upstream.transpose(0, 2, 1, 3)
    ):
        assert np.all(gradient == 0)


@pytest.mark.parametrize(("query_length", "key_length"), [(1, S), (T, 1), (1, 1)])
@pytest.mark.parametrize("mask", [Mask(), Mask(is_causal=True)], ids=["none", "causal"])
def test_lengths_of_one(query_length: int, key_length: int, mask: Mask) -> None:
    arrays = heads(query_length, key_length)
    shown = visible(mask, (B, N, query_length, key_length))
    expected = oracle.attend(*arrays, visible=shown)
    for one, other in zip(
        attend(*cast(arrays, "float64"), mask=mask), expected, strict=True
    ):
        np.testing.assert_allclose(numbers(one), other, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mask", [Mask(), FULL_ROWS["all"]], ids=["none", "all"])
def test_large_logits_do_not_overflow(dtype: str, mask: Mask) -> None:
    arrays = cast(heads(scale=60.0), dtype)
    rounded = [numbers(array) for array in arrays]
    logits = np.einsum("btnh,bsnh->bnts", *rounded[:2])
    assert np.abs(logits).max() > np.finfo(np.float16).max / 2
    expected, _ = oracle.attend(*rounded, visible=visible(mask))
    found, scores = attend(*arrays, mask=mask)
    assert np.all(np.isfinite(numbers(scores)))
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-2, atol=1e-2)
    for gradient in gradients(
        lambda *a: attend(*a, mask=mask)[0], arrays, draw(B, T, N, V)
    ):
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("is_causal", [False, True], ids=["plain", "causal"])
def test_poison_in_padding_is_harmless(poison: float, is_causal: bool) -> None:
    mask = Mask(QUERY_PADDING, KEY_PADDING, is_causal=is_causal)
    clean = heads()
    dirty = [array.copy() for array in clean]
    dirty[0][~QUERY_PADDING] = poison
    dirty[1][~KEY_PADDING] = poison
    dirty[2][~KEY_PADDING] = poison

    def function(*arrays: Any) -> Any:
        return attend(*arrays, mask=mask)[0]

    found, expected = (function(*cast(x, "float32")) for x in (dirty, clean))
    np.testing.assert_array_equal(numbers(found), numbers(expected))
    upstream = draw(B, T, N, V)
    for one, other in zip(
        gradients(function, cast(dirty, "float32"), upstream),
        gradients(function, cast(clean, "float32"), upstream),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_longer_padding_changes_nothing() -> None:
    arrays = heads()
    short, _ = attend(*cast(arrays, "float64"), mask=Mask(QUERY_PADDING, KEY_PADDING))
    longer = [
        np.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0)), constant_values=9.0) for x in arrays
    ]
    paddings = [np.pad(x, ((0, 0), (0, 4))) for x in (QUERY_PADDING, KEY_PADDING)]
    long, _ = attend(*cast(longer, "float64"), mask=Mask(*paddings))
    np.testing.assert_allclose(numbers(long)[:, :T], numbers(short), atol=1e-14)
    assert np.all(numbers(long)[:, T:] == 0)


def test_probabilities_are_those_before_dropout() -> None:
    arrays = cast(heads(), "float32")
    seed = np.array([3, 5], "uint32")
    plain, scores = attend(*arrays, mask=Mask())
    dropped, same = attend(*arrays, mask=Mask(), dropout=0.5, seed=seed)
    np.testing.assert_array_equal(numbers(same), numbers(scores))
    assert np.abs(numbers(dropped) - numbers(plain)).max() > 0.1


def test_dropped_probabilities_mix_the_values() -> None:
    query, key, value = cast(heads(), "float32")
    unit = np.broadcast_to(np.eye(S)[None, :, None], (B, S, N, S))
    seed = np.array([3, 5], "uint32")
    # With unit vectors for values, the output is the dropped probabilities.
    (unit,) = cast([unit], "float32")
    kept, scores = attend(query, key, unit, Mask(), dropout=0.5, seed=seed)
    ratio = numbers(kept).transpose(0, 2, 1, 3) / numbers(scores)
    assert np.all(np.isclose(ratio, 0) | np.isclose(ratio, 2))
    assert 0.3 < np.isclose(ratio, 0).mean() < 0.7
    expected = np.einsum("btns,bsnv->btnv", numbers(kept), numbers(value))
    found, _ = attend(query, key, value, Mask(), dropout=0.5, seed=seed)
    np.testing.assert_allclose(numbers(found), expected, atol=1e-5)


def test_worked_example() -> None:
    # One head of size 4, so queries are halved; scores 0 and log 3: weights 1/4, 3/4.
    query = np.array([2.0, 0, 0, 0]).reshape(1, 1, 1, 4)
    key = np.array([[0.0] * 4, [np.log(3), 0, 0, 0]]).reshape(1, 2, 1, 4)
    value = np.array([8.0, 16.0]).reshape(1, 2, 1, 1)
    found, scores = attend(*cast([query, key, value], "float32"), mask=Mask())
    np.testing.assert_allclose(numbers(scores).ravel(), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(numbers(found).ravel(), [14.0], rtol=1e-6)
    # The oracle is held to the same figures.
    np.testing.assert_allclose(oracle.attend(query, key, value)[0].ravel(), [14.0])


def test_the_head_size_not_the_width_scales() -> None:
    # Only the head size differs: zeros added to the heads change the scale alone.
    arrays = heads()
    wider = [np.pad(x, ((0, 0),) * 3 + ((0, 3 * H),)) for x in arrays[:2]]
    found, _ = attend(*cast([*wider, arrays[2]], "float64"), mask=Mask())
    halved = [arrays[0] / 2, *arrays[1:]]
    np.testing.assert_allclose(numbers(found), oracle.attend(*halved)[0], atol=1e-13)
