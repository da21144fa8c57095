"""The portable implementation, on the domain that its module states."""

from __future__ import annotations

import numpy as np
import pytest

from keras_mha.attention import portable, reference
from keras_mha.attention.masks import Mask
from tests import reference as oracle
from tests.attention.cases import (
    FULL_ROWS,
    KEY_PADDING,
    QUERY_PADDING,
    B,
    N,
    S,
    T,
    cast,
    check_gradients,
    heads,
    numbers,
    visible,
)

TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "float16": 6e-3, "bfloat16": 6e-2}
each_mask = pytest.mark.parametrize("mask", FULL_ROWS.values(), ids=FULL_ROWS)


def test_the_cases_lie_in_the_domain() -> None:
    for mask in FULL_ROWS.values():
        rows = visible(mask._replace(query_padding=None)).any(axis=-1)
        queries = mask.query_padding
        assert np.all(rows if queries is None else rows | ~queries[:, None])


@each_mask
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward_equals_the_oracle(mask: Mask, dtype: str) -> None:
    arrays = cast(heads(), dtype)
    expected = oracle.attend(*map(numbers, arrays), visible=visible(mask))
    found = portable.attend(*arrays, mask=mask)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(numbers(one), other, atol=TOLERANCE[dtype])


@each_mask
def test_gradients_equal_the_oracles_differences(mask: Mask) -> None:
    check_gradients(
        lambda *arrays: portable.attend(*arrays, mask=mask)[0],
        lambda *arrays: oracle.attend(*arrays, visible=visible(mask))[0],
        heads(),
    )


@pytest.mark.parametrize("name", sorted(FULL_ROWS.keys() - {"none"}))
def test_the_comparison_fails_without_the_mask(name: str) -> None:
    expected, _ = oracle.attend(*heads(), visible=visible(FULL_ROWS[name]))
    found, _ = portable.attend(*cast(heads(), "float64"), mask=Mask())
    assert np.abs(numbers(found) - expected).max() > 1e-2


@each_mask
@pytest.mark.parametrize("size", [1.0, 4.9e3])
def test_equal_to_the_reference_up_to_the_edge(mask: Mask, size: float) -> None:
    query, key, value = heads()
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    arrays = cast([query * size / np.abs(logits).max(), key, value], "float32")
    for one, other in zip(
        portable.attend(*arrays, mask=mask),
        reference.attend(*arrays, mask=mask),
        strict=True,
    ):
        # Adding 1e4 to a logit costs it float32 digits, so weights of nearly equal
        # logits differ by 1e4 * 2**-24, and the values by a few times that.
        np.testing.assert_allclose(numbers(one), numbers(other), atol=3e-3)


def test_padded_queries_are_zero() -> None:
    mask = Mask(QUERY_PADDING, KEY_PADDING)
    found, scores = portable.attend(*cast(heads(), "float32"), mask=mask)
    assert np.all(numbers(found)[~QUERY_PADDING] == 0)
    assert np.all(numbers(scores).transpose(0, 2, 1, 3)[~QUERY_PADDING] == 0)


def test_finite_padding_is_harmless() -> None:
    clean, dirty = heads(), heads()
    dirty[0][~QUERY_PADDING] = dirty[1][~KEY_PADDING] = 30.0
    dirty[2][~KEY_PADDING] = 1e3
    mask = Mask(QUERY_PADDING, KEY_PADDING)
    one, other = (
        portable.attend(*cast(x, "float32"), mask=mask)[0] for x in (clean, dirty)
    )
    np.testing.assert_allclose(numbers(one), numbers(other), atol=1e-6)


def test_the_stated_domain_is_needed() -> None:
    """Outside the domain the values do differ: the limits are no idle words."""
    nan = heads()
    nan[2][~KEY_PADDING] = np.nan
    found, _ = portable.attend(
        *cast(nan, "float32"), mask=Mask(key_padding=KEY_PADDING)
    )
    assert np.isnan(numbers(found)).any()
    for arrays, mask in ((heads(scale=60.0), Mask(key_padding=KEY_PADDING)),):
        tensors = cast(arrays, "float32")
        found, _ = portable.attend(*tensors, mask=mask)
        assert (
            np.abs(
                numbers(found) - numbers(reference.attend(*tensors, mask=mask)[0])
            ).max()
            > 0.1
        )


@pytest.mark.parametrize(("query_length", "key_length"), [(1, S), (T, 1), (1, 1)])
def test_lengths_of_one(query_length: int, key_length: int) -> None:
    arrays, mask = heads(query_length, key_length), Mask(is_causal=True)
    shown = visible(mask, (B, N, query_length, key_length))
    found, _ = portable.attend(*cast(arrays, "float64"), mask=mask)
    np.testing.assert_allclose(
        numbers(found), oracle.attend(*arrays, visible=shown)[0], atol=1e-13
    )


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no dropout. Received: dropout=0.5"):
        portable.attend(*heads(), mask=Mask(), dropout=0.5, seed=np.array([1, 2]))


@pytest.mark.parametrize("field", ["pairs", "key_padding"])
def test_rows_that_see_no_key_are_zero_here_too(field: str) -> None:
    draw_normal = np.random.default_rng(7).normal
    query = draw_normal(size=(2, 5, 3, 7)).astype("float32")
    key, value = draw_normal(size=(2, 2, 11, 3, 7)).astype("float32")
    hidden = {
        "pairs": np.zeros((2, 1, 5, 11), bool) | (np.arange(5) != 2)[:, None],
        "key_padding": np.array([[True] * 11, [False] * 11]),
    }
    mask = Mask(**{field: hidden[field]})
    for ours, exact in zip(
        portable.attend(query, key, value, mask),
        reference.attend(query, key, value, mask),
        strict=True,
    ):
        np.testing.assert_allclose(ours, exact, atol=1e-6)
