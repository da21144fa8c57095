"""MultiHeadAttention against Keras' layer: values, weights, files, signatures."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha import MultiHeadAttention
from tests.support.attention_cases import draw, numbers, pairs
from tests.support.layer_oracle import visible_in_call
from tests.support.layers import made, normal
from tests.support.multi_head_attention import (
    KEY_MASK,
    OPTIONS,
    PAIRS,
    QUERY_MASK,
    SHAPES,
    VALUE_MASK,
    B,
    H,
    N,
    S,
    Stock,
    T,
    carrying,
    differentiate,
    functional,
    inputs,
    layer_of,
    twin,
)

# Every combination but those Keras gets wrong: a mask of rank 4 with padding.
COMBINATIONS = [
    (query, value, key, rank, causal, scores)
    for query, value, key, rank, causal, scores in itertools.product(
        *[(False, True)] * 3, (None, 2, 3, 4), (False, True), (False, True)
    )
    if not (rank == 4 and (query or value or key))
]


@pytest.mark.parametrize("options", ["plain", "window"])
@pytest.mark.parametrize(
    ("query", "value", "key", "rank", "causal", "scores"), COMBINATIONS
)
def test_every_mask_combination_equals_keras(
    options: str,
    query: bool,
    value: bool,
    key: bool,
    rank: int | None,
    causal: bool,
    scores: bool,
) -> None:
    layer = layer_of(options)
    masks = {
        "query_mask": QUERY_MASK if query else None,
        "value_mask": VALUE_MASK if value else None,
        "key_mask": KEY_MASK if key else None,
    }
    call = {
        "attention_mask": None if rank is None else PAIRS[rank],
        "use_causal_mask": causal,
        "return_attention_scores": scores,
    }
    # Carried by the inputs: an explicit query_mask Keras ignores.
    found, wanted = (
        one(*map(carrying, inputs(), masks.values()), **call)
        for one in (layer, _stock(options))
    )
    given = {name: mask for name, mask in masks.items() if mask is not None}
    given |= {"use_causal_mask": causal}
    if rank is not None:
        given["attention_mask"] = PAIRS[rank]
    visible = visible_in_call(
        (B, N, T, S), layer.get_config()["sliding_window"], **given
    )
    if scores:
        np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)
        found, wanted = found[0], wanted[0]
    # Without scores, Keras mixes the padding into rows that see no key.
    rows = visible.any(axis=-1).all(axis=1) | scores
    assert rows.sum() > B
    np.testing.assert_allclose(numbers(found)[rows], numbers(wanted)[rows], atol=1e-5)


@functools.cache
def _stock(options: str) -> Any:
    return twin(layer_of(options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scores", [False, True], ids=["plain", "scores"])
def test_every_option_equals_keras(options: str, scores: bool) -> None:
    layer = layer_of(options)
    arrays = inputs()
    found, wanted = (
        keras.tree.flatten(one(*arrays, return_attention_scores=scores))
        for one in (layer, _stock(options))
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_equal_keras(options: str) -> None:
    pair = PAIRS[3] | np.eye(T, S, dtype=bool)
    call = {"attention_mask": pair, "use_causal_mask": True}
    one, other = (
        differentiate(layer, inputs(), **call)[1]
        for layer in (layer_of(options), _stock(options))
    )
    for found, wanted in zip(one, other, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_weights_are_named_and_shaped_as_in_keras(options: str) -> None:
    layer = MultiHeadAttention(N, H, name="mha", **OPTIONS[options])
    stock = Stock(N, H, name="mha", **OPTIONS[options])
    for one in (layer, stock):
        one.build(*SHAPES)
    assert [w.path for w in layer.weights] == [w.path for w in stock.weights]
    assert [w.shape for w in layer.weights] == [w.shape for w in stock.weights]
    assert [w.trainable for w in layer.weights] == [w.trainable for w in stock.weights]


@pytest.mark.parametrize(
    ("options", "count", "generators"),
    [
        ({}, 8, 0),
        ({"use_bias": False, "dropout": 0.5}, 4, 1),
        ({"use_gate": True}, 10, 0),
        ({"use_gate": True, "use_bias": False, "dropout": 0.5}, 5, 1),
    ],
)
def test_weight_counts(options: dict[str, Any], count: int, generators: int) -> None:
    layer = made(MultiHeadAttention(N, H, **options), *SHAPES)
    assert len(layer.trainable_weights) == count
    assert len(layer.non_trainable_weights) == 0
    assert len(layer.non_trainable_variables) == generators
    assert layer.losses == []


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("options", ["plain", "gate", "all"])
@pytest.mark.parametrize("to_keras", [False, True], ids=["from Keras", "to Keras"])
def test_weight_files_pass_to_and_from_keras(
    tmp_path: Path, suffix: str, options: str, to_keras: bool
) -> None:
    classes = (MultiHeadAttention, Stock) if to_keras else (Stock, MultiHeadAttention)
    source, target = (functional(one, **OPTIONS[options]) for one in classes)
    source.set_weights([draw(*w.shape, seed=i) for i, w in enumerate(source.weights)])
    path = tmp_path / f"saved{suffix}"
    (source.save if suffix == ".keras" else source.save_weights)(path)
    assert np.abs(numbers(source(inputs())) - numbers(target(inputs()))).max() > 0.1
    target.load_weights(path)
    for one, other in zip(source.get_weights(), target.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(target(inputs()), source(inputs()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "method", ["__init__", "call", "build", "compute_output_shape"]
)
def test_calls_of_keras_layer_are_understood(method: str) -> None:
    """Keras' arguments come first, in order; what follows can be left out."""
    kinds = inspect.Parameter

    def arguments(function: Callable[..., Any]) -> list[inspect.Parameter]:
        parameters = inspect.signature(function).parameters.values()
        return [each for each in parameters if each.kind is not kinds.VAR_KEYWORD]

    found = arguments(getattr(MultiHeadAttention, method))
    wanted = arguments(getattr(Stock, method))
    for ours, theirs in zip(found, wanted, strict=False):
        assert (ours.name, ours.kind) == (theirs.name, theirs.kind)
        # With a cache there are no values to pass.
        if (method, ours.name) == ("call", "value"):
            assert ours.default is None
        else:
            assert ours.default == theirs.default
    for ours in found[len(wanted) :]:
        assert ours.default is not kinds.empty
        assert method != "__init__" or ours.kind is kinds.KEYWORD_ONLY


