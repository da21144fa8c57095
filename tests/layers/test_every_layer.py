"""What every public layer owes Keras: see `tests.support.check_layer`."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import keras_mha
from keras_mha import (
    ALiBi,
    FeedForward,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    RelativePositionBias,
    ResidualNorm,
    RMSNormalization,
    RotaryEmbedding,
    TokenAndPositionEmbedding,
    TransformerDecoderBlock,
    TransformerEncoderBlock,
)
from tests.support.check_layer import LayerCase, check_layer, parts_of
from tests.support.layers import PADDING, B, D, H, N, T, V, normal, plain_config

VOCABULARY, LONGEST, HIDDEN = 19, 11, 17
IDS = np.where(PADDING, np.random.default_rng(1).integers(1, VOCABULARY, (B, T)), 0)
DISTANCES = (IDS - VOCABULARY // 2).astype("int32")
VECTORS, OTHERS = normal(B, T, D), normal(B, T, D, seed=1)

# Every constructor argument but those without a default, at another value than it.
DENSE = {
    "kernel_initializer": "he_normal",
    "bias_initializer": "ones",
    "kernel_regularizer": "l2",
    "bias_regularizer": "l1",
}
CONSTRAINTS = {"kernel_constraint": "non_neg", "bias_constraint": "max_norm"}
ATTENTION = {
    **DENSE,
    "value_dim": V,
    "dropout": 0.3,
    "use_bias": False,
    "output_shape": (3, 5),
    "activity_regularizer": "l1",
    **CONSTRAINTS,
    "jit_compile": True,
    "seed": 7,
}
SCORES = {
    "num_key_value_heads": 1,
    "position": "alibi",
    "qk_norm": "layer",
    "qk_norm_epsilon": 0.25,
    "logits_soft_cap": 2.0,
    "use_sinks": True,
    "use_gate": True,
    "sliding_window": 3,
    "flash_attention": False,
}
RESIDUAL = {
    "placement": "sandwich",
    "normalization": "rms",
    "dropout": 0.3,
    "stochastic_depth": 0.2,
    "layer_scale": 0.5,
    "epsilon": 0.01,
    "seed": 7,
}
BLOCK = {
    **RESIDUAL,
    **SCORES,
    "activation": "silu",
    "gated": True,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.2,
    "use_bias": False,
    **DENSE,
    **CONSTRAINTS,
    "value_dim": V,
    "jit_compile": False,
    "attention": {"use_bias": True},
    "feed_forward": {"seed": 3},  # what parts share goes to the block
}
# Arguments that exclude each other are in separate cases of one class.
CASES = [
    LayerCase(
        MultiHeadSelfAttention,
        {"num_heads": N, "key_dim": H},
        {**ATTENTION, **SCORES},
        [VECTORS],
        mixes=True,
    ),
    LayerCase(
        MultiHeadSelfAttention,
        {"num_heads": N, "key_dim": H},
        {"position": RelativePositionBias(N, 8), "qk_norm": "rms"},
        [VECTORS],
        mixes=True,
        has_policy=False,
    ),
    LayerCase(
        MultiHeadAttention,
        {"num_heads": N, "key_dim": H},
        {**ATTENTION, **SCORES, "attention_axes": (1,)},
        [VECTORS, OTHERS],
    ),
    LayerCase(
        MultiHeadAttention,
        {"num_heads": N, "key_dim": H},
        {"position": RotaryEmbedding(fraction=0.8)},
        [VECTORS, OTHERS],
        has_policy=False,
    ),
    LayerCase(
        FeedForward,
        {"hidden_dim": HIDDEN},
        {
            **DENSE,
            **CONSTRAINTS,
            "activation": "silu",
            "gated": True,
            "dropout": 0.3,
            "output_dim": 5,
            "use_bias": False,
            "seed": 7,
        },
        [VECTORS],
    ),
    LayerCase(RMSNormalization, {}, {"axis": (-1,), "epsilon": 0.01}, [VECTORS]),
    LayerCase(
        ResidualNorm,
        {"sublayer": keras.layers.Dense(D)},
        RESIDUAL,
        [VECTORS],
        has_policy=False,
    ),
    LayerCase(
        ResidualNorm,
        {"sublayer": MultiHeadSelfAttention(N, H, dropout=0.2, seed=3)},
        {"normalization": keras.layers.LayerNormalization(axis=[-1]), "rezero": True},
        [VECTORS],
        mixes=True,
        has_policy=False,
    ),
    LayerCase(
        TransformerEncoderBlock,
        {"num_heads": N, "hidden_dim": HIDDEN, "key_dim": H},
        BLOCK,
        [VECTORS],
        mixes=True,
    ),
    LayerCase(
        TransformerEncoderBlock,
        {"num_heads": N, "hidden_dim": HIDDEN, "key_dim": H},
        {"normalization": keras.layers.LayerNormalization(axis=[-1]), "rezero": True},
        [VECTORS],
        mixes=True,
        has_policy=False,
    ),
    LayerCase(
        TransformerDecoderBlock,
        {"num_heads": N, "hidden_dim": HIDDEN, "key_dim": H},
        BLOCK,
        [VECTORS],
    ),
    LayerCase(
        TransformerDecoderBlock,
        {
            "num_heads": N,
            "hidden_dim": HIDDEN,
            "key_dim": H,
            "cross_attention": True,
        },
        {
            "position": RelativePositionBias(N, 8),
            "normalization": keras.layers.LayerNormalization(axis=[-1]),
            "rezero": True,
        },
        [VECTORS, OTHERS],
        has_policy=False,
    ),
    LayerCase(
        RotaryEmbedding,
        {},
        {
            "base": 500.0,
            "fraction": 0.5,
            "interleaved": True,
            "scaling": "llama3",
            "scaling_factor": 2.0,
            "original_max_length": 64,
            "low_frequency_factor": 1.0,
            "high_frequency_factor": 4.0,
        },
        [normal(B, T, N, 12)],
    ),
    LayerCase(
        RotaryEmbedding,
        {},
        {"scaling": "ntk", "scaling_factor": 3.0},
        [normal(B, T, N, 12)],
    ),
    LayerCase(ALiBi, {"num_heads": N}, {}, [DISTANCES], carries_mask=False),
    LayerCase(
        RelativePositionBias,
        {"num_heads": N},
        {
            "num_buckets": 6,
            "max_distance": 5,
            "bidirectional": False,
            "embeddings_initializer": "he_normal",
            "embeddings_regularizer": "l2",
            "embeddings_constraint": "non_neg",
        },
        [DISTANCES],
        carries_mask=False,
    ),
    LayerCase(
        TokenAndPositionEmbedding,
        {
            "vocabulary_size": VOCABULARY,
            "sequence_length": LONGEST,
            "embedding_dim": D,
        },
        {"mask_zero": False, "embeddings_initializer": "he_normal"},
        [IDS.astype("int32")],
        carries_mask=False,
    ),
]
PUBLIC = {
    each
    for each in vars(keras_mha).values()
    if isinstance(each, type) and issubclass(each, keras.layers.Layer)
    if each is not keras_mha.DistanceBias  # a base without a call
}


def test_every_public_layer_and_argument_has_a_case() -> None:
    assert {case.layer_class for case in CASES} == PUBLIC
    for layer_class in PUBLIC:
        cases = [case for case in CASES if case.layer_class is layer_class]
        covered = {name for case in cases for name in case.required | case.options}
        assert covered == set(cases[0].arguments)


@pytest.mark.parametrize(
    ("case", "part"),
    [(case, part) for case in CASES for part in parts_of(case)],
    ids=[
        f"{case}-{place}-{part}"
        for place, case in enumerate(CASES)
        for part in parts_of(case)
    ],
)
def test_the_contract_of_a_layer(case: LayerCase, part: str) -> None:
    check_layer(case, part)


@pytest.mark.parametrize(
    "layer_class",
    [MultiHeadSelfAttention, TransformerEncoderBlock, TransformerDecoderBlock],
)
def test_a_free_head_size_stays_free(layer_class: type) -> None:
    sizes = {"num_heads": N, "hidden_dim": HIDDEN}
    if layer_class is MultiHeadSelfAttention:
        del sizes["hidden_dim"]
    layer = layer_class(**sizes, key_dim=None)
    config = plain_config(layer)
    layer.build((B, T, N * H))
    assert plain_config(layer) == config
    assert config["key_dim"] is None
