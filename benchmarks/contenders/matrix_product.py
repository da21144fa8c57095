"""The yardstick: one square matrix product, from which the machine's rate follows."""

from __future__ import annotations

from benchmarks.contenders.step import Step, normal


def on_tensorflow(size: int) -> Step:
    """Times a float32 product `(size, size) @ (size, size)` by TensorFlow."""
    import tensorflow as tf

    left, right = (tf.constant(normal(size, size, seed=seed)) for seed in (0, 1))
    return Step(lambda: tf.matmul(left, right))


def on_jax(size: int) -> Step:
    """Times a bfloat16 product `(size, size) @ (size, size)` by JAX."""
    import jax
    import jax.numpy as jnp

    left, right = (
        jnp.asarray(normal(size, size, seed=seed), jnp.bfloat16) for seed in (0, 1)
    )
    product = jax.jit(jnp.matmul)
    return Step(lambda: product(left, right), jax.block_until_ready)
