"""Folding of any attention axes into one, and back."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha.attention.dispatch import attend
from keras_mha.attention.mask_parts import MaskParts
from keras_mha.layers.axes import (
    attend_over,
    check_order,
    fold_heads,
    fold_padding,
    fold_pairs,
    resolve_axes,
    score_shape,
    unfold_heads,
    unfold_scores,
)
from tests.support import reference as oracle
from tests.support.attention_cases import MaskWords, cast, draw, numbers, pairs

N, H, V = 3, 11, 13
# Inner dimensions of queries, of keys, attention axes. Free axes have equal sizes.
LAYOUTS = [
    ((5,), (7,), (1,)),
    ((4, 5), (4, 7), (2,)),
    ((5, 4), (7, 4), (1,)),
    ((4, 5), (3, 7), (1, 2)),
    ((4, 5), (3, 7), (2, 1)),
    ((2, 4, 5), (2, 3, 7), (2, 3)),
    ((4, 2, 5), (3, 2, 7), (1, 3)),
    ((4, 2, 5), (3, 2, 7), (3, 1)),
    ((4, 5, 2), (3, 7, 2), (1, 2)),
    ((5, 4, 2), (7, 4, 2), (1,)),
    ((2, 4, 3), (5, 1, 3), (1, 2, 3)),
]
each_layout = pytest.mark.parametrize(("rows", "columns", "axes"), LAYOUTS)


def layout_heads(rows: tuple[int, ...], columns: tuple[int, ...]) -> list[np.ndarray]:
    return [
        draw(2, *rows, N, H, seed=1),
        draw(2, *columns, N, H, seed=2),
        draw(2, *columns, N, V, seed=3),
    ]


def layout_padding(*shape: int, seed: int) -> np.ndarray:
    """A padding mask that hides something, never everything of one batch element."""
    padding = np.random.default_rng(seed).random(shape) < 0.6
    padding[(slice(None), *([0] * (len(shape) - 1)))] = True
    padding[(0, *([-1] * (len(shape) - 1)))] = False
    return padding


def layout_visible(
    query_padding: np.ndarray, key_padding: np.ndarray, axes: tuple[int, ...]
) -> np.ndarray:
    """Both paddings as a mask of the scores' rank, by indexing element by element."""
    free = [axis for axis in range(query_padding.ndim) if axis not in axes]
    outer = [query_padding.shape[axis] for axis in free]
    rows, columns = ([x.shape[a] for a in axes] for x in (query_padding, key_padding))
    shown = np.zeros((*outer, 1, *rows, *columns), bool)
    for index in np.ndindex(*shown.shape):
        outside = dict(zip(free, index[: len(free)], strict=True))
        inside = index[len(free) + 1 :]
        row = outside | dict(zip(axes, inside[: len(axes)], strict=True))
        column = outside | dict(zip(axes, inside[len(axes) :], strict=True))
        order = range(query_padding.ndim)
        shown[index] = (
            query_padding[tuple(row[a] for a in order)]
            and key_padding[tuple(column[a] for a in order)]
        )
    return shown


