"""The portable implementation at the edge of the domain that its module states.

Inside, it keeps the contract of `test_contract.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from keras_mha.attention import portable, reference
from keras_mha.attention.bias import Bias
from keras_mha.attention.mask_parts import MaskParts
from tests.support.attention_cases import (
    CASES,
    KEY_PADDING,
    QUERY_PADDING,
    Case,
    H,
    MaskWords,
    T,
    arrays_of,
    cast,
    heads,
    mask_arrays_of,
    numbers,
    visible,
)

EDGE = 4.9e3
MASKED = {
    name: case
    for name, case in CASES.items()
    if case.options & {*MaskWords._fields} and not case.return_scores and not case.sinks
}


def attend(module: Any, case: Case, arrays: list[np.ndarray]) -> list[np.ndarray]:
    tensors = mask_arrays_of(case)
    mask = case.mask._replace(
        **dict(zip(tensors, map(_as_tensor, tensors.values()), strict=True))
    )
    scale = case.head_size**-0.5
    found = module.attend(*cast(arrays, "float32"), mask.parts(), Bias(), scale=scale)
    return [numbers(x) for x in found]


def _as_tensor(array: np.ndarray) -> Any:
    return cast([array], str(array.dtype))[0]


def at_size(case: Case, size: float) -> list[np.ndarray]:
    """Arrays whose largest scaled score is `size`."""
    query, key, value = heads(case)
    repeated = np.repeat(key, case.heads[0] // case.heads[1], axis=2)
    scores = np.einsum("btnh,bsnh->bnts", query, repeated) / np.sqrt(case.head_size)
    return [query * size / np.abs(scores).max(), key, value]


@pytest.mark.parametrize("name", MASKED)
def test_equal_to_the_reference_up_to_the_edge(name: str) -> None:
    case = MASKED[name]
    arrays = at_size(case, EDGE)
    for one, other in zip(
        attend(portable, case, arrays), attend(reference, case, arrays), strict=True
    ):
        # Adding 1e4 to a logit costs it float32 digits, so weights of nearly equal
        # logits differ by 1e4 * 2**-24, and the values by a few times that.
        np.testing.assert_allclose(one, other, atol=3e-3)


def test_past_the_edge_weight_goes_to_hidden_keys() -> None:
    """The limit is no idle word: at ten times the size, the values do differ."""
    case = CASES["keys"]
    arrays = at_size(case, 10 * EDGE)
    (found, scores), (expected, _) = (
        attend(module, case, arrays) for module in (portable, reference)
    )
    assert np.abs(found - expected).max() > 0.1
    assert scores[~visible(case)].max() > 0.9


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_spreads_from_padding(poison: float) -> None:
    query, key, value = heads()
    value[~KEY_PADDING] = poison
    found, _ = attend(portable, CASES["keys"], [query, key, value])
    assert np.isnan(found).any()
    expected, _ = attend(reference, CASES["keys"], [query, key, value])
    assert np.isfinite(expected).all()


def test_padded_queries_are_zero() -> None:
    found, scores = attend(portable, CASES["padding"], heads())
    assert np.all(found[~QUERY_PADDING] == 0)
    assert np.all(scores.transpose(0, 2, 1, 3)[~QUERY_PADDING] == 0)


def test_one_padding_of_queries_and_keys_hides_both() -> None:
    """Self-attention, where the same tensor is both, takes a shorter way."""
    case = Case(MaskWords(sliding_window=3), lengths=(T, T))
    padding = _as_tensor(QUERY_PADDING)
    arrays = heads(case)
    for is_causal in (False, True):
        mask = MaskWords(padding, padding, None, is_causal, 3).parts()
        found, _ = portable.attend(
            *cast(arrays, "float32"), mask, Bias(), scale=H**-0.5
        )
        expected, _ = reference.attend(
            *cast(arrays, "float32"), mask, Bias(), scale=H**-0.5
        )
        np.testing.assert_allclose(numbers(found), numbers(expected), atol=1e-6)
        assert np.all(numbers(found)[~QUERY_PADDING] == 0)


def test_sinks_stand_beside_hidden_keys() -> None:
    """A sink far below the scores, yet far above those of hidden keys."""
    case = CASES["sinks, empty rows"]
    arrays = {name: array.astype("float32") for name, array in arrays_of(case).items()}
    sinks = cast([np.full(case.heads[0], -50.0)], "float32")[0]
    mask = MaskParts(key_padding=_as_tensor(case.mask.key_padding))
    found, expected = (
        numbers(
            module.attend(
                *cast(list(arrays.values())[:3], "float32"),
                mask,
                Bias(sinks=sinks),
                scale=H**-0.5,
            )[0]
        )
        for module in (portable, reference)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.all(found[0] == 0)
