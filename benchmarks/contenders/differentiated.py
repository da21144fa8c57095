"""Steps from JAX functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders.step import Step


def of_function(
    function: Callable[..., Any],
    arrays: Sequence[np.ndarray],
    upstream: np.ndarray,
    *,
    dtype: str,
    backward: bool,
) -> Step:
    """Times a compiled `function(*arrays)`, or its gradients for an upstream one."""
    *inputs, above = (jnp.asarray(array, dtype) for array in (*arrays, upstream))
    if not backward:
        forward = jax.jit(function)
        return Step(lambda: forward(*inputs), jax.block_until_ready)

    @jax.jit
    def gradients(above: Any, *inputs: Any) -> Any:
        outputs, pull_back = jax.vjp(function, *inputs)
        return outputs, pull_back(above)

    return Step(lambda: gradients(above, *inputs), jax.block_until_ready)
