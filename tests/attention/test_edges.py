"""Sizes of zero, and lengths that no position has, on every implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from keras import ops

import keras_mha
from keras_mha import PaddingMask, dot_product_attention
from keras_mha.attention.bias import all_distances, table
from tests.support.attention_cases import BACKEND, MODES, value_and_gradients

LENGTHS = np.array([-3, 0, 2, 13, 14, 2**31 - 1, -(2**31)])
# As wide as arrays come: what is beyond int32 must not wrap around.
WIDE = np.array([-(2**32) + 2, 0, 2, 13, 14, 2**40, 2**32 + 1])
B, T, S, N, K, H, V = len(LENGTHS), 11, 13, 4, 2, 3, 5
EMPTY = {
    "no keys": (2, T, 0),
    "no queries": (2, 0, S),
    "neither": (2, 0, 0),
    "no rows": (0, T, S),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"sliding_window": 2},
    "sinks": {"sinks": np.ones(N, "float32")},
    "distances": {"bias": lambda distances: ops.cast(distances, "float32")[None]},
    "soft cap": {"logits_soft_cap": 2.0},
    "dropout": {"dropout": 0.5, "seed": 3},
}
IMPLEMENTATIONS = ("reference", "blockwise", "portable", "auto")


def draw_heads(B: int, T: int, S: int) -> list[Any]:
    random = np.random.default_rng(3)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
    return [ops.convert_to_tensor(random.normal(size=s), "float32") for s in shapes]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lengths_count_as_far_as_there_are_positions(
    implementation: str, mode: str
) -> None:
    tensors, upstream = draw_heads(B, T, S), [np.ones((B, T, N, V), "float32")]

    def attend(mask_of: Any) -> Any:
        return value_and_gradients(
            lambda *heads: dot_product_attention(
                *heads, mask=mask_of(), implementation=implementation
            ),
            tensors,
            upstream,
            mode,
        )

    kept = np.clip(LENGTHS, 0, None)
    pairs = (np.arange(T) < kept[::-1, None])[:, :, None]
    pairs = pairs & (np.arange(S) < kept[:, None])[:, None]
    expected = attend(lambda: pairs)
    assert not np.all(expected[0][0] == 0)
    found = attend(lambda: PaddingMask(LENGTHS, query_lengths=LENGTHS[::-1].copy()))
    for one, other in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_lengths_beyond_int32_do_not_wrap_around() -> None:
    # Elsewhere Keras makes them int32 before we see them.
    is_wide = BACKEND == "tensorflow"
    tensor = ops.convert_to_tensor(WIDE, dtype="int64") if is_wide else WIDE
    mask = PaddingMask(WIDE, query_lengths=tensor)
    for lengths in (mask.key_lengths, mask.query_lengths):
        found = ops.convert_to_numpy(lengths)
        np.testing.assert_array_equal(found, np.clip(WIDE, 0, 2**31 - 1))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32"])
def test_lengths_of_every_width(dtype: str) -> None:
    lengths = np.array([100, 3, 0]).astype(dtype)
    found = ops.convert_to_numpy(PaddingMask(lengths).key_lengths)
    np.testing.assert_array_equal(found, [100, 3, 0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", EMPTY)
def test_where_there_is_nothing_the_outputs_are_zero(
    sizes: str, implementation: str, options: str, mode: str
) -> None:
    B, T, S = EMPTY[sizes]
    tensors = draw_heads(B, T, S)

    def attend(*heads: Any) -> Any:
        return dot_product_attention(
            *heads, implementation=implementation, **OPTIONS[options]
        )

    if implementation == "portable" and options == "dropout":
        with pytest.raises(ValueError, match="is for inference and has no dropout"):
            attend(*tensors)
        return
    outputs, gradients = value_and_gradients(
        attend,
        tensors,
        [np.ones((B, T, N, V), "float32")],
        mode,
    )
    np.testing.assert_array_equal(outputs[0], np.zeros((B, T, N, V)))
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(tensor.shape))


@pytest.mark.parametrize("sizes", EMPTY)
@pytest.mark.parametrize("implementation", ["reference", "portable"])
@pytest.mark.parametrize("masked", ["mask", "pairs", "segments"])
def test_where_there_is_nothing_masks_hide_nothing(
    masked: str, sizes: str, implementation: str
) -> None:
    B, T, S = EMPTY[sizes]
    mask: dict[str, Any] = {
        "mask": {"mask": PaddingMask(np.full(B, 2), query_lengths=np.full(B, 3))},
        "pairs": {"mask": np.ones((B, 1, T, S), bool)},
        "segments": {"segment_ids": (np.ones((B, T), int), np.ones((B, S), int))},
    }[masked]
    found = dot_product_attention(
        *draw_heads(B, T, S), implementation=implementation, **mask
    )
    np.testing.assert_array_equal(found, np.zeros((B, T, N, V)))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="has unknown sizes")
@pytest.mark.parametrize("implementation", ["auto", "blockwise"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", EMPTY)
def test_sizes_that_turn_out_to_be_zero(
    sizes: str, options: str, implementation: str
) -> None:
    B, T, S = EMPTY[sizes]
    tensors = draw_heads(B, T, S)
    outputs, gradients = value_and_gradients(
        lambda *heads: dot_product_attention(
            *heads, implementation=implementation, **OPTIONS[options]
        ),
        tensors,
        [np.ones((B, T, N, V), "float32")],
        "graph",
        shapes=[(None, None, *tensor.shape[2:]) for tensor in tensors],
    )
    np.testing.assert_array_equal(outputs[0], np.zeros((B, T, N, V)))
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(tensor.shape))


def test_scores_of_nothing() -> None:
    _, scores = dot_product_attention(*draw_heads(2, T, 0), return_scores=True)
    assert tuple(scores.shape) == (2, N, T, 0)
    with pytest.raises(ValueError, match="computes no table of scores"):
        dot_product_attention(
            *draw_heads(2, T, 0), return_scores=True, implementation="blockwise"
        )


@pytest.mark.parametrize(("T", "S"), [(0, 3), (3, 0), (0, 0)])
def test_tables_of_nothing(T: int, S: int) -> None:
    distances = all_distances(T, S)
    assert tuple(distances.shape) == (max(T + S - 1, 0),)
    assert tuple(table(ops.cast(distances, "float32")[None], T, S).shape) == (1, T, S)


@pytest.mark.parametrize(
    "shape", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 0, 0, 4)]
)
@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2)])
def test_several_axes_of_which_one_is_empty(
    axes: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    layer = keras_mha.MultiHeadAttention(2, 3, attention_axes=axes)
    layer.build(shape, shape)
    inputs = ops.ones(shape)
    assert tuple(layer(inputs, inputs).shape) == shape
    if BACKEND == "tensorflow":
        unknown = (*[None] * (len(shape) - 1), shape[-1])
        (found,), _ = value_and_gradients(
            lambda x: layer(x, x, query_mask=ops.ones(ops.shape(x)[:2], "bool")),
            [inputs],
            [np.ones(shape, "float32")],
            "graph",
            shapes=[unknown],
        )
        assert found.shape == shape


@pytest.mark.parametrize("position", [None, "rotary", "alibi", "relative"])
def test_attention_to_nothing_gives_the_output_bias(position: str | None) -> None:
    layer = keras_mha.MultiHeadAttention(2, 4, position=position)
    layer.build((2, 3, 5), (2, 0, 7))
    bias = np.arange(5, dtype="float32")
    layer._output_dense.bias.assign(bias)
    found = layer(np.ones((2, 3, 5), "float32"), np.ones((2, 0, 7), "float32"))
    found = ops.convert_to_numpy(found)
    np.testing.assert_array_equal(found, np.broadcast_to(bias, (2, 3, 5)))
    assert layer(
        np.ones((2, 0, 5), "float32"), np.ones((2, 3, 7), "float32")
    ).shape == (2, 0, 5)
