from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import (
    FeedForward,
    MultiHeadSelfAttention,
    ResidualNorm,
    TransformerEncoderBlock,
)
from tests.support.layers import (
    PADDING,
    PAIRS_3,
    PAIRS_4,
    B,
    D,
    H,
    N,
    T,
    assert_equal,
    differentiate,
    made,
    normal,
)

HIDDEN = 17
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "post": {"placement": "post", "activation": "relu"},
    "sandwich_rms": {"placement": "sandwich", "normalization": "rms", "epsilon": 0.01},
    "swiglu": {"gated": True, "activation": "silu", "use_bias": False},
    "layer_scale": {"layer_scale": 0.3},
    "rezero": {"rezero": True},
}
CALL: dict[str, Any] = {
    "mask": PADDING,
    "attention_mask": PAIRS_3,
    "use_causal_mask": True,
}


def block(**options: Any) -> TransformerEncoderBlock:
    return made(TransformerEncoderBlock(N, HIDDEN, **{"key_dim": H, **options}))


def parts(layer: TransformerEncoderBlock, **options: Any) -> list[ResidualNorm]:
    """The two halves, built from public layers and given the block's weights."""
    network = {
        name: options.pop(name)
        for name in ("activation", "gated", "use_bias")
        if name in options
    }
    use_bias = network.get("use_bias", True)
    halves = [
        ResidualNorm(MultiHeadSelfAttention(N, H, use_bias=use_bias), **options),
        ResidualNorm(FeedForward(HIDDEN, **network), **options),
    ]
    for half, source in zip(halves, (layer.attention, layer.feed_forward), strict=True):
        half.build((B, T, D))
        half.set_weights(source.get_weights())
    return halves


@pytest.mark.parametrize("options", OPTIONS)
def test_a_block_is_its_parts_composed(options: str) -> None:
    layer, inputs = block(**OPTIONS[options]), normal(B, T, D)
    attention, network = parts(layer, **OPTIONS[options])
    assert len(layer.weights) == len(attention.weights) + len(network.weights)
    outputs, scores = layer(inputs, return_attention_scores=True, **CALL)
    mixed, expected_scores = attention(inputs, return_attention_scores=True, **CALL)
    np.testing.assert_allclose(outputs, network(mixed), atol=1e-5)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    np.testing.assert_allclose(layer(inputs, **CALL), outputs, atol=1e-6)
    assert outputs.shape == layer.compute_output_shape(inputs.shape) == (B, T, D)
    assert np.abs(outputs - layer(inputs)).max() > 0.01


def test_key_dim_defaults_to_an_even_share() -> None:
    layer = TransformerEncoderBlock(3, HIDDEN)
    layer.build((B, T, 15))
    assert tuple(layer.attention.sublayer.qkv_dense.kernel.shape) == (15, 3, 15)


def test_a_normalization_layer_given_is_cloned_for_each_place() -> None:
    norm = keras.layers.LayerNormalization(epsilon=0.01)
    layer = block(normalization=norm, placement="sandwich")
    norms = [
        norm
        for half in (layer.attention, layer.feed_forward)
        for norm in (half.norm, half.output_norm)
    ]
    assert len({id(each) for each in norms}) == 4
    assert {each.epsilon for each in norms} == {0.01}
    named = block(normalization="layer", epsilon=0.01, placement="sandwich")
    np.testing.assert_allclose(
        layer(normal(B, T, D)), named(normal(B, T, D)), atol=1e-6
    )


