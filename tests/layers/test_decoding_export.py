"""Prefill and step as signatures of a SavedModel, loaded without our classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mha import (
    MultiHeadSelfAttention,
    TransformerDecoderBlock,
    flatten_cache,
    unflatten_cache,
)
from tests.support.layers import normal, randomize

B, T, S, D, DM, N, PROMPT = 3, 7, 5, 8, 11, 2, 4
INPUTS, MEMORY = normal(B, T, D, seed=1), normal(B, S, DM, seed=2)
MEMORY_MASK = np.arange(S) < np.array([[3], [S], [4]])
# What comes later, and other rows, must not be in the graph.
SOME = tf.TensorSpec((None, None, D))
ONE = tf.TensorSpec((None, 1, D), name="x")
OPTIONS: dict[str, dict[str, Any]] = {
    "rotary": {"position": "rotary", "num_key_value_heads": 1},
    "relative": {"position": "relative", "flash_attention": True},
    "window": {"position": "alibi", "sliding_window": 3},
    "compiled": {"jit_compile": True},
}


def specs_of(cache: Any) -> dict[str, tf.TensorSpec]:
    """Specs of a flat cache, of any number of rows and, in a memory, of keys."""
    return {
        name: tf.TensorSpec(
            [
                None if axis == 0 or (axis == 1 and "memory" in name) else size
                for axis, size in enumerate(tensor.shape)
            ],
            tensor.dtype,
            name=name,
        )
        for name, tensor in flatten_cache(cache).items()
    }


def decode(loaded: Any, *memory: Any) -> np.ndarray:
    """Outputs of all positions: a prompt, then one by one."""
    names = ("memory", "memory_mask")
    given = {name: tf.constant(x) for name, x in zip(names, memory, strict=False)}
    state = loaded.signatures["prefill"](x=tf.constant(INPUTS[:, :PROMPT]), **given)
    outputs = [state.pop("y")]
    for place in range(PROMPT, T):
        token = tf.constant(INPUTS[:, place : place + 1])
        state = loaded.signatures["step"](x=token, **state)
        outputs.append(state.pop("y"))
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_decodes_from_a_saved_model(options: str, tmp_path: Path) -> None:
    layer = MultiHeadSelfAttention(N, **OPTIONS[options])
    layer.build((None, None, D))
    randomize(layer)
    module = tf.Module()
    module.layer = layer

    @tf.function(input_signature=[tf.TensorSpec(SOME.shape, name="x")])
    def prefill(x: Any) -> Any:
        y, cache = layer(x, cache=layer.init_cache(tf.shape(x)[0], T))
        return {"y": y, **cache}

    @tf.function
    def step(x: Any, cache: Any) -> Any:
        y, cache = layer(x, cache=cache)
        return {"y": y, **cache}

    cache = specs_of(layer.init_cache(B, T))
    signatures = {
        "prefill": prefill.get_concrete_function(),
        "step": step.get_concrete_function(ONE, cache),
    }
    # What comes out of either goes into `step`: the same shapes, and known.
    for signature in signatures.values():
        for name, spec in cache.items():
            found = signature.structured_outputs[name].shape
            assert found.as_list() == spec.shape.as_list()
    tf.saved_model.save(module, str(tmp_path), signatures)
    expected = layer(INPUTS, use_causal_mask=True)
    found = decode(tf.saved_model.load(str(tmp_path)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - layer(INPUTS)).max() > 0.01


def test_a_stack_of_blocks_decodes_from_an_export_archive(tmp_path: Path) -> None:
    blocks = [
        TransformerDecoderBlock(N, 16, cross_attention=True, **OPTIONS[options])
        for options in ("rotary", "window")
    ]
    for block in blocks:
        block.build((None, None, D), (None, None, DM))
        randomize(block)

    def prefill(x: Any, memory: Any, memory_mask: Any) -> Any:
        caches = {
            f"block_{i}": block.init_cache(tf.shape(x)[0], T, memory, memory_mask)
            for i, block in enumerate(blocks)
        }
        return step(x, flatten_cache(caches))

    def step(x: Any, cache: Any) -> Any:
        caches = unflatten_cache(cache)
        for i, block in enumerate(blocks):
            x, caches[f"block_{i}"] = block(x, cache=caches[f"block_{i}"])
        return {"y": x, **flatten_cache(caches)}

    cache = {
        f"block_{i}": block.init_cache(B, T, MEMORY, MEMORY_MASK)
        for i, block in enumerate(blocks)
    }
    archive = keras.export.ExportArchive()
    for block in blocks:
        archive.track(block)
    memory = [tf.TensorSpec((None, None, DM)), tf.TensorSpec((None, None), "bool")]
    archive.add_endpoint("prefill", prefill, [SOME, *memory])
    archive.add_endpoint("step", step, [ONE, specs_of(cache)])
    archive.write_out(tmp_path, verbose=False)
    expected = INPUTS
    for block in blocks:
        expected = block(expected, MEMORY, memory_mask=MEMORY_MASK)
    found = decode(tf.saved_model.load(str(tmp_path)), MEMORY, MEMORY_MASK)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_a_prompt_of_unknown_length_leaves_shapes_known(window: int | None) -> None:
    layer = MultiHeadSelfAttention(N, sliding_window=window)
    layer.build((None, None, D))

    @tf.function(input_signature=[tf.TensorSpec((B, None, D))], autograph=False)
    def generate(prompt: Any) -> Any:
        y, cache = layer(prompt, cache=layer.init_cache(B, T))
        # A loop refuses a state whose shape changes.
        found = tf.while_loop(
            lambda i, *_: i < T - PROMPT,
            lambda i, y, cache: (i + 1, *layer(y, cache=cache)),
            (0, y[:, -1:], cache),
        )
        return found[1]

    found = generate(INPUTS[:, :PROMPT])
    y, cache = layer(INPUTS[:, :PROMPT], cache=layer.init_cache(B, T))
    y = y[:, -1:]
    for _ in range(T - PROMPT):
        y, cache = layer(y, cache=cache)
    np.testing.assert_allclose(found, y, atol=1e-5)


def test_flat_caches_are_those_they_were() -> None:
    cache = {"a": {"self": {"key": 1, "mask": 2}, "memory": {"key": 3}}, "length": 4}
    flat: Any = flatten_cache(cache)
    assert flat == {
        "a__self__key": 1,
        "a__self__mask": 2,
        "a__memory__key": 3,
        "length": 4,
    }
    assert unflatten_cache(flat) == cache
    for name in ("a__b", 3):
        names: Any = {name: {"key": 1}}
        with pytest.raises(ValueError, match=f"without '__'. Received: {name!r}"):
            flatten_cache(names)
