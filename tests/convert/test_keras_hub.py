"""Attention of KerasHub, in its own blocks and models, and in stand-ins for it.

The tests with KerasHub run where it is installed: `make test-slow` installs it.

Letters: B batch, T length, S key length, N heads, H head size, D width.
"""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_mha
from keras_mha.convert import from_keras
from keras_mha.convert.keras_hub import CachedAttention, CachedStockAttention
from tests.support.attention_cases import numbers, pairs
from tests.support.layers import made, normal, randomize

B, T, S, N, H, D = 2, 5, 7, 3, 11, 13


class CachedMultiHeadAttention(layers.MultiHeadAttention):
    """A stand-in that is called as KerasHub's layer is."""

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        attention_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
        return_attention_scores: bool = False,
        training: Any = None,
    ) -> Any:
        keys = [
            self._key_dense(value if key is None else key),
            self._value_dense(value),
        ]
        if cache is not None:
            new, keys = keys, [cache[:, 0], cache[:, 1]]
            if cache_update_index is not None:
                start = [0, cache_update_index, 0, 0]
                keys = [
                    ops.slice_update(old, start, each)
                    for old, each in zip(keys, new, strict=True)
                ]
                cache = ops.stack(keys, axis=1)
        mixed, scores = self._compute_attention(
            self._query_dense(query),
            *keys,
            attention_mask=attention_mask,
            training=training,
            return_attention_scores=return_attention_scores,
        )
        outputs = [self._output_dense(mixed)]
        outputs += [scores] if return_attention_scores else []
        outputs += [] if cache is None else [cache]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


# As if it were KerasHub's.
CachedMultiHeadAttention.__module__ = "keras_hub.stand_in"


def calls() -> dict[str, dict[str, Any]]:
    cache = normal(B, 2, S, N, H, seed=5)
    return {
        "plain": {},
        "mask": {"attention_mask": pairs(B, T, T)},
        "scores": {"return_attention_scores": True},
        "update": {"cache": cache, "cache_update_index": 1},
        "static": {"cache": cache, "attention_mask": pairs(B, T, S)},
        "all": {
            "cache": cache,
            "cache_update_index": 2,
            "attention_mask": pairs(B, T, S).astype("int32"),
            "return_attention_scores": True,
        },
    }


