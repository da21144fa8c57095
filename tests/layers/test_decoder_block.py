"""The decoder block: Keras' layers composed, a memory, a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_mha import TransformerDecoderBlock, pack_sequences, unpack_sequences
from tests.support import layer_oracle as oracle
from tests.support.layers import normal, randomize
from tests.support.score_cases import some

# Letters: B batch, T length, S length of the memory, N heads, H head size, D width,
# DM width of the memory.
B, T, S, N, H, D, DM, HIDDEN = 2, 7, 5, 2, 6, 13, 11, 17
INPUTS, MEMORY = normal(B, T, D, seed=1), normal(B, S, DM, seed=2)
# On the left: causality alone would hide it on the right.
PADDING = np.arange(T) >= np.array([[0], [3]])
MEMORY_PADDING = np.arange(S) < np.array([[3], [S]])
PAIRS = some(B, T, T, seed=3) | np.eye(T, dtype=bool)

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "post": {"placement": "post", "activation": "relu"},
    "sandwich_rms": {"placement": "sandwich", "normalization": "rms"},
    "swiglu": {"gated": True, "activation": "silu", "use_bias": False},
}
SCORES: dict[str, dict[str, Any]] = {
    "rotary": {"position": "rotary", "num_key_value_heads": 1},
    "alibi": {"position": "alibi", "use_sinks": True},
    "relative": {"position": "relative", "qk_norm": "rms", "logits_soft_cap": 2.0},
    "window": {"position": "rotary", "sliding_window": 3, "use_gate": True},
}
each_memory = pytest.mark.parametrize("memory", [False, True], ids=["alone", "memory"])


def block(memory: bool = True, **options: Any) -> TransformerDecoderBlock:
    """A built block with random weights."""
    given = {"num_heads": N, "hidden_dim": HIDDEN, "key_dim": H, **options}
    layer = TransformerDecoderBlock(**given, cross_attention=memory)
    layer.build(INPUTS.shape, *([MEMORY.shape] if memory else []))
    randomize(layer)
    return layer


def given(memory: bool) -> list[np.ndarray]:
    return [INPUTS, MEMORY] if memory else [INPUTS]


def compose(layer: TransformerDecoderBlock, memory: bool, **masks: Any) -> np.ndarray:
    """The same from Keras' layers, with the block's weights."""
    config = layer.get_config()
    attention_mask = np.tril(np.ones((T, T), bool)) & masks.get("attention_mask", True)
    if "mask" in masks:
        attention_mask = attention_mask & masks["mask"][:, None]
    use_bias = config["use_bias"]

    def attend(sublayer: Any) -> Any:
        weights = oracle.weights_of(sublayer)
        if hasattr(sublayer, "qkv_dense"):
            weights = oracle.unfused(sublayer, weights)
        stock = keras.layers.MultiHeadAttention(N, H, use_bias=use_bias)
        width = weights["value/kernel"].shape[0]
        stock.build((B, T, D), (B, None, width))
        stock.set_weights([weights[w.path.split("/", 1)[1]] for w in stock.weights])
        if width == D:
            return lambda x: stock(x, x, attention_mask=attention_mask)
        hidden = masks.get("memory_mask", np.ones((B, S), bool))[:, None]
        return lambda x: stock(x, MEMORY, attention_mask=np.repeat(hidden, T, axis=1))

    def network(sublayer: Any) -> Any:
        weights = oracle.weights_of(sublayer)
        act = keras.activations.get(config["activation"])

        def dense(x: Any, name: str) -> Any:
            product = ops.matmul(x, np.float32(weights[f"{name}/kernel"]))
            return product + np.float32(weights.get(f"{name}/bias", 0.0))

        def run(x: Any) -> Any:
            names = sorted({name.split("/")[0] for name in weights})
            if not config["gated"]:
                return dense(act(dense(x, names[0])), names[1])
            return dense(act(dense(x, "gate")) * dense(x, "hidden"), "output")

        return run

    def normalize(norm: Any, x: Any) -> Any:
        stock = type(norm)(epsilon=1e-6)
        stock.build(x.shape)
        stock.set_weights(norm.get_weights())
        return stock(x)

    halves = [(layer.attention, attend)]
    if memory:
        halves.append((layer.memory_attention, attend))
    halves.append((layer.feed_forward, network))
    x = ops.convert_to_tensor(INPUTS)
    for half, kind in halves:
        sublayer, placement = kind(half.sublayer), config["placement"]
        if placement == "post":
            x = normalize(half.norm, x + sublayer(x))
        else:
            branch = sublayer(normalize(half.norm, x))
            if placement == "sandwich":
                branch = normalize(half.output_norm, branch)
            x = x + branch
    return np.asarray(x)


# Values.


@each_memory
@pytest.mark.parametrize("options", OPTIONS)
def test_a_block_is_keras_layers_composed(options: str, memory: bool) -> None:
    layer = block(memory, **OPTIONS[options])
    expected = compose(layer, memory)
    found = layer(*given(memory))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert found.shape == layer.compute_output_shape(INPUTS.shape) == (B, T, D)


@each_memory
def test_masks(memory: bool) -> None:
    layer = block(memory)
    masks: dict[str, Any] = {"mask": PADDING, "attention_mask": PAIRS}
    if memory:
        masks["memory_mask"] = MEMORY_PADDING
    expected = compose(layer, memory, **masks)
    found = layer(*given(memory), **masks)
    np.testing.assert_allclose(np.asarray(found)[PADDING], expected[PADDING], atol=2e-5)
    for name in masks:
        without = layer(*given(memory), **{**masks, name: None})
        assert np.abs(without - found)[PADDING].max() > 0.01, name


@each_memory
def test_no_position_sees_a_later_one(memory: bool) -> None:
    layer, changed = block(memory), INPUTS.copy()
    changed[:, 4:] = normal(B, T - 4, D, seed=9)
    found, expected = (
        layer(inputs, *given(memory)[1:]) for inputs in (changed, INPUTS)
    )
    np.testing.assert_allclose(found[:, :4], expected[:, :4], atol=1e-6)
    assert np.abs(found - expected)[:, 4:].min(axis=-1).max() > 1e-3


def test_masks_that_inputs_and_memory_carry_are_read() -> None:
    layer, masking = block(), keras.layers.Masking()
    inputs = np.where(PADDING[..., None], INPUTS, 0.0).astype("float32")
    memory = np.where(MEMORY_PADDING[..., None], MEMORY, 0.0).astype("float32")
    expected = layer(inputs, memory, mask=PADDING, memory_mask=MEMORY_PADDING)
    symbols = keras.Input((None, D)), keras.Input((None, DM))
    outputs = layer(*(masking(symbol) for symbol in symbols))
    model = keras.Model(symbols, outputs)
    found = layer(masking(inputs), masking(memory))
    np.testing.assert_array_equal(found._keras_mask, PADDING)
    for values in (found, model([inputs, memory])):
        np.testing.assert_allclose(
            np.asarray(values)[PADDING], np.asarray(expected)[PADDING], atol=1e-5
        )


@pytest.mark.parametrize("name", ["inputs", "memory"])
def test_nan_in_padding_changes_no_real_position(name: str) -> None:
    layer = block()
    arrays = {"inputs": (INPUTS, PADDING), "memory": (MEMORY, MEMORY_PADDING)}
    poisoned = {key: array for key, (array, _) in arrays.items()}
    array, real = arrays[name]
    poisoned[name] = np.where(real[..., None], array, np.float32(np.nan))
    masks = {"mask": PADDING, "memory_mask": MEMORY_PADDING}
    found = np.asarray(layer(**poisoned, **masks))
    expected = np.asarray(layer(INPUTS, MEMORY, **masks))
    np.testing.assert_allclose(found[PADDING], expected[PADDING], atol=1e-5)


def test_a_packed_batch_gives_each_sequence_the_values_it_has_alone() -> None:
    layer = block(memory=False, position="rotary")
    sequences = [normal(length, D, seed=60 + length) for length in (3, 5, 2, 4)]
    packed = pack_sequences(sequences, row_length=T)
    outputs = layer(packed.values, segment_ids=packed.segment_ids)
    found = np.asarray(unpack_sequences(outputs, packed.index))
    for place, sequence in enumerate(sequences):
        expected = layer(sequence[None])[0]
        np.testing.assert_allclose(found[place, : len(sequence)], expected, atol=1e-5)


# The cache.


@each_memory
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("options", SCORES)
def test_chunks_and_single_steps_equal_all_at_once(
    options: str, mode: str, memory: bool
) -> None:
    layer = block(memory, **SCORES[options])
    hidden = {"memory_mask": MEMORY_PADDING} if memory else {}
    expected = layer(*given(memory), **hidden)

    def call(inputs: Any, cache: Any) -> Any:
        return layer(inputs, cache=cache)

    step: Any = call
    if mode != "eager":
        step = tf.function(call, jit_compile=mode == "xla")
    cache = layer.init_cache(B, T, *given(memory)[1:], **hidden)
    structure = tf.nest.map_structure(lambda x: (x.shape, x.dtype), cache)
    assert sorted(cache) == (["memory", "self"] if memory else ["self"])
    outputs, start = [], 0
    for length in (3, 1, 1, 1, 1):
        place = slice(start, start + length)
        some_outputs, cache = step(tf.constant(INPUTS[:, place]), cache)
        outputs.append(some_outputs)
        start += length
        found = tf.nest.map_structure(lambda x: (x.shape, x.dtype), cache)
        assert found == structure
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, atol=1e-5)
    if mode != "eager":
        assert step.experimental_get_tracing_count() == 2


def test_left_padded_batches_decode() -> None:
    layer, real = block(position="rotary"), PADDING
    expected = np.asarray(layer(INPUTS, MEMORY, mask=real))
    cache = layer.init_cache(B, T, MEMORY)
    first, cache = layer(INPUTS[:, :5], cache=cache, mask=real[:, :5])
    second, _ = layer(INPUTS[:, 5:], cache=cache)
    found = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)


def test_a_model_of_blocks_generates_what_it_would_score() -> None:
    """Each token is the likeliest after those before it, with a cache or without."""
    vocabulary, length = 19, 6
    embedding = keras.layers.Embedding(vocabulary, D)
    blocks = [block(**SCORES["rotary"]), block(**SCORES["rotary"])]
    head = keras.layers.Dense(vocabulary)
    start = np.array([[3], [8]])
    caches = [each.init_cache(B, length, MEMORY) for each in blocks]
    head.build((B, 1, D))
    randomize(head)
    without, token, tokens = start, start, [start]
    for _ in range(length - 1):
        hidden = embedding(without)
        for each in blocks:
            hidden = each(hidden, MEMORY)
        best = np.argmax(head(hidden)[:, -1:], axis=-1)
        without = np.concatenate([without, best], axis=1)
        hidden = embedding(token)
        for place, each in enumerate(blocks):
            hidden, caches[place] = each(hidden, cache=caches[place])
        token = np.argmax(head(hidden), axis=-1)
        tokens.append(token)
    np.testing.assert_array_equal(np.concatenate(tokens, axis=1), without)
    assert len(set(without.ravel().tolist())) > 3


def test_past_max_length_the_outputs_are_nan() -> None:
    layer = block(memory=False)
    cache = layer.init_cache(B, 4)
    _, cache = layer(INPUTS[:, :4], cache=cache)
    outputs, _ = layer(INPUTS[:, 4:5], cache=cache)
    assert np.isnan(outputs).all()


# Models, files, training.


def model_of(memory: bool, **options: Any) -> keras.Model:
    symbols = [keras.Input((None, D)), keras.Input((None, DM))][: 1 + memory]
    layer = TransformerDecoderBlock(
        N, HIDDEN, key_dim=H, cross_attention=memory, **options
    )
    model = keras.Model(symbols, layer(*symbols))
    randomize(model)
    return model


@pytest.mark.parametrize(("memory", "jit_compile"), [(False, True), (True, False)])
def test_it_learns(memory: bool, jit_compile: bool) -> None:
    model = model_of(memory, dropout=0.1, seed=3, position="rotary")
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=jit_compile)
    targets = np.cumsum(INPUTS, axis=1) / 3.0
    losses = model.fit(given(memory), targets, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_each_dropout_draws_for_itself() -> None:
    options = {"dropout": 0.3, "attention_dropout": 0.2, "stochastic_depth": 0.1}
    layer = block(seed=3, **options)
    halves = layer.attention, layer.memory_attention, layer.feed_forward
    seeds = [each.seed for half in halves for each in (half, half.sublayer)]
    assert len(set(seeds)) == 6
    assert {half.sublayer.dropout for half in halves[:2]} == {0.2}
    assert {half.dropout for half in halves} == {0.3}
    assert {half.stochastic_depth for half in halves} == {0.1}


def test_options_of_the_scores_hold_for_the_self_attention_alone() -> None:
    options = {name: SCORES["window"][name] for name in SCORES["window"]}
    layer = block(**options, flash_attention=True, jit_compile=False)
    own = layer.attention.sublayer.get_config()
    crossed = layer.memory_attention.sublayer.get_config()
    for name, value in options.items():
        assert own[name] == value
        assert crossed[name] != value
    for config in (own, crossed):
        assert config["flash_attention"] is True
        assert config["jit_compile"] is False


def test_a_normalization_layer_given_is_cloned_for_each_place(tmp_path: Path) -> None:
    norm = keras.layers.RMSNormalization(epsilon=0.01)
    layer = block(normalization=norm)
    halves = layer.attention, layer.memory_attention, layer.feed_forward
    assert len({id(half.norm) for half in halves} | {id(norm)}) == 4
    assert {half.norm.epsilon for half in halves} == {0.01}
    model = model_of(memory=True, normalization=norm)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    expected = model(given(memory=True))
    np.testing.assert_array_equal(loaded(given(memory=True)), expected)
    assert len(loaded.weights) == len(model.weights)


def test_key_dim_defaults_to_an_even_share() -> None:
    layer = TransformerDecoderBlock(3, HIDDEN, cross_attention=True)
    layer.build((B, T, 15), (B, S, DM))
    crossed = layer.memory_attention.sublayer
    assert layer.attention.sublayer.qkv_dense.head_sizes == (5, 5)
    assert (crossed.key_dim, crossed.value_dim) == (5, 5)


# What is refused.


def test_a_memory_is_neither_missing_nor_superfluous() -> None:
    text = r"`memory` is for blocks with `cross_attention=True`.*"
    wanted = rf"{text}cross_attention=True, memory=None"
    unwanted = rf"{text}cross_attention=False, memory=\(2, 5, 11\)"
    with_memory, without = block(), block(memory=False)
    with pytest.raises(ValueError, match=wanted):
        with_memory(INPUTS)
    with pytest.raises(ValueError, match=wanted):
        with_memory.init_cache(B, T)
    with pytest.raises(ValueError, match=unwanted):
        without(INPUTS, MEMORY)
    with pytest.raises(ValueError, match=unwanted):
        without.init_cache(B, T, MEMORY)
    cache = with_memory.init_cache(B, T, MEMORY)
    with pytest.raises(ValueError, match=rf"{text}cache=\['memory', 'self'\]"):
        with_memory(INPUTS, MEMORY, cache=cache)


def test_a_memory_mask_without_its_memory_is_refused() -> None:
    layer = block(memory=False)
    text = r"`memory_mask` needs a `memory`.*memory_mask of shape \(2, 5\)"
    with pytest.raises(ValueError, match=text):
        layer(INPUTS, memory_mask=MEMORY_PADDING)
    with pytest.raises(ValueError, match=text):
        layer.init_cache(B, T, memory_mask=MEMORY_PADDING)


def test_a_block_that_is_not_built_has_no_cache() -> None:
    with pytest.raises(ValueError, match=r"`init_cache` needs a built layer"):
        TransformerDecoderBlock(N, HIDDEN).init_cache(B, T)
    with pytest.raises(ValueError, match=r"is built with a `memory`"):
        TransformerDecoderBlock(N, HIDDEN, H, cross_attention=True).build(INPUTS.shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"`dropout` must be a number with 0 <= dropout < 1"),
        ({"attention_dropout": -0.1}, r"`attention_dropout` must be a number"),
        ({"placement": "under"}, r"`placement` must be one of"),
        ({"position": "absolute"}, r"`position` must be None, one of"),
        ({"hidden_dim": 0}, r"`hidden_dim`, expected a positive integer"),
    ],
)
def test_arguments_out_of_their_domain(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerDecoderBlock(**{"num_heads": N, "hidden_dim": HIDDEN, **options})


# Bias, heads and scores.

BIAS = normal(1, N, T, T, seed=11)
HEADS = normal(B, N, seed=12)


@each_memory
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_bias_heads_and_scores_are_those_of_the_attention(
    placement: str, memory: bool
) -> None:
    layer = block(memory, placement=placement)
    options = {"mask": PADDING, "attention_bias": BIAS, "head_mask": HEADS}
    found = layer(*given(memory), return_attention_scores=True, **options)
    attention, x = layer.attention.sublayer, ops.convert_to_tensor(INPUTS)

    def half(residual: Any, x: Any, sublayer: Any) -> Any:
        if placement == "pre":
            mixed, *scores = sublayer(residual.norm(x))
            return x + mixed, *scores
        mixed, *scores = sublayer(x)
        return residual.norm(x + mixed), *scores

    x, scores = half(
        layer.attention,
        x,
        lambda x: attention(
            x, use_causal_mask=True, return_attention_scores=True, **options
        ),
    )
    expected = [scores]
    if memory:
        cross = layer.memory_attention.sublayer
        x, scores = half(
            layer.memory_attention,
            x,
            lambda x: cross(x, MEMORY, return_attention_scores=True),
        )
        expected.append(scores)
    (x,) = half(layer.feed_forward, x, lambda x: [layer.feed_forward.sublayer(x)])
    assert len(found) == 2 + memory
    for pair in zip(found, [x, *expected], strict=True):
        # The padding that the block hands on hides the memory from padded queries.
        one, other = (np.moveaxis(np.asarray(x), -2, 1)[PADDING] for x in pair)
        np.testing.assert_allclose(one, other, atol=1e-5)
    plain = layer(*given(memory), mask=PADDING)
    assert np.abs(found[0] - plain)[PADDING].max() > 0.01
    alone = layer(*given(memory), **options)
    np.testing.assert_allclose(alone, found[0], atol=1e-6)


@each_memory
def test_symbolic_scores_have_their_shapes(memory: bool) -> None:
    layer = block(memory)
    inputs = [keras.Input(x.shape[1:]) for x in given(memory)]
    bias = keras.Input((N, T, T))
    outputs = layer(*inputs, attention_bias=bias, return_attention_scores=True)
    shapes = [(None, T, D), (None, N, T, T), (None, N, T, S)][: 2 + memory]
    assert [output.shape for output in outputs] == shapes
    model = keras.Model([*inputs, bias], outputs)
    biases = np.repeat(BIAS, B, axis=0)
    found = model([*given(memory), biases])
    expected = layer(*given(memory), attention_bias=BIAS, return_attention_scores=True)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_heads_are_masked_with_a_cache_bias_and_scores_refused() -> None:
    layer = block(memory=False)
    cache = layer.init_cache(B, T)
    found, _ = layer(INPUTS, cache=cache, head_mask=HEADS)
    np.testing.assert_allclose(found, layer(INPUTS, head_mask=HEADS), atol=1e-5)
    for name, value in (("attention_bias", BIAS), ("return_attention_scores", True)):
        with pytest.raises(ValueError, match=f"With a `cache` .*Received: {name}"):
            layer(INPUTS, cache=cache, **{name: value})