@pytest.mark.parametrize("pairs", [None, PAIRS_4], ids=["none", "rank_4"])
@pytest.mark.parametrize("mode", ["eager", "functional", "stacked"])
def test_masks_are_read_from_the_inputs(mode: str, pairs: np.ndarray | None) -> None:
    layer, second, masking = block(), block(), keras.layers.Masking()
    inputs = np.where(PADDING[..., None], normal(B, T, D), 0).astype("float32")
    expected = layer(inputs, mask=PADDING, attention_mask=pairs)
    assert np.abs(expected - layer(inputs, attention_mask=pairs))[PADDING].max() > 0.01
    if mode == "eager":
        outputs = layer(masking(inputs), attention_mask=pairs)
        np.testing.assert_array_equal(outputs._keras_mask, PADDING)
    elif mode == "functional":
        symbolic = keras.Input((None, D))
        made_outputs = layer(masking(symbolic), attention_mask=pairs)
        outputs = keras.Model(symbolic, made_outputs)(inputs)
    else:
        expected = second(expected, mask=PADDING, attention_mask=pairs)
        first = layer(masking(inputs), attention_mask=pairs)
        outputs = second(first, attention_mask=pairs)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


# Dropout.


def dropouts(layer: TransformerEncoderBlock) -> dict[str, float]:
    return {
        "residual": layer.attention.dropout,
        "second_residual": layer.feed_forward.dropout,
        "attention": layer.attention.sublayer.dropout,
        "network": layer.feed_forward.sublayer.dropout,
        "depth": layer.attention.stochastic_depth,
        "second_depth": layer.feed_forward.stochastic_depth,
    }


def test_where_each_dropout_goes() -> None:
    assert dropouts(block(dropout=0.3, stochastic_depth=0.2)) == {
        "residual": 0.3,
        "second_residual": 0.3,
        "attention": 0.3,
        "network": 0.3,
        "depth": 0.2,
        "second_depth": 0.2,
    }
    assert dropouts(block(dropout=0.3, attention_dropout=0.0))["attention"] == 0.0
    assert dropouts(block(dropout=0.3, hidden_dropout=0.0))["network"] == 0.0
    assert dropouts(block(attention_dropout=0.1)) == {
        **dict.fromkeys(dropouts(block()), 0.0),
        "attention": 0.1,
    }


def test_each_dropout_draws_for_itself() -> None:
    layer = block(seed=3, dropout=0.3, stochastic_depth=0.2)
    seeds = [
        each.seed
        for half in (layer.attention, layer.feed_forward)
        for each in (half, half.sublayer)
    ]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("jit_compile", [True, "auto"])
@pytest.mark.parametrize("call", ["eager", "graph"])
def test_rematerialized_dropout_has_the_gradients_of_the_one_applied(
    call: str, jit_compile: bool | str
) -> None:
    options = {"dropout": 0.3, "stochastic_depth": 0.2, "seed": 3}

    def result(layer: TransformerEncoderBlock) -> Any:
        def run(x: Any) -> Any:
            return layer(x, training=True, **CALL)

        return differentiate(
            tf.function(run) if call == "graph" else run,
            normal(B, T, D),
            layer.trainable_weights,
        )

    expected = result(block(**options))
    with keras.RematScope(mode="full"):
        layer = block(jit_compile=jit_compile, **options)
    assert_equal(result(layer), expected)


# Options of the scores.


SCORES: dict[str, Any] = {
    "num_key_value_heads": 1,
    "position": "relative",
    "qk_norm": "rms",
    "logits_soft_cap": 2.0,
    "use_sinks": True,
    "use_gate": True,
    "sliding_window": 4,
    "flash_attention": False,
}
SCORES_CALL: dict[str, Any] = {
    **CALL,
    "segment_ids": np.arange(T)[None].repeat(B, axis=0) // 4,
    "attention_bias": normal(N, T, T, seed=3)[None],
    "head_mask": normal(B, N, seed=4),
}


def test_options_of_the_scores_reach_the_attention() -> None:
    layer = block(**SCORES)
    config = layer.attention.sublayer.get_config()
    assert {name: config[name] for name in SCORES} == SCORES


