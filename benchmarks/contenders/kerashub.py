"""KerasHub's transformer layers."""

from __future__ import annotations

from typing import Any, Literal

import keras_hub
import tensorflow as tf

from benchmarks.contenders import graph
from benchmarks.contenders.step import Step, normal


def encoder_block(
    shape: tuple[int, int, int],
    num_heads: int,
    hidden_dim: int,
    *,
    jit_compile: bool | Literal["auto"],
) -> Step:
    """Times a training step of `TransformerEncoder`."""
    block = keras_hub.layers.TransformerEncoder(
        hidden_dim, num_heads, normalize_first=True
    )
    return graph.of_training(block, shape, jit_compile=jit_compile)


def decoder_block(
    shape: tuple[int, int, int],
    num_heads: int,
    hidden_dim: int,
    *,
    compiled: bool,
    position: int | None,
) -> Step:
    """Times one more position by `TransformerDecoder`, with its cache or without one.

    Args:
        shape: `(B, T, D)`.
        num_heads: N.
        hidden_dim: Width of the hidden layer.
        compiled: Whether XLA compiles the step.
        position: How many positions the cache holds; `None` recomputes all T.
    """
    B, T, D = shape
    block = keras_hub.layers.TransformerDecoder(
        hidden_dim, num_heads, normalize_first=True
    )
    inputs = tf.constant(normal(*shape))
    block(inputs[:, :1])
    if position is None:
        every = tf.function(
            lambda inputs: block(inputs)[:, -1:],
            jit_compile=compiled,
            autograph=False,
        )
        return Step(lambda: every(inputs))

    @tf.function(jit_compile=compiled, autograph=False)
    def one(inputs: Any, cache: Any, index: Any) -> Any:
        return block(
            inputs,
            self_attention_cache=cache,
            self_attention_cache_update_index=index,
        )

    cache = tf.constant(normal(B, 2, T, num_heads, D // num_heads))
    newest, index = inputs[:, -1:], tf.constant(position)
    return Step(lambda: one(newest, cache, index))
