"""Errors name what the user gave, and come as soon as shapes are known."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha import (
    CausalMask,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    PaddingMask,
    SegmentMask,
    TransformerDecoderBlock,
    TransformerEncoderBlock,
    dot_product_attention,
)
from tests.support.layers import normal

B, T, S, D, DM, N = 2, 7, 5, 6, 11, 2
INPUTS, MEMORY = normal(B, T, D, seed=1), normal(B, S, DM, seed=2)


def decoder() -> Any:
    return TransformerDecoderBlock(N, 4, cross_attention=True)


MEMORY_FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mask length": (
        {"memory_mask": np.ones((B, S + 1), bool)},
        ValueError,
        r"`memory_mask` must have the leading dimensions .*(2, 6)",
    ),
    "mask dtype": (
        {"memory_mask": np.ones((B, S), "float32")},
        TypeError,
        "`memory_mask` must be boolean",
    ),
    "rank": ({"memory": MEMORY[0]}, ValueError, r"`memory` must .*\(5, 11\)"),
    "rows": ({"memory": normal(3, S, DM)}, ValueError, r"`memory` must .*\(3, 5, 11\)"),
}


@pytest.mark.parametrize("fault", MEMORY_FAULTS)
def test_the_memory_goes_by_its_name(fault: str) -> None:
    changed, kind, text = MEMORY_FAULTS[fault]
    block = decoder()
    block(INPUTS, MEMORY)
    with pytest.raises(kind, match=text) as raised:
        block(INPUTS, **{"memory": MEMORY, **changed})
    assert "`value" not in str(raised.value)
    with pytest.raises(kind, match=text) as raised:
        block.init_cache(B, T, **{"memory": MEMORY, **changed})
    assert "`value" not in str(raised.value)


def test_a_foreign_cache_is_told_apart() -> None:
    block, attention = decoder(), MultiHeadSelfAttention(N)
    block(INPUTS, MEMORY)
    attention.build(INPUTS.shape)
    with pytest.raises(ValueError, match=r"cache of this block holds \['memory', 's"):
        block(INPUTS, cache=attention.init_cache(B, T))
    with pytest.raises(ValueError, match="A cache holds .*Received: .'memory', 'self'"):
        attention(INPUTS, cache=block.init_cache(B, T, MEMORY))
    cross = MultiHeadAttention(N, 3)
    cross.build(INPUTS.shape, MEMORY.shape)
    with pytest.raises(ValueError, match="A cache holds .*Received: .'memory', 'self'"):
        cross(INPUTS, cache=block.init_cache(B, T, MEMORY))


# Faults of one call, of every layer that takes the argument.
FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "bias shape": (
        {"attention_bias": np.zeros((T, T + 1), "float32")},
        ValueError,
        "`attention_bias` must broadcast",
    ),
    "bias rank": (
        {"attention_bias": np.zeros(T, "float32")},
        ValueError,
        "`attention_bias` must have the shape",
    ),
    "bias dtype": (
        {"attention_bias": np.zeros((T, T), "int32")},
        TypeError,
        "`attention_bias` must be floating",
    ),
    "bias function": ({"attention_bias": abs}, TypeError, "`attention_bias` must be a"),
    "heads": ({"head_mask": np.ones(N + 1)}, ValueError, "`head_mask` must have"),
    "heads of rows": (
        {"head_mask": np.ones((B + 1, N))},
        ValueError,
        "`head_mask` must have",
    ),
    "lengths": (
        {"attention_mask": PaddingMask(np.ones(B + 1, int))},
        ValueError,
        "The key padding of `attention_mask` must fit B=2",
    ),
    "segments": (
        {"attention_mask": SegmentMask(np.ones((B, T + 1), int))},
        ValueError,
        "The query segments of `attention_mask` must fit",
    ),
}
LAYERS = {
    "self": lambda: MultiHeadSelfAttention(N),
    "attention": lambda: MultiHeadAttention(N, 3),
    "encoder": lambda: TransformerEncoderBlock(N, 4),
    "decoder": lambda: TransformerDecoderBlock(N, 4),
}


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_raises_at_once_and_by_name(
    fault: str, layer: str, symbolic: bool
) -> None:
    changed, kind, text = FAULTS[fault]
    x: Any = keras.Input(batch_shape=INPUTS.shape) if symbolic else INPUTS
    inputs = [x, x] if layer == "attention" else [x]
    with pytest.raises(kind, match=re.escape(text)):
        LAYERS[layer]()(*inputs, **changed)


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
def test_caches_that_do_not_fit(symbolic: bool) -> None:
    layer = MultiHeadSelfAttention(N)
    layer.build(INPUTS.shape)
    x: Any = keras.Input(batch_shape=INPUTS.shape) if symbolic else INPUTS
    for cache, text in (
        (layer.init_cache(B, T - 1), "takes no more positions"),
        (layer.init_cache(B + 1, T), "of as many rows as the inputs"),
        ({"key": 1}, "A cache holds"),
    ):
        with pytest.raises(ValueError, match=text):
            layer(x, cache=cache)
    with pytest.raises(ValueError, match="With a `cache` .*Received: attention_bias"):
        layer(x, cache=layer.init_cache(B, T), attention_bias=np.zeros((T, T), "f"))
    cross = MultiHeadAttention(N, 3)
    cross.build(INPUTS.shape, MEMORY.shape)
    with pytest.raises(ValueError, match="A `cache` of projected keys has no order"):
        cross(x, cache=cross.init_cache(MEMORY), use_causal_mask=True)


def test_rows_of_keys_and_values() -> None:
    layer = MultiHeadAttention(N, 3)
    for symbolic in (False, True):
        x, y, z = (
            keras.Input(batch_shape=a.shape) if symbolic else a
            for a in (INPUTS, MEMORY, normal(B + 1, S, DM))
        )
        with pytest.raises(ValueError, match=r"`value` and `key`.*\(3, 5, 11\)"):
            layer(x, y, z)


@pytest.mark.parametrize("layer", ["self", "attention"])
def test_odd_heads_cannot_turn_which_is_known_when_they_are_built(layer: str) -> None:
    made: Any = (
        MultiHeadSelfAttention(N, position="rotary")
        if layer == "self"
        else MultiHeadAttention(N, 3, position="rotary")
    )
    with pytest.raises(ValueError, match="Features turn in pairs.*H=3"):
        made.build(*[INPUTS.shape] * (1 if layer == "self" else 2))


@pytest.mark.parametrize(
    "mask", [PaddingMask(np.array([1, 2])), SegmentMask(np.arange(3))]
)
@pytest.mark.parametrize("axes", [(1, 2), (2,)])
def test_several_axes_have_no_lengths(axes: tuple[int, ...], mask: Any) -> None:
    layer = MultiHeadAttention(N, 3, attention_axes=axes)
    x = normal(B, 3, 3, D)
    with pytest.raises(ValueError, match="of `attention_mask` need inputs .B, T, D."):
        layer(x, x, attention_mask=mask)
    with pytest.raises(ValueError, match="need a single attention axis"):
        MultiHeadAttention(N, 3)(x, x, attention_mask=CausalMask())


@pytest.mark.parametrize("layer", LAYERS)
def test_lengths_count_as_padding(layer: str) -> None:
    made, lengths = LAYERS[layer](), np.array([3, T])
    real = np.arange(T) < lengths[:, None]
    inputs = np.where(real[..., None], INPUTS, 1.0).astype("float32")
    poisoned = np.where(real[..., None], INPUTS, np.nan).astype("float32")
    count = 2 if layer == "attention" else 1
    mask = PaddingMask(lengths, query_lengths=lengths)
    found = made(*[inputs] * count, attention_mask=mask)
    names = ("query_mask", "value_mask") if count == 2 else ("mask",)
    expected = made(*[inputs] * count, **dict.fromkeys(names, real))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if layer in ("self", "attention"):
        outputs = made(*[poisoned] * count, attention_mask=mask)
        np.testing.assert_allclose(outputs, expected, atol=1e-5)
    if layer == "attention":
        carried = keras.src.backend.common.masking.get_keras_mask(found)
        np.testing.assert_array_equal(carried, real)


def test_segment_ids_go_by_their_name() -> None:
    heads = normal(B, T, N, 3)
    for ids, kind in (
        (np.ones((B, T), "float32"), TypeError),
        (np.ones((B, T + 1), "int32"), ValueError),
    ):
        with pytest.raises(kind, match="`segment_ids` must"):
            dot_product_attention(heads, heads, heads, segment_ids=ids)
