"""Keras' attention: the operation and the layer."""

from __future__ import annotations

from typing import Any

import keras
from typing_extensions import override

from benchmarks.contenders import graph
from benchmarks.contenders.step import Step


class StockSelfAttention(keras.layers.Layer):
    """Times `keras.layers.MultiHeadAttention` called with one input."""

    def __init__(self, num_heads: int, key_dim: int) -> None:
        super().__init__()
        self.attention = keras.layers.MultiHeadAttention(num_heads, key_dim)

    @override
    def call(self, inputs: Any) -> Any:
        return self.attention(inputs, inputs)


def attention(
    shape: tuple[int, int, int, int],
    *,
    dtype: str = "float32",
    backward: bool,
    compiled: bool,
    is_causal: bool = False,
) -> Step:
    """Times `keras.ops.dot_product_attention`, which the layer calls."""

    def attend(query: Any, key: Any, value: Any) -> Any:
        return keras.ops.dot_product_attention(query, key, value, is_causal=is_causal)

    return graph.of_heads(
        attend, shape, dtype=dtype, backward=backward, compiled=compiled
    )


def layer(
    shape: tuple[int, int, int], num_heads: int, *, backward: bool, compiled: bool
) -> Step:
    """Times `keras.layers.MultiHeadAttention` of a sequence to itself."""
    stock = StockSelfAttention(num_heads, shape[-1] // num_heads)
    return graph.of_layer(stock, shape, backward=backward, compiled=compiled)