@pytest.mark.parametrize("name", SCORES_CALL)
def test_call_arguments_reach_the_attention(name: str) -> None:
    layer, inputs = block(**SCORES), normal(B, T, D)
    outputs, scores = layer(inputs, return_attention_scores=True, **SCORES_CALL)
    mixed, expected_scores = layer.attention.sublayer(
        layer.attention.norm(inputs), return_attention_scores=True, **SCORES_CALL
    )
    np.testing.assert_allclose(outputs, layer.feed_forward(inputs + mixed), atol=1e-5)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    without = layer(inputs, **{**SCORES_CALL, name: None})
    assert np.abs(without - outputs).max() > 0.01


# Precision and XLA.


@pytest.mark.parametrize("jit_compile", [True, "auto", False])
def test_jit_compile_reaches_the_attention(jit_compile: bool | str) -> None:
    layer = block(jit_compile=jit_compile)
    assert layer.attention.sublayer.jit_compile == jit_compile
    np.testing.assert_allclose(
        layer(normal(B, T, D), **CALL), block()(normal(B, T, D), **CALL), atol=1e-5
    )
    model = keras.Sequential([keras.Input((T, D)), layer])
    assert all(each.supports_jit for each in model._flatten_layers()) is (
        jit_compile is not False
    )


def test_int8_of_the_whole_block_is_close() -> None:
    layer, inputs = block(), normal(B, T, D)
    expected = np.asarray(layer(inputs))
    model = keras.Sequential([keras.Input((T, D)), layer])
    with pytest.warns(UserWarning, match="does not have a `quantize` method"):
        model.quantize("int8")
    outputs = np.asarray(model(inputs))
    error = np.abs(outputs - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()
    kernels = [weight.dtype for weight in layer.weights if weight.name == "kernel"]
    assert kernels == ["int8"] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "`num_heads`, expected a positive integer.*num_heads=0"),
        ({"hidden_dim": 0}, "`hidden_dim`, expected a positive .*hidden_dim=0"),
        ({"key_dim": 0}, "`key_dim`, expected a positive integer.*key_dim=0"),
        ({"placement": "before"}, "`placement` must be one of .*'before'"),
        ({"normalization": "batch"}, "`normalization` must be one of .*'batch'"),
        ({"dropout": 1.0}, "`dropout` must be .*dropout=1.0"),
        ({"attention_dropout": 1.0}, "`(attention_)?dropout` must be .*dropout=1.0"),
        ({"stochastic_depth": 2}, "`stochastic_depth` must be .*stochastic_depth=2"),
        ({"layer_scale": 0.1, "rezero": True}, "`layer_scale` and `rezero`"),
        ({"jit_compile": "yes"}, "`jit_compile` must be .*'yes'"),
    ],
    ids=str,
)
def test_arguments_out_of_their_domain(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerEncoderBlock(**{"num_heads": N, "hidden_dim": HIDDEN, **options})


def test_blocks_of_neighboring_seeds_draw_differently() -> None:
    states = []
    for seed in range(3):
        block = TransformerEncoderBlock(2, 5, dropout=0.1, seed=seed)
        for layer in (block.attention, block.feed_forward):
            states += [layer.seed_generator, layer.sublayer.seed_generator]
    assert len({tuple(np.asarray(one.state).tolist()) for one in states}) == len(states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_dropout": 2}, "`attention_dropout` must be .*attention_dropout=2"),
        ({"hidden_dropout": 2}, "`hidden_dropout` must be .*hidden_dropout=2"),
        ({"seed": "a"}, "`seed` must be an integer or None. Received: seed='a'"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerEncoderBlock(2, 5, **options)


def test_blocks_given_one_normalization_share_nothing(tmp_path: Path) -> None:
    normalization = keras.layers.RMSNormalization()
    inputs = hidden = keras.Input((None, 6))
    for _ in range(3):
        hidden = TransformerEncoderBlock(2, 5, normalization=normalization)(hidden)
    model = keras.Model(inputs, hidden)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert len(model.weights) == 3 * (4 + 4 + 2) == len(loaded.weights)
    values = normal(2, 3, 6)
    np.testing.assert_allclose(loaded(values), model(values), atol=1e-6)
