"""keras_mha, by its public names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import tensorflow as tf

import keras_mha
from benchmarks.contenders import graph
from benchmarks.contenders.step import Step, normal


def attention(
    shape: tuple[int, int, int, int],
    *,
    dtype: str = "float32",
    backward: bool,
    compiled: bool,
    is_causal: bool = False,
    sliding_window: int | None = None,
    implementation: Literal["auto", "blockwise"] = "auto",
) -> Step:
    """Times `keras_mha.dot_product_attention`."""

    def attend(query: Any, key: Any, value: Any) -> Any:
        return keras_mha.dot_product_attention(
            query,
            key,
            value,
            is_causal=is_causal,
            sliding_window=sliding_window,
            implementation=implementation,
        )

    return graph.of_heads(
        attend, shape, dtype=dtype, backward=backward, compiled=compiled
    )


def layer(
    shape: tuple[int, int, int],
    num_heads: int,
    *,
    backward: bool,
    compiled: bool,
    jit_compile: bool | Literal["auto"] = "auto",
) -> Step:
    """Times `MultiHeadSelfAttention`; `compiled` puts the whole step in XLA."""
    ours = keras_mha.MultiHeadSelfAttention(num_heads, jit_compile=jit_compile)
    return graph.of_layer(ours, shape, backward=backward, compiled=compiled)


def encoder_block(
    shape: tuple[int, int, int],
    num_heads: int,
    hidden_dim: int,
    *,
    jit_compile: bool | Literal["auto"],
) -> Step:
    """Times a training step of `keras_mha.TransformerEncoderBlock`."""
    block = keras_mha.TransformerEncoderBlock(num_heads, hidden_dim, activation="relu")
    return graph.of_training(block, shape, jit_compile=jit_compile)


def decoding_layer(
    shape: tuple[int, int, int],
    num_heads: int,
    *,
    compiled: bool,
    position: int | None,
) -> Step:
    """Times one more position by `MultiHeadSelfAttention`; see `_decoding`."""
    ours = keras_mha.MultiHeadSelfAttention(num_heads)
    return _decoding(
        ours,
        lambda inputs: ours(inputs, use_causal_mask=True),
        shape,
        compiled=compiled,
        position=position,
    )


def decoder_block(
    shape: tuple[int, int, int],
    num_heads: int,
    hidden_dim: int,
    *,
    compiled: bool,
    position: int | None,
) -> Step:
    """Times one more position by `TransformerDecoderBlock`; see `_decoding`."""
    block = keras_mha.TransformerDecoderBlock(num_heads, hidden_dim, activation="relu")
    return _decoding(block, block, shape, compiled=compiled, position=position)


def _decoding(
    layer: Any,
    recompute: Callable[[Any], Any],
    shape: tuple[int, int, int],
    *,
    compiled: bool,
    position: int | None,
) -> Step:
    """Times one more position, with a cache for T positions or without.

    Args:
        layer: Called with `cache=`.
        recompute: Gives the causal outputs of all T positions.
        shape: `(B, T, D)`.
        compiled: Whether XLA compiles the step.
        position: How many positions the cache holds; `None` recomputes all T.
    """
    B, T, _ = shape
    inputs = tf.constant(normal(*shape))
    layer(inputs[:, :1])
    if position is None:
        every = tf.function(
            lambda inputs: recompute(inputs)[:, -1:],
            jit_compile=compiled,
            autograph=False,
        )
        return Step(lambda: every(inputs))
    cache = layer.init_cache(B, T)
    if position:
        _, cache = layer(inputs[:, :position], cache=cache)
    one = tf.function(
        lambda inputs, cache: layer(inputs, cache=cache),
        jit_compile=compiled,
        autograph=False,
    )
    newest = inputs[:, position : position + 1]
    return Step(lambda: one(newest, cache))
