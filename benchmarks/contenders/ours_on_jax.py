"""keras_mha on Keras' JAX backend, by its public names."""

from __future__ import annotations

from typing import Any

import keras_mha
from benchmarks.contenders import differentiated
from benchmarks.contenders.step import Step, heads, normal


def attention(
    shape: tuple[int, int, int, int],
    *,
    dtype: str,
    backward: bool,
    is_causal: bool = False,
) -> Step:
    """Times `dot_product_attention`, with the implementation it chooses."""

    def attend(query: Any, key: Any, value: Any) -> Any:
        return keras_mha.dot_product_attention(query, key, value, is_causal=is_causal)

    *inputs, upstream = heads(shape, 4)
    return differentiated.of_function(
        attend, inputs, upstream, dtype=dtype, backward=backward
    )


def layer(
    shape: tuple[int, int, int], num_heads: int, *, dtype: str, backward: bool
) -> Step:
    """Times `keras_mha.MultiHeadSelfAttention`."""
    ours = keras_mha.MultiHeadSelfAttention(num_heads, dtype=dtype)
    ours.build(shape)
    fixed = [variable.value for variable in ours.non_trainable_variables]

    def attend(inputs: Any, *weights: Any) -> Any:
        return ours.stateless_call(list(weights), fixed, inputs)[0]

    weights = [variable.numpy() for variable in ours.trainable_variables]
    return differentiated.of_function(
        attend,
        (normal(*shape), *weights),
        normal(*shape, seed=5),
        dtype=dtype,
        backward=backward,
    )
