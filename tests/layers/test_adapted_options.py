"""Low-rank adaptation and int8 of layers with options of the scores."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mha import TransformerDecoderBlock
from tests.support import layer_oracle as oracle
from tests.support.attention_cases import check_close
from tests.support.layers import normal, randomize
from tests.support.score_cases import (
    DQ,
    KINDS,
    SELF_CALLS,
    SELF_INPUTS,
    B,
    H,
    N,
    S,
    T,
    made,
)

RANK, ALPHA = 2, 3.0
PARTS = ("query", "key", "value")
# One step of int8 is 1/127 of a column's greatest weight or a row's greatest input.
INT8_TOLERANCE = 0.05
each_kind = pytest.mark.parametrize("kind", KINDS)
each_set = pytest.mark.parametrize("options", ["gemma", "t5", "bloom"])
# Keras warns so of inputs and of its own normalizations.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Layer (InputLayer|\w+Normalization) does not have a `quantize` method"
)


def adapted(options: str, targets: tuple[str, ...] = PARTS) -> Any:
    layer = made("self", options)
    layer.enable_lora(RANK, targets, ALPHA)
    for place, weight in enumerate(layer.qkv_dense.trainable_variables):
        if "lora" in weight.name:
            weight.assign(normal(*weight.shape, seed=31 + place, scale=0.3))
    return layer


def merged(layer: Any) -> dict[str, np.ndarray]:
    """The weights with `alpha / rank * A B` in the fused kernel, computed in NumPy."""
    weights = oracle.weights_of(layer)
    K, G = layer.num_key_value_heads, N // layer.num_key_value_heads
    key_dim, value_dim = layer.qkv_dense.head_sizes
    start = 0
    for part, size in zip(PARTS, (G * key_dim, key_dim, value_dim), strict=True):
        if f"qkv/lora_{part}_a" in weights:
            factors = (weights[f"qkv/lora_{part}_{letter}"] for letter in "ab")
            delta = ALPHA / RANK * np.matmul(*factors)
            kernel = weights["qkv/kernel"][..., start : start + size]
            kernel += delta.reshape(DQ, K, size)
        start += size
    return weights


@each_set
@pytest.mark.parametrize("targets", [PARTS, ("query",), ("value",)])
def test_factors_join_the_kernel_of_grouped_heads(
    options: str, targets: tuple[str, ...]
) -> None:
    layer, call = adapted(options, targets), SELF_CALLS["all"]
    expected = oracle.attention(layer, merged(layer), *SELF_INPUTS, **call)[0]
    check_close(np.asarray(layer(*SELF_INPUTS, **call)), expected, 1e-5)
    plain = made("self", options)(*SELF_INPUTS, **call)
    assert np.abs(plain - expected).max() > 0.01


@each_set
def test_what_joins_the_scores_still_trains(options: str) -> None:
    layer = adapted(options)
    names = {w.path.removeprefix(f"{layer.path}/") for w in layer.trainable_variables}
    wanted = {
        "gemma": {"sinks", "query_norm/scale", "gate/kernel"},
        "t5": {"sinks", "key_norm/beta", "relative/embeddings"},
        "bloom": {"gate/kernel", "gate/bias"},
    }[options]
    assert wanted <= names
    assert "qkv/kernel" not in names


@each_set
def test_saved_factors_are_merged_into_a_plain_layer(
    options: str, tmp_path: Path
) -> None:
    layer, path = adapted(options), tmp_path / "adapted.weights.h5"
    model_of("self", layer).save_weights(path)
    plain = made("self", options)
    model_of("self", plain).load_weights(path)
    np.testing.assert_allclose(plain(*SELF_INPUTS), layer(*SELF_INPUTS), atol=1e-5)


def model_of(kind: str, layer: Any) -> keras.Model:
    inputs = [keras.Input((None, array.shape[-1])) for array in KINDS[kind][1]]
    return keras.Model(inputs, layer(*inputs))


@each_kind
@each_set
def test_int8_is_close_saved_and_loaded(
    kind: str, options: str, tmp_path: Path
) -> None:
    layer, inputs = made(kind, options), KINDS[kind][1]
    model = model_of(kind, layer)
    before = np.asarray(model(inputs))
    floating = {
        weight.path: np.asarray(weight)
        for weight in layer.weights
        if not weight.path.endswith(("kernel", "bias")) or "norm" in weight.path
    }
    model.quantize("int8")
    after = np.asarray(model(inputs))
    assert 0 < np.abs(after - before).max() < INT8_TOLERANCE * np.abs(before).max()
    kept = {weight.path: weight for weight in layer.weights}
    for path, value in floating.items():
        np.testing.assert_array_equal(kept[path], value)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(inputs), after, atol=1e-5)


@pytest.mark.parametrize("options", ["gemma", "bloom"])
def test_adapted_then_int8(options: str) -> None:
    layer = adapted(options)
    before = np.asarray(layer(*SELF_INPUTS))
    layer.quantize("int8")
    after = np.asarray(layer(*SELF_INPUTS))
    assert 0 < np.abs(after - before).max() < INT8_TOLERANCE * np.abs(before).max()


@pytest.mark.parametrize("options", ["gemma", "bloom"])
def test_a_quantized_layer_decodes(options: str) -> None:
    layer, (inputs,) = made("self", options), SELF_INPUTS
    layer.quantize("int8")
    first, cache = layer(inputs[:, :4], cache=layer.init_cache(B, T))
    second, _ = layer(inputs[:, 4:], cache=cache)
    expected = layer(inputs, use_causal_mask=True)
    np.testing.assert_allclose(
        np.concatenate([first, second], axis=1), expected, atol=1e-5
    )


@each_kind
@pytest.mark.parametrize("position", ["rotary", "alibi", "relative"])
def test_what_tells_positions_is_left_as_it_is_without_a_warning(
    kind: str, position: str
) -> None:
    model = model_of(kind, made(kind, position=position))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.quantize("int8")
    texts = [str(each.message) for each in caught if "quantize" in str(each.message)]
    assert all("InputLayer" in text for text in texts)


def test_a_decoder_block_quantizes_and_decodes() -> None:
    inputs, memory = keras.Input((T, DQ)), keras.Input((S, DQ))
    block = TransformerDecoderBlock(
        N, 17, key_dim=H, cross_attention=True, position="rotary", use_gate=True
    )
    model = keras.Model([inputs, memory], block(inputs, memory))
    randomize(model)
    arrays = [normal(B, T, DQ, seed=1), normal(B, S, DQ, seed=2)]
    before = np.asarray(model(arrays))
    model.quantize("int8")
    after = np.asarray(model(arrays))
    assert 0 < np.abs(after - before).max() < INT8_TOLERANCE * np.abs(before).max()
    cache = block.init_cache(B, T, arrays[1])
    first, cache = block(arrays[0][:, :4], cache=cache)
    second, _ = block(arrays[0][:, 4:], cache=cache)
    np.testing.assert_allclose(
        np.concatenate([first, second], axis=1), after, atol=1e-4
    )
