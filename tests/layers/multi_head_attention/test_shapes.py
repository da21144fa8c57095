"""Shapes that MultiHeadAttention takes, computes and refuses."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha import MultiHeadAttention
from tests.support.layers import made, normal
from tests.support.multi_head_attention import (
    DQ,
    DV,
    SHAPES,
    B,
    N,
    S,
    T,
    inputs,
    layer_of,
)


@pytest.mark.parametrize(
    ("query", "value", "key", "output_shape"),
    [
        ((4, 8), (2, 8), None, None),
        ((4, 8), (2, 8), (2, 3), None),
        ((4, 8), (2, 8), None, (3, 4)),
        ((4, 8), (2, 8), (2, 3), (1, 5)),
        ((4, 8), (2, 8), (2, 3), 5),
        ((4, 2, 3, 8), (1, 1, 5, 8), (1, 1, 5, 2), None),
        ((4, 2, 3, 8), (1, 1, 5, 8), (1, 1, 5, 2), (3, 2)),
        ((4, 2, 3, 8), (4, 2, 3, 7), (4, 2, 3, 8), None),
    ],
)
def test_compute_output_shape(
    query: Any, value: Any, key: Any, output_shape: Any
) -> None:
    layer = MultiHeadAttention(2, 3, output_shape=output_shape)
    shapes = [(B, *shape) for shape in (query, value, key) if shape]
    outputs = layer(*(normal(*shape) for shape in shapes))
    assert layer.compute_output_shape(*shapes) == tuple(outputs.shape)
    assert layer.compute_output_shape(*map(list, shapes)) == tuple(outputs.shape)
    size = output_shape if isinstance(output_shape, tuple) else (output_shape or 8,)
    assert tuple(outputs.shape) == (B, *query[:-1], *size)
    dynamic = [(None, *[None] * len(s[1:-1]), s[-1]) for s in shapes]
    assert layer.compute_output_shape(*dynamic)[0] is None


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 8), (2, 2, 7), (2, 3, 7)),
        ((2, 4, 8), (2, 2, 8), (2, 1, 7)),
        ((2, 4, 2, 3, 8), (2, 1, 1, 5, 8), (2, 1, 15, 5, 2)),
        ((2, 4, 8), (2, 2, 8), (2, 2, 1, 8)),
    ],
)
def test_keys_must_match_values(shapes: tuple[tuple[int, ...], ...]) -> None:
    layer = MultiHeadAttention(2, 3)
    text = (
        r"All dimensions of `value` and `key`, except the last one, must be equal\. "
        rf"Received: value_shape={re.escape(str(shapes[1]))} and "
        rf"key_shape={re.escape(str(shapes[2]))}"
    )
    for function in (
        layer.compute_output_shape,
        layer.build,
        lambda *given: layer(*(normal(*shape) for shape in given)),
    ):
        with pytest.raises(ValueError, match=text):
            function(*shapes)


@pytest.mark.parametrize("axes", [1, -3, (2,), (-2,), [1, 2], (2, 1), (-2, -3)])
@pytest.mark.parametrize("use_gate", [False, True], ids=["plain", "gate"])
def test_negative_axes(axes: Any, use_gate: bool) -> None:
    query = normal(2, 3, 7, 5)
    given = [axes] if isinstance(axes, int) else axes
    positive = [axis % 4 for axis in given]
    layers = [
        made(
            MultiHeadAttention(2, 5, attention_axes=a, use_gate=use_gate),
            query.shape,
            query.shape,
        )
        for a in (axes, positive, list(reversed(positive)))
    ]
    one, other, swapped = (
        x(query, query, return_attention_scores=True) for x in layers
    )
    for found, wanted in zip(one, other, strict=True):
        np.testing.assert_array_equal(found, wanted)
    # The order of the axes only orders the scores.
    np.testing.assert_allclose(swapped[0], one[0], atol=1e-5)
    if len(given) == 2:
        order = (0, 1, 3, 2, 5, 4)
        np.testing.assert_allclose(np.transpose(swapped[1], order), one[1], atol=1e-5)


@pytest.mark.parametrize("lengths", [(T, S), (1, 2), (None, S), (None, None)])
def test_symbolic_scores_have_the_shape_of_real_ones(lengths: tuple[Any, Any]) -> None:
    layer = layer_of("all", dtype="float16")
    query, value, key = (
        keras.Input((length, shape[-1]), batch_size=B, dtype="float16")
        for length, shape in zip((*lengths, lengths[1]), SHAPES, strict=True)
    )
    outputs, scores = layer(query, value, key, return_attention_scores=True)
    assert outputs.shape == (B, lengths[0], 2, 3)
    assert scores.shape == (B, N, *lengths)
    model = keras.Model([query, value, key], [outputs, scores])
    arrays = [
        x[:, :n]
        for x, n in zip(inputs("float16"), (lengths[0], *lengths[1:] * 2), strict=True)
    ]
    found = model(arrays)
    wanted = layer(*arrays, return_attention_scores=True)
    for symbolic, one, other in zip((outputs, scores), found, wanted, strict=True):
        assert symbolic.dtype == one.dtype == "float16"
        np.testing.assert_array_equal(one, other)


def test_axes_that_do_not_attend_must_match() -> None:
    # As many rows in all, so that folding them into the batch would go unnoticed.
    query, value = normal(2, 3, T, DQ), normal(3, 2, T, DV)
    with pytest.raises(
        ValueError, match=r"Received: .*\(2, 3, 5, 13\).*\(3, 2, 5, 17\)"
    ):
        MultiHeadAttention(2, 3, attention_axes=2)(query, value)


def test_inputs_need_an_axis_to_attend_over() -> None:
    layer = MultiHeadAttention(2, 3)
    with pytest.raises(ValueError, match=r"`query` must have .* \(B, T, ..., D\)"):
        layer(normal(B, DQ), normal(B, DV))
    with pytest.raises(ValueError, match="`attention_axes`"):
        layer.build((B, DQ), (B, DV))


def test_queries_and_values_of_different_rank_are_refused() -> None:
    text = "`query` and `value` must have as many dimensions. Received: query_shape="
    for query, value in ((normal(B, T, DQ), normal(B, 3, S, DV)),):
        with pytest.raises(ValueError, match=text):
            MultiHeadAttention(2, 3)(query, value)
