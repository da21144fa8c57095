"""NumPy's scalars as arguments of layers: taken as Python's, and kept as Python's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keras import ops

import keras_mha
from keras_mha import (
    FeedForward,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    ResidualNorm,
    TokenAndPositionEmbedding,
    TransformerDecoderBlock,
    TransformerEncoderBlock,
)
from keras_mha.layers.arguments import constructor_options
from keras_mha.layers.positions import ALiBi, RelativePositionBias, RotaryEmbedding

SCORES = {
    "num_key_value_heads": 2,
    "logits_soft_cap": 30.0,
    "use_sinks": True,
    "use_gate": False,
    "sliding_window": 3,
    "flash_attention": False,
    "jit_compile": False,
    "dropout": 0.25,
    "seed": 5,
}
BLOCK = {
    **SCORES,
    "num_heads": 4,
    "hidden_dim": 6,
    "key_dim": 2,
    "gated": True,
    "attention_dropout": 0.5,
    "hidden_dropout": 0.125,
    "stochastic_depth": 0.125,
    "layer_scale": 0.5,
    "rezero": False,
    "epsilon": 0.25,
    "use_bias": False,
}
LAYERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "self_attention": (
        MultiHeadSelfAttention,
        {**SCORES, "num_heads": 4, "key_dim": 2, "value_dim": 3, "use_bias": False},
    ),
    "attention": (
        MultiHeadAttention,
        {
            **SCORES,
            "num_heads": 4,
            "key_dim": 2,
            "value_dim": 3,
            "use_bias": False,
            "attention_axes": 1,
            "output_shape": 5,
        },
    ),
    "feed_forward": (
        FeedForward,
        {
            "hidden_dim": 4,
            "gated": True,
            "dropout": 0.5,
            "output_dim": 3,
            "use_bias": False,
            "seed": 5,
        },
    ),
    "residual": (
        lambda **options: ResidualNorm(FeedForward(3), **options),
        {
            "dropout": 0.5,
            "stochastic_depth": 0.25,
            "layer_scale": 0.5,
            "rezero": False,
            "epsilon": 0.25,
            "seed": 5,
        },
    ),
    "embedding": (
        TokenAndPositionEmbedding,
        {
            "vocabulary_size": 7,
            "sequence_length": 5,
            "embedding_dim": 3,
            "mask_zero": False,
        },
    ),
    "encoder": (TransformerEncoderBlock, BLOCK),
    "decoder": (TransformerDecoderBlock, {**BLOCK, "cross_attention": True}),
    "rotary": (
        RotaryEmbedding,
        {
            "base": 128.0,
            "fraction": 0.5,
            "interleaved": True,
            "scaling_factor": 8.0,
            "original_max_length": 64,
            "low_frequency_factor": 1.0,
            "high_frequency_factor": 4.0,
        },
    ),
    "alibi": (ALiBi, {"num_heads": 3}),
    "relative": (
        RelativePositionBias,
        {"num_heads": 3, "num_buckets": 8, "max_distance": 9, "bidirectional": True},
    ),
}
KINDS = {bool: np.bool_, int: np.int64, float: np.float32}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def make(layer: str, **changed: Any) -> Any:
    function, options = LAYERS[layer]
    if layer == "rotary":
        changed = {"scaling": "llama3", **changed}
    return function(**{**options, **changed})


@each_layer
def test_numpys_scalars_become_pythons_in_configs(layer: str) -> None:
    options = LAYERS[layer][1]
    scalars = {name: KINDS[type(value)](value) for name, value in options.items()}
    config = make(layer, **scalars).get_config()
    for name, value in options.items():
        found = config[name]
        if isinstance(found, tuple):  # axes and shapes may be given as one number
            (found,) = found
        assert type(found) is type(value), name
        assert found == value, name
    json.dumps(config)


@each_layer
def test_booleans_are_no_numbers(layer: str) -> None:
    for name, value in LAYERS[layer][1].items():
        if not isinstance(value, bool):
            for wrong in (True, np.True_):
                with pytest.raises(ValueError, match=f"`{name}`"):
                    make(layer, **{name: wrong})


@each_layer
def test_flags_are_true_or_false(layer: str) -> None:
    for name, value in LAYERS[layer][1].items():
        if isinstance(value, bool):
            for wrong in ("no", 1, 0.0, None):
                if wrong is None and name == "flash_attention":
                    continue
                text, kind = f"`{name}` must be True", ValueError
                if name == "cross_attention" and wrong is not None:
                    text, kind = f"`{name}` must be a dictionary", TypeError
                with pytest.raises(kind, match=text):
                    make(layer, **{name: wrong})


def test_a_layer_of_numpys_scalars_computes() -> None:
    options = {"num_heads": 2, "sliding_window": 2, "logits_soft_cap": 1.5}
    scalars = {"num_heads": np.int64(2), "sliding_window": np.uint8(2)}
    scalars["logits_soft_cap"] = np.float32(1.5)
    inputs = np.random.default_rng(1).normal(size=(2, 5, 6)).astype("float32")
    one, other = (MultiHeadSelfAttention(**each) for each in (options, scalars))
    expected = ops.convert_to_numpy(one(inputs))
    other.build(inputs.shape)
    other.set_weights(one.get_weights())
    np.testing.assert_array_equal(ops.convert_to_numpy(other(inputs)), expected)
    cache = other.init_cache(np.int64(2), np.int32(5))
    assert cache["key"].shape == (2, 1, 2, 3)


def test_low_rank_factors_take_numpys_scalars() -> None:
    layer = keras_mha.MultiHeadSelfAttention(2)
    layer.build((None, None, 6))
    layer.enable_lora(np.int64(2), lora_alpha=np.float32(3))
    assert layer.qkv_dense.lora_query_a.shape == (6, 2)


def test_arguments_that_went_by_position_still_do() -> None:
    """`MultiHeadSelfAttention` took fifteen by position in 0.1.0."""
    with pytest.warns(DeprecationWarning, match="`kernel_initializer`, `bias_init"):
        layer = MultiHeadSelfAttention(4, 2, 3, 0.0, False, (5,), "he_normal", "ones")
    config = layer.get_config()
    assert config["kernel_initializer"]["class_name"] == "HeNormal"
    assert config["bias_initializer"]["class_name"] == "Ones"
    assert (config["output_shape"], config["kernel_regularizer"]) == ((5,), None)
    rest = ("he_normal", "ones", "l1", "l2", "l2", "non_neg", "unit_norm", False, 7)
    with pytest.warns(DeprecationWarning, match="`jit_compile`, `seed` by keyword"):
        config = MultiHeadSelfAttention(4, 2, 3, 0.0, False, (5,), *rest).get_config()
    assert config["bias_constraint"]["class_name"] == "UnitNorm"
    assert (config["jit_compile"], config["seed"]) == (False, 7)
    with (
        pytest.warns(DeprecationWarning, match="by keyword"),
        pytest.raises(TypeError, match="positional arguments"),
    ):
        MultiHeadSelfAttention(4, 2, 3, 0.0, False, (5,), *rest, None)
    with (
        pytest.warns(DeprecationWarning, match="by keyword"),
        pytest.raises(TypeError, match="multiple values .*kernel_initializer"),
    ):
        MultiHeadSelfAttention(
            4, 2, 3, 0.0, False, (5,), "zeros", kernel_initializer="ones"
        )


def test_the_attention_layers_share_their_arguments_and_their_order() -> None:
    ours = constructor_options(MultiHeadSelfAttention)
    theirs = constructor_options(MultiHeadAttention)
    assert set(theirs) - set(ours) == {"attention_axes"}
    assert tuple(name for name in theirs if name != "attention_axes") == ours


def test_options_of_a_subclass_are_those_of_its_bases() -> None:
    class Closed(MultiHeadSelfAttention):
        def __init__(self, num_heads: int, temperature: float = 1.0) -> None:
            super().__init__(num_heads)
            self.temperature = temperature

    class Open(MultiHeadSelfAttention):
        def __init__(self, temperature: float, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.temperature = temperature

    class Same(Open):
        pass

    every = constructor_options(MultiHeadSelfAttention)
    assert constructor_options(Closed) == ("num_heads", "temperature")
    assert constructor_options(Open) == ("temperature", *every)
    assert constructor_options(Same) == ("temperature", *every)
    assert {"num_heads", "position", "jit_compile"} < set(every)
    assert not {"self", "options", "kwargs", "name", "dtype"} & set(every)
