"""JAX's attention: the function, and the same between projections."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.contenders import differentiated
from benchmarks.contenders.step import Step, heads, normal

Kernel = Literal["cudnn", "xla"]


def attention(
    shape: tuple[int, int, int, int],
    *,
    dtype: str,
    backward: bool,
    implementation: Kernel,
    is_causal: bool = False,
) -> Step:
    """Times `jax.nn.dot_product_attention` by `"cudnn"` or `"xla"`."""
    _check_device(implementation)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=is_causal, implementation=implementation
        )

    *inputs, upstream = heads(shape, 4)
    return differentiated.of_function(
        attend, inputs, upstream, dtype=dtype, backward=backward
    )


def layer(
    shape: tuple[int, int, int],
    num_heads: int,
    *,
    dtype: str,
    backward: bool,
    implementation: Kernel,
) -> Step:
    """Times the function between a layer's projections, written out."""
    _check_device(implementation)
    B, T, D = shape

    def attend(inputs: Any, kernel: Any, bias: Any, last: Any, shift: Any) -> Any:
        fused = jnp.reshape(inputs @ kernel + bias, (B, T, 3, num_heads, -1))
        query, key, value = jnp.moveaxis(fused, 2, 0)
        mixed = jax.nn.dot_product_attention(
            query, key, value, implementation=implementation
        )
        return jnp.reshape(mixed, (B, T, D)) @ last + shift

    scale = D**-0.5
    arrays = (
        normal(*shape),
        normal(D, 3 * D, seed=1) * scale,
        normal(3 * D, seed=2),
        normal(D, D, seed=3) * scale,
        normal(D, seed=4),
    )
    return differentiated.of_function(
        attend, arrays, normal(*shape, seed=5), dtype=dtype, backward=backward
    )


def _check_device(implementation: Kernel) -> None:
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise RuntimeError("cuDNN needs a GPU, and JAX sees none")
