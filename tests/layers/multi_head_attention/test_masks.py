"""Masks of MultiHeadAttention: arguments, carried by tensors, refused."""

from __future__ import annotations

import re
import warnings

import keras
import numpy as np
import pytest

from keras_mha import MultiHeadAttention
from keras_mha.layers.keras_mask import get_keras_mask
from tests.support import reference as oracle
from tests.support.attention_cases import numbers, pairs
from tests.support.layer_oracle import visible_in_call
from tests.support.layers import made, normal
from tests.support.multi_head_attention import (
    DQ,
    DV,
    MASKS,
    PADDING,
    PAIRS,
    QUERY_MASK,
    VALUE_MASK,
    B,
    H,
    N,
    S,
    T,
    embedded,
    inputs,
    layer_of,
)


def test_integer_masks_equal_boolean_ones() -> None:
    layer = layer_of()
    integers = {
        name: mask.astype("int32") * 2 if isinstance(mask, np.ndarray) else mask
        for name, mask in MASKS["all"].items()
    }
    found, wanted = (layer(*inputs(), **call) for call in (integers, MASKS["all"]))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scores", [False, True])
def test_carried_masks_equal_a_manual_one(causal: bool, scores: bool) -> None:
    query, value, query_mask, value_mask = embedded()
    layer = made(MultiHeadAttention(2, 5), query.shape, value.shape)
    found = layer(query, value, use_causal_mask=causal, return_attention_scores=scores)
    manual = query_mask[:, :, None] & value_mask[:, None]
    if causal:
        manual = manual & np.tri(5, 3, dtype=bool)
    wanted = layer(
        query.numpy(),
        value.numpy(),
        attention_mask=manual,
        return_attention_scores=scores,
    )
    for one, other in zip(*map(keras.tree.flatten, (found, wanted)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("scores", [False, True])
def test_the_outputs_carry_the_queries_mask(scores: bool) -> None:
    query, value, query_mask, _ = embedded()
    outputs = made(MultiHeadAttention(2, 5), query.shape, value.shape)(
        query, value, return_attention_scores=scores
    )
    outputs = outputs[0] if scores else outputs
    np.testing.assert_array_equal(get_keras_mask(outputs), query_mask)


def test_no_mask_no_carried_mask() -> None:
    assert get_keras_mask(layer_of()(*inputs(), value_mask=VALUE_MASK)) is None


@pytest.mark.parametrize("pair_mask", [False, True], ids=["bare", "attention_mask"])
def test_carried_masks_in_a_functional_model(pair_mask: bool) -> None:
    ids, other = keras.Input((T,), dtype="int32"), keras.Input((S,), dtype="int32")
    pair = keras.Input((T, S), dtype="bool")
    query = keras.layers.Embedding(4, DQ, mask_zero=True)(ids)
    value = keras.layers.Embedding(4, DV, mask_zero=True)(other)
    layer = made(MultiHeadAttention(N, H), (B, T, DQ), (B, S, DV))
    outputs = layer(query, value, attention_mask=pair if pair_mask else None)
    pooled = keras.layers.GlobalAveragePooling1D()(outputs)
    arguments = [ids, other, pair] if pair_mask else [ids, other]
    model = keras.Model(arguments, [query, value, outputs, pooled])
    given = [QUERY_MASK * 2, VALUE_MASK * 3, PAIRS[3]][: len(arguments)]
    masks = {"query_mask": QUERY_MASK, "value_mask": VALUE_MASK}
    masks |= {"attention_mask": PAIRS[3]} if pair_mask else {}
    for run in (model, model.predict_on_batch):
        q, v, found, mean = map(numbers, run(given))
        wanted, _ = oracle.multi_head_attention(
            oracle.layer_weights(layer),
            q,
            v,
            visible=visible_in_call((B, N, T, S), **masks),
        )
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        # The pooling sees the mask that the outputs carry.
        rows = QUERY_MASK[..., None]
        np.testing.assert_allclose(mean, (found * rows).sum(1) / rows.sum(1), atol=1e-5)


def test_masks_of_rank_2_3_and_4_mean_the_same() -> None:
    layer, lower = layer_of(), np.tri(T, S, dtype=bool)
    one, *others = (
        layer(*inputs(), attention_mask=np.broadcast_to(lower, shape))
        for shape in ((T, S), (B, T, S), (B, 1, T, S), (B, N, T, S))
    )
    for other in others:
        np.testing.assert_array_equal(other, one)
    np.testing.assert_allclose(one, layer(*inputs(), use_causal_mask=True), atol=1e-6)


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_causal_equals_an_explicit_mask(scores: bool, dropout: float) -> None:
    layer = layer_of(dropout=dropout)
    causal, explicit = (
        keras.tree.flatten(layer(*inputs(), return_attention_scores=scores, **call))
        for call in (
            {"use_causal_mask": True, "attention_mask": PAIRS[3]},
            {"attention_mask": PAIRS[3] & np.tri(T, S, dtype=bool)},
        )
    )
    for one, other in zip(causal, explicit, strict=True):
        np.testing.assert_array_equal(one, other)
    if scores:
        assert np.all(numbers(causal[1])[..., ~np.tri(T, S, dtype=bool)] == 0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_sliding_window_shows_its_band(causal: bool) -> None:
    layer = layer_of("window")
    _, scores = layer(*inputs(), use_causal_mask=causal, return_attention_scores=True)
    offset = np.arange(T)[:, None] - np.arange(S)
    band = (np.abs(offset) < 3) & ((offset >= 0) | (not causal))
    assert np.all((numbers(scores) > 0) == band)


@pytest.mark.parametrize("name", ["attention_mask", *PADDING])
def test_floating_masks_are_refused(name: str) -> None:
    mask = MASKS["all"][name].astype("float32")
    if name == "attention_mask":
        mask = -mask
    text = rf"`{name}` must be boolean or integer .* Received dtype float32"
    with pytest.raises(TypeError, match=text):
        layer_of()(*inputs(), **{name: mask})


@pytest.mark.parametrize(
    "shape", [(S, T), (T, T), (B, S, T), (B, B, T, S), (T, B, T, S)]
)
def test_attention_masks_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    text = rf"`attention_mask` must be 1 or .* of shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=text):
        layer_of()(*inputs(), attention_mask=pairs(*shape))


@pytest.mark.parametrize("shape", [(S,), (1, B, N, T, S)])
def test_attention_masks_of_a_wrong_rank_are_refused(shape: tuple[int, ...]) -> None:
    text = rf"`attention_mask` must have rank 2 .* of shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=text):
        layer_of()(*inputs(), attention_mask=pairs(*shape))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("query_mask", (B, S)),
        ("query_mask", (B,)),
        ("query_mask", (B, T, 1)),
        ("value_mask", (B, T)),
        ("value_mask", (B, 1)),
        ("value_mask", (B, T, S)),
        ("key_mask", (B, T)),
    ],
)
def test_padding_masks_that_do_not_fit_are_refused(
    name: str, shape: tuple[int, ...]
) -> None:
    text = rf"`{name}`.*Received: {name} of shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=text):
        layer_of()(*inputs(), **{name: np.ones(shape, bool)})


def test_causal_over_several_axes_is_refused() -> None:
    query = normal(B, 3, T, DQ)
    for options, call in (({}, {"use_causal_mask": True}), ({"sliding_window": 2}, {})):
        layer = MultiHeadAttention(2, 3, **options)
        text = r"need a single attention axis.*Received: attention_axes=\(1, 2\)"
        with pytest.raises(ValueError, match=text):
            layer(query, query, **call)


def test_masks_cause_no_warning() -> None:
    query, value, *_ = embedded()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = MultiHeadAttention(2, 5, use_gate=True, dropout=0.3)
        layer(query, value)
        layer(query, value, value, return_attention_scores=True, training=True)
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("name", PADDING)
def test_symbolic_masks_are_checked_at_once(name: str) -> None:
    query, value = keras.Input((T, DQ)), keras.Input((S, DV))
    with pytest.raises(TypeError, match=f"`{name}` must be boolean or integer"):
        layer_of()(query, value, value, **{name: keras.Input((T,), dtype="float32")})
    with pytest.raises(ValueError, match=f"`{name}` must have the leading"):
        layer_of()(query, value, value, **{name: keras.Input((17,), dtype="bool")})
