"""The one door: choice of implementation, scores on request, purity."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import keras_mha
from keras_mha.attention import masks
from keras_mha.attention.api import (
    attend,
    current_implementation,
    implementation_scope,
    prepare_inputs,
)
from keras_mha.attention.masks import Mask
from tests import reference as oracle
from tests.attention.cases import (
    FULL_ROWS,
    KEY_PADDING,
    QUERY_PADDING,
    cast,
    draw,
    heads,
    numbers,
    visible,
)


@pytest.mark.parametrize("implementation", ["reference", "portable"])
@pytest.mark.parametrize("mask", FULL_ROWS.values(), ids=FULL_ROWS)
def test_every_implementation_gives_the_same(mask: Mask, implementation: str) -> None:
    expected = oracle.attend(*heads(), visible=visible(mask))
    found = attend(
        *cast(heads(), "float32"),
        mask=mask,
        return_scores=True,
        implementation=implementation,
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(numbers(one), other, atol=2e-6)


def test_scores_come_on_request() -> None:
    arrays = cast(heads(), "float32")
    mixed, none = attend(*arrays, mask=FULL_ROWS["all"])
    again, scores = attend(*arrays, mask=FULL_ROWS["all"], return_scores=True)
    assert none is None
    assert scores is not None
    np.testing.assert_array_equal(mixed, again)


def test_it_compiles_as_it_is() -> None:
    mask, seed = FULL_ROWS["all"], tf.constant([3, 5], tf.uint32)
    arrays = cast(heads(), "float32")

    def function(*tensors: tf.Tensor) -> tf.Tensor:
        return attend(*tensors, mask=mask, seed=seed, dropout=0.3)[0]

    eager = numbers(function(*arrays))
    compiled = numbers(tf.function(function, jit_compile=True)(*arrays))
    np.testing.assert_allclose(compiled, eager, atol=1e-6)
    assert np.abs(eager - numbers(attend(*arrays, mask=mask)[0])).max() > 0.1


def test_the_scope_sets_and_restores_the_implementation() -> None:
    assert current_implementation() == "reference"
    with implementation_scope("portable"):
        assert current_implementation() == "portable"
        with implementation_scope("reference"):
            assert current_implementation() == "reference"
        assert current_implementation() == "portable"
    assert current_implementation() == "reference"


def test_the_scope_is_left_when_something_raises() -> None:
    with pytest.raises(KeyError), implementation_scope("portable"):
        raise KeyError
    assert current_implementation() == "reference"


def test_unknown_implementations_are_refused() -> None:
    text = r"`name` must be one of \['portable', 'reference'\]\. Received: name='flash'"
    with pytest.raises(ValueError, match=text), implementation_scope("flash"):
        pass


def test_padding_is_cleared_for_the_reference_alone() -> None:
    inputs = draw(*QUERY_PADDING.shape, 11)
    expected = numbers(masks.clear_padding(inputs, QUERY_PADDING))
    np.testing.assert_array_equal(
        numbers(prepare_inputs(inputs, QUERY_PADDING)), expected
    )
    with implementation_scope("portable"):
        assert prepare_inputs(inputs, QUERY_PADDING) is inputs


def test_the_layers_follow_the_scope() -> None:
    """NaN in hidden values tells the implementations apart."""
    layer = keras_mha.MultiHeadAttention(3, 5)
    query, value = draw(2, 5, 11), draw(2, 7, 13, seed=1)
    value[~KEY_PADDING] = np.nan
    clean = numbers(layer(query, value, value_mask=KEY_PADDING))
    assert np.all(np.isfinite(clean))
    with implementation_scope("portable"):
        spread = numbers(layer(query, value, value_mask=KEY_PADDING))
        value[~KEY_PADDING] = 0.0
        finite = numbers(layer(query, value, value_mask=KEY_PADDING))
    assert np.all(np.isnan(spread))
    np.testing.assert_allclose(finite, clean, atol=1e-5)


def test_dropout_needs_a_seed() -> None:
    heads = np.zeros((2, 3, 5, 7), "float32")
    with pytest.raises(ValueError, match="needs a `seed`. Received: dropout=0.5"):
        attend(heads, heads, heads, Mask(), dropout=0.5)


def test_attend_refuses_unknown_implementations() -> None:
    heads = np.zeros((2, 3, 5, 7), "float32")
    with pytest.raises(
        ValueError, match=r"\['portable', 'reference'\].*implementation='flash'"
    ):
        attend(heads, heads, heads, Mask(), implementation="flash")