@each_layout
def test_unfold_heads_inverts_fold_heads(
    rows: tuple[int, ...], columns: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    del columns
    heads = draw(2, *rows, N, H).astype("float32")  # JAX keeps no more
    folded = fold_heads(heads, axes)
    length = int(np.prod([heads.shape[axis] for axis in axes]))
    assert tuple(folded.shape[1:]) == (length, N, H)
    np.testing.assert_array_equal(unfold_heads(folded, heads, axes), heads)


@each_layout
def test_unfold_scores_inverts_fold_pairs(
    rows: tuple[int, ...], columns: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    query, key, _ = layout_heads(rows, columns)
    shape = score_shape((2, *rows, 1), (2, *columns, 1), N, axes)
    scores = draw(*shape).astype("float32")
    folded = fold_pairs(scores, query, key, axes)
    assert len(folded.shape) == 4
    np.testing.assert_array_equal(unfold_scores(folded, query, key, axes), scores)


@each_layout
def test_fold_padding_follows_fold_heads(
    rows: tuple[int, ...], columns: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    del columns
    padding = layout_padding(2, *rows, seed=1)
    heads = np.broadcast_to(padding[..., None, None], (2, *rows, N, H))
    folded = fold_padding(padding, heads, axes)
    np.testing.assert_array_equal(folded, fold_heads(heads, axes)[..., 0, 0])


def test_fold_padding_of_lower_rank_covers_the_axes_after_it() -> None:
    padding = layout_padding(2, 4, seed=1)
    heads = np.broadcast_to(padding[:, :, None, None, None], (2, 4, 5, N, H))
    for axes in ((1,), (2,), (1, 2), (2, 1)):
        folded = fold_padding(padding, heads, axes)
        np.testing.assert_array_equal(folded, fold_heads(heads, axes)[..., 0, 0])


@each_layout
@pytest.mark.parametrize("masks", ["none", "padding", "pairs", "both"])
def test_attention_over_axes_equals_the_oracle(
    rows: tuple[int, ...], columns: tuple[int, ...], axes: tuple[int, ...], masks: str
) -> None:
    heads = layout_heads(rows, columns)
    shape = score_shape((2, *rows, 1), (2, *columns, 1), N, axes)
    shown, mask = np.ones(shape, bool), MaskParts()
    if masks in ("padding", "both"):
        paddings = [
            layout_padding(2, *d, seed=i) for i, d in enumerate((rows, columns))
        ]
        shown = shown & layout_visible(paddings[0], paddings[1], axes)
        mask = mask._replace(query_padding=paddings[0], key_padding=paddings[1])
    if masks in ("pairs", "both"):
        mask = mask._replace(pairs=pairs(*shape))
        shown = shown & mask.pairs
    assert masks == "none" or not shown.all()
    expected = oracle.attend_axes(*heads, axes=axes, visible=shown)
    found = attend_over(
        axes, attend, *cast(heads, "float32"), mask=mask, return_scores=True
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(numbers(one), other, atol=3e-6)
    if masks != "none":
        bare, _ = attend_over(axes, attend, *cast(heads, "float32"), mask=MaskParts())
        assert np.abs(numbers(bare) - expected[0]).max() > 1e-2


@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (False, 2), (True, 3)])
def test_causal_and_window_over_one_of_several_axes(
    is_causal: bool, window: int | None
) -> None:
    for rows, columns, axis in (((4, 5), (4, 7), 2), ((5, 4), (7, 4), 1)):
        heads = layout_heads(rows, columns)
        shown = oracle.visible_pairs((1, 1, 5, 7), None, None, None, is_causal, window)
        expected, _ = oracle.attend_axes(*heads, axes=(axis,), visible=shown)
        mask = MaskWords(is_causal=is_causal, sliding_window=window).parts()
        found, _ = attend_over((axis,), attend, *cast(heads, "float32"), mask=mask)
        np.testing.assert_allclose(numbers(found), expected, atol=3e-6)


# TensorFlow's softmax, as Keras' layer calls it, refuses one axis of six on a CPU.
@pytest.mark.parametrize(
    ("rows", "columns", "axes"),
    [layout for layout in LAYOUTS if len(layout[0]) - len(layout[2]) < 2],
)
@pytest.mark.parametrize("shape", ["none", "lowest", "full"])
def test_the_layer_equals_keras_layer(
    rows: tuple[int, ...], columns: tuple[int, ...], axes: tuple[int, ...], shape: str
) -> None:
    options: dict[str, Any] = {
        "num_heads": N,
        "key_dim": H,
        "value_dim": V,
        "attention_axes": axes,
        "use_gate": True,
        "bias_initializer": keras.initializers.RandomNormal(stddev=0.5),
    }
    query, value = draw(2, *rows, 5, seed=1), draw(2, *columns, 7, seed=2)
    stock = keras.layers.MultiHeadAttention(**options)
    layer = keras_mha.MultiHeadAttention(**options)
    for one in (stock, layer):
        one.build(query.shape, value.shape)
    layer.set_weights(stock.get_weights())
    full = score_shape(query.shape, value.shape, N, axes)
    lowest = (*full[-2 * len(axes) :],)
    mask = {"none": None, "lowest": pairs(*lowest), "full": pairs(*full)}[shape]
    arguments = {"attention_mask": mask, "return_attention_scores": True}
    for one, other in zip(
        layer(query, value, **arguments), stock(query, value, **arguments), strict=True
    ):
        np.testing.assert_allclose(numbers(one), numbers(other), atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [MaskParts(upper=0), MaskParts(lower=-1, upper=1)],
    ids=["causal", "window"],
)
def test_causal_over_several_axes_raises(mask: MaskParts) -> None:
    text = (
        r"`use_causal_mask` and `sliding_window` need a single attention axis.* "
        rf"Received: attention_axes=\(1, 2\) and keys limited to distances from "
        rf"{mask.lower} to {mask.upper}"
    )
    with pytest.raises(ValueError, match=text):
        check_order(mask, (1, 2))


@pytest.mark.parametrize(
    ("axes", "rank", "expected"),
    [
        (None, 3, (1,)),
        (None, 5, (1, 2, 3)),
        (1, 4, (1,)),
        (-2, 4, (2,)),
        ([-2, 1], 4, (2, 1)),
        ((1, 3), 5, (1, 3)),
    ],
)
def test_resolve_axes(axes: Any, rank: int, expected: tuple[int, ...]) -> None:
    assert resolve_axes(axes, rank) == expected


@pytest.mark.parametrize(
    ("axes", "rank"),
    [
        (0, 3),
        (2, 3),
        (-1, 3),
        (-3, 3),
        (5, 3),
        (-5, 3),
        ((1, 1), 4),
        ((2, -2), 4),
        ((), 3),
    ],
)
def test_other_axes_are_refused(axes: Any, rank: int) -> None:
    text = (
        r"`attention_axes` must name different axes of the inputs, neither the first "
        rf"\(batch\) nor the last \(features\) of their {rank}\. "
        rf"Received: attention_axes={re.escape(str(axes))}"
    )
    with pytest.raises(ValueError, match=text):
        resolve_axes(axes, rank)


def test_score_shape() -> None:
    assert score_shape((2, 4, 5, 1), (2, 3, 7, 1), N, (1, 2)) == (2, N, 4, 5, 3, 7)
    assert score_shape((2, 4, 5, 1), (2, 3, 7, 1), N, (2, 1)) == (2, N, 5, 4, 7, 3)
    assert score_shape((None, 4, None, 1), (None, 4, 7, 1), N, (2,)) == (
        None,
        4,
        N,
        None,
        7,
    )