@pytest.mark.parametrize("call", calls())
@pytest.mark.parametrize("masks", ["mend", "as_keras"])
def test_every_way_to_call_it(call: str, masks: Any) -> None:
    layer = made(CachedMultiHeadAttention(N, H), (B, T, D), (B, T, D))
    converted = from_keras(layer, masks=masks)
    kind = CachedAttention if masks == "mend" else CachedStockAttention
    assert type(converted) is kind
    inputs = normal(B, T, D), normal(B, T, D, seed=1)
    found, expected = (
        keras.tree.flatten(each(*inputs, **calls()[call]))
        for each in (converted, layer)
    )
    assert (
        len(found)
        == len(expected)
        == 1 + ("cache" in calls()[call]) + ("return_attention_scores" in calls()[call])
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_rows_that_see_no_key_as_in_keras_on_request() -> None:
    layer = made(CachedMultiHeadAttention(N, H), (B, T, D), (B, T, D))
    x = ops.convert_to_tensor(normal(B, T, D))
    mask = pairs(B, T, T)
    mask[:, 2] = False
    expected = numbers(layer(x, x, attention_mask=mask))
    kept = from_keras(layer, masks="as_keras")
    np.testing.assert_allclose(kept(x, x, attention_mask=mask), expected, atol=1e-5)
    mended = numbers(from_keras(layer)(x, x, attention_mask=mask))
    bias = numbers(layer.output_dense.bias)
    np.testing.assert_allclose(mended[:, 2], np.broadcast_to(bias, (B, D)))
    assert np.abs(expected[:, 2] - bias).max() > 0.05


def test_a_layer_that_is_not_built() -> None:
    converted = from_keras(CachedMultiHeadAttention(N, H, dropout=0.25))
    assert type(converted) is CachedAttention
    assert not converted.built
    assert converted.dropout == 0.25


def test_an_index_without_a_cache_is_refused() -> None:
    layer = made(CachedAttention(N, H), (B, T, D), (B, T, D))
    with pytest.raises(ValueError, match="`cache_update_index` needs a `cache`"):
        layer(normal(B, T, D), normal(B, T, D), cache_update_index=3)


def test_the_symbolic_outputs() -> None:
    x, cache = keras.Input((T, D)), keras.Input((2, S, N, H))
    layer = CachedAttention(N, H)
    outputs = layer(x, x, cache=cache, cache_update_index=0)
    assert [tuple(each.shape) for each in outputs] == [(None, T, D), (None, 2, S, N, H)]
    assert tuple(layer(x, x).shape) == (None, T, D)


def test_conversion_does_not_import_it() -> None:
    if "keras_hub" not in sys.modules:
        x = keras.Input((T, D))
        from_keras(keras.Model(x, layers.MultiHeadAttention(N, H)(x, x)))
        assert "keras_hub" not in sys.modules


# KerasHub itself.

WORDS, LENGTH = 41, 12
SIZES = {"num_layers": 2, "hidden_dim": 12, "intermediate_dim": 23}
PLAIN = {"vocabulary_size": WORDS, "num_heads": 3, **SIZES}
GROUPED = {
    "vocabulary_size": WORDS,
    "num_query_heads": 6,
    "num_key_value_heads": 2,
    **SIZES,
}
MOE = {"num_experts": 3, "top_k": 2, "moe_intermediate_dim": 5}
# Name of the backbone's class, and its arguments.
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertBackbone", PLAIN),
    "roberta": ("RobertaBackbone", PLAIN),
    "distilbert": ("DistilBertBackbone", PLAIN),
    "gpt2": ("GPT2Backbone", PLAIN),
    "bart": ("BartBackbone", PLAIN),
    "whisper": (
        "WhisperBackbone",
        PLAIN
        | {
            "num_mels": 5,
            "max_encoder_sequence_length": LENGTH,
            "max_decoder_sequence_length": LENGTH,
        },
    ),
    "opt": ("OPTBackbone", PLAIN),
    "llama": ("LlamaBackbone", GROUPED),
    "mistral": ("MistralBackbone", GROUPED | {"sliding_window": 3}),
    "qwen": ("QwenBackbone", GROUPED),
    # KerasHub's does not generate with a window.
    "qwen_windowed": (
        "QwenBackbone",
        GROUPED | {"use_sliding_window_attention": True, "sliding_window_size": 3},
    ),
    "qwen3": (
        "Qwen3Backbone",
        GROUPED | {"head_dim": 4, "sliding_window_size": 3},
    ),
    "qwen_moe": (
        "QwenMoeBackbone",
        GROUPED
        | MOE
        | {
            "shared_expert_intermediate_dim": 7,
            "use_sliding_window_attention": True,
            "sliding_window_size": 3,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeBackbone",
        GROUPED | MOE | {"head_dim": 4, "sliding_window_size": 3},
    ),
    "mixtral": (
        "MixtralBackbone",
        GROUPED | {"num_experts": 3, "sliding_window": 3},
    ),
    "phi3": ("Phi3Backbone", GROUPED),
    "gemma": (
        "GemmaBackbone",
        GROUPED
        | {
            "head_dim": 6,
            "final_logit_soft_cap": 5.0,
            "attention_logit_soft_cap": 2.0,
            "query_head_dim_normalize": False,
            "use_sliding_window_attention": True,
            "sliding_window_size": 3,
        },
    ),
    "vit": (
        "ViTBackbone",
        {
            "image_shape": (8, 8, 3),
            "patch_size": 4,
            "num_layers": 2,
            "num_heads": 3,
            "hidden_dim": 12,
            "mlp_dim": 23,
        },
    ),
}
TASKS = {
    "gpt2": "GPT2CausalLM",
    "opt": "OPTCausalLM",
    "bart": "BartSeq2SeqLM",
    "llama": "LlamaCausalLM",
    "mistral": "MistralCausalLM",
    "qwen": "QwenCausalLM",
    "qwen3": "Qwen3CausalLM",
    "mixtral": "MixtralCausalLM",
    "phi3": "Phi3CausalLM",
    "gemma": "GemmaCausalLM",
}


def hub() -> Any:
    return pytest.importorskip("keras_hub")


def backbone(name: str) -> Any:
    kind, options = BACKBONES[name]
    if kind not in {"WhisperBackbone", "ViTBackbone"} and options["vocabulary_size"]:
        accepted = {"max_sequence_length": LENGTH} if "num_heads" in options else {}
        options = options | accepted
    return randomize(getattr(hub().models, kind)(**options), scale=0.2)


def given_for(model: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    given = {}
    for tensor in model.inputs:
        length = 9 if tensor.shape[1] is None else tensor.shape[1]
        shape = (3, length, *tensor.shape[2:])
        if "padding_mask" in tensor.name:
            array = np.arange(length) < np.array([[length], [6], [4]])
        elif "float" in tensor.dtype:
            array = rng.normal(size=shape)
        else:
            high = 2 if "segment" in tensor.name else WORDS
            array = rng.integers(0, high, size=shape)
        given[tensor.name] = ops.convert_to_tensor(array.astype(tensor.dtype))
    return given if isinstance(model.input, dict) else next(iter(given.values()))


def check_no_attention_of_theirs(converted: Any, count: int) -> None:
    found = [type(x).__name__ for x in converted._flatten_layers()]
    assert not any(
        "Cached" in name and name.endswith("HeadAttention") for name in found
    )
    ours = [x for x in converted._flatten_layers() if is_ours(x)]
    assert len(ours) == count


def is_ours(layer: Any) -> bool:
    return isinstance(layer, keras_mha.MultiHeadAttention)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name: str) -> None:
    original = backbone(name)
    converted = from_keras(original)
    assert type(converted) is type(original)
    check_no_attention_of_theirs(converted, 6 if name in {"bart", "whisper"} else 2)
    given = given_for(original)
    found, expected = (
        keras.tree.flatten(each(given)) for each in (converted, original)
    )
    for one, other in zip(found, expected, strict=True):
        assert numbers(other).std() > 0.05
        np.testing.assert_allclose(one, other, atol=2e-5)
    for weight in converted.weights:
        weight.assign(weight * 0)
    for one, other in zip(keras.tree.flatten(original(given)), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_generated_tokens_are_the_same(name: str) -> None:
    task = getattr(hub().models, TASKS[name])
    original = task(backbone=backbone(name), preprocessor=None)
    original.compile(sampler="greedy")
    given = given_for(original.backbone, seed=3)
    expected = original.generate(given, stop_token_ids=None)
    converted = from_keras(original)
    converted.compile(sampler="greedy")
    check_no_attention_of_theirs(converted, 6 if name == "bart" else 2)
    tokens = "decoder_token_ids" if name == "bart" else "token_ids"
    found = converted.generate(given, stop_token_ids=None)[tokens]
    np.testing.assert_array_equal(found, expected[tokens])
    assert len(set(np.asarray(found)[2].tolist())) > 2
    # Its own weights make them, not those of the original.
    for weight in converted.weights:
        weight.assign(weight * 0)
    cleared = converted.generate(given, stop_token_ids=None)[tokens]
    assert not np.array_equal(cleared, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TransformerEncoder", "TransformerDecoder"])
def test_blocks_on_their_own(kind: str) -> None:
    block = getattr(hub().layers, kind)(23, N, normalize_first=True)
    x = normal(B, T, D - 1)
    mask = np.arange(T) < np.array([[T], [3]])
    inputs = {"encoder_sequence": normal(B, S, D - 1, seed=2)} if "De" in kind else {}
    padding = "decoder_padding_mask" if inputs else "padding_mask"
    call = {**inputs, padding: ops.convert_to_tensor(mask)}
    block(x, **call)
    randomize(block)
    converted = from_keras(block)
    check_no_attention_of_theirs(converted, 2 if inputs else 1)
    expected = numbers(block(x, **call))
    assert expected.std() > 0.05
    np.testing.assert_allclose(converted(x, **call), expected, atol=1e-5)


@pytest.mark.slow
def test_a_classifier() -> None:
    original = hub().models.BertTextClassifier(
        backbone=backbone("bert"), num_classes=3, preprocessor=None
    )
    randomize(original)
    converted = from_keras(original)
    check_no_attention_of_theirs(converted, 2)
    given = given_for(original.backbone)
    np.testing.assert_allclose(converted(given), original(given), atol=1e-5)
    assert converted.backbone is not original.backbone
    check_no_attention_of_theirs(converted.backbone, 2)
