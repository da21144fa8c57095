"""The XLA boundary: compiles one pure function, wherever it is called from.

Only tensors and static Python values pass. Keras layers, variables, seed generators
and losses stay outside: TensorFlow reuses a trace, even one from Keras' symbolic
pass, and would freeze whatever that trace read from them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeAlias

import keras
import numpy as np

from keras_mha.typing import Tensor

JitCompile: TypeAlias = bool | Literal["auto"]


def check_jit_compile(jit_compile: JitCompile) -> JitCompile:
    """Returns `jit_compile` if it is True, False or "auto".

    Raises:
        ValueError: If it is anything else, or True on a backend other than
            TensorFlow.
    """
    if isinstance(jit_compile, np.bool_):
        jit_compile = bool(jit_compile)
    if not isinstance(jit_compile, bool) and jit_compile != "auto":
        raise ValueError(
            "`jit_compile` must be True, False or 'auto'. "
            f"Received: jit_compile={jit_compile!r}"
        )
    if jit_compile is True and keras.config.backend() != "tensorflow":
        raise ValueError(
            "`jit_compile=True` compiles with XLA on the TensorFlow backend only; "
            "use 'auto' or False elsewhere. Received: jit_compile=True with the "
            f"{keras.config.backend()} backend"
        )
    return jit_compile


def call(
    function: Callable[..., Any],
    *tensors: Tensor,
    layout: Hashable = None,
    **options: Hashable,
) -> Any:
    """Calls a pure `function` through XLA.

    With op determinism on it is called as it is: not every XLA operation supports that.

    Args:
        function: A module-level function without side effects.
        *tensors: Its positional arguments: tensors, `None`, or named tuples of
            these and of static values.
        layout: Distinguishes callers whose tensors always differ, for instance in
            head sizes. Each gets its own compiled function; TensorFlow would count
            their traces as retracing of one function, and warn.
        **options: Static keyword arguments of `function`.
    """
    if _is_deterministic():
        return function(*tensors, **options)
    return compiled(function, layout, **options)(*tensors)


@functools.cache
def compiled(
    function: Callable[..., Any], layout: Hashable = None, **options: Hashable
) -> Any:
    """Returns `function` with `options` as a `tf.function` compiled by XLA."""
    del layout  # part of the cache's key
    import tensorflow as tf

    return tf.function(
        functools.partial(function, **options),
        jit_compile=True,
        autograph=False,
        reduce_retracing=True,
    )


def _is_deterministic() -> bool:
    """Whether op determinism is on."""
    from tensorflow.python.framework.config import is_op_determinism_enabled

    return is_op_determinism_enabled()
