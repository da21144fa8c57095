"""One attention layer of Keras into ours, and back.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H
head size of queries and keys, V head size of values, DQ, DV, DK widths.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import MultiHeadAttention, MultiHeadSelfAttention
from keras_mha.convert import from_keras, keras_layers, to_keras
from tests.support.attention_cases import numbers, pairs
from tests.support.layers import made, normal

Stock = keras.layers.MultiHeadAttention
Grouped = keras.layers.GroupQueryAttention

B, T, S, N, H, V, DQ, DV, DK = 2, 5, 7, 3, 11, 4, 13, 17, 19
SHAPES = (B, T, DQ), (B, S, DV), (B, S, DK)
INPUTS = [normal(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]
VISIBLE = pairs(B, T, S)  # every query sees a key

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "value_dim": {"value_dim": V},
    "gate": {"use_gate": True, "value_dim": V},
    "no bias": {"use_bias": False},
    "output size": {"output_shape": 23},
    "output shape": {"output_shape": (2, 3), "value_dim": V},
    "window": {"sliding_window": 5},
    "all": {
        "value_dim": V,
        "use_gate": True,
        "output_shape": [2, 3],
        "sliding_window": 6,
        "dropout": 0.3,
    },
}
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"use_causal_mask": True},
    "value": {"value_mask": VISIBLE[:, 0]},
    "pairs": {"attention_mask": VISIBLE},
}


def stock(**options: Any) -> Any:
    return made(Stock(N, H, **options), *SHAPES)


def grouped(**options: Any) -> Any:
    return made(Grouped(H, 6, 2, **options), *SHAPES)


def answers(layer: Any, *inputs: np.ndarray, **call: Any) -> list[np.ndarray]:
    """Outputs and scores."""
    inputs = inputs or tuple(INPUTS)
    outputs = layer(*inputs, return_attention_scores=True, **call)
    return [numbers(each) for each in outputs]


def check_equal(one: Any, other: Any, *inputs: np.ndarray, **call: Any) -> None:
    for found, expected in zip(
        answers(one, *inputs, **call), answers(other, *inputs, **call), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_values_of_keras_layer(options: str, mask: str) -> None:
    layer = stock(**OPTIONS[options])
    converted = from_keras(layer)
    assert type(converted) is MultiHeadAttention
    check_equal(converted, layer, **MASKS[mask])
    np.testing.assert_allclose(
        numbers(converted(*INPUTS, **MASKS[mask])),
        numbers(layer(*INPUTS, **MASKS[mask])),
        atol=1e-5,
    )
    back = to_keras(converted)
    assert type(back) is Stock
    check_equal(back, layer, **MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", ["plain", "no bias", "gate", "window"])
def test_values_of_grouped_attention(options: str, mask: str) -> None:
    given = {**OPTIONS[options]}
    given.pop("value_dim", None)
    layer = grouped(**given)
    converted = from_keras(layer)
    assert converted.num_key_value_heads == 2
    check_equal(converted, layer, **MASKS[mask])
    back = to_keras(converted)
    assert type(back) is Grouped
    check_equal(back, layer, **MASKS[mask])


@pytest.mark.parametrize("axes", [None, 2, (-2,), (1, 2)])
def test_attention_over_other_axes(axes: Any) -> None:
    shapes = (B, 5, 3, DQ), (B, 5, 3, DV)
    layer = made(Stock(N, H, attention_axes=axes), *shapes)
    inputs = [normal(*shape) for shape in shapes]
    check_equal(from_keras(layer), layer, *inputs)
    check_equal(to_keras(from_keras(layer)), layer, *inputs)


@pytest.mark.parametrize("broken", ["nothing copied", "keys and values exchanged"])
def test_the_comparison_sees_wrong_weights(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = made(Stock(N, H), (B, T, DQ), (B, S, DQ))
    if broken == "nothing copied":
        monkeypatch.setattr(keras_layers, "_take_parts", lambda *_: None)
    converted = from_keras(layer)
    if broken != "nothing copied":
        key, value = layer.key_dense.kernel, layer.value_dense.kernel
        converted.key_dense.kernel.assign(value)
        converted.value_dense.kernel.assign(key)
    inputs = normal(B, T, DQ), normal(B, S, DQ, seed=1)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_equal(converted, layer, *inputs)


# Options.

EVERY_OPTION: dict[str, Any] = {
    "num_heads": N,
    "key_dim": H,
    "value_dim": V,
    "dropout": 0.25,
    "use_bias": False,
    "output_shape": (2, 3),
    "attention_axes": (1,),
    "sliding_window": 2,
    "kernel_initializer": keras.initializers.HeNormal(seed=3),
    "bias_initializer": keras.initializers.Constant(0.3),
    "kernel_regularizer": keras.regularizers.L2(0.1),
    "bias_regularizer": keras.regularizers.L1(0.2),
    "activity_regularizer": keras.regularizers.L2(0.4),
    "kernel_constraint": keras.constraints.MaxNorm(2.0),
    "bias_constraint": keras.constraints.NonNeg(),
    "use_gate": True,
    "seed": 7,
    "name": "mixer",
    "trainable": False,
    "dtype": "mixed_bfloat16",
}


@pytest.mark.parametrize("build", [False, True])
def test_every_option_carries_over(build: bool) -> None:
    named = set(inspect.signature(Stock.__init__).parameters) - {"self", "kwargs"}
    assert named - set(EVERY_OPTION) == {"flash_attention"}
    layer = Stock(**EVERY_OPTION)
    if build:
        layer.build(*SHAPES[:2])
    converted = from_keras(layer)
    assert converted.built == build
    expected, found = layer.get_config(), converted.get_config()
    assert {name: found[name] for name in expected} == expected
    back = to_keras(converted)
    assert back.built == build
    assert back.get_config() == expected


def test_every_option_of_grouped_attention_carries_over() -> None:
    names = set(inspect.signature(Grouped.__init__).parameters)
    options = {name: EVERY_OPTION[name] for name in names & set(EVERY_OPTION)}
    options |= {"name": "mixer", "trainable": False, "dtype": "mixed_bfloat16"}
    layer = Grouped(H, 6, 2, **options)
    expected, found = layer.get_config(), from_keras(layer).get_config()
    renamed = {"head_dim": "key_dim", "num_query_heads": "num_heads"}
    assert {n: found[renamed.get(n, n)] for n in expected} == expected
    assert to_keras(from_keras(layer)).get_config() == expected


@pytest.mark.parametrize("flash", [None, False, True])
def test_flash_attention_carries_over(flash: bool | None) -> None:
    layer = Stock(N, H, flash_attention=flash)
    # Keras keeps no False, unless flash attention is disabled for all layers.
    expected = None if flash is False else flash
    assert from_keras(layer).get_config()["flash_attention"] is expected


def test_an_initializer_of_any_kind_carries_over() -> None:
    def ones(shape: Any, dtype: Any = None) -> Any:
        return keras.ops.ones(shape, dtype)

    class Sevens(keras.initializers.Initializer):
        def __call__(self, shape: Any, dtype: Any = None) -> Any:
            return 7 * ones(shape, dtype)

    converted = from_keras(Stock(N, H, kernel_initializer=Sevens()))
    converted.build(*SHAPES[:2])
    assert np.all(numbers(converted.query_dense.kernel) == 7)


def test_losses_are_those_of_keras() -> None:
    options = {
        name: keras.regularizers.L2(0.1)
        for name in ("kernel_regularizer", "bias_regularizer", "activity_regularizer")
    }
    layer = stock(**options)
    converted = from_keras(layer)
    totals = []
    for each in (layer, converted):
        each(*INPUTS)
        totals.append(sum(map(float, each.losses)))
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-5)
    assert totals[0] > 1


def test_keras_counts_the_activity_of_grouped_outputs_twice() -> None:
    layer = grouped(activity_regularizer=keras.regularizers.L2(0.1))
    converted = from_keras(layer)
    outputs = numbers(layer(*INPUTS))
    converted(*INPUTS)
    given, ours = (sum(map(float, each.losses)) for each in (layer, converted))
    again = 0.1 * np.square(outputs).sum() / B
    np.testing.assert_allclose(given, ours + again, rtol=1e-5)
    assert again > 0.1


# Weights.


def test_weights_are_copied_and_not_shared() -> None:
    layer = stock()
    before = layer.get_weights()
    converted = from_keras(layer)
    for weight in converted.weights:
        weight.assign(weight * 0 + 1)
    for weight, expected in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_names_and_paths_of_weights_stay() -> None:
    layer = stock(use_gate=True, name="mixer")
    for converted in (from_keras(layer), to_keras(from_keras(layer))):
        assert [x.path for x in converted.weights] == [x.path for x in layer.weights]


@pytest.mark.parametrize("policy", ["mixed_float16", "float64", "bfloat16"])
def test_dtypes_stay(policy: str) -> None:
    layer = stock(dtype=policy)
    converted = from_keras(layer)
    assert [x.dtype for x in converted.weights] == [x.dtype for x in layer.weights]
    for weight, expected in zip(converted.weights, layer.weights, strict=True):
        np.testing.assert_array_equal(numbers(weight), numbers(expected))
    tolerance = {"float64": 1e-6, "mixed_float16": 2e-2, "bfloat16": 2e-1}[policy]
    size = np.abs(answers(layer)[0]).max()
    np.testing.assert_allclose(
        answers(converted)[0], answers(layer)[0], atol=tolerance * size
    )


def test_parts_that_are_frozen_stay_frozen() -> None:
    layer = stock()
    layer.key_dense.trainable = False
    layer.output_dense.bias.trainable = False
    for converted in (from_keras(layer), to_keras(from_keras(layer))):
        assert [x.path for x in converted.trainable_variables] == [
            x.path for x in layer.trainable_variables
        ]
        assert len(converted.trainable_variables) == 5


def test_a_layer_made_frozen_stays_so() -> None:
    converted = from_keras(stock(trainable=False))
    assert not any(weight.trainable for weight in converted.weights)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_quantized_and_adapted_weights(quantized: bool, adapted: bool) -> None:
    layer = stock(value_dim=V)
    projections = [layer.query_dense, layer.value_dense, layer.output_dense]
    if quantized:
        for projection in projections[1:]:
            projection.quantize("int8")
    if adapted:
        for projection in projections[:2]:
            projection.enable_lora(3, lora_alpha=5)
            projection.lora_kernel_b.assign(
                normal(*projection.lora_kernel_b.shape, scale=0.3)
            )
    expected = answers(layer)
    for converted in (from_keras(layer), to_keras(from_keras(layer))):
        for found, wanted in zip(answers(converted), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert converted.value_dense.quantization_mode == (
            "int8" if quantized else None
        )
        assert converted.key_dense.quantization_mode is None
        assert {x.path for x in converted.trainable_variables} == {
            x.path for x in layer.trainable_variables
        }
        for name in ("_kernel", "bias", "kernel_scale", "lora_kernel_a"):
            if hasattr(layer.value_dense, name):
                np.testing.assert_array_equal(
                    getattr(converted.value_dense, name),
                    getattr(layer.value_dense, name),
                )


@pytest.mark.parametrize("mode", ["int4", "float8"])
def test_other_quantization(mode: str) -> None:
    layer = stock(name="mixer")
    layer.value_dense.quantize(mode)
    for converted in (from_keras(layer), to_keras(from_keras(layer))):
        assert converted.value_dense.quantization_mode == mode
        check_equal(converted, layer)


# Self-attention to Keras.


@pytest.mark.parametrize("mask", ["none", "causal", "pairs"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"value_dim": V, "use_gate": True},
        {"use_bias": False, "output_shape": (2, 3)},
        {"num_heads": 6, "num_key_value_heads": 2},
        {"num_heads": 6, "num_key_value_heads": 2, "use_gate": True, "dropout": 0.5},
    ],
)
def test_self_attention_to_keras(options: dict[str, Any], mask: str) -> None:
    layer = made(MultiHeadSelfAttention(**{"num_heads": N, "key_dim": H, **options}))
    width = layer.qkv_dense.kernel.shape[0]
    inputs = normal(B, T, width)
    call = {**MASKS[mask]}
    if mask == "pairs":
        call["attention_mask"] = pairs(B, T, T)
    stocked = to_keras(layer)
    assert isinstance(stocked, Grouped if "num_key_value_heads" in options else Stock)
    expected = answers(layer, inputs, **call)
    for found, wanted in zip(
        answers(stocked, inputs, inputs, **call), expected, strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_self_attention_keeps_what_is_trained() -> None:
    layer = made(MultiHeadSelfAttention(N, H))
    layer.qkv_dense.bias.trainable = False
    layer.output_dense.trainable = False
    trained = [x.path.split("/", 1)[1] for x in to_keras(layer).trainable_variables]
    assert trained == ["query/kernel", "key/kernel", "value/kernel"]


def test_self_attention_that_knows_no_head_size_is_refused() -> None:
    with pytest.raises(ValueError, match="`key_dim`.*not built"):
        to_keras(MultiHeadSelfAttention(N))
    assert to_keras(MultiHeadSelfAttention(N, H)).key_dim == H


@pytest.mark.parametrize("state", ["adapted", "quantized"])
def test_fused_weights_that_do_not_split_are_refused(state: str) -> None:
    layer = made(MultiHeadSelfAttention(N, H, name="mixer"))
    if state == "adapted":
        layer.enable_lora(2)
    else:
        layer.quantize("int8")
    with pytest.raises(ValueError, match="mixer/qkv"):
        to_keras(layer)


# What Keras' layer does not have.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"position": "rotary"}, "position='rotary'"),
        ({"position": "alibi"}, "position='alibi'"),
        ({"qk_norm": "rms"}, "qk_norm='rms'"),
        ({"logits_soft_cap": 3.0}, "logits_soft_cap=3.0"),
        ({"use_sinks": True}, "use_sinks=True"),
        ({"flash_attention": True}, "flash_attention=True"),
        ({"num_key_value_heads": 1, "value_dim": V}, f"value_dim={V}"),
        ({"num_key_value_heads": 1, "output_shape": 5}, r"output_shape=\(5,\)"),
        ({"num_key_value_heads": 1, "attention_axes": 2}, r"attention_axes=\(2,\)"),
    ],
)
@pytest.mark.parametrize("layer_class", [MultiHeadAttention, MultiHeadSelfAttention])
def test_what_keras_lacks_is_refused(
    layer_class: Any, options: dict[str, Any], match: str
) -> None:
    if "attention_axes" in options and layer_class is MultiHeadSelfAttention:
        return
    # ALiBi wants a power of two
    layer = layer_class(**{"num_heads": 2, "key_dim": 6, "name": "mixer", **options})
    with pytest.raises(ValueError, match=f"has no option.*'mixer' with {match}"):
        to_keras(layer)


@pytest.mark.parametrize("function", [from_keras, to_keras])
def test_other_layers_are_refused(function: Any) -> None:
    class Own(Stock):
        pass

    for other in (keras.layers.Dense(3), Own(N, H), "model"):
        with pytest.raises(TypeError, match=f"Received: .*{type(other).__name__}"):
            function(other)
    mine, theirs = MultiHeadAttention(N, H), Stock(N, H)
    with pytest.raises(TypeError, match="Expected"):
        function(mine if function is from_keras else theirs)


# Faults of Keras' layer that do not come along.


def test_queries_that_see_no_key_differ_on_purpose() -> None:
    layer = stock()
    converted = from_keras(layer)
    hidden = VISIBLE.copy()
    hidden[:, 2] = False
    given, ours = (
        numbers(each(*INPUTS, attention_mask=tf.constant(hidden)))
        for each in (layer, converted)
    )
    seen = np.arange(T) != 2
    np.testing.assert_allclose(ours[:, seen], given[:, seen], atol=1e-5)
    bias = numbers(layer.output_dense.bias)
    np.testing.assert_allclose(ours[:, 2], np.broadcast_to(bias, (B, DQ)))
    assert np.abs(given[:, 2] - bias).max() > 0.1