def test_default_initial_kernels_are_those_of_keras() -> None:
    layers = [one(N, H, use_gate=True) for one in (MultiHeadAttention, Stock)]
    for layer in layers:
        keras.utils.set_random_seed(3)
        layer.build(*SHAPES)
    for one, other in zip(*(layer.get_weights() for layer in layers), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_activity_regularizer_acts_as_in_keras() -> None:
    options: dict[str, Any] = {"activity_regularizer": keras.regularizers.L2(0.5)}
    layer = made(MultiHeadAttention(N, H, **options), *SHAPES)
    stock = twin(layer)
    for one in (layer, stock):
        one(*inputs())
    found, wanted = (sorted(map(float, one.losses)) for one in (layer, stock))
    assert len(found) == 4
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "columns", "mask", "axes"),
    [
        ((3, 4), (3, 2), (4, 2), (2,)),
        ((3, 4), (3, 2), (3, 4, 2), (2,)),
        ((3, 4), (3, 2), (3, 3, 4, 2), (2,)),
        ((3, 4), (3, 2), (3, 3, 2, 4, 2), (2,)),
        ((3, 4), (3, 2), (3, 4, 3, 2), (1, 2)),
        ((3, 4), (3, 2), (3, 3, 4, 3, 2), (1, 2)),
        ((5, 3, 4), (5, 3, 2), (3, 4, 3, 2), (2, 3)),
        ((5, 3, 4), (5, 3, 2), (3, 5, 3, 4, 3, 2), (2, 3)),
    ],
)
@pytest.mark.parametrize("use_gate", [False, True], ids=["plain", "gate"])
def test_masks_of_rank_2_to_6_equal_keras(
    rows: Any, columns: Any, mask: Any, axes: Any, use_gate: bool
) -> None:
    options = {"attention_axes": axes, "use_gate": use_gate}
    query, value = normal(3, *rows, 8), normal(3, *columns, 8, seed=1)
    stock = made(Stock(2, 5, **options), query.shape, value.shape)
    layer = made(MultiHeadAttention(2, 5, **options), query.shape, value.shape)
    visible = pairs(*mask)
    assert not visible.all()
    found, wanted = (
        one(query, value, attention_mask=visible, return_attention_scores=True)
        for one in (layer, stock)
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
