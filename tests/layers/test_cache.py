"""Decoding with a cache: chunks and single steps equal one causal call over all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import MultiHeadAttention, MultiHeadSelfAttention
from tests.support.layers import normal, randomize
from tests.support.score_cases import (
    COLUMNS,
    CROSS_INPUTS,
    DQ,
    OPTIONS,
    B,
    H,
    N,
    S,
    made,
    some,
)

T = 11
INPUTS = normal(B, T, DQ, seed=1)
LEFT_PADDED = np.arange(T) >= np.array([[4], [0]])
WINDOWED = ["window", "gemma", "bloom"]
each_mode = pytest.mark.parametrize("mode", ["eager", "graph", "xla"])


def step_of(layer: Any, mode: str = "eager") -> Any:
    """`layer` as a function of inputs, cache and mask."""

    def step(inputs: Any, cache: Any, mask: Any = None) -> Any:
        return layer(inputs, cache=cache, mask=mask)

    return step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")


def decode(
    layer: Any,
    chunks: Sequence[int],
    mask: np.ndarray | None = None,
    mode: str = "eager",
    max_length: int = T,
) -> np.ndarray:
    """Outputs of all positions, which come in chunks of these lengths."""
    step, cache = step_of(layer, mode), layer.init_cache(B, max_length)
    outputs, start = [], 0
    for length in chunks:
        place = slice(start, start + length)
        hidden = None if mask is None else tf.constant(mask[:, place])
        some_outputs, cache = step(tf.constant(INPUTS[:, place]), cache, hidden)
        outputs.append(some_outputs)
        start += length
    assert start == T
    assert int(cache["length"]) == T
    return np.concatenate(outputs, axis=1)


# The same values as at once.


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left_padded"])
@pytest.mark.parametrize("options", OPTIONS)
def test_chunks_and_single_steps_equal_one_causal_call(
    options: str, padded: bool
) -> None:
    layer, mask = made("self", options), LEFT_PADDED if padded else None
    expected = layer(INPUTS, mask=mask, use_causal_mask=True)
    for chunks in ([4, 3, 1, 1, 1, 1], [1] * T, [T]):
        np.testing.assert_allclose(decode(layer, chunks, mask), expected, atol=1e-5)
    assert np.abs(expected - layer(INPUTS, mask=mask)).max() > 0.01


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("options", ["grouped", "gemma", "t5", "bloom", "alibi"])
def test_compiled_steps_equal_one_causal_call(options: str, mode: str) -> None:
    layer = made("self", options)
    expected = layer(INPUTS, mask=LEFT_PADDED, use_causal_mask=True)
    found = decode(layer, [5, 1, 1, 1, 1, 1, 1], LEFT_PADDED, mode)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("options", ["plain", "gemma", "t5"])
def test_either_implementation_decodes(
    options: str, flash: bool, jit_compile: bool
) -> None:
    layer = made("self", options, flash_attention=flash, jit_compile=jit_compile)
    expected = made("self", options)(INPUTS, use_causal_mask=True)
    np.testing.assert_allclose(decode(layer, [4, 5, 1, 1]), expected, atol=1e-5)


@pytest.mark.parametrize("options", ["plain", "gemma"])
def test_a_cache_may_be_longer_than_what_comes(options: str) -> None:
    layer = made("self", options)
    expected = layer(INPUTS, use_causal_mask=True)
    found = decode(layer, [4, 5, 1, 1], max_length=T + 6)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 3, T, T + 1, T + 5])
def test_windows_of_every_size(window: int) -> None:
    layer = made("self", sliding_window=window, position="rotary")
    expected = layer(INPUTS, use_causal_mask=True)
    for chunks in ([1] * T, [4, 5, 1, 1], [T]):
        np.testing.assert_allclose(decode(layer, chunks), expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_a_cache_has_the_layers_compute_dtype(policy: str) -> None:
    layer = made("self", "gemma", dtype=policy)
    cache = layer.init_cache(B, T)
    assert cache["key"].dtype == cache["value"].dtype == layer.compute_dtype
    expected = tf.cast(layer(INPUTS, use_causal_mask=True), "float32")
    tolerance = {"float64": 1e-6, "mixed_float16": 5e-3}.get(policy, 5e-2)
    found = decode(layer, [4, 5, 1, 1])
    np.testing.assert_allclose(found.astype("float32"), expected, atol=tolerance)


def test_heads_are_masked_with_a_cache_too() -> None:
    layer, keep = made("self"), normal(B, N, seed=6)
    outputs, _ = layer(INPUTS, cache=layer.init_cache(B, T), head_mask=keep)
    expected = layer(INPUTS, use_causal_mask=True, head_mask=keep)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_a_carried_mask_is_read() -> None:
    layer, masking = made("self"), keras.layers.Masking()
    inputs = np.where(LEFT_PADDED[..., None], INPUTS, 0.0).astype("float32")
    outputs, cache = layer(masking(inputs), cache=layer.init_cache(B, T))
    expected = layer(inputs, mask=LEFT_PADDED, use_causal_mask=True)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_array_equal(cache["mask"], LEFT_PADDED)


def test_nan_in_padding_stays_there() -> None:
    layer, cache = made("self", "gemma"), None
    poisoned = np.where(LEFT_PADDED[..., None], INPUTS, np.float32(np.nan))
    cache = layer.init_cache(B, T)
    first, cache = layer(poisoned[:, :6], cache=cache, mask=LEFT_PADDED[:, :6])
    second, _ = layer(poisoned[:, 6:], cache=cache)
    expected = layer(INPUTS, mask=LEFT_PADDED, use_causal_mask=True)
    np.testing.assert_allclose(
        np.concatenate([first, second], axis=1), expected, atol=1e-5
    )


def test_gradients_reach_the_inputs_through_the_cache() -> None:
    layer, inputs = made("self", "t5"), tf.constant(INPUTS)

    def slope(function: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(function() * normal(B, T, 5, seed=8))
        return tape.gradient(loss, inputs)

    def in_chunks() -> Any:
        cache = layer.init_cache(B, T)
        first, cache = layer(inputs[:, :6], cache=cache)
        second, cache = layer(inputs[:, 6:], cache=cache)
        return tf.concat([first, second], axis=1)

    np.testing.assert_allclose(
        slope(in_chunks),
        slope(lambda: layer(inputs, use_causal_mask=True)),
        atol=1e-5,
    )


# What a cache is.


@pytest.mark.parametrize("options", OPTIONS)
def test_a_plain_dictionary_whose_structure_never_changes(options: str) -> None:
    layer = made("self", options)
    cache = layer.init_cache(B, T)
    first = tf.nest.map_structure(lambda x: (tuple(x.shape), x.dtype), cache)
    heads, kept = layer.num_key_value_heads, cache["mask"].shape[1]
    width = layer.value_dim or H
    assert first == {
        "key": ((B, kept, heads, H), tf.float32),
        "value": ((B, kept, heads, width), tf.float32),
        "mask": ((B, kept), tf.bool),
        "length": ((), tf.int32),
    }
    for length in (4, 1):
        given = cache
        _, cache = layer(INPUTS[:, :length], cache=given)
        assert type(cache) is dict
        assert cache is not given
        found = tf.nest.map_structure(lambda x: (tuple(x.shape), x.dtype), cache)
        assert found == first


def test_a_call_leaves_the_cache_that_it_was_given_as_it_was() -> None:
    layer = made("self", "gemma")
    cache = layer.init_cache(B, T)
    layer(INPUTS[:, :3], cache=cache)
    assert int(cache["length"]) == 0
    assert not np.any(cache["mask"])
    assert not np.any(cache["key"])


@pytest.mark.parametrize("options", ["plain", "gemma", "t5"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_single_steps_are_traced_once(options: str, jit_compile: bool) -> None:
    layer = made("self", options)
    step = step_of(layer, "xla" if jit_compile else "graph")
    cache = layer.init_cache(B, T)
    for place in range(T):
        _, cache = step(tf.constant(INPUTS[:, place : place + 1]), cache)
        assert step.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("options", ["plain", "gemma", "t5"])
def test_decoding_in_a_loop(options: str, jit_compile: bool) -> None:
    layer, inputs = made("self", options), tf.constant(INPUTS)

    @tf.function(jit_compile=jit_compile)
    def generate(inputs: tf.Tensor, cache: Any) -> tf.Tensor:
        steps = tf.TensorArray(tf.float32, T, element_shape=(B, 1, layer_width(layer)))

        def body(place: Any, steps: Any, cache: Any) -> Any:
            token = tf.slice(inputs, (0, place, 0), (B, 1, DQ))
            outputs, cache = layer(token, cache=cache)
            return place + 1, steps.write(place, outputs), cache

        start = (tf.constant(0), steps, cache)
        _, steps, _ = tf.while_loop(lambda place, *_: place < T, body, start)
        return tf.transpose(steps.stack()[:, :, 0], (1, 0, 2))

    found = generate(inputs, layer.init_cache(B, T))
    np.testing.assert_allclose(found, layer(inputs, use_causal_mask=True), atol=1e-5)


def layer_width(layer: MultiHeadSelfAttention) -> int:
    return layer.compute_output_shape((B, T, DQ))[-1] or 0


def test_a_cache_is_made_inside_a_function() -> None:
    layer = made("self", "gemma")

    @tf.function
    def both(inputs: tf.Tensor) -> tf.Tensor:
        first, cache = layer(inputs[:, :6], cache=layer.init_cache(B, T))
        return tf.concat([first, layer(inputs[:, 6:], cache=cache)[0]], axis=1)

    expected = layer(INPUTS, use_causal_mask=True)
    np.testing.assert_allclose(both(tf.constant(INPUTS)), expected, atol=1e-5)


def test_the_batch_size_may_be_a_tensor() -> None:
    layer = made("self")

    @tf.function(input_signature=[tf.TensorSpec((None, None, DQ))])
    def last(inputs: tf.Tensor) -> tf.Tensor:
        cache = layer.init_cache(tf.shape(inputs)[0], T)
        _, cache = layer(inputs[:, :-1], cache=cache)
        return layer(inputs[:, -1:], cache=cache)[0]

    expected = layer(INPUTS, use_causal_mask=True)[:, -1:]
    np.testing.assert_allclose(last(INPUTS), expected, atol=1e-5)


@pytest.mark.parametrize("options", ["plain", "gemma"])
def test_a_functional_model_takes_and_returns_a_cache(options: str) -> None:
    layer = made("self", options)
    given = layer.init_cache(B, T)
    symbols = {
        name: keras.Input(batch_shape=tuple(each.shape), dtype=each.dtype.name)
        for name, each in given.items()
    }
    inputs = keras.Input((None, DQ))
    outputs, cache = layer(inputs, cache=symbols)
    assert outputs.shape == (None, None, DQ)
    assert {name: tuple(each.shape) for name, each in cache.items()} == {
        name: tuple(each.shape) for name, each in given.items()
    }
    model = keras.Model([inputs, symbols], [outputs, cache])
    first, given = model([tf.constant(INPUTS[:, :6]), given])
    second, _ = model([tf.constant(INPUTS[:, 6:]), given])
    np.testing.assert_allclose(
        np.concatenate([first, second], axis=1),
        layer(INPUTS, use_causal_mask=True),
        atol=1e-5,
    )


# Windows keep little; without one, too much is NaN.


@pytest.mark.parametrize("options", WINDOWED)
def test_a_windows_cache_keeps_one_position_less_than_the_window(options: str) -> None:
    layer = made("self", options)
    window = layer.get_config()["sliding_window"]
    for max_length, kept in ((T, window - 1), (1000, window - 1), (1, 1)):
        assert layer.init_cache(B, max_length)["key"].shape[1] == kept
    assert made("self").init_cache(B, 1000)["key"].shape[1] == 1000


@each_mode
@pytest.mark.parametrize("options", WINDOWED)
def test_with_a_window_decoding_goes_on_past_max_length(
    options: str, mode: str
) -> None:
    layer = made("self", options)
    expected = layer(INPUTS, use_causal_mask=True)
    found = decode(layer, [4, 1, 1, 1, 1, 1, 1, 1], mode=mode, max_length=4)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@each_mode
@pytest.mark.parametrize("options", ["plain", "t5", "window"])
@pytest.mark.parametrize("chunks", [[3, 1, 1], [3, 2]])
def test_past_max_length_the_outputs_are_nan(
    chunks: list[int], options: str, mode: str
) -> None:
    # The window of 6 would show more than a cache of 4 positions holds.
    others = {"sliding_window": 6} if options == "window" else {}
    layer = made("self", "plain" if options == "window" else options, **others)
    step, cache = step_of(layer, mode), layer.init_cache(B, 4)
    expected, start = layer(INPUTS, use_causal_mask=True), 0
    for length in chunks:
        place = slice(start, start + length)
        outputs, cache = step(tf.constant(INPUTS[:, place]), cache)
        start += length
        if start <= 4:
            np.testing.assert_allclose(outputs, expected[:, place], atol=1e-5)
        else:
            assert np.isnan(outputs).all()
    assert start == 5


@each_mode
def test_a_chunk_longer_than_the_cache_is_refused(mode: str) -> None:
    layer = made("self")
    text = r"no more positions in one call .* Received: 5 positions and a cache for 4"
    with pytest.raises(ValueError, match=text):
        step_of(layer, mode)(tf.constant(INPUTS[:, :5]), layer.init_cache(B, 4))


# Keys and values of another sequence.


@pytest.mark.parametrize("options", ["plain", "grouped", "rms", "gate", "sinks"])
@pytest.mark.parametrize("masked", [False, True])
def test_projected_keys_and_values_serve_many_queries(
    options: str, masked: bool
) -> None:
    layer = made("cross", options)
    query, value, key = CROSS_INPUTS
    masks = {"value_mask": COLUMNS, "key_mask": some(B, S)} if masked else {}
    expected = layer(query, value, key, **masks)
    cache = layer.init_cache(value, key, **masks)
    assert sorted(cache) == ["key", "mask", "value"]
    assert tuple(cache["key"].shape) == (B, S, layer.num_key_value_heads, H)
    np.testing.assert_allclose(layer(query, cache=cache), expected, atol=1e-5)
    steps = [layer(query[:, t : t + 1], cache=cache) for t in range(query.shape[1])]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, atol=1e-5)
    if masked:
        others = layer(query, value, key)
        assert np.abs(others - expected).max() > 0.01


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_projected_keys_pass_through_compiled_functions(mode: str) -> None:
    layer = made("cross", "grouped")
    query, value, key = CROSS_INPUTS
    expected = layer(query, value, key, value_mask=COLUMNS)
    step = tf.function(
        lambda x, cache: layer(x, cache=cache), jit_compile=mode == "xla"
    )
    cache = layer.init_cache(value, key, value_mask=COLUMNS)
    for t in range(query.shape[1]):
        found = step(tf.constant(query[:, t : t + 1]), cache)
        np.testing.assert_allclose(found, expected[:, t : t + 1], atol=1e-5)
    assert step.experimental_get_tracing_count() == 1


def test_masks_that_values_carry_are_kept_in_the_cache() -> None:
    layer = MultiHeadAttention(N, H)
    layer.build((B, T, DQ), (B, T, DQ))
    randomize(layer)
    value = np.where(LEFT_PADDED[..., None], INPUTS, 0.0).astype("float32")
    masking = keras.layers.Masking()
    cache = layer.init_cache(masking(value))
    np.testing.assert_array_equal(cache["mask"], LEFT_PADDED)
    np.testing.assert_allclose(
        layer(INPUTS, cache=cache), layer(INPUTS, masking(value)), atol=1e-5
    )


def test_other_masks_join_those_of_the_cache() -> None:
    layer, (query, value, key) = made("cross"), CROSS_INPUTS
    pairs = some(B, query.shape[1], S, seed=4)
    cache = layer.init_cache(value, key, value_mask=COLUMNS)
    np.testing.assert_allclose(
        layer(query, cache=cache, attention_mask=pairs),
        layer(query, value, key, value_mask=COLUMNS, attention_mask=pairs),
        atol=1e-5,
    )


# What is refused.


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
@pytest.mark.parametrize("bad", [0, -1, 2.5, None])
def test_sizes_of_a_cache_are_positive(name: str, bad: Any) -> None:
    text = rf"argument `{name}`, expected a positive integer.*{name}={bad}"
    with pytest.raises(ValueError, match=text):
        made("self").init_cache(**{"batch_size": B, "max_length": T, name: bad})


def test_a_layer_that_is_not_built_has_no_cache() -> None:
    text = re.escape("`init_cache` needs a built layer: call it first.")
    with pytest.raises(ValueError, match=text):
        MultiHeadSelfAttention(N).init_cache(B, T)
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(N, H).init_cache(INPUTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", np.ones((T, T), bool)),
        ("segment_ids", np.zeros((B, T), "int32")),
        ("attention_bias", normal(T, T)),
        ("return_attention_scores", True),
    ],
)
def test_what_does_not_join_a_cache_is_refused(name: str, value: Any) -> None:
    layer = made("self")
    text = (
        r"With a `cache` positions are in causal order, and only `mask` and "
        rf"`head_mask` join it\. Received: {name}"
    )
    with pytest.raises(ValueError, match=text):
        layer(INPUTS, cache=layer.init_cache(B, T), **{name: value})


def test_attention_takes_either_values_or_a_cache() -> None:
    layer, (query, value, key) = made("cross"), CROSS_INPUTS
    cache, text = layer.init_cache(value, key), r"Pass `value`, and `key` if it differs"
    for given in (
        {},
        {"value": value, "cache": cache},
        {"key": key, "cache": cache},
        {"key": key},
    ):
        with pytest.raises(ValueError, match=text):
            layer(query, **given)


def test_values_of_more_axes_have_no_cache() -> None:
    layer = MultiHeadAttention(N, H, attention_axes=1)
    inputs = normal(B, 3, 5, DQ)
    layer(inputs, inputs)
    text = r"takes `value` of shape \(B, S, D\)\. Received: value of shape \(2, 3, 5"
    with pytest.raises(ValueError, match=text):
        layer.init_cache(inputs)


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"position": "rotary"}, {}),
        ({"position": "alibi"}, {}),
        ({"sliding_window": 3}, {}),
        ({}, {"use_causal_mask": True}),
    ],
)
def test_projected_keys_go_with_no_order(
    options: dict[str, Any], call: dict[str, Any]
) -> None:
    layer, (query, value, key) = made("cross", **options), CROSS_INPUTS
    cache = layer.init_cache(value, key)
    with pytest.raises(ValueError, match=r"A `cache` of projected keys has no order"):
        layer(query, cache=cache, **call)


def test_projected_keys_bring_their_padding() -> None:
    layer, (query, value, key) = made("cross"), CROSS_INPUTS
    cache = layer.init_cache(value, key)
    with pytest.raises(ValueError, match=r"A `cache` holds the padding of its keys"):
        layer(query, cache=cache, value_mask=COLUMNS)


def test_the_cache_of_another_layer_is_refused() -> None:
    layer, grouped = made("self"), made("self", "grouped")
    text = r"must be of this layer and of as many rows.*cached key of shape \("
    for cache in (layer.init_cache(B + 1, T), grouped.init_cache(B, T)):
        with pytest.raises(ValueError, match=text):
            layer(INPUTS, cache=cache)
    _, value, key = CROSS_INPUTS
    projected = made("cross").init_cache(value, key)
    with pytest.raises(ValueError, match=r"A cache holds \['key', 'length', 'mask'"):
        layer(INPUTS, cache=projected)
