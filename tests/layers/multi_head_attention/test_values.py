"""MultiHeadAttention against the NumPy oracle: values, gradients, padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_mha import MultiHeadAttention
from tests.support import reference as oracle
from tests.support.attention_cases import cast, check_slopes, draw, numbers
from tests.support.layer_oracle import visible_in_call
from tests.support.layers import made, normal
from tests.support.multi_head_attention import (
    DQ,
    DV,
    KEY_MASK,
    MASKS,
    OPTIONS,
    PADDING,
    QUERY_MASK,
    VALUE_MASK,
    B,
    H,
    N,
    S,
    T,
    V,
    carrying,
    differentiate,
    expected,
    inputs,
    layer_of,
)

CASES = [("plain", mask) for mask in MASKS] + [
    (options, mask)
    for options in OPTIONS
    if options != "plain"
    for mask in ("none", "all")
]
each_case = pytest.mark.parametrize(("options", "mask"), CASES)


@each_case
def test_forward_equals_the_oracle(options: str, mask: str) -> None:
    layer, arrays = layer_of(options), inputs()
    found = layer(*arrays, **MASKS[mask], return_attention_scores=True)
    for one, other in zip(found, expected(layer, arrays, MASKS[mask]), strict=True):
        np.testing.assert_allclose(numbers(one), other, atol=2e-5)
    # Without the scores the same outputs come.
    np.testing.assert_allclose(layer(*arrays, **MASKS[mask]), found[0], atol=1e-6)


@each_case
def test_gradients_equal_the_oracles_differences(options: str, mask: str) -> None:
    layer, arrays = layer_of(options, dtype="float64"), inputs("float64")
    weights = oracle.layer_weights(layer)
    visible = visible_in_call(
        (B, N, T, S), layer.get_config()["sliding_window"], **MASKS[mask]
    )

    def function(query: Any, value: Any, key: Any, *given: Any) -> np.ndarray:
        named = dict(zip(weights, given, strict=True))
        return oracle.multi_head_attention(named, query, value, key, visible)[0]

    outputs, found = differentiate(layer, arrays, **MASKS[mask])
    moved = [*arrays, *weights.values()]
    np.testing.assert_allclose(outputs, function(*moved), atol=1e-6)
    upstream = draw(*outputs.shape, seed=7)
    check_slopes(found, function, moved, upstream, tolerance=2e-6)


@pytest.mark.parametrize("name", sorted(MASKS.keys() - {"none"}))
def test_the_comparison_sees_a_dropped_mask(name: str) -> None:
    layer, arrays = layer_of(), inputs()
    dropped = numbers(layer(*arrays))
    assert np.abs(dropped - expected(layer, arrays, MASKS[name])[0]).max() > 1e-2


@pytest.mark.parametrize("name", oracle.layer_weights(layer_of("gate")))
def test_the_comparison_sees_a_changed_weight(name: str) -> None:
    layer, arrays = layer_of("gate"), inputs()
    weights = oracle.layer_weights(layer)
    changed = weights | {name: weights[name] + draw(*weights[name].shape, seed=5)}
    found = numbers(layer(*arrays))
    outputs, _ = oracle.multi_head_attention(changed, *arrays)
    difference = np.abs(found - outputs).max()
    # The keys' bias adds the same to all scores of a row, which softmax ignores.
    assert difference < 1e-5 if name == "key/bias" else difference > 1e-2


def test_key_defaults_to_value() -> None:
    layer = made(MultiHeadAttention(N, H), (B, T, DQ), (B, S, DV))
    query, value, _ = inputs()
    outputs, _ = oracle.multi_head_attention(oracle.layer_weights(layer), query, value)
    np.testing.assert_allclose(layer(query, value), outputs, atol=2e-5)
    np.testing.assert_array_equal(layer(query, value, value), layer(query, value))


@pytest.mark.parametrize(("query_length", "key_length"), [(1, S), (T, 1), (1, 1)])
def test_lengths_of_one(query_length: int, key_length: int) -> None:
    query, value, key = inputs()
    arrays = [query[:, :query_length], value[:, :key_length], key[:, :key_length]]
    visible = oracle.visible_pairs((B, N, query_length, key_length), is_causal=True)
    layer = layer_of("gate")
    outputs, _ = oracle.multi_head_attention(
        oracle.layer_weights(layer), *arrays, visible=visible
    )
    found = layer(*arrays, use_causal_mask=True)
    np.testing.assert_allclose(found, outputs, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [{"key_dim": 1, "value_dim": V}, {"value_dim": 1}, {"output_shape": (N, 1)}],
)
def test_sizes_of_one_where_the_length_equals_the_heads(
    options: dict[str, Any],
) -> None:
    # `keras.ops.add` takes a bias (N, 1) for one of the positions (B, N, ...).
    arrays = [normal(B, N, DQ), normal(B, N, DV, seed=1)]
    layer: Any = MultiHeadAttention(**{"num_heads": N, "key_dim": H, **options})
    made(layer, *(array.shape for array in arrays))
    outputs, _ = oracle.multi_head_attention(oracle.layer_weights(layer), *arrays)
    np.testing.assert_allclose(layer(*arrays), outputs, atol=2e-5)


@pytest.mark.parametrize(
    "shape", [(B, 4, T, DQ), (B, 2, 4, T, DQ)], ids=["BATD", "BCATD"]
)
def test_several_axes_with_padding_equal_the_oracle(shape: tuple[int, ...]) -> None:
    axes = (len(shape) - 3, len(shape) - 2)
    query, value = normal(*shape), normal(*shape[:-3], 3, S, DV, seed=1)
    layer = made(
        MultiHeadAttention(N, H, attention_axes=axes), query.shape, value.shape
    )
    query_mask, value_mask = (
        np.arange(x.size // x.shape[-1]) % 3 > 0 for x in (query, value)
    )
    query_mask = query_mask.reshape(query.shape[:-1])
    value_mask = value_mask.reshape(value.shape[:-1])
    visible = (
        query_mask[..., None, :, :, None, None]
        & value_mask[..., None, None, None, :, :]
    )
    outputs, scores = oracle.multi_head_attention(
        oracle.layer_weights(layer), query, value, visible=visible, axes=axes
    )
    found = layer(
        carrying(query, query_mask),
        carrying(value, value_mask),
        return_attention_scores=True,
    )
    np.testing.assert_allclose(found[0], outputs, atol=2e-5)
    np.testing.assert_allclose(found[1], scores, atol=2e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("mask", ["padding", "all"])
def test_poison_in_padding_is_harmless(poison: float, mask: str) -> None:
    layer, clean, dirty = layer_of("gate"), inputs(), inputs()
    dirty[0][~QUERY_MASK] = poison
    # Values and keys are hidden together: each where either's mask says so.
    dirty[1][~(VALUE_MASK & KEY_MASK)] = dirty[2][~(VALUE_MASK & KEY_MASK)] = poison
    outputs, found = differentiate(layer, dirty, **MASKS[mask])
    same, wanted = differentiate(layer, clean, **MASKS[mask])
    np.testing.assert_array_equal(outputs, same)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    # Hidden positions get no gradient.
    assert np.all(found[0][~QUERY_MASK] == 0)
    assert np.all(found[1][~(VALUE_MASK & KEY_MASK)] == 0)


@pytest.mark.parametrize("poison", [0.0, np.nan, 1e30])
def test_longer_padding_changes_no_real_position(poison: float) -> None:
    layer, arrays = layer_of("gate"), inputs()
    short = layer(*arrays, **PADDING, use_causal_mask=True)
    longer = [
        np.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=poison) for x in arrays
    ]
    masks = {name: np.pad(mask, ((0, 0), (0, 4))) for name, mask in PADDING.items()}
    long = numbers(layer(*longer, **masks, use_causal_mask=True))
    np.testing.assert_allclose(long[:, :T], short, atol=1e-6)


def test_a_query_that_sees_no_key_gives_the_bias_and_no_gradient() -> None:
    layer, arrays = layer_of("gate"), inputs()
    empty = np.zeros((T, S), bool)
    outputs, found = differentiate(layer, arrays, attention_mask=empty)
    bias = oracle.layer_weights(layer)["attention_output/bias"]
    np.testing.assert_allclose(outputs, np.broadcast_to(bias, outputs.shape))
    names = ["query", "value", "key", *oracle.layer_weights(layer)]
    nonzero = [n for n, g in zip(names, found, strict=True) if np.any(g != 0)]
    assert nonzero == ["attention_output/bias"]


@st.composite
def calls(draw_from: st.DrawFn) -> dict[str, Any]:
    size = st.integers(1, 4)
    # Head sizes of one have a test of their own.
    head = st.integers(2, 5)
    return {
        "sizes": [draw_from(head if name == "h" else size) for name in "btsnhqvk"],
        "options": {
            "value_dim": draw_from(st.none() | head),
            "use_bias": draw_from(st.booleans()),
            "use_gate": draw_from(st.booleans()),
            "output_shape": draw_from(st.none() | size | st.tuples(size, head)),
            "sliding_window": draw_from(st.none() | size),
        },
        "use_causal_mask": draw_from(st.booleans()),
        "paddings": draw_from(st.tuples(*[st.booleans()] * 3)),
        "pairs": draw_from(
            st.sampled_from([None, "TS", "BTS", "B1TS", "1NTS", "BNTS"])
        ),
        "own_keys": draw_from(st.booleans()),
        "seed": draw_from(st.integers(0, 99)),
    }


@settings(max_examples=40)
@given(calls())
def test_any_call_equals_the_oracle(call: dict[str, Any]) -> None:
    b, t, s, n, h, dq, dv, dk = call["sizes"]
    length = {"B": b, "N": n, "T": t, "S": s, "1": 1}
    generator = np.random.default_rng(call["seed"])
    query, value, key = (
        generator.normal(size=x) for x in ((b, t, dq), (b, s, dv), (b, s, dk))
    )
    arrays = [query, value, key] if call["own_keys"] else [query, value]
    layer = MultiHeadAttention(n, h, **call["options"], dtype="float64")
    made(layer, *(x.shape for x in arrays), seed=call["seed"])

    masks: dict[str, Any] = {}
    names = ["query_mask", "value_mask", "key_mask"]
    for name, asked, x in zip(
        names, call["paddings"], (query, value, key), strict=True
    ):
        if asked:
            masks[name] = generator.random(x.shape[:2]) < 0.7
    visible = oracle.visible_pairs(
        (b, n, t, s),
        masks.get("query_mask"),
        masks.get("value_mask"),
        is_causal=call["use_causal_mask"],
        sliding_window=call["options"]["sliding_window"],
    ) & oracle.visible_pairs((b, n, t, s), key_padding=masks.get("key_mask"))
    if call["pairs"] is not None:
        pair = generator.random([length[letter] for letter in call["pairs"]]) < 0.6
        masks["attention_mask"] = pair
        visible = visible & (pair[:, None] if pair.ndim == 3 else pair)

    found = layer(
        *cast(arrays, "float64"),
        **masks,
        use_causal_mask=call["use_causal_mask"],
        return_attention_scores=True,
    )
    wanted = oracle.multi_head_attention(
        oracle.layer_weights(layer), *arrays, visible=visible
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_padding_masks_of_different_rank_combine() -> None:
    query = normal(3, 3, 3, DQ)
    layer = MultiHeadAttention(2, 3, attention_axes=(1, 2))
    short, full = np.eye(3, dtype=bool), np.ones((3, 3, 3), bool)
    full[:, :, 2] = False
    masks = {"value_mask": short, "key_mask": full}
    expanded = {"value_mask": short[:, :, None] & full, "key_mask": full}
    np.testing.assert_allclose(
        layer(query, query, query, **masks),
        layer(query, query, query, **expanded),
        atol=1e-6,
    )
